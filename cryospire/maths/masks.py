"""Soft masks around density."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from cryospire.maths.fourier import radius, soft_step


def otsu(values: NDArray[np.floating]) -> float:
    """Threshold that divides values into the two classes of least variance within (Otsu 1979)."""
    counts, edges = np.histogram(values, 256)
    middle = (edges[1:] + edges[:-1]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    total = np.cumsum(counts * middle)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (total / below - (total[-1] - total) / above) ** 2
    return float(edges[1:][int(np.nanargmax(between))])


def choose_threshold(values: NDArray[np.floating], distance: NDArray[np.floating]) -> float:
    """Low enough for density that moves or is rarely there: five standard deviations of the rim or 3% of the peak, Otsu's at most.

    ``distance`` of every voxel from the centre, in half boxes.
    """
    rim = values[(distance > 0.9) & (distance < 1)]
    return min(otsu(values[distance < 1]), max(5 * float(rim.std()), 0.03 * float(values.max())))


def soft_mask(volume: Tensor, threshold: float, edge: float, dilation: float = 2.0) -> Tensor:
    """Mask (z, y, x), 1 within ``dilation`` voxels of density above the threshold, falling over ``edge`` voxels as a cosine.

    Threshold 0 is chosen from the map.  Density apart from the rest and smaller than a twentieth of the largest piece is noise.
    """
    if not volume.any():
        return torch.zeros_like(volume)
    values = volume.numpy()
    distance = (radius(volume.shape[-1], 3) / (volume.shape[-1] / 2)).numpy()
    core = (values > max(threshold or choose_threshold(values, distance), 0)) & (distance < 1)
    pieces, count = ndimage.label(core)
    if not count:
        return torch.zeros_like(volume)
    sizes = np.bincount(pieces.ravel())[1:]
    core = np.isin(pieces, 1 + np.flatnonzero(sizes > sizes.max() / 20))
    away = torch.from_numpy(ndimage.distance_transform_edt(~core)).to(volume.dtype)
    return soft_step(dilation + edge / 2 - away, edge / 2)
