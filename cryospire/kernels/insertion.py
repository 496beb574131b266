"""Fourier insertion on CPU: the numba twin of ``maths.insertion.insert``."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from torch import Tensor


def insert(numerator: Tensor, weight: Tensor, slices: Tensor, weights: Tensor, rotation: Tensor, which: Tensor) -> None:
    """Add slices to the accumulators ``which`` (n,), in place; see ``maths.insertion.insert``.

    One thread owns an accumulator, so the sums do not depend on the number of threads.
    """
    arrays = (numerator, weight, slices.to(numerator.dtype), weights.to(weight.dtype), rotation.to(weight.dtype), which.int())
    _insert(*(a.contiguous().numpy() for a in arrays))


@numba.njit(parallel=True, fastmath=True, cache=True)
def _insert(numerator: Any, weight: Any, slices: Any, weights: Any, rotation: Any, which: Any) -> None:
    n, box, half = slices.shape
    p = numerator.shape[1]
    pad = np.float32(p // box)
    limit = (box + 1) ** 2
    for a in numba.prange(numerator.shape[0]):
        for i in range(n):
            if which[i] != a:
                continue
            r = rotation[i]
            for iy in range(box):
                ky = iy if iy < box // 2 else iy - box
                if ky == -(box // 2):
                    continue
                for kx in range(0 if ky >= 0 else 1, half - 1):
                    if 4 * (kx * kx + ky * ky) >= limit:
                        break
                    x = pad * (kx * r[0, 0] + ky * r[1, 0])
                    y = pad * (kx * r[0, 1] + ky * r[1, 1])
                    z = pad * (kx * r[0, 2] + ky * r[1, 2])
                    value = slices[i, iy, kx]
                    w = weights[i, iy, kx]
                    if x < 0:
                        x, y, z, value = -x, -y, -z, np.conj(value)
                    _spread(numerator[a], weight[a], p, x, y, z, value, w)


@numba.njit(fastmath=True, inline="always")
def _spread(numerator: Any, weight: Any, p: int, x: Any, y: Any, z: Any, value: Any, w: Any) -> None:
    x0, y0, z0 = int(np.floor(x)), int(np.floor(y)), int(np.floor(z))
    fx, fy, fz = x - np.float32(x0), y - np.float32(y0), z - np.float32(z0)
    one = np.float32(1)
    last = p // 2
    if x0 > last:
        return
    for dz in range(2):
        kz = z0 + dz
        if kz < -last or kz > last:
            continue
        iz = kz + p if kz < 0 else kz
        sz = fz if dz else one - fz
        for dy in range(2):
            ky = y0 + dy
            if ky < -last or ky > last:
                continue
            iy = ky + p if ky < 0 else ky
            sy = sz * (fy if dy else one - fy)
            s0, s1 = sy * (one - fx), sy * fx
            row, row_weight = numerator[iz, iy], weight[iz, iy]
            row[x0] += value * s0
            row_weight[x0] += w * s0
            if x0 < last:
                row[x0 + 1] += value * s1
                row_weight[x0 + 1] += w * s1
