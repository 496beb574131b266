rule preflight:
    input:
        source_files("particles", "poses", "ctf", "ind", "passthrough", "map"),
        [SIMULATED / "particles.mrcs"] if CONFIG.simulate else [],
    output:
        R / "preflight.json",
    log:
        R / "logs" / "preflight.log",
    benchmark:
        R / "benchmarks" / "preflight.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: THREADS
    resources:
        mem_mb=resource("preflight", "mem_mb"),
        runtime=resource("preflight", "runtime"),
        gpu=resource("preflight", "gpu"),
        nodes=resource("preflight", "nodes"),
        tasks=resource("preflight", "tasks"),
    params:
        settings=depends("preprocess", "datadir"),
        config=config_file,
        launch=alone,
    message:
        "preflight: sign, shifts, rotations, CTF, pixel size and hand, decided from the data"
    shell:
        "({params.launch} cryospire preflight --config {params.config:q} "
        "--output {output:q} "
        "2>&1) | tee -a {log:q}"
