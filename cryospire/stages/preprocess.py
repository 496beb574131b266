"""Particle stack to ``particles.zarr``: background normalised, Fourier-cropped, windowed, whitened, in whole shards.

dask workers measure the noise of a sample, then each task makes exactly one shard; its memory is a shard and a batch.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dask.distributed import Client, LocalCluster, as_completed
from numpy.typing import NDArray
from torch import Tensor

from cryospire.config import Config, section
from cryospire.conventions import InputError
from cryospire.io import metadata, mrc, particles, stores
from cryospire.io.metadata import ParticleTable
from cryospire.log import Progress, say
from cryospire.maths import fourier, noise
from cryospire.stages import distortions

SAMPLE = 2000  # images of an optics group from which its noise is measured
BATCH = 512 << 10  # bytes of images that are transformed at once: they stay in a core's cache
Array = NDArray[Any]


@dataclass(frozen=True)
class Geometry:
    """How optics groups meet on one grid: Fourier-crop each to ``crops``, then cut or zero-pad to ``box``."""

    box: int
    pixel_size: float
    crops: list[int]


@dataclass(frozen=True)
class Rows:
    """The source of some images: which file, which image in it, which optics group, which row of the table (0-based)."""

    table: Path
    paths: dict[int, Path]
    stack: NDArray[np.int32]
    index: NDArray[np.int64]
    group: NDArray[np.int32]
    row: NDArray[np.int64]

    def take(self, which: Any) -> Rows:
        return Rows(self.table, self.paths, self.stack[which], self.index[which], self.group[which], self.row[which])


@dataclass(frozen=True)
class Recipe:
    """What is done to every image: ``magnification`` (group, 2, 2) and odd aberrations are undone where there are any, by
    ``phases`` (group, box, box // 2 + 1); and it is whitened by ``filters``, of the same shape.
    """

    geometry: Geometry
    sign: float
    window: bool
    filters: Tensor
    phases: Tensor | None
    magnification: Tensor | None


def run(config: Config, *, output: Path, force: bool = False) -> None:
    """Particles named in the config -> particles.zarr.  Raises InputError, and then leaves nothing behind."""
    settings = config.preprocess
    stores.check_replaceable(output, "particles", config=section(settings), force=force)
    table = metadata.read(config.particles, **config.reading())
    metadata.check_stacks(table)
    geometry = common_grid(table, settings.box)
    for note in table.notes:
        say(f"preprocess: {note}")
    groups = len(np.unique(table.group))
    say(f"preprocess: {len(table):,} particles, {groups} optics group(s), box {geometry.box}, {geometry.pixel_size:.4g} Å/pixel")
    files = {"particles": config.particles, "poses": config.poses, "ctf": config.ctf, "ind": config.ind}
    begun = False
    try:
        with client(config) as workers:
            sign = 1.0 if settings.contrast == "white" else -1.0
            power = measure_noise(workers, table, geometry, config.seed)
            whitening = noise.whitening(power)
            shell = fourier.shells(geometry.box).clamp(max=geometry.box // 2)
            undo = distortions.odd_phases(table, geometry.box, geometry.pixel_size), distortions.magnification(table)
            recipe = Recipe(geometry, sign, settings.window, whitening[:, shell], *undo)
            group = particles.create(
                output, distortions.undistorted(table), box=geometry.box, pixel_size=geometry.pixel_size,
                power=power.numpy(), whitening=whitening.numpy(),
                config=section(settings), seed=config.seed, inputs={k: p for k, p in files.items() if p}, force=force,
            )  # fmt: skip
            begun = True
            with Progress("preprocess", len(table), metrics=output.parent / "logs" / "preprocess.metrics.jsonl") as progress:
                tasks = [(output.absolute(), k, rows_of(table, rows), recipe) for k, rows in enumerate(shards(group["images"]))]
                for n, variance in finished(workers, make_shard, tasks):
                    progress.advance(n)
                    progress.record(images=n, variance=variance)
        stores.finish(group)
    except InputError:
        if begun:
            shutil.rmtree(output, ignore_errors=True)
        raise


@contextmanager
def client(config: Config) -> Iterator[Client]:
    """dask workers: those of ``DASK_SCHEDULER_ADDRESS`` where it is set, else threads, ``CRYOSPIRE_WORKERS`` of them or as the config
    says: what they do lets go of Python's lock, and two processes were half as fast as two threads, in page faults of their own."""
    with ExitStack() as stack:
        address: Any = os.environ.get("DASK_SCHEDULER_ADDRESS")
        if not address:
            n = int(os.environ.get("CRYOSPIRE_WORKERS", config.preprocess.workers))
            quiet: dict[str, Any] = {"dashboard_address": "127.0.0.1:0", "silence_logs": logging.CRITICAL}
            address = stack.enter_context(LocalCluster(n_workers=n, processes=False, threads_per_worker=1, memory_limit=0, **quiet))
        yield stack.enter_context(Client(address))


def finished(workers: Client, function: Any, tasks: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
    """Results of ``function(*task)`` as they come; the first error ends the rest."""
    futures = [workers.submit(function, *task, pure=False) for task in tasks]
    try:
        for future in as_completed(futures):
            yield future.result()
    finally:
        workers.cancel(futures)


def common_grid(table: ParticleTable, box: int) -> Geometry:
    """The grid of the output, from the optics groups that hold particles; the one of coarsest pixels keeps its whole field.

    Raises InputError where another group cannot be Fourier-cropped to the same pixel size in whole, even pixels.
    """
    o = table.optics
    used = np.unique(table.group)
    widest = used[np.lexsort((o.box[used], -o.pixel_size[used]))[0]]
    box = box or int(o.box[widest])
    field = o.box[widest] * o.pixel_size[widest]
    pixel_size = float(field / box)
    if box % 2:
        raise InputError(f"preprocess.box: {box} is odd; boxes are even")
    crops = [box] * len(o.name)
    for g in used:
        exact = o.box[g] * o.pixel_size[g] / pixel_size
        crops[g] = 2 * round(exact / 2)
        if crops[g] > o.box[g]:
            raise InputError(f"preprocess.box: {box} is larger than the images of optics group {o.name[g]!r} allow ({o.box[g]} pixels)")
        if abs(exact - crops[g]) > 1e-3 * exact / 2:
            raise InputError(
                f"{table.source}: optics groups {o.name[widest]!r} ({o.pixel_size[widest]:g} Å, box {o.box[widest]}) and {o.name[g]!r} "
                f"({o.pixel_size[g]:g} Å, box {o.box[g]}) do not meet at {pixel_size:.4g} Å in an even number of pixels ({exact:.3f})"
            )
    return Geometry(box, pixel_size, crops)


def rows_of(table: ParticleTable, which: NDArray[Any]) -> Rows:
    stack = table.stack[which]
    paths = {int(s): table.stacks[s] for s in np.unique(stack)}
    return Rows(table.source, paths, stack, table.index[which], table.group[which], table.row[which])


@lru_cache(maxsize=64)
def _stack(path: Path) -> Array:
    return mrc.open_stack(path)


def read_images(rows: Rows) -> Tensor:
    """Images (n, box, box), float32, of rows of one box.  Raises InputError at one that is not finite, or constant."""
    shape = _stack(rows.paths[int(rows.stack[0])]).shape[1:]
    out = np.empty((len(rows.stack), *shape), np.float32)
    for i, (stack, index) in enumerate(zip(rows.stack, rows.index, strict=True)):
        out[i] = _stack(rows.paths[int(stack)])[index]
    low, high = out.min((1, 2)), out.max((1, 2))
    for i in np.flatnonzero(~np.isfinite(low + high) | (low == high))[:1]:
        what = f"is constant ({low[i]:g})" if low[i] == high[i] else "holds values that are not finite"
        raise InputError(f"{rows.paths[int(rows.stack[i])]}: image {rows.index[i] + 1} (row {rows.row[i] + 1} of {rows.table}) {what}")
    return torch.from_numpy(out)


def measure_noise(workers: Client, table: ParticleTable, geometry: Geometry, seed: int) -> Tensor:
    """Noise power (group, box // 2 + 1) per Fourier coefficient and pixel of the output grid, from a sample of each optics group."""
    rng = np.random.default_rng((seed, 0))
    o = table.optics
    power = torch.ones(len(o.name), geometry.box // 2 + 1)
    for g in np.unique(table.group):
        rows = np.flatnonzero(table.group == g)
        sample = np.sort(rng.choice(rows, min(SAMPLE, len(rows)), replace=False))
        tasks = [(rows_of(table, part),) for part in np.array_split(sample, -(-len(sample) // 250))]
        total = torch.stack(list(finished(workers, sample_power, tasks))).double().sum(0) / len(sample)
        # The same frequencies on the other grid: shells of the output in units of the input's shells.
        shell = np.arange(geometry.box // 2 + 1) * (o.box[g] * o.pixel_size[g]) / (geometry.box * geometry.pixel_size)
        there = np.interp(shell, np.arange(len(total)), total.numpy()) * (geometry.crops[g] / o.box[g]) ** 2
        power[g] = torch.from_numpy(there)
    matrix = distortions.magnification(table)
    return power if matrix is None else power * torch.linalg.det(matrix).float()[:, None] ** 2


def sample_power(rows: Rows) -> Tensor:
    """One task: the sum (box // 2 + 1,) over images of the background's power."""
    torch.set_num_threads(1)  # of this thread: a worker is one core
    step = together(_stack(next(iter(rows.paths.values()))).shape[-1])
    parts = [noise.background_power(read_images(rows.take(slice(i, i + step)))).double().sum(0) for i in range(0, len(rows.row), step)]
    return torch.stack(parts).sum(0)


def on_grid(images: Tensor, g: int, recipe: Recipe) -> Tensor:
    """Images (n, box, box) of optics group ``g`` on the common grid, distortions and odd aberrations undone."""
    grid = recipe.geometry
    x = recipe.sign * (images - noise.level(images))
    if recipe.magnification is not None:
        x = distortions.isotropic(x, recipe.magnification[g])
    x = resize(fourier.crop(x, grid.crops[g]), grid.box)
    if recipe.phases is not None:  # before the window: aberrations carry signal away from the particle
        x = filtered(x, recipe.phases[g])
    return x


def transform(images: Tensor, g: int, recipe: Recipe) -> Tensor:
    """Images (n, box, box) of optics group ``g`` as they are stored."""
    x = on_grid(images, g, recipe)
    if recipe.window:
        x = x * fourier.window(recipe.geometry.box)
    return filtered(x, recipe.filters[g])


def filtered(images: Tensor, factors: Tensor) -> Tensor:
    """Images (n, box, box) whose transforms are multiplied by ``factors`` (box, box // 2 + 1)."""
    return torch.fft.irfft2(torch.fft.rfft2(images).mul_(factors), s=images.shape[-2:])


def resize(images: Tensor, box: int) -> Tensor:
    """Cut or zero-pad images about their centre."""
    edge = (box - images.shape[-1]) // 2
    return torch.nn.functional.pad(images, [edge] * 4) if edge else images


def together(box: int) -> int:
    """How many images of a box are transformed at once."""
    return max(1, BATCH // (4 * box**2))


def shards(array: Any) -> list[NDArray[np.int64]]:
    """Rows of each shard of an array."""
    n, size = array.shape[0], array.shards[0]
    return [np.arange(k, min(k + size, n), dtype=np.int64) for k in range(0, n, size)]


def make_shard(store: Path, k: int, rows: Rows, recipe: Recipe) -> tuple[int, float]:
    """One task: the images of shard ``k``.  Returns their number and mean square."""
    torch.set_num_threads(1)
    array: Any = stores.writable(store)["images"]
    out = np.empty((len(rows.row), *array.shape[1:]), array.dtype)
    values = torch.from_numpy(out)  # torch rounds to half precision forty times as fast as numpy
    step = together(out.shape[-1])
    total = 0.0
    for start in range(0, len(out), step):
        batch = rows.take(slice(start, start + step))
        for g in np.unique(batch.group):
            here = np.flatnonzero(batch.group == g)
            images = transform(read_images(batch.take(here)), int(g), recipe)
            total += float(torch.dot(images.flatten(), images.flatten())) / images[0].numel()
            if len(here) == len(batch.group):  # all of one group: without a detour
                values[start : start + step].copy_(images)
            else:
                values[start + torch.from_numpy(here)] = images.to(values.dtype)
    write_shard(array, k, out)
    return len(out), total / len(out)


def write_shard(array: Any, k: int, images: Array) -> None:
    """Write shard ``k``, whole: two writers in one shard would lose data silently, so anything else is refused."""
    rows = shards(array)[k]
    if images.shape != (len(rows), *array.shape[1:]):
        raise ValueError(f"shard {k} holds {(len(rows), *array.shape[1:])} values, not {images.shape}")
    with stores.writing(stores.where(array)):
        array[int(rows[0]) : int(rows[-1]) + 1] = images
