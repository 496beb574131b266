"""The paper's head with one hidden layer on CPU: the numba twin of ``relu(a_b + f_g) W^T + c`` for every pair (b, g).

torch writes the hidden layer of all pairs (B, G, H) to memory and reads it back several times; here a block of Gaussians stays
in cache and the hidden layer is never stored.  Blocks are fixed, so the result does not depend on the number of threads.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numba import types
from numba.core import cgutils
from numpy.typing import NDArray
from torch import Tensor

from cryospire.kernels.lanes import FLOATS, LANES, Lanes, constant, intrinsic

Array = NDArray[np.float32]
BLOCK = 256  # Gaussians; whole vectors


@numba.njit(parallel=True, cache=True, error_model="numpy")
def forward(a: Array, f: Array, weight: Array, bias: Array) -> Array:
    """``out[b, o, g] = bias[o] + sum_h weight[o, h] max(a[b, h] + f[h, g], 0)``."""
    n_images, hidden = a.shape
    n = f.shape[1]
    outputs = len(bias)
    out = np.empty((n_images, outputs, n), np.float32)
    for block in numba.prange((n + BLOCK - 1) // BLOCK):
        start, stop = block * BLOCK, min((block + 1) * BLOCK, n)
        v = np.empty(BLOCK, np.float32)
        for b in range(n_images):
            for o in range(outputs):
                out[b, o, start:stop] = bias[o]
            for h in range(hidden):
                shift = a[b, h]
                row = f[h, start:stop]
                for g in range(stop - start):
                    x = shift + row[g]
                    v[g] = np.float32(0) if x < np.float32(0) else x  # NaN stays NaN
                for o in range(outputs):
                    w = weight[o, h]
                    target = out[b, o, start:stop]
                    for g in range(stop - start):
                        target[g] += w * v[g]
    return out


@intrinsic
def _unit(typing_context, shift, f, h, grad, weight, outputs, hidden, d_f, products):  # type: ignore[no-untyped-def]
    """Hidden unit ``h`` of one image, ``v = max(shift + f[h], 0)``, over a block: adds to ``d_f`` (H, BLOCK) and, lane by lane, ``grad v``
    to ``products`` (O, H, LANES); returns the gradient of ``shift``.  ``f`` (H, BLOCK), ``grad`` (O, BLOCK), ``weight`` (O, H)."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        shift, f, h, grad, weight, outputs, hidden, d_f, products = arguments
        kinds, lanes = signature.args, Lanes(context, builder)
        moved, zero = lanes.fill(shift), constant(0.0)
        total, passed = (cgutils.alloca_once(builder, FLOATS) for _ in range(2))
        builder.store(zero, total)
        with cgutils.for_range_slice(builder, h.type(0), h.type(BLOCK), h.type(LANES), inc=True) as (g, _):
            at = builder.add(builder.mul(h, h.type(BLOCK)), g)
            x = builder.fadd(moved, lanes.load(lanes.pointer(kinds[1], f, at)))
            v = builder.select(builder.fcmp_ordered("<", x, zero), zero, x)  # NaN stays NaN
            builder.store(zero, passed)
            with cgutils.for_range(builder, outputs) as loop:
                own = builder.add(builder.mul(loop.index, hidden), h)
                s = lanes.load(lanes.pointer(kinds[3], grad, builder.add(builder.mul(loop.index, h.type(BLOCK)), g)))
                w = lanes.fill(builder.load(lanes.pointer(kinds[4], weight, own)))
                builder.store(lanes.multiply_add(w, s, builder.load(passed)), passed)
                product = lanes.pointer(kinds[8], products, builder.mul(own, h.type(LANES)))
                lanes.store(lanes.multiply_add(s, v, lanes.load(product)), product)
            d = builder.select(builder.fcmp_unordered(">", v, zero), builder.load(passed), zero)
            to_f = lanes.pointer(kinds[7], d_f, at)
            lanes.store(builder.fadd(lanes.load(to_f), d), to_f)
            builder.store(builder.fadd(builder.load(total), d), total)
        return lanes.total(builder.load(total))

    i, number = types.intp, types.float32
    return number(number, f, i, grad, weight, i, i, d_f, products), build


@numba.njit(parallel=True, cache=True, error_model="numpy")
def backward(grad: Array, a: Array, f: Array, weight: Array) -> tuple[Array, Array, Array]:
    """Gradients of ``sum(grad * out)``: of ``f`` (H, G), and for every block of Gaussians of ``a`` (., B, H) and ``weight`` (., O, H)."""
    n_images, hidden = a.shape
    n = f.shape[1]
    outputs = len(weight)
    blocks = (n + BLOCK - 1) // BLOCK
    d_f = np.empty((hidden, n), np.float32)
    d_a = np.empty((blocks, n_images, hidden), np.float32)
    d_weight = np.empty((blocks, outputs, hidden), np.float32)
    for block in numba.prange(blocks):
        start, stop = block * BLOCK, min((block + 1) * BLOCK, n)
        # Whole vectors, without gradient beyond the last Gaussian.
        own = np.zeros((hidden, BLOCK), np.float32)
        own[:, : stop - start] = f[:, start:stop]
        own_grad = np.zeros((outputs, BLOCK), np.float32)
        to_f = np.zeros((hidden, BLOCK), np.float32)
        products = np.zeros((outputs, hidden, LANES), np.float32)
        for b in range(n_images):
            own_grad[:, : stop - start] = grad[b, :, start:stop]
            for h in range(hidden):
                d_a[block, b, h] = _unit(a[b, h], own, h, own_grad, weight, outputs, hidden, to_f, products)
        d_f[:, start:stop] = to_f[:, : stop - start]
        for o in range(outputs):
            for h in range(hidden):
                d_weight[block, o, h] = products[o, h].sum()
    return d_f, d_a, d_weight


class Pairs(torch.autograd.Function):
    """``Pairs.apply(a (B, H), f (G, H), weight (O, H), bias (O)) -> (B, O, G)``, float32 on CPU."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, f: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        f = f.T.contiguous()
        ctx.save_for_backward(a, f, weight)
        return torch.from_numpy(forward(*(t.detach().contiguous().numpy() for t in (a, f, weight, bias))))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad = grads[0].contiguous()
        found = backward(*(t.detach().contiguous().numpy() for t in (grad, *ctx.saved_tensors)))
        d_f, d_a, d_weight = map(torch.from_numpy, found)
        return d_a.sum(0), d_f.T, d_weight.sum(0), grad.sum((0, 2))
