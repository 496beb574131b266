"""Fourier shell correlation and what is read off it."""

from __future__ import annotations

import torch
from torch import Tensor

from cryospire.maths.fourier import half_plane_weight, shells


def fsc(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Signed Fourier shell correlation (box // 2 + 1,) of two volumes [z, y, x]; index k is the shell of radius k.

    ``mask`` multiplies both.  A shell where either volume is zero correlates 0.
    """
    box = a.shape[-1]
    if mask is not None:
        a, b = a * mask, b * mask
    fa, fb = torch.fft.rfftn(a.double()), torch.fft.rfftn(b.double())
    index = shells(box, 3, a.device).flatten()
    weight = half_plane_weight(box, 3, a.device).flatten()

    def shell_sum(values: Tensor) -> Tensor:
        return torch.bincount(index, values.flatten() * weight, box)[: box // 2 + 1]

    cross = shell_sum((fa * fb.conj()).real)
    norm = (shell_sum(fa.abs() ** 2) * shell_sum(fb.abs() ** 2)).sqrt()
    tiny = torch.finfo(torch.float64).tiny
    return torch.where(norm > tiny, cross / norm.clamp(min=tiny), torch.zeros_like(cross)).to(a.dtype)


def auc(curve: Tensor) -> Tensor:
    """Area under FSC curves (..., shells) over 0 to 0.5 cycles per pixel, by trapezoids; at most 0.5."""
    return torch.trapezoid(curve, dx=0.5 / (curve.shape[-1] - 1), dim=-1)


def resolution(curve: Tensor, threshold: float, pixel_size: float) -> float:
    """Resolution (Å) where the curve first falls below ``threshold``, between shells linearly.

    Nyquist if it never does, and the box if even the first shell is below it.
    """
    box = 2 * (len(curve) - 1)
    values = curve.double().tolist()
    for k in range(1, len(values)):
        if values[k] < threshold:
            if k == 1:
                return box * pixel_size
            before = max(values[k - 1], threshold)
            return box * pixel_size / (k - 1 + (before - threshold) / (before - values[k]))
    return 2 * pixel_size
