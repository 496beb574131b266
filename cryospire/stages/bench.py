"""Speed of training on this machine: what a step spends where, against the dense splat and against the hardware's floor.

Every number is a median of several repeats, and what is compared is measured in one run.  Parts of a step are timed alone,
forward and backward; ``images_per_second`` is the whole step with the feed in its background thread, as training runs.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cryospire import kernels
from cryospire.config import Discover, Train, Training
from cryospire.io import stores
from cryospire.log import say
from cryospire.maths import projection
from cryospire.maths.losses import residual_energy
from cryospire.stages import bench_preprocess
from cryospire.stages.bench_feed import SPECIMEN, simulated, sources, stream, trained
from cryospire.stages.bench_machine import REPEATS, ceilings, forget_peak, machine, median_time, peak_gb, resident, show, wait
from cryospire.stages.discover import seed_density
from cryospire.stages.train import SMALLEST
from cryospire.training import loop
from cryospire.training.data import Batch, Particles, batches, prefetch
from cryospire.training.latents import Latents
from cryospire.training.model import Mixture

LATENT, FEATURES, COARSE, ANCHORS = 4, 24, 2048, 5
FED = 2  # batches of which the feed is timed
TRAINED = 100  # times as long as anything is timed, a training runs whose memory is read
WIDE = 160  # characters of a table that goes into a file


@dataclass(frozen=True)
class Case:
    """One training to time; ``batch`` is small where a step is slow, on CPU."""

    stage: int
    head: str
    gaussians: int
    box: int
    batch: int


@dataclass(frozen=True)
class Plan:
    """Sizes of a whole benchmark."""

    cases: tuple[Case, ...]
    gaussians: tuple[int, ...]  # of the fit of cost against G; the cases hold those of stage 2
    boxes: tuple[int, ...]
    particles: tuple[int, ...]
    preprocessed: tuple[int, ...]
    feed_box: int
    feed_particles: int  # of the comparison of disk and memory
    seconds: float  # for each thing timed, about
    matrix: int


FULL = Plan(
    (
        Case(1, "mlp", 2048, 128, 32),
        *(Case(2, "factorized", g, b, 128) for g in (8192, 16384) for b in (128, 256)),
        *(Case(2, "mlp", g, b, 2) for g in (8192, 16384) for b in (128, 256)),
    ),
    (4096, 8192, 16384), (64, 128, 256), (10_000, 100_000, 1_000_000), (10_000, 100_000), 128, 8192, 0.4, 2048,
)  # fmt: skip
QUICK = Plan(
    (Case(1, "mlp", 32, 16, 8), Case(2, "factorized", 64, 16, 8), Case(2, "mlp", 64, 16, 8)),
    (32, 64, 128), (16, 24, 32), (200, 400, 800), (300, 600), 16, 300, 0.02, 128,
)  # fmt: skip


def run(output: Path, quick: bool = False) -> None:
    """Measure, print tables, write JSON."""
    plan = QUICK if quick else FULL
    loop.start_threads(0)
    result: dict[str, Any] = {"machine": machine(), "quick": quick, "devices": {}}
    with tempfile.TemporaryDirectory(prefix="cryospire-bench-", dir=output.resolve().parent) as folder:
        for device in [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]:
            result["devices"][device.type] = measure(plan, device, Path(folder))
        result["feed"] = feed(plan, Path(folder))
        say("bench: preprocess")
        result["preprocess"] = bench_preprocess.rates(Path(folder), plan.preprocessed, plan.feed_box, plan.seconds)
    result["machine"]["load_after"] = os.getloadavg()
    output.write_text(json.dumps(result, indent=1))
    show(result, Console(width=None if sys.stdout.isatty() else WIDE))
    say(f"bench: {output}")


def measure(plan: Plan, device: torch.device, folder: Path) -> dict[str, Any]:
    """All cases on one device, and how the cost of a step grows with G and with the box."""
    limits = ceilings(plan.matrix, device, plan.seconds)
    rows = {case: one(case, device, folder, limits, plan.seconds) for case in _on(plan.cases, device)}
    base = next(c for c in rows if c.stage == 2 and c.head == "factorized")
    series = {"gaussians": [replace(base, gaussians=g) for g in plan.gaussians], "box": [replace(base, box=b) for b in plan.boxes]}
    for case in (c for points in series.values() for c in points if c not in rows):
        rows[case] = one(case, device, folder, limits, plan.seconds)
    growth: dict[str, Any] = {}
    for name, points in series.items():
        x = [getattr(c, name) for c in points]
        growth[name] = {"points": x}
        for key in ("step", "network", "splat"):
            growth[name][key] = fit([(v, rows[c]["ms"][key]) for v, c in zip(x, points, strict=True)])
    return {"ceilings": limits, "cases": [asdict(case) | row for case, row in rows.items()], "exponents": growth}


def _on(cases: tuple[Case, ...], device: torch.device) -> list[Case]:
    return [replace(c, batch=max(c.batch, 64)) if device.type == "cuda" and c.box > 16 else c for c in cases]


def fit(points: list[tuple[float, float]]) -> float:
    """Exponent p of ``y ~ x^p``, by least squares of the logarithms."""
    x, y = np.log(np.array(points)).T
    return float(np.polyfit(x, y, 1)[0])


def mixture(case: Case) -> tuple[Mixture, Training]:
    """Gaussians where and as wide as the stages start them, in an ellipsoid that fills a sixteenth of the box."""
    torch.manual_seed(0)
    box, pixel = case.box, SPECIMEN / case.box
    x = np.linspace(-1, 1, box, endpoint=False)
    inside = ((x[:, None, None] / 0.6) ** 2 + (x[:, None] / 0.45) ** 2 + (x / 0.45) ** 2 < 1).astype(np.float32)
    section = Discover if case.stage == 1 else Train
    config: Training = section(gaussians=case.gaussians, head=case.head, batch=case.batch, lanes=min(8, case.batch))
    sizes = [len(part) for part in np.array_split(np.arange(case.gaussians), ANCHORS)] if case.stage == 2 else None
    model = Mixture(config, LATENT, FEATURES, case.gaussians, box, pixel, sizes)
    centre, scale, amplitude = seed_density(inside, inside, case.gaussians, pixel, 0)
    if case.stage == 2:  # children of stage 1's Gaussians are 0.7 as wide
        wide = seed_density(inside, inside, min(COARSE, case.gaussians), pixel, 0)[1][0]
        scale = (0.7 * wide).clamp(min=SMALLEST * pixel).expand(case.gaussians)
    model.place(centre, scale, amplitude)
    torch.nn.init.normal_(model.feature, std=0.1)
    if case.stage == 2:  # as in two thirds of a training
        model.hold(model.anchor == 0, torch.randn(64, LATENT))
    return model, config


def one(case: Case, device: torch.device, folder: Path, limits: dict[str, float], seconds: float) -> dict[str, Any]:
    """Times of a step and its parts, ms an image."""
    say(f"bench: {device.type}, stage {case.stage}, {case.head}, G {case.gaussians:,}, box {case.box}")
    forget_peak(device)
    model, config = mixture(case)
    model.to(device)
    data = _store(folder, case.box, (64 if device.type == "cuda" else 4) * case.batch).to(device)
    latents = Latents.of(config, LATENT, 0.1 * torch.randn(len(data), LATENT).to(device), 0)
    adam = loop.optimizer(model, config)
    first = next(_epoch(data, config)).to(device)
    on = loop.seen(model, latents.take(first.rows).detach(), first)
    step = stepper(model, config, latents, adam)
    step(first)
    times = {name: median_time(work, device, seconds) for name, work in parts(model, config, latents, adam, first, on).items()}
    z, lanes = latents.z[: case.batch], range(config.lanes)
    times["probe"] = median_time(lambda: loop.probe(model, z, first, config, lanes, (0,)), device, seconds) / loop.PROBE_EVERY
    times["feed"] = median_time(lambda: list(islice(_epoch(data, config), FED)), device, seconds) / FED
    times["step"] = median_time(lambda: step(first), device, seconds) + times["probe"]
    intervals = streamed(step, data, config, device, seconds)
    floor = floor_seconds(case, model, on, limits)
    return {
        "images_per_second": case.batch / (intervals + times["probe"]), "ms": {name: 1e3 * t / case.batch for name, t in times.items()},
        "floor_ms": 1e3 * floor / case.batch, "step_over_floor": times["step"] / floor, "peak_GB": peak_gb(device),
        **against_dense(model, config, on, device, seconds),
    }  # fmt: skip


def stepper(model: Mixture, config: Training, latents: Latents, adam: torch.optim.Optimizer) -> Callable[[Batch], None]:
    """The step of a training, but for the probes of its latents' Fisher information."""

    def step(batch: Batch) -> None:
        loop.descend(model, model, latents, adam, batch, latents.take(batch.rows), config, 1, config.lr_z)

    return step


def epoch_of(case: Case, count: int) -> Callable[[Particles], float]:
    """Images a second of an epoch of a training of ``count`` particles on the CPU, fed as a training is."""
    model, config = mixture(case)
    latents = Latents.of(config, LATENT, 0.1 * torch.randn(count, LATENT), 0)
    step = stepper(model, config, latents, loop.optimizer(model, config))

    def rate(data: Particles) -> float:
        began = time.perf_counter()
        for batch in prefetch(_epoch(data, config), torch.device("cpu")):
            step(batch)
        return len(data) / (time.perf_counter() - began)

    return rate


def _epoch(data: Particles, config: Training) -> Iterator[Batch]:
    return batches(data, range(config.lanes), config.lanes, config.batch, config.memory_mib, 0, 0)


def streamed(step: Callable[[Batch], None], data: Particles, config: Training, device: torch.device, seconds: float) -> float:
    """Median seconds of a step, batches coming from the background thread; a GPU is waited for as often as in a training."""
    times: list[float] = []
    several = loop.AGREE_EVERY if device.type == "cuda" else 1
    while len(times) < REPEATS or several * sum(times) < 2 * seconds:
        last = time.perf_counter()
        for count, batch in enumerate(prefetch(_epoch(data, config), device), 1):
            step(batch)
            if count % several:
                continue
            wait(device)
            times.append((time.perf_counter() - last) / several)
            last = time.perf_counter()
            if len(times) >= REPEATS and several * sum(times) > 2 * seconds:
                break
    return float(np.median(times))


def _store(folder: Path, box: int, count: int) -> Particles:
    path = folder / f"box{box}_{count}.zarr"
    if path.exists():
        return Particles(stores.open_store(path, "particles"))
    return simulated(path, count, box)


def parts(
    model: Mixture, config: Training, latents: Latents, adam: torch.optim.Optimizer, batch: Batch, on: list[Tensor]
) -> dict[str, Callable[[], Any]]:
    """The parts of a step, each alone, forward and backward."""
    z, rotation, shift, transfer, images = on
    with torch.no_grad():
        centre, amplitude = model.gaussians(z)
        scale = model.scale
    to_centre, to_amplitude, to_image = torch.randn_like(centre), torch.randn_like(amplitude), torch.randn_like(images)

    def network() -> None:
        torch.autograd.backward(model.gaussians(z.detach().requires_grad_()), [to_centre, to_amplitude])

    def splat() -> None:
        c, a, s = (t.detach().requires_grad_() for t in (centre, amplitude, scale))
        xy = rotation[:, :2] @ c + shift[:, :, None] / model.pixel_size
        kernels.splat(xy, projection.peak_weight(a, s), s / model.pixel_size, model.box, config.cutoff).backward(to_image)

    def optimiser() -> None:
        adam.step()
        own = latents.take(batch.rows).detach()
        latents.step(batch.rows, own, torch.zeros_like(own), config.lr_z)

    def fft() -> None:
        residual_energy(images.detach().requires_grad_(), transfer, images, model.strength_sd).sum().backward()

    return {"network": network, "splat": splat, "fft": fft, "optimiser": optimiser}


def against_dense(model: Mixture, config: Training, on: list[Tensor], device: torch.device, seconds: float) -> dict[str, float]:
    """Forward and backward of the splat of two images, truncated and by dense separable products: ms an image, and the ratio."""
    z, rotation, shift = (t[:2].detach() for t in on[:3])
    with torch.no_grad():
        centre, amplitude = model.gaussians(z)
        xy = rotation[:, :2] @ centre + shift[:, :, None] / model.pixel_size
        leaves = [xy, projection.peak_weight(amplitude, model.scale), model.scale / model.pixel_size]

    def both_ways(splat: Callable[..., Tensor], cutoff: float) -> None:
        splat(*(t.detach().requires_grad_() for t in leaves), model.box, cutoff).sum().backward()

    fast = median_time(lambda: both_ways(kernels.splat, config.cutoff), device, seconds)
    dense = median_time(lambda: both_ways(projection.splat, float("inf")), device, seconds)
    return {"dense_splat_ms": 1e3 * dense / len(z), "dense_over_splat": dense / fast}


def floor_seconds(case: Case, model: Mixture, on: list[Tensor], limits: dict[str, float]) -> float:
    """Least time of a step: its arithmetic at the rate of a matrix product, or its least traffic at the rate of a copy.

    Arithmetic: the network's products as counted, two operations a pixel of a window forward and six backward, three FFTs.
    Traffic: images and transfer functions read once; of each parameter eight passes (read, gradient twice, Adam's five).
    """
    with FlopCounterMode(display=False) as counter:
        centre, amplitude = model.gaussians(on[0].detach().requires_grad_())
        (centre.sum() + amplitude.sum()).backward()
    radius = torch.ceil(model.config.cutoff * model.scale.detach() / model.pixel_size)
    window = float((2 * radius + 1).square().sum())
    transform = 2.5 * case.box**2 * np.log2(case.box**2)
    flops = counter.get_total_flops() + case.batch * (8 * window + 3 * transform)
    traffic = on[3].nbytes + on[4].nbytes + 8 * sum(p.nbytes for p in model.parameters())
    return max(flops / limits["matmul_flops"], traffic / limits["bytes_per_second"])


def feed(plan: Plan, folder: Path) -> dict[str, Any]:
    """The loader alone against the number of particles, and from disk against memory."""
    config, points = Discover(batch=32), []
    cpu = torch.device("cpu")
    base = next(c for c in plan.cases if c.stage == 2)
    for count in plan.particles:
        say(f"bench: feed, {count:,} particles")
        gc.collect()
        before = resident()
        forget_peak(cpu)
        store = folder / f"feed{count}.zarr"
        data = simulated(store, count, plan.feed_box, alike=True)
        columns = resident() - before
        forget_peak(cpu)
        rates = stream(data, config.batch, config.lanes, config.memory_mib, 4 * plan.seconds)
        peaks = {"peak_GB": peak_gb(cpu), "training_peak_GB": trained(store, base.gaussians, base.batch, TRAINED * plan.seconds)}
        points.append({"particles": count, **rates, "columns_GB": columns, **peaks})
        del data
    growth = {key: fit([(p["particles"], p[key]) for p in points]) for key in ("images_per_second", "peak_GB", "training_peak_GB")}
    users: dict[str, Callable[[Particles], float]] = {
        "alone": lambda data: stream(data, config.batch, config.lanes, config.memory_mib, float("inf"))["images_per_second"],
        "training": epoch_of(replace(base, box=plan.feed_box), plan.feed_particles),
    }
    ways = sources(folder, plan.feed_particles, plan.feed_box, users, 3)
    return {"box": plan.feed_box, "memory_mib": config.memory_mib, "against_particles": points, "exponents": growth, "sources": ways}
