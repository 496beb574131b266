"""Rotations.  A pose matrix R maps model coordinates (x, y, z) into the view: ``x_view = R x_model``."""

from __future__ import annotations

import torch
from torch import Tensor

SQUARINGS = 20  # eigenvalues nearer than 1e-5 are not told apart


def _axis(angle: Tensor, axis: str) -> Tensor:
    """Active rotations (..., 3, 3) by ``angle`` (...), radians, about the y or z axis."""
    c, s, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    rows = {
        "y": (c, zero, s, zero, one, zero, -s, zero, c),
        "z": (c, -s, zero, s, c, zero, zero, zero, one),
    }
    return torch.stack(rows[axis], -1).reshape(*angle.shape, 3, 3)


def euler_to_matrix(rot: Tensor, tilt: Tensor, psi: Tensor) -> Tensor:
    """RELION's matrix A (..., 3, 3) of ``rlnAngleRot``, ``rlnAngleTilt``, ``rlnAnglePsi`` (...), degrees: ``x_view = A x_model``.

    ``A = Z(-psi) Y(-tilt) Z(-rot)``: the transpose of scipy's ``from_euler("ZYZ", [rot, tilt, psi])``.
    """
    rot, tilt, psi = (torch.deg2rad(a) for a in (rot, tilt, psi))
    return _axis(-psi, "z") @ _axis(-tilt, "y") @ _axis(-rot, "z")


def matrix_to_euler(rotation: Tensor) -> Tensor:
    """Inverse of ``euler_to_matrix``: (..., 3) rot, tilt, psi in degrees, tilt in [0, 180]; psi = 0 where tilt is 0 or 180."""
    r = rotation
    tilt = torch.atan2(torch.hypot(r[..., 2, 0], r[..., 2, 1]), r[..., 2, 2])
    pole = torch.hypot(r[..., 2, 0], r[..., 2, 1]) < 1e-6
    rot = torch.where(pole, torch.atan2(-r[..., 1, 0], r[..., 1, 1]), torch.atan2(r[..., 2, 1], r[..., 2, 0]))
    psi = torch.where(pole, torch.zeros_like(rot), torch.atan2(r[..., 1, 2], -r[..., 0, 2]))
    return torch.rad2deg(torch.stack([rot, tilt, psi], -1))


def angle_between(a: Tensor, b: Tensor) -> Tensor:
    """Angles (...), degrees, of the rotations from a (..., 3, 3) to b (..., 3, 3)."""
    return torch.rad2deg((((a * b).sum((-2, -1)) - 1) / 2).clamp(-1, 1).acos())


def exp_so3(v: Tensor) -> Tensor:
    """Rotations (..., 3, 3) by angle |v| (radians) about axis v (..., 3); Rodrigues' formula, differentiable at 0 as well."""
    angle2 = (v * v).sum(-1)[..., None, None]
    small = angle2 < 1e-4
    angle = torch.where(small, torch.ones_like(angle2), angle2).sqrt()
    a = torch.where(small, 1 - angle2 / 6 + angle2**2 / 120, angle.sin() / angle)
    b = torch.where(small, 0.5 - angle2 / 24 + angle2**2 / 720, (1 - angle.cos()) / angle**2)
    x, y, z = v.unbind(-1)
    zero = torch.zeros_like(x)
    k = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).reshape(*v.shape[:-1], 3, 3)
    return torch.eye(3, dtype=v.dtype, device=v.device) + a * k + b * (k @ k)


def axial(m: Tensor) -> Tensor:
    """Twice the vector (..., 3) of the antisymmetric part of matrices (..., 3, 3): of ``y x^T``, that is ``x cross y``."""
    return torch.stack([m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]], -1)


def frames(v: Tensor) -> Tensor:
    """Rotations (..., 3, 3) from six numbers (..., 6): two columns, orthonormalised; 0 gives the identity (Zhou et al., CVPR 2019).

    Unlike angle times axis, continuous all the way round: what turns through a full circle has no seam to jump over.
    """
    one = torch.eye(3, dtype=v.dtype, device=v.device)
    x = torch.nn.functional.normalize(one[0] + v[..., :3], dim=-1)
    y = one[1] + v[..., 3:]
    y = torch.nn.functional.normalize(y - (x * y).sum(-1, keepdim=True) * x, dim=-1)
    return torch.stack([x, y, torch.linalg.cross(x, y)], -1)


def corrected(rotation: Tensor, shift: Tensor, correction: Tensor, box: int, pixel_size: float) -> tuple[Tensor, Tensor]:
    """Poses, rotations (B, 3, 3) and shifts (B, 2) Å, after a small ``correction`` (B, 5), all in pixels: turns about the axes of the view,
    at a quarter of the box from the centre, and shifts.

    The turn is that of the Gibbs vector g, which has its axis and length ``tan(angle / 2)``: ``1 + 2 (K + K^2) / (1 + g^2)``.
    """
    g = correction[:, :3] * (2 / box)
    x, y, z = g.unbind(1)
    zero = torch.zeros_like(x)
    k = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], 1).view(-1, 3, 3)
    turn = torch.eye(3, dtype=g.dtype, device=g.device) + (k + k @ k) * (2 / (1 + g.square().sum(1)))[:, None, None]
    return turn @ rotation, shift + correction[:, 3:] * pixel_size


def correction(rotation: Tensor, shift: Tensor, rotation_after: Tensor, shift_after: Tensor, box: int, pixel_size: float) -> Tensor:
    """The correction (B, 5) that takes the first poses to those after it; inverse of ``corrected``."""
    turn = rotation_after @ rotation.transpose(1, 2)
    cosine = (turn.diagonal(dim1=1, dim2=2).sum(1) + 1)[:, None]
    return torch.cat([axial(turn) / cosine * (box / 2), (shift_after - shift) / pixel_size], 1)


def carried(rotation: Tensor, shift: Tensor, turn: Tensor, way: Tensor) -> tuple[Tensor, Tensor]:
    """Poses, rotations (B, 3, 3) and shifts (B, 2) Å, at which a body at rest is seen as at those given after its motion: rotations
    ``turn`` (B, 3, 3) and translations ``way`` (B, 3) Å."""
    return rotation @ turn, shift + (rotation[:, :2] @ way[:, :, None])[:, :, 0]


def nearest_rotation(moment: Tensor) -> Tensor:
    """Rotations R (..., 3, 3) with the greatest ``trace(R^T moment)``, for ``moment`` (..., 3, 3): Davenport's q-method (1968).

    The quaternion of R is the first eigenvector of a matrix of 4 x 4, by repeated squaring: unlike an SVD nothing of it makes a GPU's
    host wait.
    """
    trace, z = moment.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None], axial(moment)[..., None]
    even = moment + moment.mT - trace * torch.eye(3, dtype=moment.dtype, device=moment.device)
    k = torch.cat([torch.cat([trace, z.mT], -1), torch.cat([z, even], -1)], -2)
    k = k / k.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-30)
    k = k + torch.eye(4, dtype=k.dtype, device=k.device)  # no eigenvalue is negative
    for _ in range(SQUARINGS):
        k = k @ k
        k = k / k.norm(dim=(-2, -1), keepdim=True)
    column = k.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None]
    q = k.take_along_dim(column, -1)[..., 0]
    return of_quaternions(q / q.norm(dim=-1, keepdim=True))


def rotvec_to_matrix(v: Tensor) -> Tensor:
    """Rotations (..., 3, 3) of rotation vectors (..., 3), radians.  cryoSPARC's pose is the transpose of this."""
    return exp_so3(v)


def random_rotations(n: int, generator: torch.Generator | None = None) -> Tensor:
    """Rotations (n, 3, 3), float64, uniform over SO(3): normalised Gaussian quaternions."""
    q = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return of_quaternions(q / q.norm(dim=1, keepdim=True))


def even_rotations(n: int) -> Tensor:
    """Rotations (n, 3, 3) spread evenly over SO(3): super-Fibonacci spirals (Alexa, CVPR 2022)."""
    s = torch.arange(n, dtype=torch.float64) + 0.5
    a, b = 2 * torch.pi * s / 2**0.5, 2 * torch.pi * s / 1.533751168755204288118041
    inner, outer = (s / n).sqrt(), (1 - s / n).sqrt()
    return of_quaternions(torch.stack([inner * a.sin(), inner * a.cos(), outer * b.sin(), outer * b.cos()], 1)).float()


def of_quaternions(q: Tensor) -> Tensor:
    """Rotations (..., 3, 3) of unit quaternions (..., 4), w first."""
    w, x, y, z = q.unbind(-1)
    rows = (
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    )  # fmt: skip
    return torch.stack(rows, -1).reshape(*q.shape[:-1], 3, 3)
