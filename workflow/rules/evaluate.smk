rule evaluate:
    input:
        model=store("model"),
        reconstruction=store("reconstruction"),
        consensus=store("consensus"),
        particles=store("particles"),
        labels=TRUTH / "labels.npy",
    output:
        R / "evaluation.json",
    log:
        R / "logs" / "evaluate.log",
    benchmark:
        R / "benchmarks" / "evaluate.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: THREADS
    resources:
        mem_mb=resource("evaluate", "mem_mb"),
        runtime=resource("evaluate", "runtime"),
        gpu=resource("evaluate", "gpu"),
        nodes=resource("evaluate", "nodes"),
        tasks=resource("evaluate", "tasks"),
    params:
        settings=depends(),
        config=config_file,
        launch=alone,
    message:
        "evaluate: FSC of every state against the truth"
    shell:
        "({params.launch} cryospire evaluate --config {params.config:q} "
        '--model "$(dirname {input.model:q})" --consensus "$(dirname {input.consensus:q})" --particles "$(dirname {input.particles:q})" '
        '--reconstruction "$(dirname {input.reconstruction:q})" --truth "$(dirname {input.labels:q})" --output {output:q} '
        "2>&1) | tee -a {log:q}"
