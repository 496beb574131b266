# The same stages on each half-set alone, in folders half1 and half2, and how far they agree.
wildcard_constraints:
    half="half[12]",


use rule discover as discover_half with:
    output:
        store_of_half("discovery"),
    log:
        R / "{half}" / "logs" / "discover.log",
    benchmark:
        R / "{half}" / "benchmarks" / "discover.tsv"
    message:
        "discover: stage 1 on {wildcards.half} alone"


use rule parts as parts_half with:
    input:
        particles=store("particles"),
        discovery=store_of_half("discovery"),
    output:
        store_of_half("parts"),
    log:
        R / "{half}" / "logs" / "parts.log",
    benchmark:
        R / "{half}" / "benchmarks" / "parts.tsv"
    message:
        "parts: of {wildcards.half} alone"


use rule train as train_half with:
    input:
        particles=store("particles"),
        discovery=store_of_half("discovery"),
        parts=store_of_half("parts"),
    output:
        store_of_half("model"),
    log:
        R / "{half}" / "logs" / "train.log",
    benchmark:
        R / "{half}" / "benchmarks" / "train.tsv"
    message:
        "train: stage 2 on {wildcards.half} alone"


rule validate:
    input:
        model=store("model"),
        analysis=store("analysis"),
        half1=R / "half1" / "model.zarr" / "zarr.json",
        half2=R / "half2" / "model.zarr" / "zarr.json",
    output:
        R / "validation.json",
    log:
        R / "logs" / "validate.log",
    benchmark:
        R / "benchmarks" / "validate.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: THREADS
    resources:
        mem_mb=resource("validate", "mem_mb"),
        runtime=resource("validate", "runtime"),
        gpu=resource("validate", "gpu"),
        nodes=resource("validate", "nodes"),
        tasks=resource("validate", "tasks"),
    params:
        settings=depends(),
        config=config_file,
        launch=alone,
    message:
        "validate: two trainings that share no image, compared"
    shell:
        "({params.launch} cryospire validate --config {params.config:q} "
        '--model "$(dirname {input.model:q})" --analysis "$(dirname {input.analysis:q})" '
        '--half1 "$(dirname {input.half1:q})" --half2 "$(dirname {input.half2:q})" --output {output:q} '
        "2>&1) | tee -a {log:q}"
