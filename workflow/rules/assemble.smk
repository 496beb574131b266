rule assemble:
    input:
        model=store("model"),
        analysis=store("analysis"),
        reconstruction=store("reconstruction"),
    output:
        store("volumes"),
    log:
        R / "logs" / "assemble.log",
    benchmark:
        R / "benchmarks" / "assemble.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: THREADS
    resources:
        mem_mb=resource("assemble", "mem_mb"),
        runtime=resource("assemble", "runtime"),
        gpu=resource("assemble", "gpu"),
        nodes=resource("assemble", "nodes"),
        tasks=resource("assemble", "tasks"),
    params:
        settings=depends("assemble"),
        config=config_file,
        launch=mpi,
    message:
        "assemble: volumes of states and trajectories"
    shell:
        "({params.launch} cryospire assemble --config {params.config:q} "
        '--model "$(dirname {input.model:q})" --analysis "$(dirname {input.analysis:q})" '
        '--reconstruction "$(dirname {input.reconstruction:q})" --output "$(dirname {output:q})" '
        "2>&1) | tee -a {log:q}"
