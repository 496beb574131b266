"""What a cluster offers and what would fail: on the login node, and between two nodes inside a job."""

from __future__ import annotations

import math
import os
import shlex
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from cryospire.config import Training
from cryospire.conventions import InputError
from cryospire.site import estimate, settings
from cryospire.site.sbatch import flags
from cryospire.site.settings import Site

SPEED_MIB = 64  # written for the speed of the file system
SLOW = 50.0  # MiB/s
OF_NODES = ("node", "GPUs here", "C compiler", "MPI", "files")  # what is looked at on a node of a job as well
SHAPE = ("--partition", "--nodes", "--ntasks", "--cpus-per-task", "--time", "--mem", "--gres", "--gpus", "--gpus-per-node")  # of a job
SCHEDULERS = {"SLURM": "sbatch", "Grid Engine": "qconf", "PBS": "pbsnodes", "LSF": "bsub"}


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, what was found, and what would fail (empty: nothing)."""

    what: str
    found: str
    problem: str = ""


def run(site: Path, *, job: bool, launcher: Path) -> None:
    """Print every check; with ``job``, also those between two nodes.  Raises InputError where something would fail."""
    own = settings.load(site)
    checks = list(here(own, Path.cwd()))
    for check in checks:
        show(check)
    if job:
        for check in between_nodes(own, site, launcher):
            show(check)
            checks.append(check)
    problems = [f"{c.what}: {c.problem}" for c in checks if c.problem]
    if problems:
        raise InputError(f"{site}: {len(problems)} thing(s) would fail: " + "; ".join(problems))
    print("nothing found that would fail" + ("" if job else "; add --job to test two nodes"))


def show(check: Check) -> None:
    print(
        f"{'FAIL' if check.problem else 'ok  '}  {check.what:<15}{check.found}" + (f"  <- {check.problem}" if check.problem else ""),
        flush=True,
    )


def answer(command: list[str], seconds: float = 60) -> tuple[int, str]:
    """Exit code and output of a command; 127 where it does not exist, 124 where it does not end."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except FileNotFoundError:
        return 127, f"{command[0]}: not found"
    except subprocess.TimeoutExpired:
        return 124, f"{command[0]}: no answer in {seconds:.0f} s"
    return done.returncode, (done.stdout + done.stderr).strip()


def here(site: Site, folder: Path) -> Iterator[Check]:
    """What this process sees."""
    packages = ("torch", "snakemake", "zarr", "dask", "mpi4py")
    yield Check("versions", f"Python {sys.version.split()[0]}, " + ", ".join(f"{p} {version(p)}" for p in packages))
    inside = f", inside job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
    yield Check("node", f"{os.uname().nodename}, {len(os.sched_getaffinity(0))} CPUs of {os.cpu_count()}{inside}")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    blind = "torch sees none in this job; see gpu_request and envs/README.md" if inside and site.gpus_per_node and not names else ""
    yield Check("GPUs here", ", ".join(names) or "none" + (" (a login node need not have any)" if site.gpus_per_node else ""), blind)
    if names and find_spec("triton"):
        compiler = os.environ.get("CC") or shutil.which("clang") or shutil.which("gcc")
        yield Check("C compiler", compiler or "none", "" if compiler else "Triton needs one; load a module or install gcc")
    schedulers = [name for name, command in SCHEDULERS.items() if shutil.which(command)]
    none = "no sbatch, qconf, pbsnodes or bsub on PATH; use the profile cluster/local"
    yield Check("scheduler", ", ".join(schedulers) or "none", "" if schedulers else none)
    if "SLURM" in schedulers:
        yield from partitions(site)
        yield from requests(site)
    code, text = answer([sys.executable, "-c", "from mpi4py import MPI; print(MPI.Get_library_version())"])
    yield Check("MPI", text.splitlines()[0] if text else "", "" if code == 0 else "mpi4py finds no MPI library")
    yield file_system(folder)


def partitions(site: Site) -> Iterator[Check]:
    """Partitions of SLURM against what the site file asks for."""
    code, text = answer(["sinfo", "-h", "-o", "%P|%D|%c|%m|%G|%l"])
    if code:
        yield Check("partitions", text, "sinfo does not answer")
        return
    default = next((line.split("*|")[0] for line in text.splitlines() if "*|" in line), "")
    rows = [line.replace("*|", "|", 1).split("|") for line in text.splitlines()]
    for name, nodes, cpus, memory, gres, limit in rows:
        yield Check("partition", f"{name}: {nodes} nodes of {cpus} CPUs, {memory} MB, {gres.replace('(null)', 'no GPUs')}, up to {limit}")
    known = {row[0] for row in rows}
    for key in ("partition", "gpu_partition"):
        wanted = getattr(site, key)
        missing = set(filter(None, wanted.split(","))) - known
        if missing:
            yield Check(key, wanted, f"no partition {', '.join(sorted(missing))}; there are {', '.join(sorted(known))}")
    limits = {row[0]: minutes(row[5]) for row in rows}
    for wanted in sorted({site.partition or default, site.gpu_partition or site.partition or default}):
        longest = max((limits[name] for name in wanted.split(",") if name in limits), default=math.inf)
        if site.max_runtime > longest:
            problem = f"partition {wanted} ends jobs after {longest:.0f} minutes; jobs that ask for more would wait for ever"
            yield Check("max_runtime", f"{site.max_runtime} minutes", problem)
    if site.gpus_per_node and not any("gpu" in row[4] for row in rows):
        yield Check("GPUs", f"gpus_per_node: {site.gpus_per_node}", "no partition shows GPUs")


def minutes(limit: str) -> float:
    """Minutes of a time limit as sinfo writes it: ``infinite``, or ``days-hours:minutes:seconds`` without what is zero in front."""
    if limit == "infinite":
        return math.inf
    days, _, rest = limit.rpartition("-")
    hours, m, seconds = ([0.0, 0.0] + [float(v) for v in rest.split(":")])[-3:]
    return 1440 * float(days or 0) + 60 * hours + m + seconds / 60


def requests(site: Site) -> Iterator[Check]:
    """What jobs of this site ask for at most, as sbatch judges it; nothing is submitted."""
    most = site.ranks or 1 << (min(site.max_gpus, Training().lanes).bit_length() - 1)  # of the largest training
    nodes, gpus = estimate.shape(most, site)
    shapes = {
        "preprocess": (1, {"nodes": site.dask_nodes, "tasks": site.dask_workers}),
        "trainings": (site.cpus_per_task, {"nodes": nodes, "tasks": most, "gpu": gpus}),
        "MPI stages": (site.cpus_per_task, dict(zip(("nodes", "tasks"), estimate.over_mpi(site), strict=True))),
        "other stages": (site.cpus_per_task, {}),
    }
    for name, (threads, shape) in shapes.items():
        asked = flags(site, "check", threads, {"mem_mb": site.max_mem_mb or 2000, "runtime": site.max_runtime} | shape)
        code, text = answer(["sbatch", "--test-only", *asked, "--wrap=true"])
        shown = " ".join(flag for flag in asked if flag.split("=")[0] in SHAPE)
        hint = "; max_gpus (or ranks) is the most of a training" if name == "trainings" else ""
        yield Check(name, shown, f"sbatch refuses such a job{hint}: {text.splitlines()[-1] if text else code}" if code else "")


def file_system(folder: Path) -> Check:
    """Kind of file system, and its speed for one file, synced."""
    kind = answer(["stat", "-f", "-c", "%T", str(folder)])[1]
    file = folder / f".cryospire-{uuid.uuid4().hex}"
    block = os.urandom(1 << 20)
    try:
        start = time.monotonic()
        with file.open("wb") as out:
            for _ in range(SPEED_MIB):
                out.write(block)
            out.flush()
            os.fsync(out.fileno())
        speed = SPEED_MIB / (time.monotonic() - start)
    except OSError as error:
        return Check("files", f"{folder} ({kind})", f"cannot write: {error.strerror}")
    finally:
        file.unlink(missing_ok=True)
    free = shutil.disk_usage(folder).free / 1e9
    return Check(
        "files", f"{folder} ({kind}): {speed:.0f} MiB/s written, {free:.0f} GB free", "slow; choose another folder" if speed < SLOW else ""
    )


def between_nodes(site: Site, file: Path, launcher: Path) -> Iterator[Check]:
    """A job on two nodes: what it sees, ranks that meet and exchange, a file seen by both, MPI ranks that know of each other."""
    if not launcher.is_file():
        raise InputError(f"{launcher}: no such file; run this from the folder that holds cluster/")
    if not shutil.which("sbatch"):
        raise InputError("--job: sends a job to SLURM, and there is no sbatch on PATH")
    folder = Path.cwd() / f".cryospire-check-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    gpu = 2 if site.gpus_per_node else 0
    own = [
        f
        for f in flags(site, "check", 1, {"nodes": 2, "tasks": 2, "gpu": gpu, "mem_mb": 2000, "runtime": 10})
        if not f.startswith("--output")
    ]
    path = shlex.quote(str(Path(sys.executable).parent))
    probe = f"env {site.variables} {shlex.quote(str(launcher.resolve()))} 2 2 1 cryospire cluster probe {shlex.quote(str(folder))}"
    mpi = f"{site.mpi} -n 2 {site.container} python -c 'from mpi4py import MPI; print(\"MPI\", MPI.COMM_WORLD.size)'"
    inside = f"{site.container} cryospire cluster check --site {shlex.quote(str(file.resolve()))}"
    lines = ["#!/bin/bash", *site.opening, f"export PATH={path}:$PATH", inside, probe, mpi]
    (folder / "job.sh").write_text("\n".join(lines) + "\n")
    try:
        code, text = answer(
            ["sbatch", "--wait", "--no-requeue", f"--output={folder}/out", *(f for f in own if f != "--requeue"), str(folder / "job.sh")],
            1800,
        )
        if not (folder / "out").exists():
            yield Check("two nodes", " ".join(own), f"sbatch refuses the job: {text}")
            return
        out = (folder / "out").read_text()
        for line in out.splitlines():
            if line.startswith(("ok  ", "FAIL")) and (what := line[6:21].strip()) in OF_NODES:
                found, _, problem = line[21:].partition("  <- ")
                yield Check(f"job: {what}", found, problem)
        ranks = [line for line in out.splitlines() if line.startswith("rank ")]
        shown = "; ".join(sorted(ranks)) or (out.strip().splitlines() or [text])[-1]
        hint = f"ranks did not meet (exit code {code}); see network_interface, container and srun_flags in the site file"
        yield Check("two nodes", shown, "" if len(ranks) == 2 else hint)
        sizes = [line.split()[1] for line in out.splitlines() if line.startswith("MPI ")]
        yield Check(
            "MPI ranks",
            f"{len(sizes)} of {site.mpi}, of a world of {', '.join(sizes) or '?'}",
            "" if sizes == ["2", "2"] else "they do not find each other; see mpi in the site file",
        )
    finally:
        shutil.rmtree(folder)


def probe(folder: Path) -> None:
    """One of two ranks: meet, exchange 32 MB of latents and, as a training does, 32 MB of gradients; see each other's files."""
    from cryospire.training.distributed import team

    with team() as ranks:
        rows = torch.ones(1 << 20, 8)
        ranks.barrier()
        start = time.monotonic()
        ranks.gather(rows)
        ranks.barrier()
        latents = 32 / (time.monotonic() - start)
        network = ranks.wrap(torch.nn.Linear(1 << 12, 1 << 11, bias=False).to(ranks.device))
        for _ in range(2):  # the first meets, the second is timed
            start = time.monotonic()
            network(torch.full((1, 1 << 12), 1.0 + ranks.rank, device=ranks.device)).sum().backward()
            mean = float(next(network.parameters()).grad.mean())  # type: ignore[union-attr]
            gradients = 32 / (time.monotonic() - start)
            network.zero_grad()
        if mean != 1.5:
            raise InputError(f"gradients of two ranks over {ranks.backend} are averaged to {mean:g}, not 1.5")
        (folder / str(ranks.rank)).touch()
        ranks.barrier()
        other, waited = folder / str(1 - ranks.rank), time.monotonic()
        while not other.exists() and time.monotonic() - waited < 60:
            time.sleep(0.1)
        seen = (
            f"the other's file after {time.monotonic() - waited:.1f} s"
            if other.exists()
            else "NOT the other's file: the folder is not shared"
        )
        # One write: lines of two ranks in one file must not mix.
        sys.stdout.write(
            f"rank {ranks.rank} of {ranks.size} on {os.uname().nodename}, {ranks.device}, latents {latents:.0f} MB/s, "
            f"gradients {gradients:.0f} MB/s over {ranks.backend}, sees {seen}\n"
        )
        sys.stdout.flush()
