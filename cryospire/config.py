"""One typed, documented configuration: a section for each stage, checked before any work starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from cryospire.conventions import InputError

OPERATIONAL = {"workers", "checkpoint_minutes"}  # change how a stage runs, not what it writes


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Simulate(Section):
    """Particles with a known truth, from an atomic model or the built-in phantom."""

    model: Path | None = Field(None, description="PDB or mmCIF file, plain or .gz; empty: the built-in phantom of protein-like domains")
    kind: Literal["conformational", "compositional", "mixed"] = Field("mixed", description="what differs between states: a moving group, absent groups, or both")
    moving: list[str] = Field([], description="chains that turn about the hinge, as 'A' or 'A:1-110' (residues), with a model; the phantom has its own arm")
    hinge: list[str] = Field([], description="two residues, as 'B:222' 'B:238', whose CA atoms span the axis, with a model; the group turns about their middle")
    path: Literal["circle", "random"] = Field("circle", description="states along one dihedral (IgG-1D) or at random orientations of the group (IgG-RL)")
    absent: list[list[str]] = Field([], description="groups of chains that are absent from some states, with a model; the phantom has its own tip (compositional: three caps)")
    states: int = Field(20, ge=1)
    particles: int = Field(20_000, ge=2)
    uneven: bool = Field(False, description="state populations fall geometrically by a factor of five instead of being equal")
    box: int = Field(64, ge=16, description="pixels; even")
    pixel_size: float = Field(6.0, gt=0, description="Å")
    snr: float = Field(0.04, gt=0, description="signal variance over noise variance in this box (CryoBench: 0.01 at box 256 is 0.04 at 128)")
    shift: float = Field(10.0, ge=0, description="standard deviation of particle shifts, Å")
    turn_error: float = Field(0.0, ge=0, description="standard deviation of the errors of the table's poses about an axis, degrees")
    shift_error: float = Field(0.0, ge=0, description="standard deviation of the errors of the table's shifts along an axis, Å")
    strength: float = Field(0.0, ge=0, lt=0.5, description="standard deviation over images of how strongly they show the particle (ice and what lies in it), about 1")
    resolution: float = Field(0.0, ge=0, description="of the truth, Å: an atom is a Gaussian of sd 0.225 of it, as in ChimeraX molmap, cut softly at Nyquist; 0: 2.2 pixels")


class Preflight(Section):
    """Conventions decided from a sample of the particles, before anything is computed from them."""

    sample: int = Field(5000, ge=2, description="particles that are read")
    accept: bool = Field(False, description="go on in spite of a contradiction between table, settings and data")


class Preprocess(Section):
    """Particle stack to whitened Zarr shards."""

    box: int = Field(0, ge=0, description="pixels after Fourier cropping; 0: as they are")
    contrast: Literal["white", "black"] = Field("white", description="protein in the input images")
    window: bool = Field(True, description="multiply by a soft circle, 1 inside 0.85 of the half box and 0 beyond 0.99")
    dtype: Literal["float16", "float32"] = "float16"
    shard_mib: int = Field(64, ge=1, description="size of a shard file; one dask task reads and writes one shard")
    workers: int = Field(2, ge=1, description="dask workers on this machine, a thread each")

    @field_validator("box")
    @classmethod
    def _is_none_or_even(cls, box: int) -> int:
        if box and (box < 16 or box % 2):
            raise ValueError(f"{box}: an even number from 16 on, or 0 for images as they are")
        return box


class Consensus(Section):
    """Rigid reconstruction of all particles."""

    mask_threshold: float = Field(0.0, ge=0, description="density threshold of the mask; 0: chosen from the map")
    mask_soft: float = Field(3.0, ge=0, description="width of the cosine edge, pixels")


class Training(Section):
    """What both trainings share."""

    gaussians: int = Field(2048, ge=8)
    epochs: int = Field(15, ge=1)
    batch: int = Field(32, ge=1, description="images in a global batch, over all ranks")
    head: Literal["mlp", "factorized"] = Field("mlp", description="'mlp': the paper's, one evaluation for every Gaussian-image pair; 'factorized': trunk(z) times branch(feature)")
    rank: int = Field(32, ge=1, description="rank of the factorized head")
    hidden: int = Field(32, ge=1, description="units in a hidden layer")
    layers: int = Field(1, ge=1, description="hidden layers")
    lambda_z: float = Field(1.0, gt=0, description="weight of |z|^2 / 2 beside |residual|^2 / 2 summed over pixels; 1 is the MAP estimate under unit noise")
    lr: float = Field(1e-2, gt=0, description="Adam, networks and features")
    lr_z: float = Field(1.0, gt=0, description="latents: fraction of a natural-gradient (Newton) step a visit, in stage 2 falling like lr; each is visited once an epoch")
    refine_poses: bool = Field(True, description="correct the pose of every particle along with its latent; how wrong poses are is learnt from the images; stage 2 then takes the frame of the part that rests")
    lr_density: float = Field(0.02, gt=0, description="Adam, centres (pixels), log scales and relative amplitudes of the Gaussians")
    lanes: int = Field(8, ge=1, validate_default=True, description="fixed division of the particles among ranks; the number of ranks must divide it, and so must the batch")
    cutoff: float = Field(3.0, ge=2, description="Gaussians are cut off beyond this many scales; of a peak at most exp(-cutoff^2 / 2) is left out, 1.1 % at 3")
    checkpoint_minutes: float = Field(10.0, ge=0, description="time between checkpoints inside an epoch; there is always one after an epoch")
    deterministic: bool = Field(False, description="GPU: deterministic algorithms only; CPU runs are always deterministic")
    memory_mib: int = Field(512, ge=16, description="images held in memory while streaming, over all ranks; as many are shuffled among each other")

    @field_validator("lanes")
    @classmethod
    def _divide_the_batch(cls, lanes: int, info: ValidationInfo) -> int:
        if info.data.get("batch", 0) % lanes:
            raise ValueError(f"batch, {info.data['batch']}, is no multiple of it")
        return lanes


class Discover(Training):
    """Stage 1: a coarse mixture whose features tell which Gaussians move or vanish together."""

    latent: int = Field(4, ge=1)
    features: int = Field(24, ge=1)


class Parts(Section):
    """Clusters of features, divided in space into anchors."""

    parts: int = Field(0, ge=0, description="number of parts; 0: chosen from the evidence")
    max_parts: int = Field(8, ge=2, description="the largest number that is chosen")
    anchors: int = Field(5, ge=1, description="anchors over all parts, at least one a part; large parts get more")
    random: bool = Field(False, description="ablation: parts without regard to features")


class Train(Training):
    """Stage 2: parts move rigidly, Gaussians flex and switch on and off."""

    gaussians: int = Field(8192, ge=8)
    epochs: int = Field(30, ge=1)
    batch: int = Field(128, ge=1, description="images in a global batch, over all ranks; with 32 the first steps undid docking, and the factorized head costs a step the same whatever their number")
    head: Literal["mlp", "factorized"] = "factorized"
    hidden: int = Field(128, ge=1)
    layers: int = Field(3, ge=1)
    lr: float = Field(3e-3, gt=0, description="Adam, networks and features; 1e-2 threw networks this wide out of what stage 1 had found")
    lambda_f: float = Field(0.01, ge=0, description="weight of the squared feature offsets")
    anchor_motion: bool = Field(True, description="ablation: off leaves only the local flex")
    positional: bool = Field(False, description="ablation: positional encoding of the centres in place of the features")


class Analyse(Section):
    """Latents: axes, states, density, trajectories."""

    states: int = Field(10, ge=1, description="k-means states")
    trajectories: int = Field(2, ge=0, description="principal components along which a trajectory is made, beside the one between the most distant states")
    steps: int = Field(8, ge=2, description="points of a trajectory")
    umap: bool = True


class Assemble(Section):
    """Volumes of states and trajectories."""

    box: int = Field(0, ge=0, description="pixels of the volumes; 0: the training box")


class Config(Section):
    """The whole run."""

    particles: Path = Field(Path("particles.star"), description=".star, .cs or cryoDRGN stack")
    poses: Path | None = Field(None, description="cryoDRGN poses.pkl, with a bare stack")
    ctf: Path | None = Field(None, description="cryoDRGN ctf.pkl, with a bare stack")
    passthrough: list[Path] = Field([], description="cryoSPARC passthrough .cs files, joined on uid")
    ind: Path | None = Field(None, description="rows of the particle table to use, from 0: cryoDRGN's ind.pkl, or a .txt with one a line; empty: all")
    datadir: Path | None = Field(None, description="folder that image paths are relative to; empty: found from the table")
    map: Path | None = Field(None, description="consensus map (.mrc) to use instead of back-projecting the particles")
    mask: Path | None = Field(None, description="soft mask (.mrc, 0 to 1) of the particle, in which Gaussians begin and FSCs are told; empty: made from the map")
    truth: Path | None = Field(None, description="folder of known volumes and labels, from `cryospire simulate`; adds the stage evaluate")
    output: Path = Field(Path("results"), description="folder of every result")
    seed: int = Field(0, ge=0)
    halves: bool = Field(False, description="also train on each half-set alone, which takes as long again, and compare: adds the stage validate")
    threads: int = Field(0, ge=0, description="CPU threads of a process; 0: all that are given to it")
    simulate: Simulate | None = Field(None, description="present only when the particles are to be simulated")
    preflight: Preflight = Preflight()
    preprocess: Preprocess = Preprocess()
    consensus: Consensus = Consensus()
    discover: Discover = Discover()
    parts: Parts = Parts()
    train: Train = Train()
    analyse: Analyse = Analyse()
    assemble: Assemble = Assemble()

    def reading(self) -> dict[str, Any]:
        """How the particle table is read: what goes with ``particles``."""
        return {name: getattr(self, name) for name in ("poses", "ctf", "ind", "passthrough", "datadir")}


def load(path: Path) -> Config:
    """Read and check a YAML file.  Raises InputError naming the file, the key and the value."""
    try:
        values: Any = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text, at byte {error.start}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    try:
        return Config.model_validate(values or {})
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc'])) or 'top level'}: {e['msg']} (value {e['input']!r})" for e in error.errors()]
        raise InputError(f"{path}: " + "; ".join(lines)) from None


def section(values: Section) -> dict[str, Any]:
    """A section as plain JSON values, as stores and schemas keep it."""
    return values.model_dump(mode="json")


def schema() -> dict[str, Any]:
    """JSON Schema of the whole config, as ``workflow/schemas/config.schema.json`` holds it."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}
