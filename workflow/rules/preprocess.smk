rule preprocess:
    input:
        R / "preflight.json",
        source_files("particles", "poses", "ctf", "ind", "passthrough"),
        [SIMULATED / "particles.mrcs"] if CONFIG.simulate else [],
    output:
        store("particles"),
    log:
        R / "logs" / "preprocess.log",
    benchmark:
        R / "benchmarks" / "preprocess.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: 1 if SITE else THREADS # of a job's dask worker; on one machine each worker is a thread
    resources:
        mem_mb=resource("preprocess", "mem_mb"),
        runtime=resource("preprocess", "runtime"),
        gpu=resource("preprocess", "gpu"),
        nodes=resource("preprocess", "nodes"),
        tasks=resource("preprocess", "tasks"),
    params:
        settings=depends("preprocess", "datadir"),
        config=config_file,
        launch=dask,
    message:
        "preprocess: particle stack to whitened Zarr shards"
    shell:
        "({params.launch} cryospire preprocess --config {params.config:q} "
        '--output "$(dirname {output:q})" '
        "2>&1) | tee -a {log:q}"
