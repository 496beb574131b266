"""Reconstruction by Fourier insertion: every image is a central slice of the map's transform, seen through its CTF.

``F_2D(image)(k) = transfer(k) pixel_size F_3D(map)(R^T k)``, phases counted from the origin.  Each pixel of a slice is spread
over the eight nearest voxels of a grid ``pad`` times finer; least squares gives ``numerator / weight`` in each voxel, and the
trilinear kernel, a product of sinc^2 in real space, is divided out.

Accumulators hold the half space kx >= 0: (A, P, P, P // 2 + 1) as [z, y, x], P = pad box, one for each half-set or state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cryospire.maths import fourier


def padding(box: int) -> int:
    """Finer grid where it fits in memory: 2 up to box 128, else 1."""
    return 2 if box <= 128 else 1


def accumulators(count: int, box: int, pad: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Empty numerators (complex) and weights (real), each (count, P, P, P // 2 + 1)."""
    p = pad * box
    weight = torch.zeros(count, p, p, p // 2 + 1, dtype=dtype)
    return torch.zeros_like(weight, dtype=torch.complex128 if dtype == torch.float64 else torch.complex64), weight


def weighted_slices(images: Tensor, transfer: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Slices ``transfer F(image moved back to the centre)`` and their weights ``transfer^2``, both (n, box, box // 2 + 1).

    ``images`` (n, box, box), ``transfer`` (n, box, box // 2 + 1) real, ``shift`` (n, 2) of the particles in pixels, x and y.
    """
    return fourier.rfft(images) * transfer * fourier.shift_phase(images.shape[-1], -shift), transfer**2


def slice_points(box: int, device: torch.device | None = None) -> Tensor:
    """Where a slice is read: boolean (box, box // 2 + 1), each pair (k, -k) once, up to the shell ``box // 2``, Nyquist lines left out."""
    ky = torch.fft.fftfreq(box, 1 / box, device=device).round().long()[:, None]
    kx = torch.arange(box // 2 + 1, device=device)[None]
    inside = (4 * (kx**2 + ky**2) < (box + 1) ** 2) & (kx < box // 2) & (ky > -(box // 2))
    return inside & ((kx > 0) | (ky >= 0))


def insert(numerator: Tensor, weight: Tensor, slices: Tensor, weights: Tensor, rotation: Tensor, which: Tensor) -> None:
    """Add slices to the accumulators ``which`` (n,), in place.  Plain twin of ``kernels.insertion.insert``.

    ``slices`` and ``weights`` (n, box, box // 2 + 1) from ``weighted_slices``, ``rotation`` (n, 3, 3).
    """
    box, p = slices.shape[-2], numerator.shape[-2]
    points = slice_points(box, slices.device)
    y, x = torch.nonzero(points, as_tuple=True)
    ky = torch.where(y < box // 2, y, y - box)
    k = torch.stack([x, ky], -1).to(rotation.dtype) * (p // box)
    where = k @ rotation[:, :2]  # R^T (kx, ky, 0) as rows: (n, points, 3)
    values, value_weights = slices[:, points], weights[:, points]
    flip = where[..., 0] < 0
    where = torch.where(flip[..., None], -where, where)
    values = torch.where(flip, values.conj(), values)
    low = where.floor()
    part = where - low
    for corner in range(8):
        step = torch.tensor([corner & 1, corner >> 1 & 1, corner >> 2])
        node = low.long() + step
        share = torch.where(step.bool(), part, 1 - part).prod(-1)
        kept = (node.abs() <= p // 2).all(-1)
        nx, ny, nz = node[kept].remainder(p).unbind(-1)
        a = which[:, None].expand_as(kept)[kept]
        numerator.index_put_((a, nz, ny, nx), (values * share)[kept], accumulate=True)
        weight.index_put_((a, nz, ny, nx), (value_weights * share)[kept], accumulate=True)


def complete(numerator: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Give the plane kx = 0 what the mates -k of inserted points add to it."""
    numerator, weight = numerator.clone(), weight.clone()

    def opposite(plane: Tensor) -> Tensor:
        return torch.roll(torch.flip(plane, (-2, -1)), (1, 1), (-2, -1))

    numerator[..., 0] += opposite(numerator[..., 0]).conj()
    weight[..., 0] += opposite(weight[..., 0])
    return numerator, weight


def reconstruct(numerator: Tensor, weight: Tensor, box: int, pixel_size: float, floor: float = 1e-3) -> Tensor:
    """Map (box, box, box) as [z, y, x], image unit / Å, of one accumulator (P, P, P // 2 + 1).

    Weights below ``floor`` times their shell's mean are raised to it, so that a voxel no slice came near stays small.
    """
    p = numerator.shape[-2]
    numerator, weight = complete(numerator, weight)
    index = fourier.shells(p, 3, weight.device).clamp(max=p // 2)
    least = floor * fourier.radial_mean(weight, p, 3)[index]
    transform = numerator / torch.maximum(weight, least.clamp(min=torch.finfo(weight.dtype).tiny))
    padded = fourier.irfft(transform, 3)
    start = (p - box) // 2
    inner = padded[start : start + box, start : start + box, start : start + box]
    volume = inner / (pixel_size * gridding(box, p, inner.dtype))
    # Near zero frequency, weights change within a voxel; solvent has density 0, as images have background 0.
    return volume - volume[fourier.radius(box, 3) > box / 2].mean()


def gridding(box: int, p: int, dtype: torch.dtype) -> Tensor:
    """What trilinear spreading on a grid of ``p`` does to a map (box, box, box): ``sinc^2(x / p)`` along each axis."""
    x = (torch.arange(box, dtype=dtype) - box // 2) / p
    one = torch.sinc(x) ** 2
    return one[:, None, None] * one[:, None] * one


def project(volume: Tensor, rotation: Tensor, pixel_size: float, pad: int = 2) -> Tensor:
    """Images (n, box, box) ``sum_z V pixel_size`` of a map (box, box, box) at ``rotation`` (n, 3, 3), by slicing its transform.

    The adjoint of ``insert`` up to the gridding correction; pixels beyond the shell ``box // 2`` are zero in Fourier space.
    """
    box = volume.shape[-1]
    p = pad * box
    edge = (p - box) // 2
    padded = torch.nn.functional.pad(volume / gridding(box, p, volume.dtype), [edge] * 6)
    transform = fourier.rfft(padded, 3)
    points = slice_points(box, volume.device)
    y, x = torch.nonzero(points, as_tuple=True)
    ky = torch.where(y < box // 2, y, y - box)
    where = (torch.stack([x, ky], -1).to(volume.dtype) * pad) @ rotation[:, :2].to(volume.dtype)
    flip = where[..., 0] < 0
    where = torch.where(flip[..., None], -where, where)
    low = where.floor()
    part = where - low
    values = torch.zeros(where.shape[:2], dtype=transform.dtype)
    for corner in range(8):
        step = torch.tensor([corner & 1, corner >> 1 & 1, corner >> 2])
        node = (low.long() + step).clamp(-(p // 2), p // 2)
        nx, ny, nz = node.remainder(p).unbind(-1)
        nx = torch.where(node[..., 0] > p // 2, p // 2, nx)
        values = values + transform[nz, ny, nx] * torch.where(step.bool(), part, 1 - part).prod(-1)
    slices = torch.zeros(len(rotation), box, box // 2 + 1, dtype=transform.dtype)
    slices[:, points] = torch.where(flip, values.conj(), values) * pixel_size
    mates = torch.arange(1, box // 2)
    slices[:, box - mates, 0] = slices[:, mates, 0].conj()
    return fourier.irfft(slices)
