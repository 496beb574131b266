"""What this machine is, how fast it multiplies and copies, how time and memory are measured, and the tables of a result."""

from __future__ import annotations

import gc
import os
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from cryospire import __version__
from cryospire.log import memory_gb

PARTS = ("feed", "network", "splat", "fft", "optimiser", "probe")
REPEATS = 3  # at least, of everything timed


def machine() -> dict[str, Any]:
    """Where and when, with which versions, and how busy it was with other work."""
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    packages: tuple[Any, ...] = (torch, numba, np)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "memory_GB": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        "load_before": os.getloadavg(),
        "versions": {"cryospire": __version__, "python": platform.python_version()} | {m.__name__: str(m.__version__) for m in packages},
    }


def median_time(work: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Seconds of ``work``: median of at least three repeats after one that is not counted."""
    times: list[float] = []
    while len(times) < REPEATS + 1 or (sum(times) < seconds and len(times) < 50):
        wait(device)
        began = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - began)
    return float(np.median(times[1:]))


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def ceilings(matrix: int, device: torch.device, seconds: float) -> dict[str, float]:
    """Measured rates of this machine: a float32 matrix product, FLOP/s, and a copy, bytes read and written a second."""
    a, b = torch.randn(2, matrix, matrix, device=device)
    source = torch.randn(matrix**2 * (64 if device.type == "cuda" else 16), device=device)
    target = torch.empty_like(source)
    return {
        "matmul_flops": 2 * matrix**3 / median_time(lambda: a @ b, device, seconds),
        "bytes_per_second": 2 * source.nbytes / median_time(lambda: target.copy_(source), device, seconds),
    }


def forget_peak(device: torch.device) -> None:
    """Start counting peak memory anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def peak_gb(device: torch.device) -> float:
    """Peak memory since ``forget_peak``, GB: allocated on the GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024 / 1e9 if "VmHWM" in status else memory_gb()


def resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9


def show(result: dict[str, Any], console: Console) -> None:
    """Tables of the result."""
    m = result["machine"]
    load = f"load {m['load_before'][0]:.1f} to {m['load_after'][0]:.1f}"
    console.print(f"{m['date']}  {m['cpu']}, {m['threads']} threads of {m['cores']} cores, GPU {m['gpu'] or 'none'}, {load}")
    for device, d in result["devices"].items():
        c = d["ceilings"]
        rates = f"matrix product {c['matmul_flops'] / 1e9:,.0f} GFLOP/s, copy {c['bytes_per_second'] / 1e9:,.1f} GB/s"
        table = Table(title=f"{device}: {rates}; ms an image")
        for name in ("stage", "head", "G", "box", "batch", "images/s", *PARTS, "step", "floor", "step/floor", "dense/splat", "peak GB"):
            table.add_column(name, justify="right")
        for r in d["cases"]:
            times = [f"{r['ms'][name]:.3f}" for name in (*PARTS, "step")]
            ratios = [f"{r['step_over_floor']:.1f}", f"{r['dense_over_splat']:.1f}", f"{r['peak_GB']:.2f}"]
            shape = [str(r[k]) for k in ("stage", "head", "gaussians", "box", "batch")]
            table.add_row(*shape, f"{r['images_per_second']:,.0f}", *times, f"{r['floor_ms']:.3f}", *ratios)
        console.print(table)
        for name, g in d["exponents"].items():
            console.print(f"cost ~ {name}^p over {g['points']}: " + ", ".join(f"{k} {g[k]:.2f}" for k in ("step", "network", "splat")))
    f = result["feed"]
    table = Table(title=f"feed alone, box {f['box']}, and the memory of stage 2 with it")
    for name in ("particles", "images/s", "MB/s", "columns GB", "peak GB", "of a training"):
        table.add_column(name, justify="right")
    for p in f["against_particles"]:
        memory = [f"{p[key]:.2f}" for key in ("columns_GB", "peak_GB", "training_peak_GB")]
        table.add_row(f"{p['particles']:,}", f"{p['images_per_second']:,.0f}", f"{p['MB_per_second']:,.0f}", *memory)
    console.print(table)
    s = f["sources"]
    growth = ", ".join(f"{name} {f['exponents'][key]:.2f}" for name, key in (("rate", "images_per_second"), ("memory", "training_peak_GB")))
    console.print(f"~ particles^p over {[p['particles'] for p in f['against_particles']]}: {growth}")
    for name, words in (("alone", "the feed alone"), ("training", "a training of stage 2")):
        rates = ", ".join(f"{way} {rate:,.0f}" for way, rate in s[name]["images_per_second"].items())
        longer = s[name]["time_out_of_core_over_in_memory"]
        console.print(f"an epoch of {s['particles']:,} particles, {words}, images/s from: {rates}; from disk {longer:.2f} times as long")
    console.print(f"disk alone, images/s: {s['disk_images_per_second']:,.0f}")
    p = result["preprocess"]
    runs = "; ".join(f"{r['particles']:,} by {r['workers']} worker(s) {r['images_per_second']:,.0f}" for r in p["runs"])
    core, disk = p["transforms_per_second_of_a_core"], p["images_per_second_of_the_disk"]
    console.print(f"preprocess, box {p['box']}, images/s: {runs}; a core transforms {core:,.0f} there and back, the disk takes {disk:,.0f}")
