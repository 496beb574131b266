"""Truncated separable splatting on CPU: the numba twin of ``maths.projection.splat`` and ``render``.

Images are independent, so threads never share a pixel and the result does not depend on their number.  The rows of a window are
handled ``LANES`` pixels at a time (``kernels.lanes``); an image has a margin as wide as the widest window, so that none is clipped.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from numba import types
from numba.core import cgutils
from numpy.typing import NDArray

from cryospire.kernels.lanes import FLOAT, FLOATS, INT, LANES, Lanes, constant, intrinsic

Array = NDArray[np.float32]
@intrinsic
def _profile(typing_context, out, at, first, h, window):  # type: ignore[no-untyped-def]
    """``out[at + k] = exp(-h (first + at + k)^2)`` for k < LANES, 0 from ``window`` on."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        out, at, first, h, window = arguments
        lanes = Lanes(context, builder)
        index = lanes.numbered(at)
        d = builder.fadd(builder.sitofp(index, FLOATS), lanes.fill(first))
        value = lanes.exp(builder.fmul(builder.fmul(d, d), lanes.fill(builder.fneg(h))))
        inside = builder.icmp_signed("<", index, lanes.fill(builder.trunc(window, INT)))
        lanes.store(builder.select(inside, value, constant(0.0)), lanes.pointer(signature.args[0], out, at))
        return context.get_dummy_value()

    return types.void(out, types.intp, types.float32, types.float32, types.intp), build


@intrinsic
def _add(typing_context, image, corner, pitch, ey, window, ex, at, weight):  # type: ignore[no-untyped-def]
    """``image[corner + at + y pitch + k] += weight ey[y] ex[at + k]`` for y < window and k < LANES."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        image, corner, pitch, ey, window, ex, at, weight = arguments
        kinds, lanes = signature.args, Lanes(context, builder)
        across = builder.fmul(lanes.load(lanes.pointer(kinds[5], ex, at)), lanes.fill(weight))
        start = builder.add(corner, at)
        with cgutils.for_range(builder, window) as loop:
            e = lanes.fill(builder.load(lanes.pointer(kinds[3], ey, loop.index)))
            row = lanes.pointer(kinds[0], image, builder.add(start, builder.mul(loop.index, pitch)))
            lanes.store(lanes.multiply_add(across, e, lanes.load(row)), row)
        return context.get_dummy_value()

    i = types.intp
    return types.void(image, i, i, ey, i, ex, i, types.float32), build


@intrinsic
def _moments(typing_context, image, corner, pitch, ey, window, ex, at, first_x, first_y):  # type: ignore[no-untyped-def]
    """Sums of ``image[corner + at + y pitch + k] ey[y] ex[at + k]`` over y < window and k < LANES: times 1, dx, dy and dx^2 + dy^2,
    where ``dx = first_x + at + k`` and ``dy = first_y + y``."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        image, corner, pitch, ey, window, ex, at, first_x, first_y = arguments
        kinds, lanes = signature.args, Lanes(context, builder)
        columns = [cgutils.alloca_once(builder, FLOATS) for _ in range(3)]  # of every column: times 1, dy, dy^2
        for column in columns:
            builder.store(constant(0.0), column)
        start = builder.add(corner, at)
        with cgutils.for_range(builder, window) as loop:
            row = lanes.pointer(kinds[0], image, builder.add(start, builder.mul(loop.index, pitch)))
            value = builder.fmul(lanes.load(row), lanes.fill(builder.load(lanes.pointer(kinds[3], ey, loop.index))))
            dy = lanes.fill(builder.fadd(first_y, builder.sitofp(builder.trunc(loop.index, INT), FLOAT)))
            for column in columns:
                builder.store(builder.fadd(builder.load(column), value), column)
                value = builder.fmul(value, dy)
        e = lanes.load(lanes.pointer(kinds[5], ex, at))
        one, y, yy = (builder.fmul(builder.load(column), e) for column in columns)
        dx = builder.fadd(builder.sitofp(lanes.numbered(at), FLOATS), lanes.fill(first_x))
        x = builder.fmul(one, dx)
        sums = [lanes.total(s) for s in (one, x, y, lanes.multiply_add(x, dx, yy))]
        return context.make_tuple(builder, signature.return_type, sums)

    i, f = types.intp, types.float32
    return types.UniTuple(f, 4)(image, i, i, ey, i, ex, i, f, f), build


@numba.njit(inline="always")
def _window(s, cutoff):  # type: ignore[no-untyped-def]
    """Pixels along an axis on which a Gaussian of scale ``s`` is drawn."""
    return 2 * int(math.ceil(np.float32(cutoff) * s)) + 1


@numba.njit(inline="always")
def _margin(scale, cutoff):  # type: ignore[no-untyped-def]
    """The widest window in whole vectors."""
    widest = 1
    for s in scale:
        widest = max(widest, _window(s, cutoff))  # whole numbers: a scale that is not finite must not hide the others
    return (widest + LANES - 1) // LANES * LANES


@numba.njit(inline="always")
def _first(x, window, box):  # type: ignore[no-untyped-def]
    """The first pixel of the window of a Gaussian at ``x`` from the origin pixel, and how far it is from ``x``."""
    first = math.floor(x + np.float32(0.5)) - np.float32(window // 2)
    return int(first) + box // 2, np.float32(first - x)


@numba.njit(parallel=True, cache=True, error_model="numpy")
def forward(xy: Array, weight: Array, scale: Array, box: int, cutoff: float) -> Array:
    """Images (B, box, box); arguments as in ``maths.projection.splat``."""
    n_images, n = weight.shape
    margin = _margin(scale, cutoff)
    pitch = box + 2 * margin
    images = np.empty((n_images, box, box), np.float32)
    for b in numba.prange(n_images):
        ex = np.empty(margin, np.float32)
        ey = np.empty(margin, np.float32)
        image = np.zeros(pitch * pitch, np.float32)
        for i in range(n):
            s = scale[i]
            window = _window(s, cutoff)
            x0, dx = _first(xy[b, 0, i], window, box)
            y0, dy = _first(xy[b, 1, i], window, box)
            if x0 <= -window or x0 >= box or y0 <= -window or y0 >= box:
                continue
            h = np.float32(0.5) / (s * s)
            for at in range(0, window, LANES):
                _profile(ey, at, dy, h, window)
            corner = (y0 + margin) * pitch + x0 + margin
            for at in range(0, window, LANES):
                _profile(ex, at, dx, h, window)
                _add(image, corner, pitch, ey, window, ex, at, weight[b, i])
        for y in range(box):
            start = (y + margin) * pitch + margin
            images[b, y] = image[start : start + box]
    return images


@numba.njit(parallel=True, cache=True, error_model="numpy")
def backward(grad: Array, xy: Array, weight: Array, scale: Array, cutoff: float) -> tuple[Array, Array, Array]:
    """Gradients of ``sum(grad * images)``: of ``xy`` (B, 2, G), of ``weight`` (B, G), and of ``scale`` for every image (B, G)."""
    n_images, n = weight.shape
    box = grad.shape[1]
    margin = _margin(scale, cutoff)
    pitch = box + 2 * margin
    d_xy = np.zeros((n_images, 2, n), np.float32)
    d_weight = np.zeros((n_images, n), np.float32)
    d_scale = np.zeros((n_images, n), np.float32)
    for b in numba.prange(n_images):
        ex = np.empty(margin, np.float32)
        ey = np.empty(margin, np.float32)
        image = np.zeros(pitch * pitch, np.float32)
        for y in range(box):
            start = (y + margin) * pitch + margin
            image[start : start + box] = grad[b, y]
        for i in range(n):
            s = scale[i]
            window = _window(s, cutoff)
            x0, dx = _first(xy[b, 0, i], window, box)
            y0, dy = _first(xy[b, 1, i], window, box)
            if x0 <= -window or x0 >= box or y0 <= -window or y0 >= box:
                continue
            h = np.float32(0.5) / (s * s)
            for at in range(0, window, LANES):
                _profile(ey, at, dy, h, window)
            corner = (y0 + margin) * pitch + x0 + margin
            m = mx = my = mr = np.float32(0.0)  # moments of the gradient under the Gaussian
            for at in range(0, window, LANES):
                _profile(ex, at, dx, h, window)
                sums = _moments(image, corner, pitch, ey, window, ex, at, dx, dy)
                m, mx, my, mr = m + sums[0], mx + sums[1], my + sums[2], mr + sums[3]
            w = weight[b, i] / (s * s)
            d_weight[b, i] = m
            d_xy[b, 0, i] = w * mx
            d_xy[b, 1, i] = w * my
            d_scale[b, i] = w * mr / s
    return d_xy, d_weight, d_scale


@numba.njit(cache=True, error_model="numpy")
def volume(centre: Array, amplitude: Array, scale: Array, box: int, cutoff: float) -> Array:
    """Volume [z, y, x]; arguments as in ``maths.projection.render``."""
    out = np.zeros((box, box, box), np.float32)
    profiles = np.empty((3, _margin(scale, cutoff)), np.float32)
    first = np.empty(3, np.int64)
    for i in range(len(amplitude)):
        s = scale[i]
        window = _window(s, cutoff)
        for k in range(3):
            first[k], d = _first(centre[i, k], window, box)
            for at in range(0, window, LANES):
                _profile(profiles[k], at, d, np.float32(0.5) / (s * s), window)
        x0, x1 = max(first[0], 0), min(first[0] + window, box)
        for z in range(max(first[2], 0), min(first[2] + window, box)):
            az = amplitude[i] * profiles[2, z - first[2]]
            for y in range(max(first[1], 0), min(first[1] + window, box)):
                a = az * profiles[1, y - first[1]]
                for x in range(x0, x1):
                    out[z, y, x] += a * profiles[0, x - first[0]]
    return out
