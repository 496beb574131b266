"""Groups that turn or vanish, the phantom, and exact projections of atoms."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from cryospire.kernels import atoms
from cryospire.maths import fourier, metrics, molecules, poses

BOX, PIXEL, RESOLUTION = 32, 4.0, 9.0


def few_atoms(n: int = 40, radius: float = 40.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    position = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    position *= radius * torch.rand(n, 1, generator=generator, dtype=torch.float64) ** (1 / 3) / position.norm(dim=1, keepdim=True)
    return position, 1 + 10 * torch.rand(n, generator=generator, dtype=torch.float64)


def test_projection_is_the_sum_over_atoms_at_random_poses() -> None:
    """Written out in numpy with scipy's rotations and no code of ours: sum_j w_j exp(-2 pi i k.(R r_j)) times the atom's Gaussian."""
    position, weight = few_atoms()
    rotations = Rotation.random(5, rng=7).as_matrix()
    found = atoms.projection_transforms(
        position[None], weight[None], torch.zeros(5, dtype=torch.long), torch.from_numpy(rotations), BOX, PIXEL, RESOLUTION
    ).numpy()
    kx, ky = np.arange(BOX // 2 + 1) / (BOX * PIXEL), np.fft.fftfreq(BOX, PIXEL)
    k2 = kx[None] ** 2 + ky[:, None] ** 2
    inside = np.sqrt(k2) * BOX * PIXEL < BOX // 2 - 1
    gaussian = np.exp(-2 * math.pi**2 * (RESOLUTION / (math.pi * math.sqrt(2))) ** 2 * k2)
    for r, image in zip(rotations, found, strict=True):
        x, y, _ = r @ position.numpy().T
        phase = ky[:, None, None] * y + kx[None, :, None] * x
        expected = (weight.numpy() * np.exp(-2j * math.pi * phase)).sum(-1) * gaussian
        assert np.abs(image - expected)[inside].max() < 2e-5 * weight.sum()


def test_fast_projection_is_the_plain_one_and_a_present_atom_only() -> None:
    position, weight = few_atoms()
    states = weight * torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    states[1, :10] = weight[:10]
    rotation = poses.random_rotations(2, torch.Generator().manual_seed(0))
    which = torch.tensor([1, 0])
    found = atoms.projection_transforms(position.expand(2, -1, -1), states, which, rotation, BOX, PIXEL, RESOLUTION)
    for k, keep in enumerate((slice(0, 10), slice(None))):
        plain = molecules.projection_transform(position[keep], weight[keep], rotation[k], BOX, PIXEL, RESOLUTION)
        assert float((found[k] - plain).abs().max()) < 2e-5 * float(weight.sum())


def test_volume_projects_to_the_image_and_keeps_the_mass() -> None:
    position, weight = few_atoms()
    volume = atoms.volume(position, weight, BOX, PIXEL, RESOLUTION)
    assert float(volume.sum()) * PIXEL**3 == pytest.approx(float(weight.sum()), rel=1e-4)
    # Along z, and along x after the turn that brings x to z.
    turned = torch.tensor([[0.0, 0, -1], [0, 1, 0], [1, 0, 0]], dtype=torch.float64)
    for image, rotation in ((volume.sum(0), torch.eye(3, dtype=torch.float64)), (volume.sum(2).T.flip(1).roll(1, 1), turned)):
        plain = fourier.irfft(molecules.projection_transform(position, weight, rotation, BOX, PIXEL, RESOLUTION)) / PIXEL**2
        assert float((image * PIXEL - plain).norm() / plain.norm()) < 1e-4


def test_one_atom_is_a_gaussian_in_space() -> None:
    """Far from Nyquist the volume is w (2 pi s^2)^(-3/2) exp(-r^2 / 2 s^2), s = resolution / (pi sqrt 2), at a position between voxels."""
    at, resolution = torch.tensor([[5.3, -7.9, 2.2]], dtype=torch.float64), 40.0
    volume = atoms.volume(at, torch.tensor([3.0]), BOX, PIXEL, resolution).double()
    s = resolution / (math.pi * math.sqrt(2))
    x = (torch.arange(BOX, dtype=torch.float64) - BOX // 2) * PIXEL
    r2 = (x - at[0, 0]) ** 2 + (x[:, None] - at[0, 1]) ** 2 + (x[:, None, None] - at[0, 2]) ** 2
    expected = 3 * (2 * math.pi * s * s) ** -1.5 * torch.exp(-r2 / (2 * s * s))
    assert float((volume - expected).abs().max() / expected.max()) < 1e-4


def test_truth_has_signal_up_to_nyquist_and_correlates_with_itself() -> None:
    volume = atoms.volume(*few_atoms(), BOX, PIXEL, RESOLUTION)
    assert float(metrics.auc(metrics.fsc(volume, volume))) == pytest.approx(0.5, abs=1e-6)


def test_hinge_turns_the_group_about_the_axis_and_nothing_else() -> None:
    molecule = molecules.phantom()
    rotation = molecules.hinge_rotation(molecule.hinge, 90.0)
    pivot = molecule.hinge.mean(0)
    assert torch.allclose(molecules.turn(molecule.hinge, rotation, pivot), molecule.hinge, atol=1e-9), "points of the axis stay"
    expected = Rotation.from_rotvec(np.pi / 2 * (d := (molecule.hinge[1] - molecule.hinge[0]).numpy()) / np.linalg.norm(d)).as_matrix()
    assert np.allclose(rotation, expected, atol=1e-9)
    moved = molecules.turn(molecule.position, rotation, pivot)
    for _ in range(3):
        moved = molecules.turn(moved, rotation, pivot)
    assert torch.allclose(moved, molecule.position, atol=1e-8), "four quarter turns"


def test_phantom_is_protein_like() -> None:
    molecule = molecules.phantom(caps=3)
    again = molecules.phantom(caps=3)
    assert torch.equal(molecule.position, again.position)
    assert torch.bincount(molecule.part).tolist() == [int((molecule.part == p).sum()) for p in range(5)]
    assert (molecule.weight[:, None] * molecule.position).sum(0).abs().max() < 1e-6 * float(molecule.weight.sum())
    extent = molecule.position.max(0).values - molecule.position.min(0).values
    assert 100 < float(extent.max()) < 200
    # The arm comes nowhere near the rest on its way round, except at the hinge.
    arm, rest = molecule.position[molecule.moving], molecule.position[~molecule.moving]
    pivot = molecule.hinge.mean(0)
    for degrees in range(0, 360, 40):
        turned = molecules.turn(arm, molecules.hinge_rotation(molecule.hinge, degrees), pivot)
        assert molecules.clash(turned, rest) < 0.05


def test_domain_chain_is_self_avoiding_and_compact() -> None:
    atoms_ = molecules.globule((0, 0, 0), (15, 15, 18), seed=1)
    n = len(atoms_) // 3
    chain = atoms_[:n]
    assert torch.allclose((chain[1:] - chain[:-1]).norm(dim=1), torch.tensor(3.8, dtype=torch.float64))
    neighbours = torch.ones(n, n).tril(1).triu(-1)
    apart = torch.cdist(chain, chain) + 100 * neighbours
    assert float(apart.min()) > molecules.CLEARANCE
    assert float(((chain / torch.tensor([15.0, 15, 18])) ** 2).sum(1).max()) < 1


@pytest.mark.parametrize(("states", "particles"), [(20, 20_000), (7, 1000), (5, 5), (16, 37)])
def test_populations(states: int, particles: int) -> None:
    even, uneven = molecules.populations(states, particles, False), molecules.populations(states, particles, True)
    assert int(even.sum()) == particles and int(uneven.sum()) == particles
    assert int(even.max() - even.min()) <= 1 and int(uneven.min()) >= 1
    if particles > 50 * states:
        assert float(uneven[0] / uneven[-1]) == pytest.approx(5, rel=0.05)


def test_compositions_are_all_subsets_fewest_absent_first() -> None:
    table = molecules.compositions(3)
    assert len({tuple(row.tolist()) for row in table}) == 8
    assert table.sum(1).tolist() == [0, 1, 1, 1, 2, 2, 2, 3]
