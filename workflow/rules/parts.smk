rule parts:
    input:
        particles=store("particles"),
        discovery=store("discovery"),
    output:
        store("parts"),
    log:
        R / "logs" / "parts.log",
    benchmark:
        R / "benchmarks" / "parts.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: THREADS
    resources:
        mem_mb=resource("parts", "mem_mb"),
        runtime=resource("parts", "runtime"),
        gpu=resource("parts", "gpu"),
        nodes=resource("parts", "nodes"),
        tasks=resource("parts", "tasks"),
    params:
        settings=depends("parts"),
        config=config_file,
        launch=alone,
    message:
        "parts: clusters of features, anchors, masks, evidence"
    shell:
        "({params.launch} cryospire parts --config {params.config:q} "
        '--particles "$(dirname {input.particles:q})" --discovery "$(dirname {input.discovery:q})" --output "$(dirname {output:q})" '
        "2>&1) | tee -a {log:q}"
