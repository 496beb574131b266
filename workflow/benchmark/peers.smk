# Other programs on the same images, by their documented commands, each in an environment of its own.
# cryoDRGN and RECOVAR expect protein-white images under their default inversion, which is what `simulate` writes.
# Both take the latent of the image nearest to each state's mean latent, as CryoBench does.  PEER_EPOCHS fewer than the authors'
# advice must be said beside the numbers; on a CPU add "-b 8 --lr 5e-4 --no-amp --enc-dim 128 --dec-dim 128" to cryodrgn.
PEER_EPOCHS = config.get("cryodrgn_epochs", 20)
PEER_FLAGS = config.get("cryodrgn_flags", "")


rule environment:
    input:
        HERE / "peers" / "{peer}.txt",
    output:
        touch(f"{O}/environments/{{peer}}/ready"),
    log:
        f"{O}/environments/{{peer}}.log",
    conda:
        "../../envs/cpu.yaml"
    message:
        "environment: {wildcards.peer} from PyPI"
    shell:
        "python -m venv $(dirname {output}) > {log} 2>&1 && $(dirname {output})/bin/pip install -r {input} >> {log} 2>&1"


rule cryodrgn:
    input:
        ready=f"{O}/environments/cryodrgn/ready",
        star=f"{RUN}/data/particles.star",
        labels=f"{RUN}/data/truth/labels.npy",
        base=f"{RUN}/base/evaluation.json",
    output:
        f"{RUN}/cryodrgn/evaluation.json",
    log:
        f"{RUN}/logs/cryodrgn.log",
    benchmark:
        f"{RUN}/benchmarks/cryodrgn.tsv"
    threads: workflow.cores
    params:
        bin=lambda w, input: Path(input.ready).parent / "bin",
        box=lambda w: config["size"][w.size]["box"],
        pixel=lambda w: config["size"][w.size]["pixel_size"],
        epochs=PEER_EPOCHS,
        flags=PEER_FLAGS,
        program=HERE / "benchmark.py",
    conda:
        "../../envs/cpu.yaml"
    message:
        "cryodrgn: {wildcards.dataset} {wildcards.size} {wildcards.level} seed {wildcards.seed}"
    shell:
        "(d=$(dirname {output}); data=$(dirname {input.star}); b={params.bin}; mkdir -p $d/volumes; "
        "$b/cryodrgn parse_pose_star {input.star} -D {params.box} --Apix {params.pixel} -o $d/poses.pkl; "
        "$b/cryodrgn parse_ctf_star {input.star} -D {params.box} --Apix {params.pixel} -o $d/ctf.pkl; "
        "$b/cryodrgn train_vae {input.star} --datadir $data --poses $d/poses.pkl --ctf $d/ctf.pkl --zdim 8 -n {params.epochs} "
        "--seed {wildcards.seed} {params.flags} -o $d/train; "
        "z=$(ls -v $d/train/z.*.pkl | tail -1); w=${{z/\\/z./\\/weights.}}; "
        "python {params.program} zfile $z {input.labels} $d/z.txt; "
        "$b/cryodrgn eval_vol $w --config $d/train/config.yaml --zfile $d/z.txt --Apix {params.pixel} -o $d/volumes; "
        "python {params.program} score $d/volumes $(dirname {input.base})/particles.zarr $data/truth cryodrgn {output}) > {log} 2>&1"


rule recovar:
    input:
        ready=f"{O}/environments/recovar/ready",
        star=f"{RUN}/data/particles.star",
        labels=f"{RUN}/data/truth/labels.npy",
        base=f"{RUN}/base/evaluation.json",
    output:
        f"{RUN}/recovar/evaluation.json",
    log:
        f"{RUN}/logs/recovar.log",
    benchmark:
        f"{RUN}/benchmarks/recovar.tsv"
    threads: workflow.cores
    params:
        bin=lambda w, input: Path(input.ready).parent / "bin",
        zdim=10,
        flags=config.get("recovar_flags", ""),
        program=HERE / "benchmark.py",
    conda:
        "../../envs/cpu.yaml"
    message:
        "recovar: {wildcards.dataset} {wildcards.size} {wildcards.level} seed {wildcards.seed}"
    shell:
        "(d=$(dirname {output}); data=$(dirname {input.star}); b={params.bin}; mkdir -p $d/volumes; "
        "$b/recovar pipeline {input.star} --datadir $data --mask $data/truth/mask.mrc --zdim 4,{params.zdim} --no-downsample "
        "{params.flags} -o $d/pipeline; "
        "$b/python -c 'import sys, numpy; from recovar import output; "
        'numpy.save(sys.argv[2], output.PipelineOutput(sys.argv[1]).get("zs")[int(sys.argv[3])])\' $d/pipeline $d/z.npy {params.zdim}; '
        "python {params.program} zfile $d/z.npy {input.labels} $d/z.txt; "
        "$b/recovar compute_state $d/pipeline -o $d/states --latent-points $d/z.txt; "
        "n=0; for f in $(find $d/states -name 'state*.mrc' -not -name '*half*' | sort -V); do "
        "cp $f $d/volumes/$(printf 'vol_%03d.mrc' $n); n=$((n + 1)); done; "
        "python {params.program} score $d/volumes $(dirname {input.base})/particles.zarr $data/truth recovar {output}) > {log} 2>&1"
