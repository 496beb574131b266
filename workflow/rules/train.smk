rule train:
    input:
        particles=store("particles"),
        discovery=store("discovery"),
        parts=store("parts"),
    output:
        store("model"),
    log:
        R / "logs" / "train.log",
    benchmark:
        R / "benchmarks" / "train.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: THREADS
    resources:
        mem_mb=resource("train", "mem_mb"),
        runtime=resource("train", "runtime"),
        gpu=resource("train", "gpu"),
        nodes=resource("train", "nodes"),
        tasks=resource("train", "tasks"),
    params:
        settings=depends("train"),
        config=config_file,
        launch=ddp,
        half=of_half,
    message:
        "train: stage 2, the part-aware mixture"
    shell:
        "({params.launch} cryospire train --config {params.config:q} "
        '--particles "$(dirname {input.particles:q})" --discovery "$(dirname {input.discovery:q})" '
        '--parts "$(dirname {input.parts:q})" --output "$(dirname {output:q})" {params.half} '
        "2>&1) | tee -a {log:q}"
