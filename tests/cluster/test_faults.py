"""A training of real size in steps, disturbed on a real SLURM in every way that happens: it ends in the same result, bit for bit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import yaml

from cryospire import config as configuration
from cryospire.conventions import InputError
from cryospire.io import stores
from cryospire.stages import consensus, discover, preprocess, simulate

from .conftest import ROOT, Slurm
from .test_launch import LAUNCH, ends_as, submit

CONFIG = {
    "particles": "data/particles.star",
    "output": "results",
    "threads": 1,
    "simulate": {"states": 2, "particles": 256, "box": 32, "pixel_size": 9.0, "snr": 0.5},
    "preprocess": {"workers": 1},
    "discover": {"gaussians": 64, "epochs": 40, "batch": 16, "lanes": 4, "hidden": 16},
}
SITE = {"ranks": 2, "ranks_per_node": 1, "cpus_per_task": 1, "max_mem_mb": 7000, "signal_seconds": 0}
Result = tuple[np.ndarray, np.ndarray]
STORE = "results/discovery.zarr"
DISCOVER = f"cryospire discover --config config.yaml --particles results/particles.zarr --consensus results/consensus.zarr --output {STORE}"
TOLERANCE = 2e-3  # of latents between numbers of ranks: sums in another order, amplified by Adam; see tests/training/test_loop.py


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with particles and consensus, and the workflow to go on with."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    config = configuration.load(folder / "config.yaml")
    config = config.model_copy(update={"particles": folder / "data/particles.star"})
    results = folder / "results"
    simulate.run(config, output=folder / "data")
    preprocess.run(config, output=results / "particles.zarr")
    consensus.run(config, particles=results / "particles.zarr", output=results / "consensus.zarr")
    for name in ("Snakefile", "workflow", "cluster", "envs"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, folder / name)
    (folder / "cluster/site.yaml").write_text(yaml.safe_dump(SITE))
    return folder


@pytest.fixture
def run(inputs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(inputs, tmp_path / "run"))


def ranks(slurm: Slurm, folder: Path, nodes: int, tasks: int, site: str = "{requeue: false}", **more: object) -> str:
    return submit(slurm, folder, f"{LAUNCH} {nodes} {tasks} 1 {DISCOVER} >> said 2>&1", site, "discover", nodes=nodes, tasks=tasks, **more)


def result(folder: Path) -> Result:
    """Latents and losses of a finished training."""
    group = stores.open_store(folder / STORE, "discovery")
    return stores.read(group, "latents"), stores.read(group, "history/loss")


@pytest.fixture(scope="module")
def undisturbed(slurm: Slurm, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Two ranks on two nodes, left alone."""
    folder = Path(shutil.copytree(inputs, tmp_path_factory.mktemp("undisturbed") / "run"))
    ends_as(slurm, ranks(slurm, folder, 2, 2), "success", 120)
    return result(folder)


def same(folder: Path, undisturbed: Result) -> None:
    latents, losses = result(folder)
    assert np.array_equal(latents, undisturbed[0])
    assert losses == pytest.approx(undisturbed[1], rel=1e-12)


Workflow = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def snakemake(slurm: Slurm, run: Path) -> Iterator[Workflow]:
    """Starts the workflow's training through cluster/slurm; its words go to the file ``said``."""
    started = []

    def start(*options: str) -> subprocess.Popen[str]:
        target = ["--allowed-rules", "discover", "--rerun-triggers", "mtime", "--", f"{STORE}/zarr.json"]
        command = ["snakemake", "--configfile", "config.yaml", "--seconds-between-status-checks", "1"]
        profile = [] if "--profile" in options else ["--profile", "cluster/slurm"]
        with (run / "said").open("a") as said:
            started.append(
                subprocess.Popen([*command, *profile, *options, *target], cwd=run, env=slurm.env, stdout=said, stderr=said, text=True)
            )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
    slurm.sh("scancel --me; scontrol update nodename=node[1-2] state=resume", check=False)
    slurm.until("squeue -h | wc -l", "0", 60)


def submissions(slurm: Slurm, job: str) -> list[str]:
    """Every job that was submitted for the outputs of this one."""
    alike = slurm.sh(f"squeue -h --states=all -o %j -j {job}").strip().rpartition("-")[0]  # but for the flags: a retry asks for more
    rows = [line.split() for line in slurm.sh("squeue -h --states=all -o '%i %j'").splitlines()]
    return [found for found, name in rows if name.startswith(alike)]


def in_epoch(slurm: Slurm, folder: Path, epoch: int, log: str = "results/logs/discover.log") -> str:
    """Wait until an epoch has been finished; returns the id of the running job."""
    slurm.until(f"cat {folder}/{log}; tail -n 30 {folder}/said {folder}/slurm_logs/*", f"discover: epoch {epoch}/", 90)
    return slurm.sh("squeue -h --states=R -o %i").strip()


def rank_process(job: str, rank: int) -> int:
    """Process of a rank of a job, found by its environment."""
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and b"/cryospire\0discover" in (folder / "cmdline").read_bytes():
                words = (folder / "environ").read_bytes().split(b"\0")
                if f"SLURM_JOB_ID={job}".encode() in words and f"RANK={rank}".encode() in words:
                    return int(folder.name)
        except OSError:  # it ended meanwhile
            continue
    raise AssertionError(f"job {job} has no rank {rank}")


def ends_well(folder: Path, process: subprocess.Popen[str], seconds: float = 150) -> str:
    code = process.wait(timeout=seconds)
    said = (folder / "said").read_text()
    assert code == 0, said
    return said


def complete(folder: Path) -> bool:
    try:
        return bool(stores.open_partial(folder / STORE).attrs["complete"])
    except InputError:
        return False


def shortened(folder: Path, epochs: int, **more: object) -> None:
    changed = CONFIG | {"discover": CONFIG["discover"] | {"epochs": epochs} | more}  # type: ignore[operator]
    (folder / "config.yaml").write_text(yaml.safe_dump(changed))


def alone(inputs: Path, folder: Path, epochs: int, **more: object) -> Result:
    """What one process reaches."""
    folder.mkdir()
    shortened(folder, epochs, **more)
    store = inputs / "results"
    config = configuration.load(folder / "config.yaml")
    discover.run(config, particles=store / "particles.zarr", consensus=store / "consensus.zarr", output=folder / STORE)
    return result(folder)


def close(folder: Path, expected: Result) -> None:
    latents, losses = result(folder)
    np.testing.assert_allclose(latents, expected[0], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(losses, expected[1], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [2, 4])
def test_ranks_over_two_nodes_reach_what_one_process_reaches(slurm: Slurm, inputs: Path, run: Path, tmp_path: Path, tasks: int) -> None:
    shortened(run, 3)
    job = ranks(slurm, run, 2, tasks)
    expected = alone(inputs, tmp_path / "alone", 3)
    ends_as(slurm, job, "success", 120)
    assert f"{tasks} rank(s)" in (run / "said").read_text()
    close(run, expected)


def test_saved_on_four_ranks_goes_on_with_two_and_one(slurm: Slurm, inputs: Path, run: Path, tmp_path: Path) -> None:
    """Latents are kept by particle, whatever rank had them."""
    slow = {"gaussians": 8192, "lr": 3e-4}  # in small steps: signals come before the end on any machine, and rounding stays small
    shortened(run, 4, **slow)
    for nodes, tasks, words in ((2, 4, "discover: epoch 1/"), (2, 2, "discover: resumed at epoch")):
        job = ranks(slurm, run, nodes, tasks)
        slurm.until(f"cat {run}/said", words, 60)
        slurm.sh(f"scancel --signal=USR1 {job}")
        ends_as(slurm, job, "failed", 60)  # with the code that asks for more; this site does not put it back
    ends_as(slurm, ranks(slurm, run, 1, 1), "success", 60)
    said = (run / "said").read_text()
    assert said.count("stopped by a signal; saved") == 2 and said.count("resumed at epoch") == 2
    assert "4 rank(s)" in said and "2 rank(s)" in said and "1 rank(s)" in said
    close(run, alone(inputs, tmp_path / "alone", 4, **slow))


def test_a_rank_killed_in_mid_epoch(slurm: Slurm, run: Path, snakemake: Workflow, undisturbed: Result) -> None:
    """The job ends promptly, is retried, and goes on from its checkpoint."""
    process = snakemake()
    job = in_epoch(slurm, run, 3)
    os.kill(rank_process(job, 1), signal.SIGKILL)
    slurm.until(f"squeue -h --states=all -j {job} -o %T", "FAILED", 20)
    assert not complete(run)
    said = ends_well(run, process)
    assert f"slurm_logs/discover-{job}.log" in said, "the log of the failed job is named"
    assert "discover: resumed at epoch" in (run / "results/logs/discover.log").read_text()
    same(run, undisturbed)


@pytest.mark.parametrize("partition", ["debug", pytest.param("cxl", marks=pytest.mark.slow)])
def test_a_training_is_preempted(slurm: Slurm, run: Path, snakemake: Workflow, undisturbed: Result, partition: str) -> None:
    """By a job of a partition that goes first.  SLURM puts it back in the queue (debug) or cancels it, and Snakemake submits another."""
    (run / "cluster/site.yaml").write_text(yaml.safe_dump(SITE | {"partition": partition}))
    process = snakemake()
    job = in_epoch(slurm, run, 3)
    urgent = submit(slurm, run, "sleep 3", "{partition: urgent, requeue: false}", name="urgent", nodes=2, tasks=8, mem_mb=4000)
    ends_as(slurm, urgent, "success", 60)
    ends_well(run, process)
    assert len(submissions(slurm, job)) == (1 if partition == "debug" else 2)
    assert "discover: resumed at epoch" in (run / "results/logs/discover.log").read_text()
    same(run, undisturbed)


@pytest.mark.parametrize("ended", [pytest.param(False, marks=pytest.mark.slow), True], ids=["running", "ended"])
def test_snakemake_killed_and_started_again(slurm: Slurm, run: Path, snakemake: Workflow, undisturbed: Result, ended: bool) -> None:
    """The job lives on; the next Snakemake takes it up, or takes its output where it has ended meanwhile; it was submitted once."""
    process = snakemake()
    job = in_epoch(slurm, run, 1)
    process.kill()
    process.wait()
    if ended:
        slurm.until(f"squeue -h --states=all -j {job} -o %T", "COMPLETED", 90)
    ends_well(run, snakemake())
    assert submissions(slurm, job) == [job]
    same(run, undisturbed)
    assert "Nothing to be done" in ends_well(run, snakemake())
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("gaussians: ", "gaussians: 1"))
    assert "discover was run with other settings (gaussians)" in ends_well(run, snakemake("--dry-run"))


@pytest.fixture
def disk(run: Path) -> Iterator[Path]:
    """A small disk of its own for checkpoints."""
    folder = run / "results/checkpoints"
    folder.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"NEEDS a mount: {done.stderr.strip()}; a full disk is not tested here")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_the_disk_is_full(slurm: Slurm, run: Path, snakemake: Workflow, undisturbed: Result, disk: Path) -> None:
    """Every try ends with the error, whose log is named; once there is room the workflow goes on from the last good checkpoint."""
    process = snakemake()
    in_epoch(slurm, run, 3)
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):  # until nothing more fits
        while file.write(b"0" * 4096):
            pass
    assert process.wait(timeout=200) == 1
    said, log = (run / "said").read_text(), (run / "results/logs/discover.log").read_text()
    assert "No space left on device" in log and "Traceback" not in log, log
    assert "slurm_logs/discover-" in said
    assert not complete(run)
    filler.unlink()
    ends_well(run, snakemake())
    assert "discover: resumed at epoch" in (run / "results/logs/discover.log").read_text()
    same(run, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("node", ["node1", "node2"])
def test_a_node_goes_down(slurm: Slurm, run: Path, snakemake: Workflow, undisturbed: Result, node: str) -> None:
    """SLURM puts the job back, or Snakemake submits it again: the workflow does not notice more than that."""
    process = snakemake()
    job = in_epoch(slurm, run, 3)
    slurm.sh(f"scontrol update nodename={node} state=down reason=test")
    slurm.until(f"squeue -h --states=R -j {job} | wc -l", "0", 30)
    assert not complete(run)
    slurm.sh(f"scontrol update nodename={node} state=resume", check=False)  # it may have come back by itself
    ends_well(run, process)
    assert "discover: resumed at epoch" in (run / "results/logs/discover.log").read_text()
    same(run, undisturbed)


@pytest.mark.slow
def test_the_controller_restarts(slurm: Slurm, run: Path, snakemake: Workflow, undisturbed: Result) -> None:
    process = snakemake()
    job = in_epoch(slurm, run, 1)
    slurm.stop("slurmctld.pid")
    time.sleep(5)
    slurm.daemon("slurmctld")
    ends_well(run, process)
    assert "resumed" not in (run / "results/logs/discover.log").read_text()
    assert submissions(slurm, job) == [job]
    same(run, undisturbed)


@pytest.mark.slow
def test_a_real_time_limit(slurm: Slurm, inputs: Path, run: Path, tmp_path: Path) -> None:
    """SLURM itself signals before the minute is over; the training saves itself, the same job goes on and ends as if left alone."""
    began = time.monotonic()
    alone(inputs, tmp_path / "alone", 30)
    epochs = round(30 * 120 / (time.monotonic() - began))  # about two minutes; more than one on any machine that other work slows or leaves
    shortened(run, epochs)
    left = Path(shutil.copytree(run, tmp_path / "left"))
    site = "{signal_seconds: 10, requeue: true}"
    command = f"{LAUNCH} 1 1 1 {DISCOVER} >> said 2>&1"
    job = submit(slurm, run, f"export CRYOSPIRE_REQUEUE_LIMIT=30; {command}", site, "discover", runtime=1)
    other = submit(slurm, left, command, "{requeue: false}", "discover", runtime=10)
    ends_as(slurm, job, "success", 600)
    ends_as(slurm, other, "success", 600)
    said = (run / "said").read_text()
    assert "stopped by a signal; saved" in said and f"job {job} goes back to the queue" in said and "resumed at epoch" in said
    assert "Restarts=0" not in slurm.sh(f"scontrol show job {job}")
    same(run, result(left))


@pytest.mark.slow
def test_the_generic_profile_with_the_commands_of_a_scheduler(run: Path, snakemake: Workflow, undisturbed: Result) -> None:
    """Filled with SLURM's commands, as a site fills it with its own."""
    (run / "status.sh").write_text(
        "#!/bin/sh\ncase $(squeue -h --states=all -j $1 -o %T) in COMPLETED) echo success ;; PENDING|RUNNING|COMPLETING) echo running ;;"
        " *) echo failed ;; esac\n"
    )
    profile = run / "cluster/generic/config.yaml"
    settings = yaml.safe_load(profile.read_text())
    settings["cluster-generic-submit-cmd"] = (
        "sbatch --parsable -J {rule} -N {resources.nodes} -n {resources.tasks} -c {threads} --mem={resources.mem_mb} -t {resources.runtime}"
    )
    settings |= {"cluster-generic-status-cmd": "sh status.sh", "cluster-generic-cancel-cmd": "scancel"}
    profile.write_text(yaml.safe_dump(settings))
    ends_well(run, snakemake("--profile", "cluster/generic"))
    assert "2 rank(s)" in (run / "results/logs/discover.log").read_text()
    same(run, undisturbed)
