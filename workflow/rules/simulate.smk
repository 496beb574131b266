rule simulate:
    input:
        model=[CONFIG.simulate.model] if CONFIG.simulate.model else [],
    output:
        star=SIMULATED / "particles.star",
        stack=SIMULATED / "particles.mrcs",
        labels=TRUTH / "labels.npy",
    log:
        R / "logs" / "simulate.log",
    benchmark:
        R / "benchmarks" / "simulate.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: THREADS
    resources:
        mem_mb=resource("simulate", "mem_mb"),
        runtime=resource("simulate", "runtime"),
        gpu=resource("simulate", "gpu"),
        nodes=resource("simulate", "nodes"),
        tasks=resource("simulate", "tasks"),
    params:
        settings=depends("simulate"),
        config=config_file,
        launch=alone,
    message:
        "simulate: particles with a known truth"
    shell:
        "({params.launch} cryospire simulate --config {params.config:q} "
        '--output "$(dirname {output.star:q})" '
        "2>&1) | tee -a {log:q}"
