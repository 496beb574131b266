"""What more ranks give: step time of one process and of two, what a step reduces, and a model of many ranks over a stated link.

``T(p) = overhead + image * images + 2 (p - 1) latency + 2 (p - 1) / p bytes / bandwidth``: an affine fit of the step of one process,
and a ring all-reduce (Patarasuk & Yuan 2009) that is not overlapped with anything, which is the worst case; DDP overlaps it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cryospire.config import Discover, Train, Training
from cryospire.conventions import InputError
from cryospire.log import say
from cryospire.maths.poses import random_rotations
from cryospire.stages.bench_machine import machine, median_time, wait
from cryospire.training import loop
from cryospire.training.data import Batch
from cryospire.training.distributed import Team, team
from cryospire.training.latents import Latents
from cryospire.training.model import Mixture

PAYLOADS = (1_000, 250_000, 1_000_000)  # floats, of the measured all-reduce
RANKS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Size:
    """The training that is measured."""

    stage: int
    gaussians: int
    box: int
    batch: int

    @property
    def batches(self) -> list[int]:
        """Images of the steps that are measured, over all ranks: up to a whole batch, since those of 32 tell little of 128."""
        return [self.batch >> k for k in (4, 3, 2, 1, 0) if self.batch >> k > 1]


@dataclass(frozen=True)
class Law:
    """Times in seconds, of a step and of an image in it; bytes reduced a step; the link between ranks."""

    overhead: float
    image: float
    bytes: int
    latency: float
    bandwidth: float

    def parts(self, ranks: int, images: float) -> dict[str, float]:
        """Seconds of a step in which each rank has ``images``."""
        return {
            "overhead": self.overhead,
            "images": self.image * images,
            "latency": 2 * (ranks - 1) * self.latency,
            "bandwidth": 2 * (ranks - 1) / ranks * self.bytes / self.bandwidth,
        }


def run(output: Path, *, latency_us: float, gbit: float, size: Size, step: tuple[float, float] | None, seconds: float = 2.0) -> None:
    """Measure here, predict there; JSON, and a figure beside it.  ``step``: overhead and image, s, of another device."""
    if output.suffix != ".json":
        raise InputError(f"{output}: the result is a .json; the figure goes beside it")
    one, two = (measured(ranks, size, seconds) for ranks in (1, 2))
    slope, intercept = np.polyfit(size.batches, [one["step"][str(b)] for b in size.batches], 1)
    overhead, image = step or (max(0.0, float(intercept)), float(slope))
    cost = np.polyfit([4 * n for n in PAYLOADS], [two["reduce"][str(n)] - one["reduce"][str(n)] for n in PAYLOADS], 1)
    law = Law(overhead, image, one["bytes"], latency_us * 1e-6, gbit * 1e9 / 8)
    table = {kind: [row(law, p, size.batch, kind) for p in RANKS] for kind in ("fixed", "growing")}
    result = {
        "machine": machine(), "size": asdict(size), "law": asdict(law),
        "fitted_here": {"overhead": float(intercept), "image": float(slope)}, "step": {"1": one["step"], "2": two["step"]},
        "gloo": {"seconds": float(cost[1]), "bytes_per_second": 1 / float(cost[0])},
        "predicted": table,
    }  # fmt: skip
    output.write_text(json.dumps(result, indent=1))
    show(result, size, law)
    draw(result, output.with_suffix(".png"))
    say(f"scaling: {output}, {output.with_suffix('.png')}")


def row(law: Law, ranks: int, batch: int, kind: str) -> dict[str, Any]:
    """One line of the prediction: the batch fixed over all ranks, or growing with them."""
    images = batch / ranks if kind == "fixed" else batch
    parts = law.parts(ranks, images)
    time, alone = sum(parts.values()), sum(law.parts(1, batch).values())
    speed = images * ranks / time / (batch / alone)
    return {
        "ranks": ranks, "seconds": time, "speed_up": speed, "efficiency": speed / ranks, "limit": max(parts, key=lambda k: parts[k]),
        "images_per_second": images * ranks / time,
    }  # fmt: skip


def measured(ranks: int, size: Size, seconds: float) -> dict[str, Any]:
    """What ``probe`` finds with so many ranks of one thread on this machine."""
    say(f"scaling: {ranks} rank(s), stage {size.stage}, {size.gaussians:,} Gaussians, box {size.box}")
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        words = [str(result), *map(str, asdict(size).values()), str(seconds)]
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        env = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"} | ({} if ranks == 1 else {"CUDA_VISIBLE_DEVICES": ""})
        done = subprocess.run([sys.executable, *launch, "-m", __name__, *words], env=env, capture_output=True, text=True)
        if done.returncode:
            raise InputError(f"scaling: {ranks} rank(s) failed: {done.stderr.strip().splitlines()[-1] if done.stderr else done.returncode}")
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def probe(result: Path, size: Size, seconds: float) -> None:
    """One rank: steps of several sizes, with their share of the latents' probes, and all-reduces alone; rank 0 writes what it took."""
    loop.keep_memory()
    with team() as ranks:
        model, config = mixture(size)
        model.to(ranks.device)
        wrapped = ranks.wrap(model)
        adam = loop.optimizer(model, config)
        found: dict[str, Any] = {"bytes": sum(p.nbytes for p in model.parameters()), "step": {}, "reduce": {}}
        for images in size.batches:
            batch = data(images, size.box, ranks)
            latents = Latents.of(config, model.latent, torch.randn(len(batch.rows), model.latent).to(ranks.device), 0)
            shape = config.model_copy(update={"batch": images, "lanes": ranks.size})

            def learn(batch: Batch = batch, latents: Latents = latents, shape: Training = shape) -> None:
                latents.learn(loop.probe(model, latents.z, batch, shape, range(ranks.rank, ranks.rank + 1), (0,)), ranks)

            def step(batch: Batch = batch, latents: Latents = latents) -> None:
                loop.descend(model, wrapped, latents, adam, batch, latents.take(batch.rows), config, ranks.size, config.lr_z)

            learn()
            found["step"][images] = agreed(step, ranks, seconds) + agreed(learn, ranks, seconds / 4) / loop.PROBE_EVERY
        for count in PAYLOADS:
            found["reduce"][count] = agreed(Backward(ranks.wrap(Payload(count).to(ranks.device))), ranks, seconds / 4)
        if ranks.rank == 0:
            result.write_text(json.dumps(found))


def agreed(work: Callable[[], Any], ranks: Team, seconds: float) -> float:
    """Least seconds of ``work``, which every rank does equally often; other work on the machine only adds."""
    once = median_time(work, ranks.device, 0.0)
    times = []
    for _ in range(ranks.broadcast(int(np.clip(seconds / once, 3, 200)))):
        begun = time.perf_counter()
        work()
        wait(ranks.device)
        times.append(time.perf_counter() - begun)
    return min(times)


@dataclass
class Backward:
    """Forward and backward of a module that needs no input."""

    module: nn.Module

    def __call__(self) -> None:
        self.module().backward()


class Payload(nn.Module):
    """So many numbers whose gradient is reduced, and nothing else."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(count))

    def forward(self) -> torch.Tensor:
        return self.values.sum()


def mixture(size: Size) -> tuple[Mixture, Training]:
    """Gaussians spread over a ball of a third of the box, with the settings of a stage."""
    generator = torch.Generator().manual_seed(0)
    config: Training = (Discover if size.stage == 1 else Train)(gaussians=size.gaussians)
    anchors = [len(a) for a in np.array_split(np.arange(size.gaussians), 5)] if size.stage == 2 else None
    model = Mixture(config, 4, 24, size.gaussians, size.box, 3.0, anchors)
    centre = torch.randn(size.gaussians, 3, generator=generator) * (size.box / 12 * 3.0)
    width = 3.0 * size.box / 128 * (1.2 if size.stage == 2 else 2.0)
    model.place(centre, torch.full((size.gaussians,), width), torch.full((size.gaussians,), 0.01))
    if size.stage == 2:  # as in two thirds of a training
        model.hold(model.anchor == 0, torch.randn(64, 4, generator=generator))
    return model, config


def data(images: int, box: int, ranks: Team) -> Batch:
    """This rank's share of a step of so many images."""
    generator, own = torch.Generator().manual_seed(ranks.rank), images // ranks.size
    made = (
        torch.arange(own), torch.randn(own, box, box, generator=generator), random_rotations(own, generator).float(), torch.zeros(own, 2),
        torch.ones(own, box, box // 2 + 1),
    )  # fmt: skip
    return Batch(*made, images).to(ranks.device)


def show(result: dict[str, Any], size: Size, law: Law) -> None:
    """The numbers, for people."""
    one, two = ({int(k): v for k, v in result["step"][n].items()} for n in ("1", "2"))
    m, gloo = result["machine"], result["gloo"]
    print(f"{m['date'][:10]}  {m['cpu']}, {m['cores']} cores, GPU {m['gpu'] or 'none'}, load {m['load_before'][0]:.1f}")
    print(f"stage {size.stage}, {size.gaussians:,} Gaussians, box {size.box}; a step reduces {law.bytes / 1e6:.2f} MB")
    for b in size.batches:
        print(f"  {b:3d} images: 1 rank {1e3 * one[b]:8.1f} ms, 2 ranks {1e3 * two[b]:8.1f} ms, {one[b] / two[b]:.2f} times as fast")
    print(f"all-reduce between 2 ranks here: {1e3 * gloo['seconds']:.2f} ms and {gloo['bytes_per_second'] / 1e6:,.0f} MB/s")
    print(f"model: {1e3 * law.overhead:.2f} ms a step, {1e3 * law.image:.3f} ms an image, ", end="")
    print(f"link {1e6 * law.latency:g} us, {law.bandwidth * 8e-9:g} Gbit/s")
    for kind, words in (("fixed", f"{size.batch} images over all ranks"), ("growing", f"{size.batch} images a rank")):
        print(f"{words}:")
        for r in result["predicted"][kind]:
            took = f"{1e3 * r['seconds']:9.2f} ms  speed-up {r['speed_up']:6.1f}  efficiency {r['efficiency']:4.0%}"
            took += f"  reads {2e-6 * size.box**2 * r['images_per_second']:7,.0f} MB/s"  # half precision; what memory does not hold
            print(f"  {r['ranks']:3d} ranks {took}  most of it: {r['limit']}")


def draw(result: dict[str, Any], path: Path) -> None:
    """Speed-up against ranks: predicted both ways, measured here, and the ideal."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    axes.loglog(RANKS, RANKS, "k:", label="ideal", base=2)
    batch = result["size"]["batch"]
    for kind, label in (("growing", f"{batch} images a rank"), ("fixed", f"{batch} images over all ranks")):
        axes.plot(RANKS, [r["speed_up"] for r in result["predicted"][kind]], "o-", label=f"predicted, {label}")
    largest = str(batch)
    axes.plot(2, result["step"]["1"][largest] / result["step"]["2"][largest], "*", ms=12, label=f"measured here, {largest} images, 2 ranks")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.set_xlabel("ranks")
    axes.set_ylabel("speed-up")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    words = sys.argv[1:]
    probe(Path(words[0]), Size(*map(int, words[1:5])), float(words[5]))
