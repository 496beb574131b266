rule report:
    input:
        [store(name) for name in ("particles", "consensus", "discovery", "parts", "model", "reconstruction", "analysis", "volumes")],
        [R / "evaluation.json"] if TRUTH else [],
        [R / "validation.json"] if CONFIG.halves else [],
    output:
        R / "report.html",
    log:
        R / "logs" / "report.log",
    benchmark:
        R / "benchmarks" / "report.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: THREADS
    resources:
        mem_mb=resource("report", "mem_mb"),
        runtime=resource("report", "runtime"),
        gpu=resource("report", "gpu"),
        nodes=resource("report", "nodes"),
        tasks=resource("report", "tasks"),
    params:
        settings=depends(),
        config=config_file,
        launch=alone,
    message:
        "report: one HTML page of the whole run"
    shell:
        "({params.launch} cryospire report --config {params.config:q} "
        '--results "$(dirname {output:q})" --output {output:q} '
        "2>&1) | tee -a {log:q}"
