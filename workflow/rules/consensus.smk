rule consensus:
    input:
        particles=store("particles"),
        given=source_files("map", "mask"),
    output:
        store("consensus"),
    log:
        R / "logs" / "consensus.log",
    benchmark:
        R / "benchmarks" / "consensus.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: THREADS
    resources:
        mem_mb=resource("consensus", "mem_mb"),
        runtime=resource("consensus", "runtime"),
        gpu=resource("consensus", "gpu"),
        nodes=resource("consensus", "nodes"),
        tasks=resource("consensus", "tasks"),
    params:
        settings=depends("consensus"),
        config=config_file,
        launch=alone,
    message:
        "consensus: rigid reconstruction, half-maps, FSC, mask"
    shell:
        "({params.launch} cryospire consensus --config {params.config:q} "
        '--particles "$(dirname {input.particles:q})" --output "$(dirname {output:q})" '
        "2>&1) | tee -a {log:q}"
