"""Console messages, progress with time left, and metrics as JSON lines; silent on every rank but the first."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from cryospire.conventions import InputError

NOTE = 60.0  # seconds between records that a stage does not ask for: an epoch may take hours


def rank() -> int:
    """Rank of this process under torchrun, mpiexec or srun; 0 when alone.  What mpiexec starts in a job of SLURM inherits that job's."""
    for name in ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"):
        if name in os.environ:
            return int(os.environ[name])
    return 0


def say(message: str) -> None:
    """Print one line on rank 0, at once."""
    if rank() == 0:
        print(message, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """``75 -> '1:15'``, ``4000 -> '1:06:40'``."""
    minutes, s = divmod(int(round(seconds)), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def memory_gb() -> float:
    """Peak resident memory of this process, GB."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def node() -> str:
    """Name of this node, as the scheduler calls it."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


def job() -> str:
    """Id of the scheduler's job that this is; empty where it is none."""
    return next((os.environ[name] for name in ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID") if os.environ.get(name)), "")


def gpus() -> int:
    """GPUs of this job: what SLURM has given, else one a rank where this process uses one."""
    given = os.environ.get("SLURM_GPUS_ON_NODE", "")
    if given.isdigit():
        return int(given) * int(os.environ.get("SLURM_JOB_NUM_NODES", 1))
    torch = sys.modules.get("torch")
    return int(os.environ.get("WORLD_SIZE", 1)) if torch is not None and torch.cuda.is_available() else 0


class Progress:
    """Progress of one stage: a line at most every ``every`` seconds, a metrics record at the start, at each ``record``, every minute
    and at the end.

    ``metrics`` is a JSON-lines file; each record holds ``time`` (Unix, s), ``stage``, ``done``, ``total``,
    ``memory_gb``, ``host``, ``job`` and ``gpus`` beside the caller's numbers.
    """

    def __init__(self, stage: str, total: int, unit: str = "images", metrics: Path | None = None, every: float = 5.0) -> None:
        self.stage, self.total, self.unit, self.every = stage, total, unit, every
        self.done = 0
        self.start = self.last = time.monotonic()
        self.noted = -math.inf
        self.resumed = 0
        self.file: TextIO | None = None
        if metrics is not None and rank() == 0:
            metrics.parent.mkdir(parents=True, exist_ok=True)
            self.file = metrics.open("a")

    def skip(self, done: int) -> None:
        """Count work found already done (a resumed run) without letting it flatter the rate."""
        self.done = self.resumed = done

    def advance(self, n: int, text: str = "") -> None:
        self.done += n
        now = time.monotonic()
        rate = (self.done - self.resumed) / max(now - self.start, 1e-9)
        if now - self.noted >= NOTE:
            self.record(**({"images_per_second": rate} if self.unit == "images" and self.noted > 0 else {}))
            self.noted = now
        if now - self.last >= self.every or self.done >= self.total:
            self.last = now
            left = duration((self.total - self.done) / rate) if rate > 0 else "?"
            say(f"{self.stage:<10} {self.done:>9,}/{self.total:,} {self.unit}  {rate:8.1f}/s  left {left:>7}  {text}")

    def record(self, **numbers: Any) -> None:
        if self.file is not None:
            base = {
                "time": time.time(), "stage": self.stage, "done": self.done, "total": self.total,
                "memory_gb": round(memory_gb(), 3), "host": node(), "job": job(), "gpus": gpus(),
            }
            try:
                self.file.write(json.dumps(base | numbers) + "\n")
                self.file.flush()
            except OSError as error:
                raise InputError(f"{self.file.name}: could not be written: {error.strerror}") from error

    def close(self) -> None:
        if self.file is not None:
            self.file.close()

    def __enter__(self) -> Progress:
        self.record()
        return self

    def __exit__(self, *exc: object) -> None:
        if exc[0] is None:
            self.record()
        self.close()
