"""`cryospire <stage>`: argument parsing only; a stage is imported when it is called."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cryospire import config as configuration
from cryospire.conventions import InputError, explained

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Heterogeneous cryo-EM by a part-aware Gaussian mixture.",
)

ConfigPath = Annotated[Path, typer.Option("--config", help="YAML configuration", show_default=False)]
Output = Annotated[Path, typer.Option("--output", help="what this stage writes", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="replace a complete output")]


@app.command()
def simulate(config: ConfigPath, output: Output, force: Force = False) -> None:
    """Particles with a known truth, from an atomic model or the built-in phantom."""
    from cryospire.stages import simulate as stage

    stage.run(configuration.load(config), output=output, force=force)


@app.command()
def preprocess(
    config: ConfigPath,
    output: Output,
    particles: Annotated[Path | None, typer.Option(help="instead of the config's particles")] = None,
    force: Force = False,
) -> None:
    """Particle stack to whitened Zarr shards."""
    from cryospire.stages import preprocess as stage

    settings = configuration.load(config)
    if particles is not None:
        settings = settings.model_copy(update={"particles": particles})
    stage.run(settings, output=output, force=force)


@app.command()
def consensus(
    config: ConfigPath,
    particles: Annotated[Path, typer.Option(help="particles.zarr", show_default=False)],
    output: Output,
    force: Force = False,
) -> None:
    """Rigid reconstruction of all particles: half-maps, FSC, mask."""
    from cryospire.stages import consensus as stage

    stage.run(configuration.load(config), particles=particles, output=output, force=force)


@app.command()
def discover(
    config: ConfigPath,
    particles: Annotated[Path, typer.Option(help="particles.zarr", show_default=False)],
    consensus: Annotated[Path, typer.Option(help="consensus.zarr", show_default=False)],
    output: Output,
    half: Annotated[int, typer.Option(min=0, max=2, help="1 or 2: of this half-set alone")] = 0,
    force: Force = False,
) -> None:
    """Stage 1: a coarse mixture learns which Gaussians move or vanish together."""
    from cryospire.stages import discover as stage

    stage.run(configuration.load(config), particles=particles, consensus=consensus, output=output, half=half, force=force)


@app.command()
def parts(
    config: ConfigPath,
    particles: Annotated[Path, typer.Option(help="particles.zarr", show_default=False)],
    discovery: Annotated[Path, typer.Option(help="discovery.zarr", show_default=False)],
    output: Output,
    force: Force = False,
) -> None:
    """Cluster Gaussians into parts and anchors, with the evidence for their number; where parts are, the images tell."""
    from cryospire.stages import parts as stage

    stage.run(configuration.load(config), particles=particles, discovery=discovery, output=output, force=force)


@app.command()
def train(
    config: ConfigPath,
    particles: Annotated[Path, typer.Option(help="particles.zarr", show_default=False)],
    discovery: Annotated[Path, typer.Option(help="discovery.zarr", show_default=False)],
    parts: Annotated[Path, typer.Option(help="parts.zarr", show_default=False)],
    output: Output,
    half: Annotated[int, typer.Option(min=0, max=2, help="1 or 2: of this half-set alone")] = 0,
    force: Force = False,
) -> None:
    """Stage 2: parts move rigidly, Gaussians flex and switch on and off."""
    from cryospire.stages import train as stage

    stage.run(configuration.load(config), particles=particles, discovery=discovery, parts=parts, output=output, half=half, force=force)


@app.command()
def analyse(
    config: ConfigPath,
    model: Annotated[Path, typer.Option(help="model.zarr", show_default=False)],
    output: Output,
    force: Force = False,
) -> None:
    """Latents only: principal axes, UMAP, states, density, trajectories."""
    from cryospire.stages import analyse as stage

    stage.run(configuration.load(config), model=model, output=output, force=force)


@app.command()
def reconstruct(
    config: ConfigPath,
    particles: Annotated[Path, typer.Option(help="particles.zarr", show_default=False)],
    model: Annotated[Path, typer.Option(help="model.zarr", show_default=False)],
    output: Output,
    force: Force = False,
) -> None:
    """What the images know beyond the Gaussians: a map of every part, its motion undone, over any number of MPI ranks."""
    from cryospire.stages import reconstruct as stage

    stage.run(configuration.load(config), particles=particles, model=model, output=output, force=force)


@app.command()
def assemble(
    config: ConfigPath,
    model: Annotated[Path, typer.Option(help="model.zarr", show_default=False)],
    analysis: Annotated[Path, typer.Option(help="analysis.zarr", show_default=False)],
    reconstruction: Annotated[Path, typer.Option(help="reconstruction.zarr", show_default=False)],
    output: Output,
    force: Force = False,
) -> None:
    """Volumes of states and trajectories, over any number of MPI ranks, and files for ChimeraX, RELION and 3DFlex."""
    from cryospire.stages import assemble as stage

    stage.run(configuration.load(config), model=model, analysis=analysis, reconstruction=reconstruction, output=output, force=force)


@app.command()
def evaluate(
    config: ConfigPath,
    model: Annotated[Path, typer.Option(help="model.zarr; discovery.zarr and parts.zarr are looked for beside it", show_default=False)],
    consensus: Annotated[Path, typer.Option(help="consensus.zarr", show_default=False)],
    particles: Annotated[Path, typer.Option(help="particles.zarr", show_default=False)],
    truth: Annotated[Path, typer.Option(help="folder of known volumes and labels", show_default=False)],
    output: Output,
    reconstruction: Annotated[Path | None, typer.Option(help="reconstruction.zarr: the detail of parts is judged too")] = None,
) -> None:
    """FSC of every state against the known truth; latents, parts, motion and occupancy too."""
    from cryospire.stages import evaluate as stage

    stage.run(
        configuration.load(config), model=model, consensus=consensus, particles=particles, truth=truth, output=output,
        reconstruction=reconstruction,
    )  # fmt: skip


@app.command()
def validate(
    config: ConfigPath,
    model: Annotated[Path, typer.Option(help="model.zarr of all particles", show_default=False)],
    analysis: Annotated[Path, typer.Option(help="analysis.zarr", show_default=False)],
    half1: Annotated[Path, typer.Option(help="model.zarr of half-set 1", show_default=False)],
    half2: Annotated[Path, typer.Option(help="model.zarr of half-set 2", show_default=False)],
    output: Annotated[Path, typer.Option("--output", help="validation.json; figure and half-maps go beside it", show_default=False)],
) -> None:
    """Two trainings that share no image: how far volumes, differences between states, parts and motions agree."""
    from cryospire.stages import validate as stage

    stage.run(configuration.load(config), model=model, analysis=analysis, half1=half1, half2=half2, output=output)


@app.command()
def report(
    config: ConfigPath,
    results: Annotated[Path, typer.Option(help="folder of the run", show_default=False)],
    output: Output,
) -> None:
    """One self-contained HTML page of everything that is there so far."""
    from cryospire.stages import report as stage

    stage.run(configuration.load(config), results=results, output=output)


@app.command()
def inspect(
    store: Annotated[Path, typer.Argument(help="a store of any stage, complete or not")],
    preview: Annotated[Path | None, typer.Option(help="write a picture (.png) of what is inside")] = None,
) -> None:
    """A store's story: tree, shapes, units, provenance, completeness."""
    from cryospire.stages import inspect as stage

    stage.run(store, preview=preview)


@app.command()
def init(
    particles: Annotated[Path, typer.Option(help=".star, .cs or cryoDRGN stack", show_default=False)],
    poses: Annotated[Path | None, typer.Option(help="cryoDRGN poses.pkl")] = None,
    ctf: Annotated[Path | None, typer.Option(help="cryoDRGN ctf.pkl")] = None,
    ind: Annotated[Path | None, typer.Option(help="rows to use, from 0: ind.pkl, or a .txt with one a line")] = None,
    passthrough: Annotated[list[Path] | None, typer.Option(help="cryoSPARC passthrough .cs; may be repeated")] = None,
    datadir: Annotated[Path | None, typer.Option(help="folder that image paths are relative to")] = None,
    output: Annotated[Path, typer.Option(help="configuration to write")] = Path("config.yaml"),
    force: Force = False,
) -> None:
    """Write a commented configuration that fits the particles."""
    from cryospire.stages import init as stage

    stage.run(particles, poses=poses, ctf=ctf, ind=ind, passthrough=passthrough or [], datadir=datadir, output=output, force=force)


@app.command()
def status(results: Annotated[Path, typer.Argument(help="folder of the run")] = Path("results")) -> None:
    """What each stage is doing: state, epoch, loss, images per second, time left, node, memory, job."""
    from cryospire.stages import status as stage

    stage.run(results)


@app.command()
def preflight(
    config: ConfigPath,
    output: Annotated[Path, typer.Option("--output", help="preflight.json; the figure goes beside it", show_default=False)],
    particles: Annotated[Path | None, typer.Option(help="instead of the config's particles")] = None,
    sample: Annotated[int | None, typer.Option(min=2, help="particles that are read, instead of the config's")] = None,
    accept: Annotated[bool, typer.Option("--accept", help="go on in spite of a contradiction, whatever the config says")] = False,
) -> None:
    """Decide sign, shifts, rotations, CTF, pixel size and hand from the data, and say what the run will cost."""
    from cryospire.stages import preflight as stage

    stage.run(configuration.load(config), output, particles=particles, sample=sample, accept=accept)


@app.command()
def export(
    config: ConfigPath,
    output: Annotated[Path, typer.Option("--output", help=".star or .cs as the source is, .pkl or .txt of rows", show_default=False)],
    particles: Annotated[Path | None, typer.Option(help="the source, if not the configured one")] = None,
    analysis: Annotated[Path | None, typer.Option(help="analysis.zarr, for --state and --box")] = None,
    state: Annotated[list[int] | None, typer.Option(help="a state to keep; may be repeated")] = None,
    box: Annotated[str | None, typer.Option(help="bounds on principal coordinates, COMPONENT:LOW:HIGH[,...]")] = None,
    ids: Annotated[Path | None, typer.Option(help="text file of particle ids or image names, one a line")] = None,
    poses: Annotated[Path | None, typer.Option(help="model.zarr or discovery.zarr, whose refined poses replace the source's")] = None,
    force: Force = False,
) -> None:
    """A selection of particles back into RELION, cryoSPARC or cryoDRGN, every column kept."""
    from cryospire.stages import export as stage

    stage.run(
        configuration.load(config), output, particles=particles, analysis=analysis, states=state or [], box=box, ids=ids, poses=poses,
        force=force,
    )  # fmt: skip


@app.command("filter")
def filter_(
    config: ConfigPath,
    particles: Annotated[Path, typer.Option(help="particles.zarr", show_default=False)],
    discovery: Annotated[Path, typer.Option(help="discovery.zarr", show_default=False)],
    output: Annotated[Path, typer.Option("--output", help="rows to keep, .txt or .pkl, for the config's `ind`", show_default=False)],
    share: Annotated[float, typer.Option(min=0, help="keep images with more than this share of the median evidence")] = 0.25,
    threshold: Annotated[float | None, typer.Option(help="evidence (nats) above which an image is kept, instead of --share")] = None,
    force: Force = False,
) -> None:
    """Images that show the particle, by what stage 1 says of each; the others are impurities."""
    from cryospire.stages import filter as stage

    stage.run(
        configuration.load(config), particles=particles, discovery=discovery, output=output, share=share, threshold=threshold, force=force
    )


@app.command()
def summary(results: Annotated[Path, typer.Argument(help="folder of the run")] = Path("results")) -> None:
    """What a run has found, and where report, volumes and stores are."""
    from cryospire.stages import summary as stage

    stage.run(results)


@app.command()
def bench(
    output: Annotated[Path, typer.Option("--output", help="what is measured, JSON")] = Path("bench.json"),
    quick: Annotated[bool, typer.Option("--quick", help="tiny sizes: whether it runs, not how fast")] = False,
) -> None:
    """Speed of training on this machine: parts of a step, dense reference, hardware floor, feed."""
    from cryospire.stages import bench as stage

    stage.run(output, quick=quick)


@app.command()
def scaling(
    output: Annotated[Path, typer.Option("--output", help="what is measured, JSON")] = Path("scaling.json"),
    latency: Annotated[float, typer.Option(min=0, help="of the link between ranks, microseconds")] = 20.0,
    bandwidth: Annotated[float, typer.Option(min=0.001, help="of the link between ranks, Gbit/s")] = 100.0,
    number: Annotated[int, typer.Option("--stage", min=1, max=2, help="1: discover, 2: train")] = 2,
    gaussians: Annotated[int, typer.Option(min=8)] = 8192,
    box: Annotated[int, typer.Option(min=16)] = 128,
    batch: Annotated[int, typer.Option(min=8, help="images")] = 128,
    device: Annotated[tuple[float, float] | None, typer.Option(help="of another device: ms a step, ms an image")] = None,
) -> None:
    """Step time on 1 and 2 ranks here, and what a model of compute and communication gives for up to 64."""
    from cryospire.stages import scaling as stage

    size = stage.Size(number, gaussians, box, batch)
    step = (device[0] / 1e3, device[1] / 1e3) if device else None
    stage.run(output, latency_us=latency, gbit=bandwidth, size=size, step=step)


cluster = typer.Typer(no_args_is_help=True, help="The cluster that jobs go to.")
app.add_typer(cluster, name="cluster")


@cluster.command("check")
def cluster_check(
    site: Annotated[Path, typer.Option(help="settings of the site")] = Path("cluster/site.yaml"),
    job: Annotated[bool, typer.Option("--job", help="also submit a job of two nodes: reachability, MPI, shared files")] = False,
    launcher: Annotated[Path, typer.Option(help="starts the ranks of that job")] = Path("cluster/launch.sh"),
) -> None:
    """Scheduler, partitions, GPUs, MPI, file system and versions, and what would fail."""
    from cryospire.stages import clustercheck

    clustercheck.run(site, job=job, launcher=launcher)


@cluster.command("probe", hidden=True)
def cluster_probe(folder: Path) -> None:
    """One rank of the check's job."""
    from cryospire.stages import clustercheck

    clustercheck.probe(folder)


def main() -> None:
    """Entry point: bad input, and what the system refuses, end with one line and exit code 2."""
    try:
        app()
    except (InputError, OSError) as error:
        print(f"cryospire: error: {explained(error)}", file=sys.stderr)
        sys.exit(2)
