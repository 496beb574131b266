"""Noise of particle images: the background outside the particle's circle, its power spectrum, and the filter that whitens it."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from cryospire.maths.fourier import radial_mean, window


@lru_cache(maxsize=8)
def background(box: int) -> Tensor:
    """Weights (box, box) of background pixels: 0 within 0.85 of the half box, rising to 1 at 0.99."""
    return 1 - window(box)


def level(images: Tensor) -> Tensor:
    """Mean background (n, 1, 1) of images (n, box, box)."""
    weight = background(images.shape[-1]).to(images)
    return (images.flatten(1) @ weight.flatten() / weight.sum())[:, None, None]


def background_power(images: Tensor) -> Tensor:
    """Radial power spectra (n, box // 2 + 1) of the background, variance per pixel and Fourier coefficient.

    The spectrum of the masked images over the mask's mean square: the true one smoothed over two shells.  The two lowest
    shells, which subtracting the mean empties, take the value of the third.
    """
    box = images.shape[-1]
    weight = background(box)
    transform = torch.fft.rfft2((images - level(images)) * weight, norm="ortho")
    power = radial_mean(transform.abs() ** 2, box) / (weight**2).mean()
    power[:, :2] = power[:, 2:3]
    return power


def whitening(power: Tensor) -> Tensor:
    """Filters (..., shells) that turn noise of this power into unit variance; power is taken to be at least 1e-6 of its mean."""
    return torch.maximum(power, 1e-6 * power.mean(-1, keepdim=True)).rsqrt()
