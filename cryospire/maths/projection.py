"""Projection of a Gaussian mixture to images and to voxels: the plain equations, dense, in any float dtype.

A Gaussian's projection is a Gaussian, separable in x and y (method: equation of the image formation), so an image is
``I[y, x] = sum_i w_i exp(-(x - x_i)^2 / 2 s_i^2) exp(-(y - y_i)^2 / 2 s_i^2)``, cut to the window of whole pixels within
``ceil(cutoff s_i)`` of the pixel nearest to the centre.  The fast twins are in ``cryospire.kernels``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SQRT_2PI = math.sqrt(2 * math.pi)


def axis_profile(x: Tensor, scale: Tensor, box: int, cutoff: float) -> Tensor:
    """One-dimensional profiles (..., G, box) of Gaussians at ``x`` (..., G), pixels from the origin pixel ``box // 2``."""
    pixel = torch.arange(box, dtype=x.dtype, device=x.device) - box // 2
    d = pixel - x[..., None]
    profile = torch.exp(-(d**2) / (2 * scale[..., None] ** 2))
    inside = (pixel - torch.floor(x[..., None] + 0.5)).abs() <= torch.ceil(cutoff * scale)[..., None]
    return torch.where(inside, profile, torch.zeros((), dtype=x.dtype, device=x.device))


def splat(xy: Tensor, weight: Tensor, scale: Tensor, box: int, cutoff: float = 3.0) -> Tensor:
    """Images (B, box, box) of Gaussians.

    ``xy`` (B, 2, G) centres in pixels from the origin pixel, ``weight`` (B, G) peak values, ``scale`` (G) standard
    deviations in pixels, shared by the batch.  ``cutoff=inf`` gives the dense image without truncation.
    """
    ex = axis_profile(xy[:, 0], scale, box, cutoff)
    ey = axis_profile(xy[:, 1], scale, box, cutoff)
    return torch.einsum("bgy,bg,bgx->byx", ey, weight, ex)


def peak_weight(amplitude: Tensor, scale: Tensor) -> Tensor:
    """Peak of the projection of ``amplitude * exp(-r^2 / 2 scale^2)`` along z: ``sqrt(2 pi) scale amplitude`` (scale in Å)."""
    return SQRT_2PI * scale * amplitude


def render(centre: Tensor, amplitude: Tensor, scale: Tensor, box: int, cutoff: float = 4.0) -> Tensor:
    """Volume (box, box, box) as [z, y, x] of Gaussians: ``centre`` (G, 3) and ``scale`` (G) in voxels, ``amplitude`` (G)."""
    ex, ey, ez = (axis_profile(centre[:, k], scale, box, cutoff) for k in range(3))
    return torch.einsum("gz,gy,gx->zyx", ez * amplitude[:, None], ey, ex)
