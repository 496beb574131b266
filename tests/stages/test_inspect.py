"""The story names shapes, units, origin and completeness; the picture is one."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.image import imread

from cryospire.conventions import InputError
from cryospire.io import stores
from cryospire.stages import inspect


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, synthetic: SimpleNamespace) -> Path:
    return synthetic.write_run(tmp_path_factory.mktemp("run"), 60)


def test_story(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect.run(run_folder / "model.zarr")
    told = capsys.readouterr().out
    assert "cryospire.model version 1" in told and "24 px of 5.0 Å" in told and "incomplete" not in told and "complete" in told
    line = next(line for line in told.splitlines() if "centre at zero motion" in line)
    assert "120 gaussian × 3 xyz" in line and "float32" in line and " Å " in line


def test_changed_inputs_are_told(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source.bin"
    source.write_bytes(b"before")
    gone = tmp_path / "gone.bin"
    inputs = {"kept": run_folder / "model.zarr", "edited": source, "gone": gone}
    stores.create(tmp_path / "consensus.zarr", "consensus", config={}, seed=0, inputs=inputs, pixel_size=1, box=16)
    source.write_bytes(b"after")
    inspect.run(tmp_path / "consensus.zarr")
    told = " ".join(capsys.readouterr().out.split())
    assert "model.zarr (unchanged)" in told and "source.bin (changed since)" in told and "gone.bin (no longer there)" in told
    assert "incomplete: the stage that writes it has not finished" in told


@pytest.mark.parametrize("name", ["particles", "consensus", "parts", "model", "analysis", "volumes"])
def test_picture(run_folder: Path, tmp_path: Path, name: str) -> None:
    inspect.run(run_folder / f"{name}.zarr", preview=tmp_path / f"{name}.png")
    pixels = imread(tmp_path / f"{name}.png")[..., :3]
    assert min(pixels.shape[:2]) > 100 and np.ptp(pixels) > 0.5


def test_not_a_store(tmp_path: Path) -> None:
    for path, words in ((tmp_path, "not a store: it has no zarr.json"), (tmp_path / "nowhere.zarr", "no such store")):
        done = subprocess.run([sys.executable, "-m", "cryospire", "inspect", str(path)], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr == f"cryospire: error: {path}: {words}\n"


def test_nothing_to_draw_yet(tmp_path: Path) -> None:
    stores.create(tmp_path / "c.zarr", "consensus", config={}, seed=0, inputs={}, pixel_size=1, box=16)
    with pytest.raises(InputError, match="nothing to draw yet"):
        inspect.run(tmp_path / "c.zarr", preview=tmp_path / "c.png")


def test_an_array_that_is_gone_or_damaged_is_named(tmp_path: Path) -> None:
    group = stores.create(tmp_path / "m.zarr", "model", config={}, seed=0, inputs={}, pixel_size=1, box=16)
    stores.put(group, "latents", np.random.default_rng(0).normal(size=(50, 2)), ("particle", "latent"), "latents")
    with pytest.raises(InputError, match=r"m\.zarr: the array anchors/position is not there"):
        stores.read(group, "anchors/position")
    chunk = next(p for p in (tmp_path / "m.zarr/latents").rglob("*") if p.is_file() and p.name != "zarr.json")
    chunk.write_bytes(chunk.read_bytes()[: chunk.stat().st_size // 2])
    with pytest.raises(InputError, match=r"m\.zarr: the array latents is damaged"):
        stores.read(group, "latents")


def test_what_the_system_refuses_is_one_line_too(tmp_path: Path) -> None:
    """A file in the place of a folder; whoever runs the tests, root too, is refused this."""
    (tmp_path / "file").write_text("")
    (tmp_path / "config.yaml").write_text("particles: p.star\n")
    command = ["report", "--config", "config.yaml", "--results", ".", "--output", "file/report.html"]
    done = subprocess.run([sys.executable, "-m", "cryospire", *command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("cryospire: error: file")
    assert "Traceback" not in done.stderr
