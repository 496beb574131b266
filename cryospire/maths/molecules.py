"""Atoms: groups that turn or vanish, the built-in phantom, and the transform of their projections as a plain sum.

A molecule is a density of atoms of weight ``w_j`` (electrons) at ``r_j``, each a Gaussian, cut softly at Nyquist, so it is
known exactly at every frequency: ``F(k) = H(|k|) sum_j w_j exp(-2 pi i k . r_j)``.  The fast twin is ``kernels.atoms``.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cryospire.maths import poses

SD_PER_RESOLUTION = 1 / (math.pi * math.sqrt(2))  # standard deviation of an atom over the nominal resolution, as ChimeraX molmap has it
CARBON = 6.0
CLEARANCE = 3.8  # Å between residues of a phantom's chain that are not neighbours


@dataclass(frozen=True)
class Molecule:
    """Atoms with the groups that move or vanish, and the hinge.

    ``position`` (A, 3) Å and ``weight`` (A,) float64; ``moving`` (A,) and ``absent`` (K, A) boolean; ``hinge`` (2, 3) Å, two points
    of the axis, about whose middle the moving group turns.
    """

    position: Tensor
    weight: Tensor
    moving: Tensor
    absent: Tensor
    hinge: Tensor

    @property
    def part(self) -> Tensor:
        """Part (A,) of every atom: atoms share one when they move together and vanish together; 0 is the still, permanent rest."""
        code = self.moving.long() + sum(2 ** (k + 1) * group.long() for k, group in enumerate(self.absent))
        return torch.unique(code, return_inverse=True)[1]

    def centred(self) -> Molecule:
        """The same with the centre of mass at the origin."""
        centre = (self.weight[:, None] * self.position).sum(0) / self.weight.sum()
        return Molecule(self.position - centre, self.weight, self.moving, self.absent, self.hinge - centre)


def turn(position: Tensor, rotation: Tensor, pivot: Tensor) -> Tensor:
    """``pivot + R (x - pivot)`` for positions (A, 3), a rotation (3, 3) and a point (3,)."""
    return pivot + (position - pivot) @ rotation.T


def hinge_rotation(hinge: Tensor, degrees: float) -> Tensor:
    """Rotation (3, 3) by an angle about the axis from the first hinge point (2, 3) to the second."""
    axis = hinge[1] - hinge[0]
    return poses.exp_so3(axis / axis.norm() * math.radians(degrees))


def clash(a: Tensor, b: Tensor, distance: float = 3.0) -> float:
    """Fraction of the atoms ``a`` (A, 3) that come within ``distance`` (Å) of any of ``b`` (B, 3)."""
    if not len(a) or not len(b):
        return 0.0
    return float((torch.cdist(a.float(), b.float()).min(1).values < distance).double().mean())


def compositions(groups: int) -> Tensor:
    """Every choice of absent groups (2^groups, groups), boolean: none first, then one at a time, then two."""
    choices = [c for n in range(groups + 1) for c in itertools.combinations(range(groups), n)]
    table = torch.zeros(len(choices), groups, dtype=torch.bool)
    for row, choice in enumerate(choices):
        table[row, list(choice)] = True
    return table


def populations(states: int, particles: int, uneven: bool) -> Tensor:
    """Particles of each state (states,), int64: equal, or falling geometrically by five from first to last; every one at least 1."""
    share = 5.0 ** (-torch.linspace(0, 1, states, dtype=torch.float64) * uneven)
    exact = share / share.sum() * particles
    counts = exact.floor().long().clamp(min=1)
    for k in torch.argsort(exact.floor() - exact, stable=True).tolist() * 2:
        if int(counts.sum()) >= particles:
            break
        counts[k] += 1
    return counts


def envelope(box: int, pixel_size: float, resolution: float, dims: int) -> Tensor:
    """``H`` in ``rfft`` layout, float64: an atom's Gaussian times a cosine edge from one shell inside Nyquist to one outside.

    The lines and planes at Nyquist itself, whose sign is undefined, are zero.
    """
    k = torch.fft.fftfreq(box, 1 / box, dtype=torch.float64)
    axes = [k] * (dims - 1) + [torch.arange(box // 2 + 1, dtype=torch.float64)]
    grids = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    radius = grids.square().sum(0).sqrt()
    sd = SD_PER_RESOLUTION * resolution / (box * pixel_size)
    edge = (1 + torch.cos(math.pi * ((radius - box // 2 + 1) / 2).clamp(0, 1))) / 2
    inside = (grids.abs() < box // 2).all(0)
    return torch.exp(-2 * (math.pi * sd * radius) ** 2) * edge * inside


def projection_transform(position: Tensor, weight: Tensor, rotation: Tensor, box: int, pixel_size: float, resolution: float) -> Tensor:
    """Transform (box, box // 2 + 1) of the projection along z after ``rotation`` (3, 3): the sum over atoms as it is written.

    Its ``fourier.irfft`` over pixel_size^2 is the image, ``sum_z V pixel_size``.
    """
    xy = (position @ rotation.T)[:, :2] / (box * pixel_size)
    kx = torch.arange(box // 2 + 1, dtype=torch.float64)
    ky = torch.fft.fftfreq(box, 1 / box, dtype=torch.float64)
    along_x = torch.exp(-2j * math.pi * xy[:, :1] * kx)
    along_y = torch.exp(-2j * math.pi * xy[:, 1:] * ky)
    return torch.einsum("a,ay,ax->yx", weight.to(along_x.dtype), along_y, along_x) * envelope(box, pixel_size, resolution, 2)


# centre and semi-axes (Å) of each domain; an antibody's Y without its symmetry, so that no pose fits twice
DOMAINS = {
    "base left": ((-13.0, 4.0, -55.0), (14.0, 15.0, 22.0)),
    "base right": ((14.0, -4.0, -52.0), (14.0, 15.0, 20.0)),
    "stem": ((0.0, 0.0, -14.0), (17.0, 15.0, 20.0)),
    "still arm": ((24.0, 3.0, 14.0), (16.0, 15.0, 20.0)),
    "still arm end": ((46.0, 10.0, 40.0), (17.0, 15.0, 18.0)),
    "moving arm": ((-30.0, 0.0, 16.0), (19.0, 15.0, 17.0)),
    "moving arm end": ((-62.0, -4.0, 36.0), (21.0, 16.0, 15.0)),
    "tip": ((60.0, 14.0, 74.0), (17.0, 15.0, 17.0)),
    "side cap": ((34.0, -6.0, -72.0), (15.0, 14.0, 14.0)),
    "back cap": ((-4.0, 34.0, -36.0), (15.0, 13.0, 16.0)),
}
HINGE = ((-8.0, 0.0, 2.0), (-28.0, 0.0, 0.0))  # from the stem outwards: the arm sweeps a cone away from everything else
CAPS = ("tip", "side cap", "back cap")


def phantom(caps: int = 1) -> Molecule:
    """Protein-like domains in the manner of an antibody: a still body, an arm that turns, ``caps`` (1 to 3) that may be absent.

    About 150 Å across and always the same: a domain is a compact self-avoiding chain with side groups, drawn from its own fixed seed.
    """
    present = [name for name in DOMAINS if name not in CAPS[caps:]]
    chains = [globule(*DOMAINS[name], seed=list(DOMAINS).index(name)) for name in present]
    owner = [name for name, chain in zip(present, chains, strict=True) for _ in chain]
    position = torch.cat(chains)
    return Molecule(
        position,
        torch.full((len(position),), 3 * CARBON, dtype=torch.float64),  # an atom here stands for about three
        torch.tensor([name.startswith("moving") for name in owner]),
        torch.tensor([[name == cap for name in owner] for cap in CAPS[:caps]]),
        torch.tensor(HINGE, dtype=torch.float64),
    ).centred()


def globule(centre: tuple[float, float, float], semi_axes: tuple[float, float, float], seed: int) -> Tensor:
    """Pseudo-atoms (A, 3) of one domain: a chain of 3.8 Å steps clear of itself, a residue for every 135 Å^3, two side groups each."""
    rng = np.random.default_rng(7919 + seed)
    semi = np.array(semi_axes)
    residues = int(4 / 3 * math.pi * semi.prod() / 135)
    chain = np.zeros((residues, 3))
    length = 1
    while length < residues:
        step = rng.standard_normal((16, 3))
        candidates = chain[length - 1] + 3.8 * step / np.linalg.norm(step, axis=1, keepdims=True)
        distance = ((candidates[:, None] - chain[: length - 1]) ** 2).sum(2)
        allowed = (((candidates / semi) ** 2).sum(1) < 1) & (distance > CLEARANCE**2).all(1)
        if allowed.any():
            chain[length] = candidates[allowed][0]
            length += 1
        else:
            length = max(1, length - 12)
    backbone = torch.from_numpy(chain)
    side = torch.from_numpy(rng.standard_normal((2, residues, 3)))
    side = backbone + 2.4 * side / side.norm(dim=2, keepdim=True)
    return torch.cat([backbone, side[0], side[1]]) + torch.tensor(centre, dtype=torch.float64)
