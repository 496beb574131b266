"""The feed: a simulated particle store streamed through the loader that training uses, alone and under a training."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cryospire.io import particles, stores
from cryospire.io.table import Optics, ParticleTable
from cryospire.maths.poses import random_rotations
from cryospire.stages import scaling
from cryospire.stages.bench_machine import peak_gb
from cryospire.training import loop
from cryospire.training.data import CPU, Particles, batches, prefetch
from cryospire.training.distributed import team

SETTINGS: dict[str, Any] = {"dtype": "float16", "shard_mib": 64}
SPECIMEN = 384.0  # Å, side of the box


def simulated(path: Path, count: int, box: int, alike: bool = False, field: float = SPECIMEN) -> Particles:
    """A complete particles.zarr of ``count`` images of noise, ``field`` (Å) wide, in the layout that preprocess writes.

    ``alike``: every shard after the first is a hard link to it, so that a million particles fit on any disk; what is read and
    decoded is the same, but it comes from the page cache.
    """
    rng = np.random.default_rng(0)
    columns = table(count, box, field / box, rng)
    pixel, shells = field / box, np.ones((1, box // 2 + 1), np.float32)
    group = particles.create(path, columns, box=box, pixel_size=pixel, power=shells, whitening=shells, config=SETTINGS, seed=0, inputs={})
    images = group["images"]
    shard = images.shards[0]
    noise = rng.standard_normal((min(shard, count), box, box), dtype=np.float32).astype(np.float16)
    for start in range(0, count, shard):
        if alike and start:
            place = path / "images" / "c" / str(start // shard) / "0" / "0"
            place.parent.mkdir(parents=True)
            os.link(path / "images" / "c" / "0" / "0" / "0", place)
        else:
            images[start : start + shard] = np.roll(noise, start // shard, 0)[: count - start]
    stores.finish(group)
    return Particles(stores.open_store(path, "particles"))


def table(count: int, box: int, pixel: float, rng: np.random.Generator) -> ParticleTable:
    """Particles without names: random poses and defoci, one optics group."""
    one = np.ones(1)
    optics = Optics(["simulated"], 300 * one, 2.7 * one, 0.1 * one, pixel * one, np.full(1, box), 0 * one, 0 * one, [[]], [[]])
    defocus = rng.uniform(1e4, 2.5e4, count)
    zeros = np.zeros(count)
    whole = np.arange(count)
    return ParticleTable(
        source=Path("simulated"), id=whole, image_names=[], stacks=[], stack=zeros.astype(np.int32), index=whole, row=whole,
        rotation=random_rotations(count, torch.Generator().manual_seed(0)).numpy(), shift=rng.normal(0, 10, (count, 2)), defocus_u=defocus,
        defocus_v=defocus - 300, defocus_angle=rng.uniform(0, 180, count), phase_shift=zeros, ctf_scale=zeros + 1,
        half_set=zeros.astype(np.int8), group=zeros.astype(np.int32), optics=optics,
    )  # fmt: skip


def stream(data: Particles, batch: int, lanes: int, memory_mib: int, seconds: float) -> dict[str, float]:
    """Images and MB a second of the first ``seconds`` of an epoch, or all of it: reading, mixing, CTFs, in the background thread."""
    done = 0
    began = time.perf_counter()
    for b in prefetch(batches(data, range(lanes), lanes, batch, memory_mib, seed=0, epoch=0)):
        done += len(b.rows)
        took = time.perf_counter() - began
        if took > seconds:
            break
    rate = done / (time.perf_counter() - began)
    return {"images": done, "images_per_second": rate, "MB_per_second": rate * data.box**2 * data.images.dtype.itemsize / 1e6}


def trained(path: Path, gaussians: int, batch: int, seconds: float) -> float:
    """Peak memory, GB, of stage 2 on a store for so long, in a process of its own."""
    command = [sys.executable, "-m", __name__, str(path), str(gaussians), str(batch), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
    return float(done.stdout.splitlines()[-1])


def train(path: Path, gaussians: int, batch: int, seconds: float) -> None:
    """The process of ``trained``: the loop of the pipeline, which a signal ends as it does on a cluster, saved."""
    loop.start_threads(0)
    data = Particles(stores.open_store(path, "particles"))
    model, config = scaling.mixture(scaling.Size(2, gaussians, data.box, batch))
    config = config.model_copy(update={"batch": batch, "epochs": 1000})
    z = torch.randn(len(data), model.latent, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, team() as alone:
        metrics = Path(folder) / "metrics.jsonl"

        def end() -> None:
            while not metrics.exists():  # it has begun
                time.sleep(0.1)
            time.sleep(seconds)
            os.kill(os.getpid(), signal.SIGUSR1)

        threading.Thread(target=end, daemon=True).start()
        try:
            loop.fit("train", model, z, data, config, 0, alone, Path(folder), metrics, {})
        except loop.Interrupted:
            print(peak_gb(CPU))


def forget(folder: Path) -> None:
    """Ask the system to drop the files from its page cache, so that they come from the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def sources(folder: Path, count: int, box: int, rates: dict[str, Callable[[Particles], float]], repeats: int) -> dict[str, Any]:
    """One epoch of the same particles from disk, from the page cache, and from an array in memory; medians of interleaved runs.

    ``rates``: by name, what uses up an epoch of the particles and returns images a second.
    """
    path = folder / "sources.zarr"
    data = simulated(path, count, box)
    on_disk, in_memory = data.images, np.asarray(data.images[...])

    def cold() -> None:
        forget(path / "images")
        data.images = on_disk

    def warm() -> None:
        data.images = on_disk

    def memory() -> None:
        data.images = in_memory

    ways: dict[str, Callable[[], None]] = {"disk": cold, "page cache": warm, "memory": memory}
    found: dict[str, Any] = {}
    for name, rate in rates.items():
        runs: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(repeats):
            for way, prepare in ways.items():
                prepare()
                runs[way].append(rate(data))
        medians = {way: float(np.median(values)) for way, values in runs.items()}
        found[name] = {"images_per_second": medians, "time_out_of_core_over_in_memory": medians["memory"] / medians["disk"]}
    disk = raw_read(path / "images")
    return found | {
        "particles": count, "box": box, "disk_MB_per_second": disk,
        "disk_images_per_second": disk * 1e6 / (box**2 * on_disk.dtype.itemsize),
    }  # fmt: skip


def raw_read(folder: Path) -> float:
    """MB a second of reading the files of a folder in turn, none of them in the page cache."""
    forget(folder)
    began, size = time.perf_counter(), 0
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            with file.open("rb", buffering=0) as f:
                while block := f.read(8 << 20):
                    size += len(block)
    return size / 1e6 / (time.perf_counter() - began)


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
