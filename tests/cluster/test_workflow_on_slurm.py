"""The whole workflow, small, through ``cluster/slurm`` on two nodes: dask workers, two DDP ranks, MPI ranks."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from cryospire.io import stores

from .conftest import ROOT, Slurm

CONFIG = {
    "particles": "results/simulate/particles.star",
    "output": "results",
    "simulate": {"states": 2, "particles": 200, "box": 32, "pixel_size": 9.0, "snr": 0.5},
    "preprocess": {"shard_mib": 1},
    "discover": {"gaussians": 64, "epochs": 1, "batch": 16},
    "parts": {"max_parts": 3, "seeds": 2},
    "train": {"gaussians": 128, "epochs": 2, "batch": 16, "hidden": 16, "layers": 1, "rank": 8},
    "analyse": {"states": 2, "steps": 2, "trajectories": 1, "umap": False},
}
SITE = {
    "partition": "debug", "ranks": 2, "ranks_per_node": 1, "mpi_ranks": 2, "dask_workers": 2, "dask_nodes": 2, "cpus_per_task": 1,
    "max_mem_mb": 7000, "signal_seconds": 0,
}  # fmt: skip

DEFAULT = Path("/etc/slurm/slurm.conf")


@pytest.fixture(scope="module")
def run(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("workflow")
    for name in ("Snakefile", "workflow", "cluster", "envs"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, folder / name)
    (folder / "cluster/site.yaml").write_text(yaml.safe_dump(SITE))
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    out = slurm.sh("snakemake --profile cluster/slurm --configfile config.yaml", cwd=folder, timeout=1500)
    assert "(100%) done" in out
    return folder


def test_every_store_is_complete(run: Path) -> None:
    for name, schema in (
        ("particles", "particles"),
        ("discovery", "discovery"),
        ("parts", "parts"),
        ("model", "model"),
        ("volumes", "volumes"),
    ):
        stores.open_store(run / f"results/{name}.zarr", schema)
    assert (run / "results/report.html").stat().st_size > 0
    latents = stores.read(stores.open_store(run / "results/model.zarr", "model"), "latents")
    assert np.isfinite(latents).all() and latents.std() > 0


def test_stages_ran_on_two_nodes(run: Path) -> None:
    assert "2 rank(s)" in (run / "results/logs/train.log").read_text()
    assert "2 rank(s)" in (run / "results/logs/assemble.log").read_text()
    log = (run / "results/logs/preprocess.log").read_text()
    assert "dask worker on node1" in log and "dask worker on node2" in log


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
    slurm.sh(f"snakemake --profile cluster/slurm-plugin --configfile config.yaml --retries 0 {target}", cwd=run, timeout=300)
    assert "2 rank(s)" in log.read_text()
    stores.open_store(run / "results/volumes.zarr", "volumes")


def test_parts_alone_again(slurm: Slurm, run: Path) -> None:
    """One parameter changed: that stage and what follows from it, nothing before it."""
    before = {name: (run / f"results/{name}.zarr/zarr.json").stat().st_mtime_ns for name in ("discovery", "parts", "model")}
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"parts": {"parts": 2, "seeds": 2}}))
    slurm.sh("snakemake --profile cluster/slurm --configfile config.yaml -- results/parts.zarr/zarr.json", cwd=run, timeout=120)
    after = {name: (run / f"results/{name}.zarr/zarr.json").stat().st_mtime_ns for name in before}
    assert after["parts"] > before["parts"]
    assert after["discovery"] == before["discovery"] and after["model"] == before["model"]
    planned = slurm.sh("snakemake --profile cluster/slurm --configfile config.yaml --dry-run", cwd=run)
    assert "train" in planned.split("Job stats:")[1] and "discover" not in planned.split("Job stats:")[1]
