"""GPU-hours and energy of a run: from SLURM's accounting where the site keeps one, else GPUs times wall time."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from cryospire.stages import status

FIELDS = "JobID,ElapsedRaw,AllocTRES,ConsumedEnergyRaw"
ABSURD = 1e15  # J; SLURM's word for "not measured" is a number near 2^64


@dataclass(frozen=True)
class Usage:
    """What jobs took, over every time they were put back in the queue; ``joule`` is 0 where nothing measures it."""

    gpu_hours: float
    joule: float
    source: str


def of_run(root: Path, seconds: dict[str, float]) -> Usage | None:
    """Of the stages that used GPUs or told a job id; ``seconds`` is their wall time.  None where there is nothing to tell."""
    records = {stage: status.read_metrics(root / "logs" / f"{stage}.metrics.jsonl") for stage in status.STAGES}
    for half in status.halves(root):
        records |= {f"{stage} {half.name}": status.read_metrics(half / "logs" / f"{stage}.metrics.jsonl") for stage in status.STAGES}
    jobs = sorted({str(r["job"]) for found in records.values() for r in found if r.get("job")})
    counted = from_accounting(sacct(jobs)) if jobs else None
    gpus = {stage: max((int(r.get("gpus", 0)) for r in found), default=0) for stage, found in records.items()}
    hours = sum(n * seconds.get(stage, 0.0) / 3600 for stage, n in gpus.items())
    if counted is not None and (counted.gpu_hours or not hours):  # not every site's accounting knows of GPUs
        return counted
    return Usage(hours, counted.joule if counted else 0.0, "GPUs times the wall time of each stage's last start") if hours else None


def sacct(jobs: list[str]) -> str:
    """What the accounting says of jobs and their steps, one a line; empty where there is none."""
    if shutil.which("sacct") is None:
        return ""
    command = ["sacct", "--duplicates", "--noheader", "--parsable2", f"--jobs={','.join(jobs)}", f"--format={FIELDS}"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def from_accounting(text: str) -> Usage | None:
    """Sums over lines of ``sacct``; None where it knows no job."""
    hours = allocation = steps = 0.0
    known = False
    for line in text.splitlines():
        words = line.split("|")
        if len(words) != len(FIELDS.split(",")) or not words[1].isdigit():
            continue
        job, elapsed, tres, energy = words
        joule = float(energy) if energy.isdigit() and float(energy) < ABSURD else 0.0
        if "." in job:  # a step; some sites measure energy there only
            steps += joule
            continue
        known = True
        allocation += joule
        resources = dict(item.split("=", 1) for item in tres.split(",") if "=" in item)
        hours += int(resources.get("gres/gpu", 0)) * int(elapsed) / 3600
    return Usage(hours, max(allocation, steps), "the scheduler's accounting, every start included") if known else None
