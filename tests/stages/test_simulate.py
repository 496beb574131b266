"""A simulated stack is what it says: exact images, measured SNR, populations, the same bytes from the same seed."""

import json
from pathlib import Path

import gemmi
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from cryospire.config import Config, Simulate
from cryospire.conventions import InputError
from cryospire.io import metadata, mrc
from cryospire.maths import fourier, metrics, molecules
from cryospire.maths.ctf import ctf
from cryospire.stages import simulate

BOX, PIXEL = 32, 9.0


def settings(**changes: object) -> Simulate:
    values = {"kind": "mixed", "states": 4, "particles": 300, "box": BOX, "pixel_size": PIXEL, "snr": 0.5, "shift": 8.0}
    return Simulate.model_validate(values | changes)


def run(folder: Path, seed: int = 0, **changes: object) -> Path:
    simulate.run(Config(simulate=settings(**changes), seed=seed, threads=1), output=folder)
    return folder


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("simulated"))


def expected_images(folder: Path, rows: list[int]) -> np.ndarray:
    """Clean images from what was written alone: star file, segmentation; the sum over atoms and the CTF."""
    table = metadata.read(folder / "particles.star")
    truth, labels = np.load(folder / "truth/segmentation.npz"), np.load(folder / "truth/labels.npy")
    images = []
    for row in rows:
        state, part = labels[row], truth["part"]
        position = np.einsum("aij,aj->ai", truth["rotation"][state][part], truth["position"]) + truth["translation"][state][part]
        weight = truth["weight"] * truth["present"][state][part]
        transform = molecules.projection_transform(
            torch.from_numpy(position), torch.from_numpy(weight), torch.from_numpy(table.rotation[row]), BOX, PIXEL, 2.2 * PIXEL
        )
        c = [torch.tensor([float(x[row])], dtype=torch.float64) for x in (table.defocus_u, table.defocus_v, table.defocus_angle)]
        microscope = [torch.tensor([x], dtype=torch.float64) for x in (300.0, 2.7, 0.1)]
        shift = torch.from_numpy(table.shift[row : row + 1]) / PIXEL
        images.append(fourier.irfft(transform * ctf(BOX, PIXEL, *c, *microscope)[0] * fourier.shift_phase(BOX, shift)[0]).numpy())
    return np.array(images)


def test_images_are_the_sum_over_atoms_plus_white_noise(stack: Path) -> None:
    rows = list(range(0, 300, 5))
    images = np.array(mrc.open_stack(stack / "particles.mrcs")[rows], np.float64)
    clean = expected_images(stack, rows)
    scale = (images * clean).sum() / (clean**2).sum()
    noise = images - scale * clean
    assert abs(noise.std() - 1) < 4 / np.sqrt(2 * noise.size)
    # Left-over signal would show: noise is as uncorrelated with each image as chance has it.
    z = (noise * clean).sum((1, 2)) / np.sqrt((clean**2).sum((1, 2)))
    assert abs(z.std() - 1) < 0.4 and np.abs(z).max() < 4.5
    power = np.abs(np.fft.rfft2(noise)) ** 2 / BOX**2
    radial = fourier.radial_mean(torch.from_numpy(power.mean(0)), BOX)
    assert np.abs(radial[2:].numpy() - 1).max() < 0.2
    assert (scale * clean).var() == pytest.approx(0.5, rel=0.15)


def test_snr_is_signal_variance_over_noise_variance(tmp_path: Path) -> None:
    """The same seed at two SNRs has the same noise: the difference of the stacks is signal alone."""
    low, high = (np.array(mrc.open_stack(run(tmp_path / str(snr), snr=snr) / "particles.mrcs")) for snr in (0.25, 1.0))
    signal = (high - low).astype(np.float64) / (1 - 0.5)
    assert signal.var() == pytest.approx(1.0, rel=1e-3)
    assert (high - signal).var() == pytest.approx(1.0, rel=0.01)


def test_strengths_of_images(stack: Path, tmp_path: Path) -> None:
    """As spread as they should be; all else is as without."""
    varied = mrc.open_stack(run(tmp_path, strength=0.2) / "particles.mrcs")
    more = np.array(varied, np.float64) - mrc.open_stack(stack / "particles.mrcs")
    clean = expected_images(stack, list(range(300)))
    factor = (more * clean).sum((1, 2)) / (clean**2).sum((1, 2))
    scale = np.linalg.norm(more) / np.linalg.norm(factor[:, None, None] * clean)
    assert scale == pytest.approx(1, abs=1e-3), "nothing but the particle is stronger"
    same = np.array(mrc.open_stack(stack / "particles.mrcs"), np.float64)
    unit = (same * clean).sum() / (clean**2).sum()
    assert (factor / unit).std() == pytest.approx(0.2, rel=0.15) and abs((factor / unit).mean()) < 0.04


def test_errors_of_poses_are_in_the_table_alone(stack: Path, tmp_path: Path) -> None:
    run(tmp_path, turn_error=2.0, shift_error=3.0)
    assert (tmp_path / "particles.mrcs").read_bytes() == (stack / "particles.mrcs").read_bytes()
    true, wrong = (metadata.read(folder / "particles.star") for folder in (stack, tmp_path))
    angle = Rotation.from_matrix(wrong.rotation @ true.rotation.transpose(0, 2, 1)).as_rotvec(degrees=True)
    assert angle.std(0) == pytest.approx(np.full(3, 2.0), rel=0.15) and np.abs(angle.mean(0)).max() < 0.4
    assert (wrong.shift - true.shift).std(0) == pytest.approx(np.full(2, 3.0), rel=0.15)
    known = np.load(tmp_path / "truth/poses.npz")
    assert np.allclose(known["rotation"], true.rotation, atol=1e-5) and np.allclose(known["shift"], true.shift, atol=1e-4)


def test_same_seed_same_bytes(stack: Path, tmp_path: Path) -> None:
    again, other = run(tmp_path / "again"), run(tmp_path / "other", seed=1)
    for file in sorted(p.relative_to(stack) for p in stack.rglob("*") if p.is_file()):
        assert (stack / file).read_bytes() == (again / file).read_bytes(), file
    assert (stack / "particles.mrcs").read_bytes() != (other / "particles.mrcs").read_bytes()


def test_true_volumes_are_in_the_images_unit(stack: Path) -> None:
    """A particle's image without CTF is its state's volume projected: check the volume's total against the images' mean at CTF 0.1."""
    table, labels = metadata.read(stack / "particles.star"), np.load(stack / "truth/labels.npy")
    images = np.array(mrc.open_stack(stack / "particles.mrcs"), np.float64)
    for state in range(4):
        volume, pixel = mrc.read_volume(stack / f"truth/vol_{state:03d}.mrc")
        assert pixel == PIXEL
        total = images[labels == state].sum((1, 2)).mean() / 0.1
        spread = BOX / np.sqrt((labels == state).sum()) / 0.1
        assert abs(total - volume.astype(np.float64).sum() * PIXEL) < 4 * spread
        assert float(metrics.auc(metrics.fsc(torch.from_numpy(volume), torch.from_numpy(volume)))) == pytest.approx(0.5, abs=1e-5)
    assert len(table) == 300 and table.optics.pixel_size.tolist() == [PIXEL] and table.optics.box.tolist() == [BOX]
    assert set(table.half_set.tolist()) == {1, 2}


def test_states_differ_where_they_should(stack: Path) -> None:
    """State 1 lacks the tip and its arm is turned by 90 degrees; atoms of the body stay where they were."""
    story = json.loads((stack / "truth/states.json").read_text())
    assert [s["angle"] for s in story["states"]] == [0, 90, 180, 270]
    assert [s["absent_groups"] for s in story["states"]] == [[], [0], [], [0]]
    truth = np.load(stack / "truth/segmentation.npz")
    assert np.allclose(truth["rotation"][:, 0], np.eye(3)) and truth["present"][:, 0].all()
    volumes = [mrc.read_volume(stack / f"truth/vol_{k:03d}.mrc")[0] for k in range(4)]
    at = truth["position"][truth["part"] == 0]
    at = at[at[:, 2] < -45]  # the base, far from the hinge
    x, y, z = (np.round(at / PIXEL).astype(int) + BOX // 2).T
    assert np.allclose(volumes[1][z, y, x], volumes[0][z, y, x], rtol=0.02, atol=0.01 * volumes[0].max())
    present = [v.astype(np.float64).sum() for v in volumes]
    tip = next(p for p in story["parts"] if not p["moves"] and p["part"] > 0)
    share = truth["weight"][truth["part"] == tip["part"]].sum() / truth["weight"].sum()
    assert present[1] / present[0] == pytest.approx(1 - share, rel=1e-3) and present[2] / present[0] == pytest.approx(1, rel=1e-3)


def test_uneven_populations(tmp_path: Path) -> None:
    labels = np.load(run(tmp_path, kind="compositional", states=8, particles=1000, uneven=True) / "truth/labels.npy")
    counts = np.bincount(labels)
    assert len(counts) == 8 and counts.sum() == 1000 and counts[0] / counts[-1] == pytest.approx(5, rel=0.1)
    assert (np.diff(labels) != 0).mean() > 0.5, "states are shuffled over the stack"


def peptide(path: Path) -> Path:
    """Two chains of glycine a PDB file can hold: chain A along x, chain B beside it; with water and hydrogens."""
    structure = gemmi.Structure()
    model = gemmi.Model(1)
    for name, y in (("A", 0.0), ("B", 30.0)):
        chain = gemmi.Chain(name)
        for i in range(20):
            residue = gemmi.Residue()
            residue.name, residue.seqid = ("GLY" if i < 19 else "HOH"), gemmi.SeqId(str(i + 1))
            for k, (atom_name, element) in enumerate((("N", "N"), ("CA", "C"), ("H", "H"))):
                atom = gemmi.Atom()
                atom.name, atom.element, atom.occ = atom_name, gemmi.Element(element), 1.0
                atom.pos = gemmi.Position(3.5 * i, y + 1.2 * k, 0.3 * i)
                residue.add_atom(atom)
            chain.add_residue(residue)
        model.add_chain(chain)
    structure.add_model(model)
    structure.setup_entities()
    structure.write_pdb(str(path))
    return path


def test_atomic_model_groups(tmp_path: Path) -> None:
    model = peptide(tmp_path / "two.pdb")
    chosen = settings(model=model, kind="mixed", moving=["A:1-10"], hinge=["A:10", "A:12"], absent=[["B"]])
    molecule = simulate.load(chosen)
    assert len(molecule.weight) == 2 * 19 * 2 and set(molecule.weight.tolist()) == {6.0, 7.0}, "no water, no hydrogens"
    assert int(molecule.moving.sum()) == 20 and int(molecule.absent.sum()) == 38
    states = simulate.make_states(molecule, chosen, 0)
    assert torch.equal(states.position[:, ~molecule.moving], molecule.position[~molecule.moving].expand(4, -1, -1))
    assert torch.allclose(torch.cdist(states.position[2, molecule.moving], states.position[2, molecule.moving]), torch.cdist(
        molecule.position[molecule.moving], molecule.position[molecule.moving]), atol=1e-6), "the group stays rigid"  # fmt: skip
    assert (states.weight > 0).sum(1).tolist() == [76, 38, 76, 38]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moving": ["Q"], "hinge": ["A:10", "A:12"]}, "simulate.moving: 'Q'"),
        ({"moving": ["A"], "hinge": ["A:10", "A:99"]}, "'A:99'"),
        ({"moving": ["A:1~3"], "hinge": ["A:10", "A:12"]}, "A:1~3"),
        ({"moving": ["A"], "hinge": ["A:10"]}, "simulate.hinge"),
        ({"moving": ["A"], "hinge": ["A:10", "A:12"], "pixel_size": 1.0}, "simulate.box"),
        ({"model": "missing.cif"}, "simulate.hinge"),
        ({"box": 31}, "simulate.box"),
    ],
)
def test_bad_input_names_the_key_and_writes_nothing(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    values = {"model": peptide(tmp_path / "two.pdb"), "kind": "conformational"} | changes
    with pytest.raises(InputError, match=message):
        run(tmp_path / "out", **values)
    assert not (tmp_path / "out").exists()


def test_existing_stack_is_not_overwritten(stack: Path) -> None:
    before = (stack / "particles.star").stat().st_mtime_ns
    with pytest.raises(InputError, match=r"particles\.star"):
        run(stack)
    assert (stack / "particles.star").stat().st_mtime_ns == before
