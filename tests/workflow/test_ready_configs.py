"""The ready configs of public data: files of their very names, boxes and forms are read, and a dry run of each passes."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import builders
import numpy as np
import pytest

from cryospire import cli
from cryospire import config as configuration
from cryospire.conventions import InputError
from cryospire.io import metadata
from cryospire.stages import preprocess

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "workflow/config"
N = 6


def cryobench(folder: Path, images: str) -> None:
    """As CryoBench writes them: stacks of 128 pixels in a list, poses of all, and CTFs on the grid before downsampling."""
    p = builders.planted(folder / "any", N)
    for k in range(2):
        builders.stack(folder / images / f"{k:03d}_particles_128.mrcs", N // 2, 128, 3.0)
    (folder / images / "sorted_particles.128.txt").write_text("000_particles_128.mrcs\n001_particles_128.mrcs\n")
    ctf = builders.ctf_table(p)
    ctf[:, :2] = 256, 1.5
    builders.pickled(folder / "combined_ctfs.pkl", ctf)
    builders.pickled(folder / "combined_poses.pkl", (p.matrices.astype(np.float32), p.origin / 384))


def empiar_10076(folder: Path) -> None:
    """cryoSPARC's table of imported images, renamed as its authors say, and a selection."""
    p = builders.planted(folder / "any", N)
    builders.stack(folder / "data/L17Combine_weight_local.mrcs", N, 320, 1.31)
    rows = builders.cs_rows(p)
    rows = rows.astype([(d[0], "S40", *d[2:]) if d[0] == "blob/path" else d for d in rows.dtype.descr])
    rows["blob/path"], rows["blob/idx"], rows["blob/shape"] = b"J3/imported/L17Combine_weight_local.mrcs", np.arange(N), 320
    rows["blob/psize_A"] = rows["alignments3D/psize_A"] = 1.31
    rows["blob/sign"], rows["ctf/amp_contrast"] = 1, 0.07
    builders.cs(folder / "cryosparc_P4_J33_004_particles.cs", rows)
    (folder / "kept.txt").write_text("0\n2\n3\n")


def empiar_10180(folder: Path) -> None:
    """RELION 2's table without optics groups, image paths from the folder above it."""
    p = builders.planted(folder / "any", N)
    builders.stack(folder / "data/Particles/all.mrcs", N, 320, 1.699)
    p.names[:] = [f"{i + 1:06d}@Particles/all.mrcs" for i in range(N)]
    (folder / "data/Example").mkdir()
    columns = builders.columns30(p) | {"rlnDetectorPixelSize": [1.699] * N}
    builders.star30(folder / "data/Example/consensus_data.star", p, columns)
    builders.pickled(folder / "filtered.ind.pkl", np.array([0, 2, 3]))


FILES = {
    "cryobench-igg-1d": (cryobench, "IgG-1D", "images/snr0.01"),
    "cryobench-igg-rl": (cryobench, "IgG-RL", "images/snr0.01"),
    "cryobench-ribosembly": (cryobench, "Ribosembly", "images"),
    "empiar-10076-filter": (empiar_10076, "10076"),
    "empiar-10076": (empiar_10076, "10076"),
    "empiar-10180": (empiar_10180, "10180"),
}
PARTICLES = {"empiar-10076": 3, "empiar-10180": 3}
PIXEL = {"empiar-10076-filter": 3.275, "empiar-10076": 1.6375, "empiar-10180": 1.699 * 320 / 256}


@pytest.fixture(params=FILES)
def ready(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    make, folder, *more = FILES[request.param]
    (tmp_path / folder / "any").mkdir(parents=True)
    make(tmp_path / folder, *more)
    (tmp_path / "workflow").symlink_to(ROOT / "workflow")
    (tmp_path / "cluster").symlink_to(ROOT / "cluster")
    monkeypatch.chdir(tmp_path)
    return request.param


def commands(name: str) -> list[list[str]]:
    """Command lines in the comments of a config, in which every line of a step begins with three blanks."""
    text = (CONFIGS / f"{name}.yaml").read_text()
    return [shlex.split(line) for line in re.findall(r"^#   ((?:snakemake|cryospire) .*)$", text, re.MULTILINE)]


def test_files_are_read_and_a_dry_run_passes(ready: str) -> None:
    config = configuration.load(CONFIGS / f"{ready}.yaml")
    table = metadata.read(config.particles, **config.reading())
    metadata.check_stacks(table)
    assert len(table) == PARTICLES.get(ready, N)
    grid = preprocess.common_grid(table, config.preprocess.box)
    assert grid.pixel_size == pytest.approx(PIXEL.get(ready, 3.0)) and grid.box == (config.preprocess.box or 128)
    if "empiar" not in ready:
        np.testing.assert_allclose(table.shift, -builders.planted(Path(), N).origin, atol=1e-4)
    arguments = [c[1:] for c in commands(ready) if c[0] == "snakemake" and c[4].endswith(f"/{ready}.yaml")]
    plain = ["--profile", "cluster/local", "--configfile", f"workflow/config/{ready}.yaml"]
    program = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--dry-run", *(arguments or [plain])[0]]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^discover +1$", done.stdout, re.MULTILINE)
    assert bool(re.search(r"^train +1$", done.stdout, re.MULTILINE)) == (ready != "empiar-10076-filter")


def test_the_command_between_the_two_steps_is_understood() -> None:
    """It gets as far as looking for the stores that the first step writes."""
    ((_, *arguments),) = [c for c in commands("empiar-10076-filter") if c[0] == "cryospire"]
    values = dict(zip(arguments[1::2], arguments[2::2], strict=True))
    assert values["--output"] == str(configuration.load(CONFIGS / "empiar-10076.yaml").ind)
    assert values["--discovery"] == str(configuration.load(CONFIGS / "empiar-10076-filter.yaml").output / "discovery.zarr")
    arguments[arguments.index("--config") + 1] = str(CONFIGS / "empiar-10076-filter.yaml")
    with pytest.raises(InputError, match=r"10076/filter/particles\.zarr"):
        cli.app(arguments, standalone_mode=False)
