# Other programs on the same images, by their documented commands, each in an environment of its own.
# cryoDRGN and RECOVAR expect protein-white images under their default inversion, which is what `simulate` writes.
# Of each state both are asked for the volume at the latent of the image nearest to the state's mean latent, as CryoBench does.
# The names of the methods say with which settings they ran.
CRYODRGN = config["cryodrgn"]
RECOVAR = config["recovar"]


def environment(peer):
    """Folder of a peer's virtual environment: one that is there already, or the one that the rule makes."""
    return Path(config["environments"].get(peer, f"{O}/environments/{peer}"))


def ready(peer):
    return [] if peer in config["environments"] else f"{O}/environments/{peer}/ready"


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
        "(python -m venv $(dirname {output}); $(dirname {output})/bin/pip install -r {input}) > {log} 2>&1"


# Its two networks: a variational autoencoder, and a decoder alone whose latents are parameters.
NETWORK = {
    "cryodrgn": f"train_vae --enc-dim {CRYODRGN['width']} --dec-dim {CRYODRGN['width']}",
    "cryodrgn-dec": f"train_dec --dim {CRYODRGN['width']} --z-lr 1e-2",  # at its default, 1e-4, latents hardly move
}


rule cryodrgn:
    input:
        ready=ready("cryodrgn"),
        star=particles,
        labels=rules.simulate.output.labels,
    output:
        f"{RUN}/{{network}}/evaluation.json",
    log:
        f"{RUN}/logs/{{network}}.log",
    benchmark:
        f"{RUN}/benchmarks/{{network}}.tsv"
    wildcard_constraints:
        network="|".join(NETWORK),
    threads: workflow.cores
    resources:
        mem_mb=8000,
    params:
        command=environment("cryodrgn") / "bin/cryodrgn",
        box=lambda w: config["size"][w.size]["box"],
        pixel=lambda w: config["size"][w.size]["pixel_size"],
        train=lambda w: f"{NETWORK[w.network]} --zdim {CRYODRGN['zdim']} -n {CRYODRGN['epochs']} --no-analysis {CRYODRGN['flags']}",
        name=lambda w: shlex.quote(
            f"cryoDRGN 4.3.1 {NETWORK[w.network].split()[0]}, {CRYODRGN['epochs']} epochs, networks of {CRYODRGN['width']}"
        ),
        program=HERE / "benchmark.py",
    conda:
        "../../envs/cpu.yaml"
    message:
        "{wildcards.network}: {wildcards.dataset} {wildcards.size} {wildcards.level} seed {wildcards.seed}"
    shell:
        "(d=$(dirname {output}); data=$(dirname {input.star}); rm -rf $d/train $d/volumes; "
        "{params.command} parse_pose_star {input.star} -D {params.box} --Apix {params.pixel} -o $d/poses.pkl; "
        "{params.command} parse_ctf_star {input.star} -D {params.box} --Apix {params.pixel} -o $d/ctf.pkl; "
        "{params.command} {params.train} {input.star} --datadir $data --poses $d/poses.pkl --ctf $d/ctf.pkl --seed {wildcards.seed} "
        "-o $d/train; "
        "e=$(ls $d/train | sed -n 's/^z\\.\\([0-9]*\\)\\.pkl$/\\1/p' | sort -n | tail -1); "
        "python {params.program} zfile $d/train/z.$e.pkl {input.labels} $d/z.txt; "
        "{params.command} eval_vol $d/train/weights.$e.pkl --config $d/train/config.yaml --zfile $d/z.txt --Apix {params.pixel} "
        "-o $d/volumes; "
        "python {params.program} score $d/volumes $data/truth {params.name} {output} --latents $d/train/z.$e.pkl) > {log} 2>&1"


rule recovar:
    input:
        ready=ready("recovar"),
        star=particles,
        labels=rules.simulate.output.labels,
    output:
        f"{RUN}/recovar/evaluation.json",
    log:
        f"{RUN}/logs/recovar.log",
    benchmark:
        f"{RUN}/benchmarks/recovar.tsv"
    threads: workflow.cores
    resources:
        mem_mb=12000,
    params:
        # The program's own commands; without a GPU an error is put right and what is slow is replaced by equals: peers/recovar_cpu.py.
        command=f"{environment('recovar') / 'bin/python'} {HERE / 'peers' / 'recovar_cpu.py'}",
        zdim=RECOVAR["zdim"],
        flags=RECOVAR["flags"],
        budget=RECOVAR["budget"],
        name=shlex.quote(f"RECOVAR 1.0.5, latent dimension {RECOVAR['zdim']}"),
        program=HERE / "benchmark.py",
    conda:
        "../../envs/cpu.yaml"
    message:
        "recovar: {wildcards.dataset} {wildcards.size} {wildcards.level} seed {wildcards.seed}"
    shell:
        "(d=$(dirname {output}); data=$(dirname {input.star}); rm -rf $d/pipeline $d/states $d/volumes; mkdir -p $d/volumes; "
        "{params.command} pipeline {input.star} --datadir $data --mask $data/truth/mask.mrc --zdim {params.zdim} --no-downsample "
        "{params.budget} {params.flags} -o $d/pipeline; "
        "z=$d/pipeline/model/zdim_{params.zdim}/latent_coords.npy; "
        "python {params.program} zfile $z {input.labels} $d/z.txt; "
        "{params.command} compute_state $d/pipeline --latent-points $d/z.txt {params.budget} -o $d/states; "
        "cp $d/states/state[0-9][0-9][0-9].mrc $d/volumes; "
        "python {params.program} score $d/volumes $data/truth {params.name} {output} --latents $z) > {log} 2>&1"
