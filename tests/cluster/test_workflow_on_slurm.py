"""The whole workflow, small, through ``cluster/slurm`` on two nodes: dask workers, two DDP ranks, MPI ranks."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import yaml

from cryospire.io import stores
from cryospire.stages import report_usage

from .conftest import ROOT, Slurm

CONFIG = {
    "particles": "results/simulate/particles.star",
    "output": "results",
    "simulate": {"states": 2, "particles": 200, "box": 32, "pixel_size": 9.0, "snr": 0.5},
    "preprocess": {"shard_mib": 1},
    "discover": {"gaussians": 64, "epochs": 1, "batch": 16},
    "parts": {"max_parts": 3},
    "train": {"gaussians": 128, "epochs": 2, "batch": 16, "hidden": 16, "layers": 1, "rank": 8},
    "analyse": {"states": 2, "steps": 2, "trajectories": 1, "umap": False},
}
SITE = {
    "partition": "debug", "gpus_per_node": 1, "ranks": 2, "ranks_per_node": 1, "mpi_ranks": 2, "mpi_nodes": 2, "dask_workers": 2,
    "dask_nodes": 2, "cpus_per_task": 1, "max_mem_mb": 7000, "signal_seconds": 0,
}  # fmt: skip

SNAKEMAKE = f"snakemake -s {ROOT}/Snakefile --configfile config.yaml --seconds-between-status-checks 1"
DEFAULT = Path("/etc/slurm/slurm.conf")


@pytest.fixture(scope="module")
def run(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, in a folder that holds nothing of the program but a site's settings."""
    folder = tmp_path_factory.mktemp("workflow")
    (folder / "cluster").mkdir()
    (folder / "cluster/site.yaml").write_text(yaml.safe_dump(SITE))
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    out = slurm.sh(f"{SNAKEMAKE} --profile {ROOT}/cluster/slurm", cwd=folder, timeout=1500)
    assert "(100%) done" in out
    return folder


def test_every_store_is_complete(run: Path) -> None:
    for name, schema in (
        ("particles", "particles"),
        ("discovery", "discovery"),
        ("parts", "parts"),
        ("model", "model"),
        ("reconstruction", "reconstruction"),
        ("volumes", "volumes"),
    ):
        stores.open_store(run / f"results/{name}.zarr", schema)
    assert (run / "results/report.html").stat().st_size > 0
    latents = stores.read(stores.open_store(run / "results/model.zarr", "model"), "latents")
    assert np.isfinite(latents).all() and latents.std() > 0


def test_stages_ran_on_two_nodes(run: Path) -> None:
    assert "2 rank(s)" in (run / "results/logs/train.log").read_text()
    for stage in ("reconstruct", "assemble"):
        assert "2 ranks on node1, node2" in (run / f"results/logs/{stage}.log").read_text()
    log = (run / "results/logs/preprocess.log").read_text()
    assert "dask worker on node1" in log and "dask worker on node2" in log


def test_the_report_counts_gpu_hours_from_the_accounts(accounted: Slurm, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two trainings of two GPUs each, from when to when each ran."""
    hours = 0.0
    for line in accounted.sh(f"sacct -X -n -P -S now-1hour -o Start,End,ReqTRES,WorkDir | grep '{run}$' | grep gres/gpu=2").splitlines():
        start, end = (datetime.fromisoformat(word) for word in line.split("|")[:2])
        hours += 2 * (end - start).total_seconds() / 3600
    assert hours > 0
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, accounted.env[name])
    used = report_usage.of_run(run / "results", {})
    assert used is not None and used.gpu_hours == pytest.approx(hours, abs=1e-3)
    assert "GPU-hours, from the scheduler" in (run / "results/report.html").read_text()
    assert "but torch sees none" in (run / "results/logs/train.log").read_text()  # the GPUs of this SLURM are made up


@pytest.fixture
def default_place(slurm: Slurm) -> Iterator[None]:
    """The plugin takes SLURM_CONF from a job's environment: slurm.conf has to be where SLURM looks by itself."""
    if DEFAULT.exists() or DEFAULT.is_symlink():
        pytest.skip(f"{DEFAULT} is there already and is left alone: the official plugin is NOT TESTED")
    DEFAULT.parent.mkdir(exist_ok=True)
    DEFAULT.symlink_to(slurm.base / "slurm.conf")
    yield
    DEFAULT.unlink()


def test_the_official_plugin_runs_mpi_ranks(slurm: Slurm, run: Path, default_place: None) -> None:
    log = run / "results/logs/assemble.log"
    log.unlink()
    target = "--forcerun assemble -- results/volumes.zarr/zarr.json"
    profile = f"--profile {ROOT}/cluster/slurm-plugin --slurm-init-seconds-before-status-checks 3 --retries 0"
    slurm.sh(f"{SNAKEMAKE} {profile} {target}", cwd=run, timeout=300)
    assert "2 rank(s)" in log.read_text()
    stores.open_store(run / "results/volumes.zarr", "volumes")


OF_STAGE = {
    "preprocess": "particles", "consensus": "consensus", "discover": "discovery", "parts": "parts", "train": "model",
    "reconstruct": "reconstruction", "analyse": "analysis", "assemble": "volumes",
}  # fmt: skip


@pytest.mark.slow
def test_every_stage_is_cancelled_once(slurm: Slurm, run: Path, tmp_path: Path) -> None:
    """scancel in each stage: no store claims to be complete, the stage is retried, and the end is the same."""
    folder = tmp_path / "again"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("results", ".snakemake", "slurm_logs"))
    with (folder / "said").open("w") as said:
        command = f"{SNAKEMAKE} --profile {ROOT}/cluster/slurm".split()
        process = subprocess.Popen(command, cwd=folder, env=slurm.env, stdout=said, stderr=said)
    cancelled: dict[str, str] = {}
    try:
        while process.poll() is None:
            for line in slurm.sh("squeue -h --states=R -o '%i %j'").splitlines():
                job, name = line.split()
                stage = name.split("-")[1]
                if stage in cancelled or not (folder / f"results/logs/{stage}.log").exists():
                    continue
                time.sleep(1)  # in it, not before it
                slurm.sh(f"scancel {job}")
                slurm.until(f"squeue -h --states=R,CG -j {job} | wc -l", "0", 30)
                if "CANCELLED" in slurm.sh(f"squeue -h --states=all -j {job} -o %T"):
                    cancelled[stage] = job
                    store = folder / f"results/{OF_STAGE.get(stage)}.zarr"
                    assert not (store / "zarr.json").exists() or not stores.open_partial(store).attrs["complete"]
            time.sleep(0.2)
    finally:
        process.kill()
    words = (folder / "said").read_text()
    assert process.returncode == 0, words
    assert set(OF_STAGE) <= set(cancelled)
    for stage, job in cancelled.items():
        assert f"job {job}: CANCELLED; its own log is" in words, stage
    for name, array in (("particles", "images"), ("model", "latents"), ("volumes", "states")):
        one, other = (stores.read(stores.open_store(f / f"results/{name}.zarr", name), array) for f in (run, folder))
        assert np.array_equal(one, other), name


def test_parts_alone_again(slurm: Slurm, run: Path) -> None:
    """One parameter changed: that stage and what follows from it, nothing before it."""
    before = {name: (run / f"results/{name}.zarr/zarr.json").stat().st_mtime_ns for name in ("discovery", "parts", "model")}
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"parts": {"parts": 2}}))
    slurm.sh(f"{SNAKEMAKE} --profile {ROOT}/cluster/slurm -- results/parts.zarr/zarr.json", cwd=run, timeout=120)
    after = {name: (run / f"results/{name}.zarr/zarr.json").stat().st_mtime_ns for name in before}
    assert after["parts"] > before["parts"]
    assert after["discovery"] == before["discovery"] and after["model"] == before["model"]
    planned = slurm.sh(f"{SNAKEMAKE} --profile {ROOT}/cluster/slurm --dry-run", cwd=run)
    assert "train" in planned.split("Job stats:")[1] and "discover" not in planned.split("Job stats:")[1]
