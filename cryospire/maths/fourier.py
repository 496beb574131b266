"""Fourier transforms of real images and volumes whose origin is pixel ``n // 2`` of an even box."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def rfft(x: Tensor, dims: int = 2) -> Tensor:
    """Half-plane transform over the last ``dims`` axes, phases counted from the origin pixel ``n // 2``; unnormalised."""
    axes = tuple(range(-dims, 0))
    return torch.fft.rfftn(torch.fft.ifftshift(x, axes), dim=axes)


def irfft(transform: Tensor, dims: int = 2) -> Tensor:
    """Inverse of ``rfft``: real (..., n, n) from (..., n, n // 2 + 1)."""
    axes = tuple(range(-dims, 0))
    size = [2 * (transform.shape[-1] - 1)] * dims
    return torch.fft.fftshift(torch.fft.irfftn(transform, size, dim=axes), axes)


def shells(box: int, dims: int = 2, device: torch.device | None = None) -> Tensor:
    """Shell index, the nearest integer to |k|, of every entry of an ``rfft``: (box, [box,] box // 2 + 1), int64."""
    k = torch.fft.fftfreq(box, 1 / box, dtype=torch.float64, device=device)
    grids = torch.meshgrid(*[k] * (dims - 1), k[: box // 2 + 1].abs(), indexing="ij")
    return torch.stack(grids).square().sum(0).sqrt().round().long()


def radial_mean(values: Tensor, box: int, dims: int = 2) -> Tensor:
    """Mean over each shell 0..box // 2 of values (..., [box,] box, box // 2 + 1) in ``rfft`` layout: (..., box // 2 + 1)."""
    index = shells(box, dims, values.device).flatten()
    weight = half_plane_weight(box, dims, values.device, values.dtype).flatten()
    kept = index <= box // 2
    flat = values.flatten(-dims)[..., kept] * weight[kept]
    total = torch.zeros(*values.shape[:-dims], box // 2 + 1, dtype=values.dtype, device=values.device)
    total.index_add_(-1, index[kept], flat)
    return total / torch.bincount(index[kept], weight[kept], box // 2 + 1).to(values.dtype)


def half_plane_weight(box: int, dims: int, device: torch.device | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """How many entries of the whole transform each entry of the half plane stands for: 2, but 1 at kx = 0 and Nyquist."""
    weight = torch.full((box // 2 + 1,), 2.0, dtype=dtype, device=device)
    weight[0] = weight[-1] = 1
    return weight.expand(*[box] * (dims - 1), box // 2 + 1)


def crop(x: Tensor, box: int, dims: int = 2) -> Tensor:
    """Resample real (..., n, n) to (..., box, box) by cropping, or zero-padding, its Fourier transform.

    Values are kept (a constant stays itself) and so is the origin ``n // 2``; both boxes even.  The Nyquist frequency of the
    smaller box stands for the sum of its two sides, as in sampling; padding gives half to each.
    """
    n = x.shape[-1]
    if box == n:
        return x
    axes = tuple(range(-dims, 0))
    transform = torch.fft.rfftn(x, dim=axes, norm="forward")
    for axis in axes[:-1]:
        transform = _resize_axis(transform, axis, box)
    half = min(n, box) // 2
    # irfftn takes the Nyquist entry as the mean of both sides: doubled when it becomes one, halved when it stops to be.
    last = [transform[..., :half], transform[..., half : half + 1] * (2 if box < n else 0.5)]
    if box > n:
        last.append(transform.new_zeros(*transform.shape[:-1], (box - n) // 2))
    return torch.fft.irfftn(torch.cat(last, -1), [box] * dims, dim=axes, norm="forward")


def _resize_axis(transform: Tensor, axis: int, box: int) -> Tensor:
    n = transform.shape[axis]
    half = min(n, box) // 2
    low, high = transform.narrow(axis, 0, half), transform.narrow(axis, n - half + 1, half - 1)
    if box < n:
        nyquist = transform.narrow(axis, half, 1) + transform.narrow(axis, n - half, 1)
        return torch.cat([low, nyquist, high], axis)
    nyquist = transform.narrow(axis, half, 1) / 2
    shape = list(transform.shape)
    shape[axis] = box - n - 1
    return torch.cat([low, nyquist, transform.new_zeros(shape), nyquist, high], axis)


def resample(x: Tensor, matrix: Tensor) -> Tensor:
    """Images (n, box, box) read at ``matrix`` (2, 2) times the position (x, y; from the origin pixel), periodic outside.

    Exact for band-limited images: x and then y is resampled by its Fourier series (Catmull & Smith 1980's two passes).
    """
    a, b, c, d = matrix.double().flatten().tolist()
    return _resample_rows(_resample_rows(x, a - b * c / d, b / d).transpose(1, 2), d, c).transpose(1, 2)


def _resample_rows(x: Tensor, scale: float, shear: float) -> Tensor:
    """Row y of images read at ``scale x + shear y``."""
    box = x.shape[-1]
    at = (torch.arange(box, dtype=torch.float64) - box // 2).to(x.device)
    k = torch.arange(box // 2 + 1, device=x.device)
    transform = torch.fft.rfft(torch.fft.ifftshift(x, -1), norm="forward")
    transform = transform * torch.exp(2j * math.pi / box * shear * at[:, None] * k).to(transform.dtype)
    series = half_plane_weight(box, 1, x.device) * torch.exp(2j * math.pi / box * scale * at[:, None] * k)
    return (transform @ series.T.to(transform.dtype)).real


def shift_phase(box: int, shift: Tensor) -> Tensor:
    """Factors (n, box, box // 2 + 1) that move images by ``shift`` (n, 2; x, y in pixels): ``exp(-2 pi i k . shift / box)``."""
    kx = torch.arange(box // 2 + 1, dtype=shift.dtype, device=shift.device)
    ky = torch.fft.fftfreq(box, 1 / box, dtype=shift.dtype, device=shift.device)
    x = torch.exp(-2j * math.pi / box * kx * shift[:, 0, None])
    y = torch.exp(-2j * math.pi / box * ky * shift[:, 1, None])
    return y[:, :, None] * x[:, None]


def apply_radial(x: Tensor, curve: Tensor, dims: int) -> Tensor:
    """Multiply the transform of real ``x`` by ``curve`` (box // 2 + 1,), a value a shell; corners take the last one."""
    box = x.shape[-1]
    factor = curve[shells(box, dims, x.device).clamp(max=box // 2)]
    axes = tuple(range(-dims, 0))
    return torch.fft.irfftn(torch.fft.rfftn(x, dim=axes) * factor, [box] * dims, dim=axes)


def lowpass(volume: Tensor, pixel_size: float, resolution: float, edge: float = 2.0) -> Tensor:
    """Low-pass a volume (z, y, x) at ``resolution`` (Å), with a cosine edge ``edge`` shells wide on either side."""
    box = volume.shape[-1]
    k = torch.arange(box // 2 + 1, dtype=volume.dtype, device=volume.device)
    return apply_radial(volume, soft_step(box * pixel_size / resolution - k, edge), 3)


def soft_step(x: Tensor, width: float) -> Tensor:
    """0 below ``-width``, 1 above ``+width``, half a cosine between."""
    return (1 - torch.cos(math.pi * ((x / max(width, 1e-12) + 1) / 2).clamp(0, 1))) / 2


def radius(box: int, dims: int = 2, centre: Sequence[float] | None = None) -> Tensor:
    """Distance (pixels, float32) of every pixel from the origin pixel ``box // 2``, or from ``centre`` (x, y[, z]) relative to it."""
    r = torch.arange(box, dtype=torch.float32) - box // 2
    offset = [0.0] * dims if centre is None else list(centre)
    grids = torch.meshgrid(*[r - c for c in reversed(offset)], indexing="ij")
    return torch.stack(grids).square().sum(0).sqrt()


@lru_cache(maxsize=8)
def window(box: int, inner: float = 0.85, outer: float = 0.99) -> Tensor:
    """Circular window (box, box): 1 inside ``inner`` of the half box, falling linearly to 0 at ``outer``."""
    return ((outer - radius(box) / (box / 2)) / (outer - inner)).clamp(0, 1)
