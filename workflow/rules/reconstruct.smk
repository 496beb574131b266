rule reconstruct:
    input:
        particles=store("particles"),
        model=store("model"),
    output:
        store("reconstruction"),
    log:
        R / "logs" / "reconstruct.log",
    benchmark:
        R / "benchmarks" / "reconstruct.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: THREADS
    resources:
        mem_mb=resource("reconstruct", "mem_mb"),
        runtime=resource("reconstruct", "runtime"),
        gpu=resource("reconstruct", "gpu"),
        nodes=resource("reconstruct", "nodes"),
        tasks=resource("reconstruct", "tasks"),
    params:
        settings=depends(),
        config=config_file,
        launch=mpi,
    message:
        "reconstruct: what the images know beyond the Gaussians"
    shell:
        "({params.launch} cryospire reconstruct --config {params.config:q} "
        '--particles "$(dirname {input.particles:q})" --model "$(dirname {input.model:q})" --output "$(dirname {output:q})" '
        "2>&1) | tee -a {log:q}"
