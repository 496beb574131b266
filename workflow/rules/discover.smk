rule discover:
    input:
        particles=store("particles"),
        consensus=store("consensus"),
    output:
        store("discovery"),
    log:
        R / "logs" / "discover.log",
    benchmark:
        R / "benchmarks" / "discover.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: THREADS
    resources:
        mem_mb=resource("discover", "mem_mb"),
        runtime=resource("discover", "runtime"),
        gpu=resource("discover", "gpu"),
        nodes=resource("discover", "nodes"),
        tasks=resource("discover", "tasks"),
    params:
        settings=depends("discover"),
        config=config_file,
        launch=ddp,
        half=of_half,
    message:
        "discover: stage 1, which Gaussians move or vanish together"
    shell:
        "({params.launch} cryospire discover --config {params.config:q} "
        '--particles "$(dirname {input.particles:q})" --consensus "$(dirname {input.consensus:q})" --output "$(dirname {output:q})" {params.half} '
        "2>&1) | tee -a {log:q}"
