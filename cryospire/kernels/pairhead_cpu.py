"""The paper's head with one hidden layer on CPU: the numba twin of ``relu(a_b + f_g) W^T + c`` for every pair (b, g).

torch writes the hidden layer of all pairs (B, G, H) to memory and reads it back several times; here a block of Gaussians stays
in cache and the hidden layer is never stored.  Blocks are fixed, so the result does not depend on the number of threads.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float32]
BLOCK = 256  # Gaussians


@numba.njit(parallel=True, fastmath={"reassoc", "contract", "nsz", "arcp"}, cache=True, error_model="numpy")
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


@numba.njit(parallel=True, fastmath={"reassoc", "contract", "nsz", "arcp"}, cache=True, error_model="numpy")
def backward(grad: Array, a: Array, f: Array, weight: Array) -> tuple[Array, Array, Array]:
    """Gradients of ``sum(grad * out)``: of ``f`` (H, G), and for every block of Gaussians of ``a`` (., B, H) and ``weight`` (., O, H)."""
    n_images, hidden = a.shape
    n = f.shape[1]
    outputs = len(weight)
    blocks = (n + BLOCK - 1) // BLOCK
    d_f = np.zeros((hidden, n), np.float32)
    d_a = np.zeros((blocks, n_images, hidden), np.float32)
    d_weight = np.zeros((blocks, outputs, hidden), np.float32)
    for block in numba.prange(blocks):
        start, stop = block * BLOCK, min((block + 1) * BLOCK, n)
        v = np.empty(BLOCK, np.float32)
        d = np.empty(BLOCK, np.float32)
        for b in range(n_images):
            for h in range(hidden):
                shift = a[b, h]
                row = f[h, start:stop]
                to_f = d_f[h, start:stop]
                for g in range(stop - start):
                    x = shift + row[g]
                    v[g] = np.float32(0) if x < np.float32(0) else x
                    d[g] = np.float32(0)
                for o in range(outputs):
                    w = weight[o, h]
                    source = grad[b, o, start:stop]
                    total = np.float32(0)
                    for g in range(stop - start):
                        total += source[g] * v[g]
                        d[g] += w * source[g]
                    d_weight[block, o, h] += total
                total = np.float32(0)
                for g in range(stop - start):
                    passed = d[g] if v[g] > np.float32(0) else np.float32(0)
                    to_f[g] += passed
                    total += passed
                d_a[block, b, h] = total
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
