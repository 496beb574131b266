"""Truncated separable splatting on CPU: the numba twin of ``maths.projection.splat`` and ``render``.

Images are independent, so threads never share a pixel and the result does not depend on their number.  Along an axis the
profile follows from its neighbour, ``e(k + 1) = e(k) a(k)``, ``a(k + 1) = a(k) q`` with ``q = exp(-1 / s^2)``: three
exponentials an axis instead of one a pixel.
"""

from __future__ import annotations

import math

import numba
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
WIDEST = 512  # pixels a profile may span


@numba.njit(inline="always", fastmath=True)
def _profile(x, s, radius, out):  # type: ignore[no-untyped-def]
    """Profile of a Gaussian at ``x`` pixels from the nearest pixel's left neighbour grid; returns that pixel."""
    centre = math.floor(x + np.float32(0.5))
    d = x - centre
    h = np.float32(0.5) / (s * s)
    q = math.exp(-np.float32(2.0) * h)
    e0 = math.exp(-d * d * h)
    out[radius] = e0
    e, a = e0, math.exp(-(np.float32(1.0) - np.float32(2.0) * d) * h)
    for k in range(1, radius + 1):
        e *= a
        a *= q
        out[radius + k] = e
    e, a = e0, math.exp(-(np.float32(1.0) + np.float32(2.0) * d) * h)
    for k in range(1, radius + 1):
        e *= a
        a *= q
        out[radius - k] = e
    return int(centre)


@numba.njit(parallel=True, fastmath=True, cache=True, error_model="numpy")
def forward(xy: Array, weight: Array, scale: Array, box: int, cutoff: float) -> Array:
    """Images (B, box, box); arguments as in ``maths.projection.splat``."""
    n_images, n = weight.shape
    images = np.zeros((n_images, box, box), np.float32)
    for b in numba.prange(n_images):
        ex = np.empty(WIDEST, np.float32)
        ey = np.empty(WIDEST, np.float32)
        image = images[b]
        for i in range(n):
            s = scale[i]
            w = weight[b, i]
            r = int(math.ceil(np.float32(cutoff) * s))
            cx = math.floor(xy[b, 0, i] + np.float32(0.5)) + box // 2
            cy = math.floor(xy[b, 1, i] + np.float32(0.5)) + box // 2
            x0, x1 = max(cx - r, 0), min(cx + r + 1, box)
            y0, y1 = max(cy - r, 0), min(cy + r + 1, box)
            if x0 >= x1 or y0 >= y1:
                continue
            _profile(xy[b, 0, i], s, r, ex)
            _profile(xy[b, 1, i], s, r, ey)
            dx = int(r - cx)
            for y in range(y0, y1):
                wy = w * ey[y - cy + r]
                row = image[y]
                for x in range(x0, x1):
                    row[x] += wy * ex[x + dx]
    return images


@numba.njit(parallel=True, fastmath=True, cache=True, error_model="numpy")
def backward(grad: Array, xy: Array, weight: Array, scale: Array, cutoff: float) -> tuple[Array, Array, Array]:
    """Gradients of ``sum(grad * images)``: of ``xy`` (B, 2, G), of ``weight`` (B, G), and of ``scale`` for every image (B, G)."""
    n_images, n = weight.shape
    box = grad.shape[1]
    d_xy = np.zeros((n_images, 2, n), np.float32)
    d_weight = np.zeros((n_images, n), np.float32)
    d_scale = np.zeros((n_images, n), np.float32)
    for b in numba.prange(n_images):
        ex = np.empty(WIDEST, np.float32)
        ey = np.empty(WIDEST, np.float32)
        c0 = np.empty(WIDEST, np.float32)
        c1 = np.empty(WIDEST, np.float32)
        c2 = np.empty(WIDEST, np.float32)
        image = grad[b]
        for i in range(n):
            s = scale[i]
            r = int(math.ceil(np.float32(cutoff) * s))
            cx = math.floor(xy[b, 0, i] + np.float32(0.5)) + box // 2
            cy = math.floor(xy[b, 1, i] + np.float32(0.5)) + box // 2
            x0, x1 = max(cx - r, 0), min(cx + r + 1, box)
            y0, y1 = max(cy - r, 0), min(cy + r + 1, box)
            if x0 >= x1 or y0 >= y1:
                continue
            _profile(xy[b, 0, i], s, r, ex)
            _profile(xy[b, 1, i], s, r, ey)
            wide = int(x1 - x0)
            for k in range(wide):
                c0[k] = np.float32(0.0)
                c1[k] = np.float32(0.0)
                c2[k] = np.float32(0.0)
            # Moments along y for every column, then along x: three multiply-adds a pixel.
            for y in range(y0, y1):
                e = ey[y - cy + r]
                dy = np.float32(y - box // 2) - xy[b, 1, i]
                e1 = e * dy
                e2 = e1 * dy
                row = image[y]
                for k in range(wide):
                    g = row[x0 + k]
                    c0[k] += g * e
                    c1[k] += g * e1
                    c2[k] += g * e2
            m00 = m10 = m01 = m2 = np.float32(0.0)
            for k in range(wide):
                e = ex[x0 + k - cx + r]
                dx = np.float32(x0 + k - box // 2) - xy[b, 0, i]
                m00 += c0[k] * e
                m10 += c0[k] * e * dx
                m01 += c1[k] * e
                m2 += (c2[k] + c0[k] * dx * dx) * e
            w = weight[b, i] / (s * s)
            d_weight[b, i] = m00
            d_xy[b, 0, i] = w * m10
            d_xy[b, 1, i] = w * m01
            d_scale[b, i] = w * m2 / s
    return d_xy, d_weight, d_scale


@numba.njit(fastmath=True, cache=True, error_model="numpy")
def volume(centre: Array, amplitude: Array, scale: Array, box: int, cutoff: float) -> Array:
    """Volume [z, y, x]; arguments as in ``maths.projection.render``."""
    out = np.zeros((box, box, box), np.float32)
    profiles = np.empty((3, WIDEST), np.float32)
    start = np.empty(3, np.int64)
    stop = np.empty(3, np.int64)
    shift = np.empty(3, np.int64)
    for i in range(len(amplitude)):
        s = scale[i]
        r = int(math.ceil(np.float32(cutoff) * s))
        for k in range(3):
            c = _profile(centre[i, k], s, r, profiles[k]) + box // 2
            start[k], stop[k], shift[k] = max(c - r, 0), min(c + r + 1, box), r - c
        for z in range(start[2], stop[2]):
            az = amplitude[i] * profiles[2, z + shift[2]]
            for y in range(start[1], stop[1]):
                a = az * profiles[1, y + shift[1]]
                for x in range(start[0], stop[0]):
                    out[z, y, x] += a * profiles[0, x + shift[0]]
    return out
