"""cluster/launch.sh, submit.py and status.py on a real SLURM of two nodes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml

from cryospire.site.settings import Site
from cryospire.stages import report_usage

from .conftest import ROOT, Slurm

LAUNCH = ROOT / "cluster" / "launch.sh"
DASK = ROOT / "cluster" / "dask.sh"
SUBMIT = ROOT / "cluster" / "slurm" / "submit.py"
STATUS = ROOT / "cluster" / "slurm" / "status.py"


def write(path: Path, text: str) -> Path:
    path.write_text(textwrap.dedent(text))
    return path


def submit(slurm: Slurm, folder: Path, command: str, site: str = "{}", name: str = "job", settings: str = "", **resources: object) -> str:
    """Submit a command as Snakemake would; returns the job's id."""
    properties = {
        "rule": name,
        "output": [str(folder / f"{name}.out")],
        "params": {"settings": settings},
        "log": [str(folder / f"logs/{name}.log")],
        "threads": 1,
        "resources": {"mem_mb": 500, "runtime": 5} | resources,
    }
    script = write(folder / f"{name}.sh", f"#!/bin/sh\n# properties = {json.dumps(properties)}\ncd {folder}\n{command}\n")
    write(folder / "site.yaml", site)
    return slurm.sh(f"{sys.executable} {SUBMIT} --site site.yaml {script}", cwd=folder).splitlines()[0]


def ends_as(slurm: Slurm, job: str, verdict: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while (found := slurm.sh(f"{sys.executable} {STATUS} {job}").split()[0]) == "running":
        assert time.monotonic() < end, f"job {job} still runs after {seconds} s"
        time.sleep(0.5)
    assert found == verdict, slurm.sh(f"scontrol show job {job}; cat {slurm.base}/log/slurmd-node1.log | tail -n 20", check=False)


def test_two_ranks_on_two_nodes_meet(slurm: Slurm, tmp_path: Path) -> None:
    write(
        tmp_path / "meet.py",
        """
        import os, torch
        from cryospire.training.distributed import team
        with team() as ranks:
            print(ranks.rank, os.environ["SLURMD_NODENAME"], ranks.sum(10.0 ** ranks.rank)[0], flush=True)
        """,
    )
    job = submit(slurm, tmp_path, f"{LAUNCH} 2 2 1 {sys.executable} meet.py > meet.out", nodes=2, tasks=2)
    ends_as(slurm, job, "success")
    assert sorted((tmp_path / "meet.out").read_text().splitlines()) == ["0 node1 11.0", "1 node2 11.0"]


def test_a_killed_rank_ends_the_job(slurm: Slurm, tmp_path: Path) -> None:
    write(
        tmp_path / "die.py",
        """
        import os, signal, time
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(300)
        """,
    )
    job = submit(slurm, tmp_path, f"{LAUNCH} 2 2 1 {sys.executable} die.py", nodes=2, tasks=2)
    ends_as(slurm, job, "failed", 30)


def test_a_killed_mpi_rank_ends_the_job(slurm: Slurm, tmp_path: Path) -> None:
    """As when memory runs out: the others, who wait for it, must not keep their nodes until the time limit."""
    write(
        tmp_path / "die.py",
        """
        import os, signal
        from mpi4py import MPI
        if MPI.COMM_WORLD.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        MPI.COMM_WORLD.Barrier()
        """,
    )
    job = submit(slurm, tmp_path, f"{Site().mpi} -N 2 -n 2 {sys.executable} die.py", nodes=2, tasks=2)
    ends_as(slurm, job, "failed", 30)


def test_a_killed_dask_worker_ends_the_job(slurm: Slurm, tmp_path: Path) -> None:
    """The command would wait for its task as long as there is time."""
    write(
        tmp_path / "wait.py",
        """
        import os, time
        from dask.distributed import Client
        def work():
            open("pid", "w").write(str(os.getpid()))
            os.rename("pid", "worker")
            time.sleep(300)
        Client(os.environ["DASK_SCHEDULER_ADDRESS"]).submit(work).result()
        """,
    )
    job = submit(slurm, tmp_path, f"{DASK} 2 2 1 {sys.executable} wait.py > said 2>&1", nodes=2, tasks=2)
    slurm.until(f"ls {tmp_path}", "worker\n")
    os.kill(int((tmp_path / "worker").read_text()), signal.SIGKILL)
    ends_as(slurm, job, "failed", 60)
    assert "before the command did" in (tmp_path / "said").read_text()


def test_a_job_is_taken_up_again_unless_its_settings_have_changed(slurm: Slurm, tmp_path: Path) -> None:
    first = submit(slurm, tmp_path, "sleep 300", settings="lr: 1")
    assert submit(slurm, tmp_path, "sleep 300", settings="lr: 1") == first
    second = submit(slurm, tmp_path, "sleep 300", settings="lr: 2")
    assert second != first
    assert slurm.sh(f"squeue -h --states=all -j {first} -o %T").strip() == "CANCELLED"
    slurm.sh(f"scancel {second}")


def test_a_job_that_waits_with_flags_of_an_older_site_is_submitted_anew(slurm: Slurm, tmp_path: Path) -> None:
    """One that runs is left to run."""
    held = submit(slurm, tmp_path, "sleep 300", "{sbatch_flags: [--hold]}")
    running = submit(slurm, tmp_path, "sleep 300")
    assert running != held and slurm.sh(f"squeue -h --states=all -j {held} -o %T").strip() == "CANCELLED"
    slurm.until(f"squeue -h -j {running} -o %T", "RUNNING")
    assert submit(slurm, tmp_path, "sleep 300", "{qos: nosuch}") == running
    slurm.sh(f"scancel {running}")


@pytest.mark.parametrize(
    "program",
    ["from cryospire.training.distributed import Team; Team()", "from cryospire.stages.ranks import over_ranks; over_ranks(print)"],
    ids=["training", "MPI"],
)
def test_tasks_of_a_bare_srun_do_not_each_do_everything(slurm: Slurm, tmp_path: Path, program: str) -> None:
    job = submit(slurm, tmp_path, f'srun --mpi=none -n 2 {sys.executable} -c "{program}" > said 2>&1', nodes=1, tasks=2)
    ends_as(slurm, job, "failed")
    assert "InputError: 2 tasks of srun that do not know of each other" in (tmp_path / "said").read_text()


def test_dask_workers_outlive_the_signal_before_the_time_limit(slurm: Slurm, tmp_path: Path) -> None:
    """It is for trainings, but SLURM sends it to whatever runs."""
    write(
        tmp_path / "wait.py",
        """
        import os, pathlib, time
        from dask.distributed import Client
        def work():
            pathlib.Path("begun").touch()
            time.sleep(8)
            return "done"
        print(Client(os.environ["DASK_SCHEDULER_ADDRESS"]).submit(work).result())
        """,
    )
    job = submit(slurm, tmp_path, f"{DASK} 2 2 1 {sys.executable} wait.py > said 2>&1", nodes=2, tasks=2)
    slurm.until(f"ls {tmp_path}", "begun\n")
    slurm.sh(f"scancel --signal=USR1 {job}")
    ends_as(slurm, job, "success", 60)
    assert "done" in (tmp_path / "said").read_text()


def test_status_tells_of_a_job_in_the_queue(slurm: Slurm, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, "sleep 300", "{sbatch_flags: [--hold]}", name="train")
    shown = slurm.sh(f"cryospire status {tmp_path}")
    assert re.search(rf"train +queued .*{job}", shown) and f"train: job {job} is in the queue (JobHeldUser)" in shown
    slurm.sh(f"scontrol release {job}")
    slurm.until(f"squeue -h -j {job} -o %T", "RUNNING")
    log = tmp_path / "logs/train.log"
    log.write_text("train: 100 particles\n")
    os.utime(log, (0, 0))  # a step that says nothing for long: SLURM knows better
    assert re.search(r"train +running", slurm.sh(f"cryospire status {tmp_path}"))
    slurm.sh(f"scancel {job}")
    slurm.until(f"squeue -h --states=all -j {job} -o %T", "CANCELLED")
    assert f"train: job {job}: cancelled" in slurm.sh(f"cryospire status {tmp_path}")


def test_near_its_limit_a_training_saves_itself_and_goes_on(slurm: Slurm, tmp_path: Path) -> None:
    """The signal before the time limit reaches the ranks; exit code 75 puts the job back; the same job ends well.

    Rank 0 is still saving when the others leave: they must not take it with them.
    """
    write(
        tmp_path / "save.py",
        """
        import os, pathlib, signal, sys, time
        saved, rank = pathlib.Path("saved"), os.environ["RANK"]
        def save(number, frame):
            if rank == "0":
                time.sleep(3)
                saved.touch()
            sys.exit(75)
        signal.signal(signal.SIGUSR1, save)
        if not saved.exists():
            pathlib.Path("started" + rank).touch()
            time.sleep(300)
        pathlib.Path("went_on" + rank).touch()
        """,
    )
    job = submit(slurm, tmp_path, f"CRYOSPIRE_REQUEUE_LIMIT=2 {LAUNCH} 2 4 1 {sys.executable} save.py", nodes=2, tasks=4)
    slurm.until(f"ls {tmp_path} | grep -c started", "4")
    slurm.sh(f"scancel --signal=USR1 {job}")  # what SLURM sends by itself signal_seconds before the limit
    ends_as(slurm, job, "success", 90)
    assert sorted(p.name for p in tmp_path.glob("went_on*")) == [f"went_on{k}" for k in range(4)]
    assert "Restarts=1" in slurm.sh(f"scontrol show job {job}")


def test_a_cancelled_training_is_not_put_back(slurm: Slurm, tmp_path: Path) -> None:
    """It saves itself on SIGTERM, too, but the user wanted an end."""
    program = "import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); open('up', 'w'); time.sleep(300)"
    write(tmp_path / "up.py", program)
    job = submit(slurm, tmp_path, f"CRYOSPIRE_REQUEUE_LIMIT=2 {LAUNCH} 1 1 1 {sys.executable} up.py")
    slurm.until(f"ls {tmp_path}", "up\n")
    slurm.sh(f"scancel {job}")
    slurm.until(f"squeue -h --states=all -j {job} -o %T", "CANCELLED", 30)
    time.sleep(1)
    ends_as(slurm, job, "failed")
    assert "Restarts=0" in slurm.sh(f"scontrol show job {job}")


def test_what_sbatch_is_told(slurm: Slurm, tmp_path: Path) -> None:
    site = """
    partition: urgent
    signal_seconds: 45
    prologue: ["export FROM_PROLOGUE=yes"]
    tmpdir: /var/tmp
    logs: jobs
    """
    command = "echo $FROM_PROLOGUE $TMPDIR $SLURM_JOB_GPUS $SLURM_GPUS_ON_NODE; nvidia-smi -L; true"
    job = submit(slurm, tmp_path, command, textwrap.dedent(site), gpu=2, runtime=7)
    shown = slurm.sh(f"scontrol show job {job}")
    ends_as(slurm, job, "success")
    assert "Partition=urgent" in shown and "TimeLimit=00:07:00" in shown and "Requeue=1" in shown and "gpu:2" in shown
    assert "yes /var/tmp 0,1 2" in (tmp_path / "jobs" / f"job-{job}.log").read_text()


def test_a_job_in_the_queue_is_taken_up_again(slurm: Slurm, tmp_path: Path) -> None:
    """After Snakemake was killed, its job lives on; the same outputs are not computed twice at once."""
    first = submit(slurm, tmp_path, "sleep 60", name="long")
    second = submit(slurm, tmp_path, "sleep 60", name="long")
    other = submit(slurm, tmp_path, "true", name="short")
    assert first == second != other
    slurm.sh(f"scancel {first}")
    ends_as(slurm, first, "failed")


@pytest.mark.parametrize(
    ("command", "options", "verdict"),
    [
        ("true", {}, "success"),
        ("exit 3", {}, "failed"),
        ("sleep 300", {"cancel": True}, "failed"),
        ("sleep 300", {"limit": True}, "failed"),
    ],
    ids=["ends", "fails", "cancelled", "time-limit"],
)
def test_status(slurm: Slurm, tmp_path: Path, command: str, options: dict[str, bool], verdict: str) -> None:
    job = submit(slurm, tmp_path, command, "requeue: false")
    if options:
        slurm.until(f"{sys.executable} {STATUS} {job}", "running")
        slurm.until(f"squeue -h -j {job} -o %T", "RUNNING")
    if options.get("cancel"):
        slurm.sh(f"scancel {job}")
    if options.get("limit"):
        slurm.sh(f"scontrol update jobid={job} EndTime=now+1")
    ends_as(slurm, job, verdict, 90)


def test_a_wrong_site_key_is_named(slurm: Slurm, tmp_path: Path) -> None:
    write(tmp_path / "site.yaml", "acount: mine\n")
    out = slurm.sh(f"{sys.executable} {SUBMIT} --site site.yaml nothing.sh", cwd=tmp_path, check=False)
    assert "acount" in out


def test_status_waits_for_a_restarting_controller(slurm: Slurm, tmp_path: Path) -> None:
    """Asked while the controller is away, the status script answers after its return, and with the truth."""
    job = submit(slurm, tmp_path, "sleep 4")
    slurm.until(f"squeue -h -j {job} -o %T", "RUNNING")
    slurm.stop("slurmctld.pid")
    out = slurm.sh(f"(sleep 3; slurmctld) & {sys.executable} {STATUS} {job}; wait", timeout=90)
    assert out.split()[0] in ("running", "success")
    ends_as(slurm, job, "success", 90)


def test_a_preempted_job_is_a_failure_to_retry(slurm: Slurm, tmp_path: Path) -> None:
    low = submit(slurm, tmp_path, "sleep 300", "{partition: cxl, requeue: false}", name="low", nodes=2, tasks=8, mem_mb=4000)
    slurm.until(f"squeue -h -j {low} -o %T", "RUNNING")
    high = submit(slurm, tmp_path, "true", "{partition: urgent, requeue: false}", name="high", nodes=2, tasks=8, mem_mb=4000)
    ends_as(slurm, low, "failed", 60)
    ends_as(slurm, high, "success", 60)


def test_cluster_check(slurm: Slurm, tmp_path: Path) -> None:
    """Between two nodes ranks meet by gloo, MPI ranks by pmi2; a partition that is not there is named."""
    write(tmp_path / "site.yaml", "{partition: debug, mail_user: '', cpus_per_task: 1, dask_workers: 4, max_gpus: 2}")
    out = slurm.sh(f"cryospire cluster check --site site.yaml --job --launcher {LAUNCH}", cwd=tmp_path, timeout=120)
    assert "rank 0 of 2" in out and "rank 1 of 2" in out and "sees the other's file" in out and "MB/s over gloo" in out
    assert "of a world of 2, 2" in out and "nothing found that would fail" in out
    assert "job: node" in out and "inside job" in out
    write(tmp_path / "site.yaml", "partition: nowhere")
    out = slurm.sh("cryospire cluster check --site site.yaml; echo code $?", cwd=tmp_path)
    assert "no partition nowhere; there are cxl, debug, urgent" in out and "code 2" in out


@pytest.mark.parametrize(
    ("settings", "job", "words"),
    [
        ("network_interface: nosuch0", "--job", "two nodes .*see network_interface"),
        pytest.param("container: nosuch", "--job", "two nodes .*see .*container", marks=pytest.mark.slow),
        ("max_runtime: 99999", "", "max_runtime .*partition debug ends jobs after 1440 minutes"),
        ("max_gpus: 4", "", "trainings .*--nodes=4 .*sbatch refuses such a job"),
        ("gpus_per_node: 8", "", "trainings .*sbatch refuses such a job"),
        ("mpi_ranks: 5", "", "MPI stages .*sbatch refuses such a job"),
    ],
)
def test_cluster_check_names_what_would_fail(slurm: Slurm, tmp_path: Path, settings: str, job: str, words: str) -> None:
    """On nodes of four CPUs and two GPUs, and of a day at most."""
    write(tmp_path / "site.yaml", f"{{cpus_per_task: 1, dask_workers: 4, {settings}}}")
    out = slurm.sh(f"cryospire cluster check --site site.yaml {job} --launcher {LAUNCH}; echo code $?", cwd=tmp_path, timeout=120)
    failed = [line for line in out.splitlines() if line.startswith("FAIL")]
    assert any(re.search(words, line) for line in failed) and "code 2" in out, out


def test_every_start_of_a_job_is_in_the_accounts(accounted: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs, put back in the queue once: both starts count, by the job's own clock."""
    slurm = accounted
    job = submit(
        slurm, tmp_path,
        "date +%s.%N >> clock; sleep 4; date +%s.%N >> clock\n"
        '[ -n "$SLURM_RESTART_COUNT" ] || { scontrol requeue $SLURM_JOB_ID; sleep 60; }',
        nodes=1, tasks=1, gpu=2,
    )  # fmt: skip
    ends_as(slurm, job, "success", 120)
    first, ended, again, end = map(float, (tmp_path / "clock").read_text().split())
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, slurm.env[name])
    slurm.until(f"sacct --duplicates -X -n -j {job} -o State", "COMPLETED")
    used = report_usage.from_accounting(report_usage.sacct([job]))
    assert used is not None and used.source.startswith("the scheduler")
    assert used.gpu_hours * 3600 / 2 == pytest.approx(ended - first + end - again, abs=3)  # SLURM counts whole seconds


def test_a_job_that_the_controller_has_forgotten(accounted: Slurm, tmp_path: Path) -> None:
    """What became of it is in the accounts: of one that ended well, one that failed, one that was cancelled."""
    slurm = accounted
    conf = slurm.base / "slurm.conf"
    before = conf.read_text()
    conf.write_text(before.replace("MinJobAge=300", "MinJobAge=2"))
    slurm.sh("scontrol reconfigure")
    try:
        commands = {"good": "true", "bad": "false", "gone": "sleep 60"}
        jobs = {name: submit(slurm, tmp_path, command, name=name) for name, command in commands.items()}
        slurm.until(f"squeue -h --states=R -j {jobs['gone']}", jobs["gone"])
        slurm.sh(f"scancel {jobs['gone']}")
        for job in jobs.values():
            slurm.until(f"scontrol show job {job}", "Invalid job id", 120)
        for name, job in jobs.items():
            ends_as(slurm, job, "success" if name == "good" else "failed")
    finally:
        conf.write_text(before)
        slurm.sh("scontrol reconfigure")


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("qsub", "-l walltime=2:05:00 -l place=scatter -l select=2:ncpus=16:mpiprocs=4:mem=64000mb:ngpus=4"),
        ("bsub", "-n 32 -R span[ptile=16] rusage[mem=64000] -W 125 -wa USR1 -wt 2 -gpu num=4"),
    ],
    ids=["PBS", "LSF"],
)
def test_what_other_schedulers_are_asked_for(tmp_path: Path, program: str, expected: str) -> None:
    """Eight ranks of four CPUs and one GPU over two nodes for 125 minutes; neither can be installed here, so only the words are seen."""
    recorder = write(tmp_path / program, '#!/bin/sh\necho "$@" > asked\necho "Job <7> is submitted to queue <q>."\n')
    recorder.chmod(0o755)
    script = write(tmp_path / "job.sh", "true\n")
    command = [str(ROOT / "cluster/generic/scheduler.sh"), "submit", "2", "8", "4", "8", "64000", "125", "train", str(script)]
    for tool in ("bash", "mkdir", "sed", "cat", "head", "tail"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    done = subprocess.run(command, cwd=tmp_path, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=True)
    assert expected in (tmp_path / "asked").read_text()
    assert done.stdout.strip() == "7" or program == "qsub"


def test_other_schedulers_are_told_to_cancel(tmp_path: Path) -> None:
    """Snakemake starts the profile's command as one program, with ids and nothing else."""
    recorder = write(tmp_path / "qdel", '#!/bin/sh\necho "$@" > asked\n')
    recorder.chmod(0o755)
    profile = ROOT / "cluster/generic"
    program = profile / yaml.safe_load((profile / "config.yaml").read_text())["cluster-generic-cancel-cmd"]
    for tool in ("bash", "dirname"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    subprocess.run([str(program), "7", "8"], cwd=tmp_path, env={"PATH": str(tmp_path)}, check=True)
    assert (tmp_path / "asked").read_text() == "7 8\n"
