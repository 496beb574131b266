"""cryoDRGN itself (PyPI, GPL, in an environment of its own) reads what is exported, back-projects to the same map, with the same CTF.

Its executable is named by the environment variable CRYODRGN, or found on PATH; without it nothing here is tested, and that is said.
"""

import os
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cryospire.config import Config
from cryospire.io import metadata, mrc, stores
from cryospire.maths import fourier
from cryospire.maths.ctf import ctf
from cryospire.maths.metrics import fsc
from cryospire.stages import consensus, export, preprocess

sys.path.append(str(Path(__file__).parents[1] / "stages"))
from planted import plant

BOX, PIXEL, N, KEPT = 32, 4.0, 1600, 1200
PLAIN = {"workers": 1, "dtype": "float32", "window": False}
MASK = fourier.soft_step(0.65 * BOX / 2 - fourier.radius(BOX, 3), 1.5)


def run(*command: str | Path, cwd: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def program() -> Path:
    found = os.environ.get("CRYODRGN") or shutil.which("cryodrgn")
    if not found:
        warnings.warn("CRYODRGN IS NOT INSTALLED: exports, maps and CTF are NOT compared with it", stacklevel=1)
        pytest.skip("CRYODRGN IS NOT INSTALLED: nothing is compared with it (pip install cryodrgn elsewhere, set CRYODRGN)")
    return Path(found)


@pytest.fixture(scope="module")
def exported(program: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A selection that cryospire exported, and cryoDRGN's pickles of it."""
    folder = tmp_path_factory.mktemp("cryodrgn")
    planted = plant(folder, n=N, box=BOX, pixel=PIXEL, noise=0.2)
    rows = np.sort(np.random.default_rng(0).permutation(N)[:KEPT])
    (folder / "rows.txt").write_text("\n".join(map(str, rows)))
    config = Config(particles=planted.star, ind=folder / "rows.txt")
    export.run(config, folder / "selected.star")
    export.run(config, folder / "selected.pkl")
    run(program, "parse_pose_star", "selected.star", "-o", "poses.pkl", cwd=folder)
    run(program, "parse_ctf_star", "selected.star", "-o", "ctf.pkl", cwd=folder)
    return SimpleNamespace(folder=folder, planted=planted, rows=rows, table=metadata.read(folder / "selected.star"))


def test_it_reads_poses_and_ctf_as_we_do(exported: SimpleNamespace) -> None:
    t, rows = exported.table, exported.rows
    rotation, translation = pickle.loads((exported.folder / "poses.pkl").read_bytes())
    np.testing.assert_allclose(rotation, exported.planted.table.rotation[rows], atol=1e-5)
    np.testing.assert_allclose(rotation, t.rotation, atol=1e-5)
    np.testing.assert_allclose(-translation * BOX * PIXEL, t.shift, atol=1e-4)
    values = pickle.loads((exported.folder / "ctf.pkl").read_bytes())
    np.testing.assert_allclose(values[:, 2:5], np.stack([t.defocus_u, t.defocus_v, t.defocus_angle], 1), rtol=1e-5)
    assert values[0, [0, 1, 5, 6, 7]].tolist() == pytest.approx([BOX, PIXEL, 300, 2.7, 0.1])
    assert pickle.loads((exported.folder / "selected.pkl").read_bytes()).tolist() == rows.tolist()


def test_its_pickles_come_back_as_the_same_table(exported: SimpleNamespace) -> None:
    folder, t = exported.folder, exported.table
    stack = np.array(mrc.open_stack(folder / "particles.mrcs"))[exported.rows]
    mrc.write_stack(folder / "selected.mrcs", stack, PIXEL)
    back = metadata.read(folder / "selected.mrcs", poses=folder / "poses.pkl", ctf=folder / "ctf.pkl")
    for name in ("rotation", "shift", "defocus_u", "defocus_v", "defocus_angle", "phase_shift"):
        np.testing.assert_allclose(getattr(back, name), getattr(t, name), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("selection", ["by rows", "by star"])
def test_it_back_projects_to_the_same_map(program: Path, exported: SimpleNamespace, selection: str) -> None:
    folder = exported.folder
    files, source = ["--poses", "poses.pkl", "--ctf", "ctf.pkl"], "selected.star"
    if selection == "by rows":  # the whole table, and the index file that was exported
        run(program, "parse_pose_star", "particles.star", "-o", "all_poses.pkl", cwd=folder)
        run(program, "parse_ctf_star", "particles.star", "-o", "all_ctf.pkl", cwd=folder)
        files, source = ["--poses", "all_poses.pkl", "--ctf", "all_ctf.pkl", "--ind", "selected.pkl"], "particles.star"
    run(program, "backproject_voxel", source, "--datadir", ".", *files, "-o", "theirs", cwd=folder)
    theirs = torch.from_numpy(mrc.read_volume(folder / "theirs" / "backproject.mrc")[0])
    config = Config.model_validate({"particles": folder / "selected.star", "preprocess": PLAIN})
    preprocess.run(config, output=folder / "particles.zarr", force=True)
    consensus.run(config, particles=folder / "particles.zarr", output=folder / "consensus.zarr", force=True)
    ours = torch.from_numpy(stores.read(stores.open_store(folder / "consensus.zarr", "consensus"), "half_maps")).mean(0)
    # cryoDRGN's grid is not padded, which costs it a few hundredths of FSC against the truth; 0.75 of Nyquist.
    agreement = fsc(ours, theirs, MASK)[1:13]
    truth = exported.planted.truth
    print(selection, agreement, fsc(theirs, truth, MASK)[1:13], fsc(ours, truth, MASK)[1:13])
    assert agreement.min() > 0.95 and agreement.mean() > 0.98, agreement  # positive: the documented signs of CTF and images meet
    assert fsc(ours, truth, MASK)[1:13].min() > 0.98
    assert fsc(torch.roll(ours.flip(0), 1, 0), theirs, MASK)[4:13].mean() < 0.5  # hand


def test_its_ctf_is_minus_ours(program: Path, tmp_path: Path) -> None:
    code = """
import sys, numpy as np, torch
from cryodrgn.ctf import compute_ctf
x, y = np.meshgrid(np.fft.rfftfreq(64, 1.7), np.fft.fftfreq(64, 1.7))
freqs = torch.tensor(np.stack([x.ravel(), y.ravel()], 1))
v = [torch.tensor([[a]], dtype=torch.float64) for a in (15000, 13000, 30, 300, 2.7, 0.1, 20)]
np.save(sys.argv[1], compute_ctf(freqs, *v).numpy().reshape(64, 33))
"""
    run(program.parent / "python", "-c", code, "theirs.npy", cwd=tmp_path)
    one = [torch.tensor([a], dtype=torch.float64) for a in (15000, 13000, 30, 300, 2.7, 0.1, 20)]
    difference = ctf(64, 1.7, *one)[0].numpy() + np.load(tmp_path / "theirs.npy")
    print("largest difference", np.abs(difference).max())
    assert np.abs(difference).max() < 5e-3  # the two know the wavelength to five digits, of 80 radians
