"""Preprocessing: images of noise on disk through the stage itself, beside the rate at which one core transforms images there and back."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cryospire.config import Config, Preprocess
from cryospire.conventions import particle_id
from cryospire.io import metadata_relion, mrc
from cryospire.stages import bench_feed, preprocess
from cryospire.stages.bench_machine import median_time
from cryospire.stages.status import read_metrics

CPU = torch.device("cpu")
SYNCED = 64 << 20  # bytes of a shard, by which the disk is measured


def rates(folder: Path, counts: tuple[int, ...], box: int, seconds: float) -> dict[str, Any]:
    """Images a second of the stage for each number of particles, by one worker, and for the largest by one on every CPU; what a core
    transforms, and what the disk takes of what is written, with every shard synced."""
    cpus = len(os.sched_getaffinity(0))
    stack = _stack(folder / "stack0.mrcs", min(counts), box)
    plans = [(count, 1) for count in counts] + ([(max(counts), cpus)] if cpus > 1 else [])
    runs = [{"particles": n, "workers": w, "images_per_second": once(folder, stack, n, box, w)} for n, w in plans]
    images = torch.randn(64, box, box)
    torch.set_num_threads(1)
    transform = median_time(lambda: torch.fft.irfft2(torch.fft.rfft2(images)), CPU, seconds) / len(images)
    torch.set_num_threads(cpus)
    shard = np.random.default_rng(0).bytes(SYNCED)
    disk = SYNCED / (2 * box**2) / median_time(lambda: synced(folder / "synced", shard), CPU, seconds)
    return {"box": box, "runs": runs, "transforms_per_second_of_a_core": 1 / transform, "images_per_second_of_the_disk": disk}


def synced(path: Path, content: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    path.unlink()


def once(folder: Path, stack: Path, count: int, box: int, workers: int) -> float:
    """Images a second of one run, from the first shard's start to the last one's end; stacks after the first are hard links to it."""
    star, output = folder / "particles.star", folder / "preprocess" / "particles.zarr"
    of_stack = mrc.stack_shape(stack)[0]
    stacks = [stack.with_name(f"stack{k}.mrcs") for k in range(-(-count // of_stack))]
    for link in stacks[1:]:
        if not link.exists():
            os.link(stack, link)
    names = [f"{k % of_stack + 1:06d}@{stacks[k // of_stack].name}" for k in range(count)]
    whole = np.arange(count)
    table = replace(
        bench_feed.table(count, box, bench_feed.SPECIMEN / box, np.random.default_rng(0)), source=star, image_names=names, stacks=stacks,
        id=np.array([particle_id(name) for name in names], np.int64), stack=(whole // of_stack).astype(np.int32), index=whole % of_stack,
    )  # fmt: skip
    metadata_relion.write_star(star, table)
    preprocess.run(Config(particles=star, output=output.parent, preprocess=Preprocess(workers=workers), threads=1), output=output)
    records = [r for r in read_metrics(output.parent / "logs" / "preprocess.metrics.jsonl") if "time" in r]
    shutil.rmtree(output.parent)
    return (records[-1]["done"] - records[0]["done"]) / (records[-1]["time"] - records[0]["time"])


def _stack(path: Path, count: int, box: int) -> Path:
    images = mrc.create_stack(path, count, box, bench_feed.SPECIMEN / box)
    rng = np.random.default_rng(0)
    for start in range(0, count, 1000):
        part = images[start : start + 1000]
        part[...] = rng.standard_normal(part.shape, dtype=np.float32)
    images.flush()  # type: ignore[attr-defined]
    return path
