"""What each stage of a run is doing: from the stores' complete flags, metrics and logs."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cryospire.config import OPERATIONAL, Config, section
from cryospire.conventions import InputError
from cryospire.io import stores
from cryospire.log import duration
from cryospire.site import estimate, lock

# Stage -> what it writes, in the order of the workflow.
STAGES = {
    "simulate": "benchmarks/simulate.tsv", "preflight": "preflight.json", "preprocess": "particles.zarr", "consensus": "consensus.zarr",
    "discover": "discovery.zarr", "parts": "parts.zarr", "train": "model.zarr",
    "reconstruct": "reconstruction.zarr", "analyse": "analysis.zarr", "assemble": "volumes.zarr", "evaluate": "evaluation.json",
    "validate": "validation.json", "report": "report.html",
}  # fmt: skip
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "CANCELLED", "PREEMPTED", "DEADLINE", "BOOT_FAIL")  # SLURM's words
FRESH = 180.0  # s since the last line of a log or metrics after which an unfinished stage no longer counts as running


@dataclass(frozen=True)
class Stage:
    """One stage: ``state`` is complete, outdated (complete, of an input that has changed since), running, queued (a job that SLURM has
    not started), failed, stopped or waiting (for other stages); ``last`` its newest metrics record."""

    name: str
    state: str
    last: dict[str, Any] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    remark: str = ""

    @property
    def left(self) -> float | None:
        """Seconds left, at the rate of the newest record."""
        rate = self.last.get("images_per_second")
        return (self.last["total"] - self.last["done"]) / rate if self.state == "running" and rate else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON-lines file; a line that is being written is skipped."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def newest(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The newest value of everything, from records of this start: those that had done no more than the last one has."""
    done = records[-1].get("done", 0) if records else 0
    return {k: v for r in records if r.get("done", 0) <= done for k, v in r.items()}


def jobs() -> dict[str, tuple[str, str]]:
    """State and reason of own jobs that SLURM knows, ended some minutes ago at most; none where there is no SLURM or it does not answer."""
    try:
        done = subprocess.run(["squeue", "-h", "--me", "--states=all", "-o", "%i %T %r"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    rows = [line.split(maxsplit=2) for line in done.stdout.splitlines()] if done.returncode == 0 else []
    return {job: (state, reason) for job, state, reason in rows}


def read_stage(results: Path, name: str, now: float, queue: Mapping[str, tuple[str, str]]) -> Stage:
    """State of one stage from what it has written, and from the ``queue`` of jobs; nothing is locked, nothing changed."""
    target, log = results / STAGES[name], results / "logs" / f"{name}.log"
    metrics = results / "logs" / f"{name}.metrics.jsonl"
    records = read_metrics(metrics)
    last = newest(records)
    if finished(target):
        changed = outdated(target)
        if changed:
            return Stage(name, "outdated", last, records, f"made of {', '.join(changed)} as it was before")
        return Stage(name, "complete", last, records)
    submitted = log.with_suffix(".job")  # by cluster/slurm/submit.py
    job = submitted.read_text().strip() if submitted.exists() else ""
    state, reason = queue.get(job, ("", ""))
    if state == "PENDING":
        return Stage(name, "queued", last | {"job": job}, records, f"job {job} is in the queue ({reason})")
    if state and state not in ENDED:
        return Stage(name, "running", last | {"job": job}, records)
    checkpoints = results / "checkpoints" / name
    traces = [p for p in (log, metrics, checkpoints, target) if p.exists()]
    if not traces:
        return Stage(name, "waiting")
    tail = log.read_text(errors="replace").strip().splitlines()[-1:] if log.exists() else []
    if tail and ("error:" in tail[0].lower() or tail[0].startswith(("Traceback", "srun: error"))):
        return Stage(name, "failed", last, records, f"{tail[0]} ({log})")
    if state in ENDED and state != "COMPLETED":
        return Stage(name, "failed", last, records, f"job {job}: {state.lower().replace('_', ' ')} ({log})")
    fresh = now - max(p.stat().st_mtime for p in traces) < FRESH
    if log.exists() and not (last.get("job") or submitted.exists()):  # of a workflow on this machine: what it has begun ends with it
        fresh = fresh and (any(map(lock.held, (results, results.parent))) or bool(lock.orphans(results)))
    return Stage(name, "running" if fresh else "stopped", last, records, "" if fresh else f"no sign of life; see {log}")


def finished(target: Path) -> bool:
    """A store says so itself; a file is whole when it is there."""
    if target.suffix != ".zarr":
        return target.exists()
    try:
        return bool(stores.open_partial(target).attrs.get("complete"))
    except InputError:
        return False


def outdated(target: Path) -> list[str]:
    """Stores that a complete store was made from and that are no longer what they were."""
    if target.suffix != ".zarr":
        return []
    inputs: Any = stores.open_partial(target).attrs["inputs"]
    changed = []
    for name, source in inputs.items():
        path = Path(source["path"])
        beside = [path] if path.is_absolute() else [folder / path.name for folder in target.resolve().parents[:2]]
        found = next((p for p in beside if p.exists()), None)  # none where results have been moved
        if path.suffix == ".zarr" and found and stores.fingerprint(found) != source["hash"]:
            changed.append(name)
    return changed


def read(results: Path) -> list[Stage]:
    """All stages; simulate and evaluate only where the run has them."""
    if not results.is_dir():
        raise InputError(f"{results}: no such folder of results")
    now, queue = time.time(), jobs()
    found = [read_stage(results, name, now, queue) for name in STAGES]
    for half in halves(results):
        found += [replace(read_stage(half, name, now, queue), name=f"{name} {half.name}") for name in estimate.OF_HALVES]
    return [s for s in found if s.name not in ("simulate", "evaluate", "preflight", "validate") or s.state != "waiting"]


def halves(results: Path) -> list[Path]:
    """Folders of the trainings on half-sets, where there are any."""
    return [path for path in (results / "half1", results / "half2") if path.is_dir()]


def altered(config: Config) -> dict[str, list[str]]:
    """Complete stores that were made with other settings or another seed than the config's: rule -> what differs.

    Snakemake reruns a stage whose parameters changed if it has a record of them; of a job that ended while it was dead it has none.
    """
    found = {}
    for k, folder in enumerate((config.output, config.output / "half1", config.output / "half2")):
        for stage in estimate.OF_HALVES if k else STAGES:
            target = folder / STAGES[stage]
            if target.suffix == ".zarr" and finished(target):
                own = section(getattr(config, stage)) if hasattr(config, stage) else {}
                attributes = stores.open_partial(target).attrs
                differ = [key for key in stores.differing(attributes, own) if key not in OPERATIONAL]
                if attributes["seed"] != config.seed + k * (stage != "parts"):
                    differ.append("seed")
                if differ:
                    found[f"{stage}_half" if k else stage] = differ
    return found


def cells(stage: Stage) -> list[str]:
    """A row of the table: stage, state, progress, epoch, loss, images/s, time left, memory, node, job."""
    last = stage.last
    done = 1.0 if stage.state in ("complete", "outdated") else last["done"] / last["total"] if last.get("total") else None
    share = f"{done:.0%}" if done is not None else ""
    number = {k: last.get(k) for k in ("epoch", "loss", "images_per_second", "memory_gb")}
    text = [f"{number[k]:{f}}" if number[k] is not None else "" for k, f in zip(number, ("d", ".3f", ",.0f", ".2f"), strict=True)]
    left = duration(stage.left) if stage.left is not None else ""
    return [stage.name, stage.state, share, text[0], text[1], text[2], left, text[3], str(last.get("host", "")), str(last.get("job", ""))]


def run(results: Path) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    colours = {
        "complete": "green", "outdated": "yellow", "running": "cyan", "queued": "blue", "failed": "bold red", "stopped": "yellow",
        "waiting": "dim",
    }  # fmt: skip
    stages = read(results)
    table = Table(title=str(results), title_justify="left", box=None, header_style="bold", pad_edge=False, collapse_padding=True)
    for head in ("stage", "state", "done", "epoch", "loss", "images/s", "left", "GB", "node", "job"):
        words = head in ("stage", "state", "node", "job")
        # Where a terminal is narrow, names of nodes are cut; nothing else is.
        table.add_column(head, justify="left" if words else "right", no_wrap=head != "node", overflow="ellipsis")
    for stage in stages:
        row = cells(stage)
        table.add_row(row[0], f"[{colours[stage.state]}]{row[1]}[/]", *row[2:])
    console = Console()
    console.print(table)
    for stage in stages:
        if stage.remark:
            console.print(f"{stage.name}: {stage.remark}", style=colours[stage.state], markup=False)
