"""Maps against a plain float64 sum, against the number of ranks, and files against other readers."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gemmi
import mrcfile
import numpy as np
import pytest
import starfile
import torch

from cryospire.config import Analyse, Assemble, Config
from cryospire.conventions import InputError
from cryospire.io import bodies, mrc, stores
from cryospire.stages import analyse, assemble

INPUTS = ("model", "analysis", "reconstruction")
MPIEXEC = Path(sys.executable).parent / "mpiexec"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, synthetic: SimpleNamespace) -> Path:
    """model.zarr, analysis.zarr, masks of two parts, a config.yaml, and the volumes made by one process."""
    tmp_path = tmp_path_factory.mktemp("run")
    latents = np.random.default_rng(1).normal(size=(60, 2)) * [2, 1]
    model = synthetic.write_model(tmp_path / "model.zarr", latents)
    synthetic.write_reconstruction(tmp_path / "reconstruction.zarr")
    config = Config(output=tmp_path, analyse=Analyse(states=3, trajectories=1, steps=4, umap=False))
    analyse.run(config, model=model, output=tmp_path / "analysis.zarr")
    (tmp_path / "parts_masks").mkdir()
    x = np.broadcast_to(np.arange(synthetic.box), (synthetic.box,) * 3)
    for k, side in enumerate((x < synthetic.box // 2, x >= synthetic.box // 2)):
        mrc.write_volume(tmp_path / "parts_masks" / f"part_{k + 1}.mrc", side.astype(np.float32), synthetic.pixel)
    (tmp_path / "config.yaml").write_text(f"output: {tmp_path}\n")
    run(tmp_path)
    return tmp_path


def run(folder: Path, name: str = "volumes", reconstruction: str = "reconstruction", **own: int) -> Path:
    config = Config(output=folder, assemble=Assemble(**own))
    inputs = {kind: folder / f"{stem}.zarr" for kind, stem in zip(INPUTS, ("model", "analysis", reconstruction), strict=True)}
    assemble.run(config, **inputs, output=folder / f"{name}.zarr")
    return folder / f"{name}.zarr"


def plain(mixture, latent: np.ndarray, box: int, pixel: float) -> np.ndarray:
    """The mixture summed at every voxel in float64, without a cutoff."""
    centre, amplitude, scale = (t.double().numpy() for t in mixture.forward_gaussians(torch.tensor(latent)[None]))
    axis = (np.arange(box) - box // 2) * pixel
    profile = np.exp(-((axis[:, None, None] - centre[0]) ** 2) / (2 * scale[:, None] ** 2))  # (voxel, G, xyz)
    return np.einsum("zg,yg,xg,g->zyx", profile[..., 2], profile[..., 1], profile[..., 0], amplitude[0], optimize=True)


@pytest.mark.parametrize("box", [24, 32])
def test_volumes_are_the_mixture(run_folder: Path, synthetic: SimpleNamespace, box: int) -> None:
    group = stores.open_store(run(run_folder, f"box{box}", box=box), "volumes")
    mixture, found = synthetic.two_part_mixture(), stores.open_store(run_folder / "analysis.zarr", "analysis")
    pixel = synthetic.pixel * synthetic.box / box
    states, lines = stores.read(group, "states"), stores.read(group, "trajectories")
    assert states.shape == (3, box, box, box) and lines.shape == (2, 4, box, box, box)
    latents = stores.read(found, "states/latent"), stores.read(found, "trajectories/latent")
    for volume, latent in ((states[1], latents[0][1]), (lines[0, 3], latents[1][0, 3])):
        true = plain(mixture, latent, box, pixel)
        assert np.abs(volume - true).max() < 1e-3 * true.max()  # beyond four scales a Gaussian is cut: exp(-8) = 3e-4
    with mrcfile.open(run_folder / f"box{box}" / "trajectory_0_003.mrc") as f:
        assert np.array_equal(f.data, lines[0, 3])
        assert float(f.voxel_size.x) == pytest.approx(pixel)
    assert len({tuple(mrcfile.open(p).header.origin.tolist()) for p in (run_folder / f"box{box}").glob("*_*.mrc")}) == 1


@pytest.mark.parametrize("ranks", [2, 3])
def test_same_maps_on_more_ranks(run_folder: Path, ranks: int) -> None:
    alone = stores.open_store(run_folder / "volumes.zarr", "volumes")
    several = f"ranks{ranks}"
    files = ["--config", "config.yaml", "--model", "model.zarr", "--analysis", "analysis.zarr"]
    files += ["--reconstruction", "reconstruction.zarr", "--output", f"{several}.zarr"]
    command = [str(MPIEXEC), "-n", str(ranks), sys.executable, "-m", "cryospire", "assemble", *files]
    done = subprocess.run(command, cwd=run_folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    other = stores.open_store(run_folder / f"{several}.zarr", "volumes")
    for name in ("states", "trajectories"):
        assert np.array_equal(stores.read(alone, name), stores.read(other, name))
    for file in (run_folder / "volumes").iterdir():
        twin = run_folder / several / file.name
        if file.suffix in (".pdb", ".bild", ".cxc", ".star"):
            assert twin.read_text() == file.read_text()
    assert len(list((run_folder / several).iterdir())) == len(list((run_folder / "volumes").iterdir()))


def test_one_ranks_error_ends_all(run_folder: Path) -> None:
    """Rank 0 refuses to overwrite; rank 1 waits for it, and must not hang."""
    files = ["--config", "config.yaml", "--model", "model.zarr", "--analysis", "analysis.zarr"]
    files += ["--reconstruction", "reconstruction.zarr", "--output", "volumes.zarr"]
    command = [str(MPIEXEC), "-n", "2", sys.executable, "-m", "cryospire", "assemble", *files]
    done = subprocess.run(command, cwd=run_folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "volumes.zarr: is already complete" in done.stderr and "Traceback" not in done.stderr


def test_gaussians_as_another_program_reads_them(run_folder: Path, synthetic: SimpleNamespace) -> None:
    line = stores.read(stores.open_store(run_folder / "analysis.zarr", "analysis"), "trajectories/latent")[0]
    centre, _, scale = synthetic.two_part_mixture().forward_gaussians(torch.tensor(line))
    centre += synthetic.pixel * synthetic.box / 2  # files live in the frame of the maps, voxel 0 at 0
    structure = gemmi.read_pdb(str(run_folder / "volumes" / "trajectory_0.pdb"))
    assert len(structure) == len(line)
    for step, model in enumerate(structure):
        assert [c.name for c in model] == ["A", "B"]
        atoms = [a for c in model for r in c for a in r]
        assert np.allclose([a.pos.tolist() for a in atoms], centre[step].numpy(), atol=6e-4)
        assert np.allclose([a.b_iso for a in atoms], scale.numpy(), atol=6e-3)
        assert all(0 <= a.occ <= 1 for a in atoms)


def test_gaussians_lie_in_the_map(run_folder: Path) -> None:
    """A reader that knows only the two files finds the pseudo-atoms' centre of mass at the map's."""
    grid = gemmi.read_ccp4_map(str(run_folder / "volumes" / "state_000.mrc")).grid
    density = np.array(grid.array)
    where = np.stack(np.meshgrid(*(np.arange(n) for n in density.shape), indexing="ij"), -1) * grid.spacing[0]
    atoms = [a for c in gemmi.read_pdb(str(run_folder / "volumes" / "gaussians.pdb"))[0] for r in c for a in r]
    centre = np.mean([a.pos.tolist() for a in atoms], axis=0)
    # amplitudes vary by a factor of two at random and occupancies by part: a few Å over 120 Gaussians, far below half a box (60 Å)
    assert np.abs((density[..., None] * where).sum((0, 1, 2)) / density.sum() - centre).max() < 5


def test_arrows_join_the_ends(run_folder: Path, synthetic: SimpleNamespace) -> None:
    line = stores.read(stores.open_store(run_folder / "analysis.zarr", "analysis"), "trajectories/latent")[0]
    ends = synthetic.two_part_mixture().forward_gaussians(torch.tensor(line[[0, -1]]))[0].numpy()
    rows = [r.split()[1:7] for r in (run_folder / "volumes" / "trajectory_0.bild").read_text().splitlines() if r.startswith(".arrow")]
    assert len(rows) > 20
    ends = ends + synthetic.pixel * synthetic.box / 2
    apart = np.abs(np.array(rows, float)[:, None] - np.concatenate(ends, axis=1)).max(2)
    assert (apart.min(1) < 6e-4).all()


def test_bodies_for_relion_and_3dflex(run_folder: Path, synthetic: SimpleNamespace) -> None:
    table = starfile.read(run_folder / "volumes" / "relion_bodies.star")
    assert list(table["rlnBodyRotateRelativeTo"]) == [2, 1]
    assert all(Path(p).exists() for p in table["rlnBodyMaskName"])
    assert (table["rlnBodySigmaAngles"] >= 5).all() and (table["rlnBodySigmaOffsetAngst"] >= 2).all()
    labels, pixel = mrc.read_volume(run_folder / "volumes" / "segments.mrc")
    assert pixel == pytest.approx(synthetic.pixel)
    assert (labels[..., :12] == 1).all() and (labels[..., 12:] == 2).all()
    assert (run_folder / "volumes" / "segments.txt").read_text().strip() == "0>1"


def test_fuse_tree_joins_neighbours() -> None:
    assert bodies.tree(np.array([[0, 0, 0], [30, 0, 0], [10, 0, 0], [20, 0, 0.0]])) == "0>2,2>3,3>1"


def test_detail_is_carried_with_its_part(run_folder: Path, synthetic: SimpleNamespace) -> None:
    """A blob planted beside the second part at rest is found where the part's own anchor takes it; the first part adds nothing."""
    place, width = np.array([40.0, 15, -10]), 8.0
    axis = (np.arange(synthetic.box) - synthetic.box // 2) * synthetic.pixel
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")

    def blob(at: np.ndarray) -> np.ndarray:
        return np.exp(-((x - at[0]) ** 2 + (y - at[1]) ** 2 + (z - at[2]) ** 2) / (2 * width**2)).astype(np.float32)

    detail = np.stack([np.zeros_like(x, np.float32), blob(place)])
    synthetic.write_reconstruction(run_folder / "planted.zarr", detail)
    plain_run, with_detail = run(run_folder, "without"), run(run_folder, "with", "planted")
    added, bare = (stores.read(stores.open_store(p, "volumes"), "states") for p in (with_detail, plain_run))
    mixture = synthetic.two_part_mixture()
    latents = torch.from_numpy(stores.read(stores.open_store(run_folder / "analysis.zarr", "analysis"), "states/latent"))
    rotation, way = mixture.anchor_pose(latents)
    middle = mixture.anchor_centre[:, 1].numpy() * synthetic.pixel
    for s in range(len(latents)):
        moved = rotation[s, 1].numpy() @ (place - middle) + middle + way[s, 1].numpy() * synthetic.pixel
        seen = added[s] - bare[s]
        found = np.array([(seen * w).sum() for w in (x, y, z)]) / seen.sum()
        present = float(mixture.occupancies(latents[s : s + 1], mixture.features)[0, mixture.centre.shape[1] // 2 :].mean())
        assert np.linalg.norm(found - moved) < 0.15 * synthetic.pixel, (found, moved)
        assert np.linalg.norm(moved - place) > synthetic.pixel, "it moved"
        assert seen.sum() == pytest.approx(present * blob(place).sum(), rel=0.03)
        assert np.abs(seen).max() < 1.05  # beyond its mask, too


def test_detail_of_another_model_is_refused(run_folder: Path, synthetic: SimpleNamespace, tmp_path: Path) -> None:
    synthetic.write_model(tmp_path / "model.zarr", np.zeros((7, 2)))  # the same settings, but trained to other numbers
    inputs = {"model": tmp_path / "model.zarr", **{name: run_folder / f"{name}.zarr" for name in ("analysis", "reconstruction")}}
    with pytest.raises(InputError, match="made from another model"):
        assemble.run(Config(output=tmp_path), **inputs, output=tmp_path / "v.zarr")
    assert not (tmp_path / "v.zarr").exists()


def test_latents_of_another_model_are_refused(run_folder: Path, synthetic: SimpleNamespace, tmp_path: Path) -> None:
    other = synthetic.write_latents(tmp_path / "other.zarr", np.random.default_rng(0).normal(size=(30, 3)))
    config = Config(output=tmp_path, analyse=Analyse(umap=False))
    analyse.run(config, model=other, output=tmp_path / "foreign.zarr")
    with pytest.raises(InputError, match="made from another model than"):
        assemble.run(
            config, model=run_folder / "model.zarr", analysis=tmp_path / "foreign.zarr",
            reconstruction=run_folder / "reconstruction.zarr", output=tmp_path / "v.zarr",
        )  # fmt: skip
    assert not (tmp_path / "v.zarr").exists()
