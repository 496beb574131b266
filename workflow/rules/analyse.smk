rule analyse:
    input:
        model=store("model"),
    output:
        store("analysis"),
    log:
        R / "logs" / "analyse.log",
    benchmark:
        R / "benchmarks" / "analyse.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: THREADS
    resources:
        mem_mb=resource("analyse", "mem_mb"),
        runtime=resource("analyse", "runtime"),
        gpu=resource("analyse", "gpu"),
        nodes=resource("analyse", "nodes"),
        tasks=resource("analyse", "tasks"),
    params:
        settings=depends("analyse"),
        config=config_file,
        launch=alone,
    message:
        "analyse: axes, states, density, trajectories"
    shell:
        "({params.launch} cryospire analyse --config {params.config:q} "
        '--model "$(dirname {input.model:q})" --output "$(dirname {output:q})" '
        "2>&1) | tee -a {log:q}"
