"""Memory, time, GPUs and disk of every stage, from the number of particles, the box and the number of Gaussians."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from cryospire.config import Config, Train, Training
from cryospire.conventions import InputError
from cryospire.log import duration
from cryospire.site.settings import Site

STAGES = (
    "simulate", "preflight", "preprocess", "consensus", "discover", "parts", "train", "reconstruct", "analyse", "assemble", "evaluate",
    "validate", "report",
)  # fmt: skip
TRAININGS = {"discover": 101, "train": 102}
OF_HALVES = ("discover", "parts", "train")  # run again on each half-set, where the config wants that

# Rates, deliberately on the slow side; a job that needs more is retried with more.
CPU_GFLOPS = 8.0  # of one core, in training: networks and splat together
GPU_GFLOPS = 2000.0  # of one GPU, in training
CPU_IMAGES = 150.0  # images of 128 pixels that one process reads, transforms and writes, or inserts, each second
GPU_HOURS = 6.0  # a training asks for as many GPUs as end it in about this time
BASE_MB = 1200  # Python, torch, numba
SPLAT_FLOP = 60.0  # forward and backward, of one Gaussian on one pixel
DRAWN_MB = 400  # drawings with which stage 2 compares latents, and what is made of them
IMAGES = 64  # that reconstruct draws at once
MINUTES = 30  # the least time that is asked for
START, WARM = 30.0, 60.0  # s until a stage begins, and of a training before its first image


@dataclass(frozen=True)
class Data:
    """Size of the input: particles, and the box of images before and after cropping."""

    particles: int
    source_box: int
    box: int


@dataclass(frozen=True)
class Need:
    """Resources of one job; ``mem_mb`` is a node's, ``runtime`` the limit to ask for, in minutes, ``hours`` what it may take."""

    mem_mb: int
    runtime: int
    hours: float
    gpu: int = 0
    nodes: int = 1
    tasks: int = 1
    disk_mb: int = 0


def half_of(data: Data) -> Data:
    """Size of a half-set."""
    return replace(data, particles=-(-data.particles // 2))


def measure(config: Config) -> Data:
    """Size of the particles: from the section ``simulate``, else from the table and the first stack. Zero if there is no file yet."""
    if config.simulate is not None:
        particles, source = config.simulate.particles, config.simulate.box
    else:
        particles, source = _table(config.particles, config.datadir)
        if config.ind is not None and config.ind.is_file():
            particles = min(particles, _listed(config.ind))
    return Data(particles, source, config.preprocess.box or source)


def _listed(path: Path) -> int:
    """Rows that a selection names: lines of a .txt; of a pickle the most that its bytes can hold, three or more to a number."""
    if path.suffix == ".txt":
        return sum(bool(line.strip()) for line in path.read_text().splitlines())
    return path.stat().st_size // 3


@lru_cache
def _table(path: Path, datadir: Path | None) -> tuple[int, int]:
    """Rows of a particle table and the box of its images, read as cheaply as it can be; (0, 256) where there is no file."""
    if not path.is_file():
        return 0, 256
    if path.suffix == ".star":
        return _star(path, datadir)
    if path.suffix == ".cs":
        table = np.load(path, mmap_mode="r", allow_pickle=False)
        shape = table["blob/shape"][0] if "blob/shape" in (table.dtype.names or ()) else [256]
        return len(table), int(shape[0])
    if path.suffix == ".txt":
        stacks = [path.parent / line.strip() for line in path.read_text().splitlines() if line.strip()]
        sizes = [_mrc(p) for p in stacks if p.is_file()]
        return sum(n for n, _ in sizes), sizes[0][1] if sizes else 256
    return _mrc(path)


def _star(path: Path, datadir: Path | None) -> tuple[int, int]:
    rows, box, first = 0, 0, ""
    labels: list[str] = []
    with path.open(errors="replace") as file:
        for line in file:
            word = line.split()
            if not word or word[0].startswith(("#", "data_", "loop_")):
                if word and word[0] == "loop_":
                    rows, labels = 0, []
            elif word[0].startswith("_"):
                labels.append(word[0])
            else:
                if rows == 0:
                    found = dict(zip(labels, word, strict=False))
                    box = int(float(found.get("_rlnImageSize", box)))
                    first = found.get("_rlnImageName", first)
                rows += 1
    # RELION 3.0 and older tell no box: the first stack does.
    name = first.rpartition("@")[2]
    stacks = [root / name for root in (datadir, path.parent, *path.absolute().parents, Path()) if root] if name and not box else []
    return rows, box or next((_mrc(stack)[1] for stack in stacks if stack.is_file()), 256)


def _mrc(path: Path) -> tuple[int, int]:
    with path.open("rb") as file:
        head = file.read(12)
    order = "<" if 0 < struct.unpack("<i", head[:4])[0] < 65536 else ">"
    nx, _, nz = struct.unpack(f"{order}3i", head)
    return nz, nx


def flop_of_image(settings: Training, box: int) -> float:
    """Floating-point operations of one image, forward and backward: networks of every Gaussian, and the splat."""
    g, h, rank = settings.gaussians, settings.hidden, settings.rank
    if settings.head == "mlp":
        pair = 2 * 2 * h * ((settings.layers - 1) * h + 4)
    else:
        pair = 2 * rank * 4
    radius = settings.cutoff * (1.2 if isinstance(settings, Train) else 2.0) * box / 128 + 1
    return 3.0 * g * pair + SPLAT_FLOP * g * math.pi * radius**2 + 200.0 * box**2 * math.log2(box)


def ranks(config: Config, stage: str, data: Data, site: Site) -> int:
    """Ranks of a training: a power of two that divides its lanes, enough to end it in ``GPU_HOURS``, within the site's bound."""
    settings: Training = getattr(config, stage)
    if site.ranks:
        if settings.lanes % site.ranks:
            raise InputError(f"ranks: {site.ranks} of the site file do not divide {stage}.lanes, {settings.lanes}")
        return site.ranks
    rate = GPU_GFLOPS if site.gpus_per_node else CPU_GFLOPS * site.cpus_per_task
    hours = settings.epochs * data.particles * flop_of_image(settings, data.box) / (rate * 1e9) / 3600
    wanted = 1
    while wanted * 2 <= min(site.max_gpus, settings.lanes) and settings.lanes % (wanted * 2) == 0 and hours / wanted > GPU_HOURS:
        wanted *= 2
    return wanted


def shape(tasks: int, site: Site) -> tuple[int, int]:
    """Nodes and GPUs of a training of so many ranks."""
    each = site.ranks_per_node or site.gpus_per_node or 1
    return -(-tasks // each), tasks if site.gpus_per_node else 0


def over_mpi(site: Site | None) -> tuple[int, int]:
    """Nodes and ranks of a stage of MPI ranks."""
    return (min(site.mpi_nodes, site.mpi_ranks), site.mpi_ranks) if site else (1, 1)


def most_parts(config: Config) -> int:
    """Parts that there may be: their number is known when they have been found."""
    return config.parts.parts or config.parts.max_parts


def need(config: Config, stage: str, data: Data, site: Site | None, attempt: int = 1, cores: int = 1) -> Need:
    """Resources of one stage; without a site, of one process on this machine.  A later attempt gets more memory and time."""
    n, b = max(data.particles, 1), data.box
    image_mb = b * b * 4 / 1e6
    cpus = site.cpus_per_task if site else cores
    gpu, nodes, tasks = 0, 1, 1
    memory, seconds, disk = 500.0, 60.0, 5.0
    if stage == "simulate":
        memory, seconds, disk = 600 + 30 * b**3 * 8 / 1e6, n * (b / 64) ** 2 / 100, n * image_mb
    elif stage == "preflight":
        memory, seconds = 1000 + 40 * b**3 * 8 / 1e6, 300 * (b / 128) ** 2
    elif stage == "preprocess":
        block = config.preprocess.shard_mib * (4 if config.preprocess.dtype == "float16" else 2) * (data.source_box / b) ** 2
        workers = site.dask_workers if site else config.preprocess.workers
        nodes, tasks = (min(site.dask_nodes, workers), workers) if site else (1, 1)
        memory = (300 + 3 * block) if site else workers * (300 + 3 * block)
        seconds, disk = n * (data.source_box / 128) ** 2 / CPU_IMAGES / workers, n * image_mb / 2
    elif stage == "consensus":
        memory, seconds, disk = 12 * (2 * b) ** 3 * 8 / 1e6 + 500, n * (b / 128) ** 2 / CPU_IMAGES, 5 * b**3 * 4 / 1e6
    elif stage in TRAININGS:
        settings: Training = getattr(config, stage)
        if site is not None:
            tasks = ranks(config, stage, data, site)
            nodes, gpu = shape(tasks, site)
        batch = settings.batch / tasks  # of a rank
        pairs = batch * settings.gaussians * 4 / 1e6  # MB of one number for every image and Gaussian
        depth = settings.hidden * settings.layers if settings.head == "mlp" and not gpu else 40
        rate = GPU_GFLOPS if gpu else CPU_GFLOPS * cpus
        drawn = DRAWN_MB if stage == "train" else 0
        memory = drawn + settings.memory_mib / tasks + pairs * (2 * depth) + 20 * batch * image_mb + n * 4e-4
        seconds = WARM + settings.epochs * n * flop_of_image(settings, b) / (rate * 1e9 * tasks)
        disk = 3 * n * 1e-4 + settings.gaussians * 2e-3
    elif stage == "parts":
        memory, seconds = 1400 + 1300 * image_mb + n * 3e-4, 60 + 120 * most_parts(config) + n * 1e-5
    elif stage == "analyse":
        memory, seconds, disk = 1000 + n * 4e-3, 120 + n * 3e-3, n * 1e-4
    elif stage == "reconstruct":
        parts, fine = most_parts(config), (2 * b if b <= 128 else b)
        nodes, tasks = over_mpi(site)
        wide = IMAGES * config.train.gaussians * (3 * config.train.hidden if config.train.head == "mlp" else 40) * 4 / 1e6
        work = flop_of_image(config.train, b) / 3 / (CPU_GFLOPS * cpus * 1e9) + parts * (b / 128) ** 2 / CPU_IMAGES
        memory, seconds, disk = 4 * parts * fine**3 * 6 * 1.2 / 1e6 + wide + 500, n * work / tasks, 9 * parts * b**3 * 4 / 1e6
    elif stage == "assemble":
        side = config.assemble.box or b
        volumes = config.analyse.states + (config.analyse.trajectories + 1) * config.analyse.steps
        nodes, tasks = over_mpi(site)
        maps = 12 + 2 * most_parts(config)  # detail and mask of every part stay in memory
        memory, seconds, disk = maps * side**3 * 4 / 1e6, 3 * volumes * (side / 64) ** 3, 2 * volumes * side**3 * 4 / 1e6
    elif stage in ("evaluate", "validate"):
        states = config.simulate.states if config.simulate else len(list(config.truth.glob("vol_*.mrc"))) if config.truth else 0
        maps = 60 + 6 * states if stage == "evaluate" else 20 + 4 * config.analyse.states
        memory, seconds = 1000 + maps * b**3 * 4 / 1e6, 300 * (b / 64) ** 3
    seconds += START
    on_node = -(-tasks // nodes)
    bound = site.max_mem_mb if site and site.max_mem_mb else 1 << 40
    longest = site.max_runtime if site else 1 << 20
    return Need(
        mem_mb=min(bound, round((BASE_MB + memory) * on_node * (1 + 0.5 * (attempt - 1)))),
        runtime=min(longest, (MINUTES + round(2 * seconds / 60)) * attempt),
        hours=seconds / 3600,
        gpu=gpu, nodes=nodes, tasks=tasks, disk_mb=round(disk),
    )  # fmt: skip


def needs(config: Config, without: set[str], data: Data, site: Site | None, cores: int = 1) -> dict[str, Need]:
    """Of every stage that this config runs, ``without`` some; trainings on half-sets are named ``train half1``, and so on."""
    found = {stage: need(config, stage, data, site, cores=cores) for stage in STAGES if stage not in without}
    if not config.halves:
        found.pop("validate", None)
        return found
    for half in (1, 2):
        found |= {f"{stage} half{half}": need(config, stage, half_of(data), site, cores=cores) for stage in OF_HALVES}
    return found


def summary(config: Config, without: set[str], data: Data, site: Site | None, cores: int = 1) -> str:
    """The estimate of a whole run, as lines for people."""
    asked = needs(config, without, data, site, cores)
    lines = [f"estimate for {data.particles:,} particles, box {data.box}:"]
    for stage, n in asked.items():
        where = f"{n.gpu} GPU on {n.nodes} node(s)" if n.gpu else f"{n.tasks} task(s) on {n.nodes} node(s)"
        time = f"under {duration(3600 * n.hours):>8} (limit {n.runtime:5d} min)"
        lines.append(f"  {stage:<14} {n.mem_mb / 1000:7.1f} GB memory a node  {time}  {n.disk_mb / 1000:9.3f} GB disk  {where}")
    hours = sum(n.gpu * n.hours for n in asked.values())
    lines.append(f"  together {sum(n.disk_mb for n in asked.values()) / 1000:.2f} GB disk, about {hours:.1f} GPU-hours")
    return "\n".join(lines)
