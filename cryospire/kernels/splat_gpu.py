"""Truncated separable splatting on GPU: the Triton twin of ``maths.projection.splat``.

Forward, every tile of an image first lists the Gaussians that reach it, then sums them with the tile in registers and writes
it once.  Backward, every Gaussian gathers the moments of the gradient in its own window.  One program owns each output, so
nothing is added atomically and the same input gives the same bits; the gradient of the scales, shared by the batch, is summed
over images in a second step.

Run under Triton's interpreter (``TRITON_INTERPRET=1``) and compiled for sm_90 only: no speed is claimed before it is measured.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 32  # pixels, side of a tile
SCAN = 256  # Gaussians tested at once for reaching a tile
CHUNK = 16  # Gaussians of a tile's list summed at once, the least that tl.dot takes
OWNED = 16  # Gaussians of a program of the backward pass
COLUMNS = 16  # columns of their windows gathered at once
FAR = tl.constexpr(1 << 20)  # pixels; farther than any window


@triton.jit
def _window(x, scale, cutoff, half):  # type: ignore[no-untyped-def]
    """Pixel nearest to ``x`` (counted from the image's corner) and the window's radius."""
    centre = tl.floor(tl.minimum(tl.maximum(x, -FAR), FAR) + 0.5).to(tl.int32) + half
    return centre, tl.ceil(tl.minimum(cutoff * scale, FAR)).to(tl.int32)


@triton.jit
def _list_kernel(xy, scale, members, counts, n, box, cutoff, tiles, TILE: tl.constexpr, SCAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """``members`` (B, tiles^2, G), ``counts`` (B, tiles^2): the Gaussians that reach a tile, in their order."""
    tile, b = tl.program_id(0), tl.program_id(1)
    x0, y0 = (tile % tiles) * TILE, (tile // tiles) * TILE
    place = b.to(tl.int64) * tiles * tiles + tile
    xy += b.to(tl.int64) * 2 * n
    found = 0
    for start in range(0, n, SCAN):
        i = start + tl.arange(0, SCAN)
        valid = i < n
        s = tl.load(scale + i, valid, 1.0)
        cx, r = _window(tl.load(xy + i, valid, 0.0), s, cutoff, box // 2)
        cy, r = _window(tl.load(xy + n + i, valid, 0.0), s, cutoff, box // 2)
        hit = valid & (cx + r >= x0) & (cx - r < x0 + TILE) & (cy + r >= y0) & (cy - r < y0 + TILE)
        rank = tl.cumsum(hit.to(tl.int32), 0)
        tl.store(members + place * n + found + rank - 1, i, hit)
        found += tl.sum(hit.to(tl.int32), 0)
    tl.store(counts + place, found)


@triton.jit
def _profile(pixel, x, centre, radius, scale, half):  # type: ignore[no-untyped-def]
    d = (pixel - half).to(tl.float32) - x
    inside = tl.abs(pixel - centre) <= radius
    return tl.where(inside, tl.exp(-0.5 * d * d / (scale * scale)), 0.0)


@triton.jit
def _forward_kernel(xy, weight, scale, members, counts, image, n, box, cutoff, tiles, TILE: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One tile of one image: ``sum_i (w_i e_i(y)) e_i(x)`` as a product of small matrices."""
    tile, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    px = (tile % tiles) * TILE + tl.arange(0, TILE)
    py = (tile // tiles) * TILE + tl.arange(0, TILE)
    place = b * tiles * tiles + tile
    xy += b * 2 * n
    total = tl.load(counts + place)
    out = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, total, CHUNK):
        k = start + tl.arange(0, CHUNK)
        valid = k < total
        i = tl.load(members + place * n + k, valid, 0)
        x, y, s = tl.load(xy + i), tl.load(xy + n + i), tl.load(scale + i)
        w = tl.load(weight + b * n + i, valid, 0.0)
        cx, r = _window(x, s, cutoff, box // 2)
        cy, r = _window(y, s, cutoff, box // 2)
        ex = _profile(px[None, :], x[:, None], cx[:, None], r[:, None], s[:, None], box // 2)
        ey = _profile(py[:, None], y[None, :], cy[None, :], r[None, :], s[None, :], box // 2)
        out = tl.dot(ey * w[None, :], ex, out, input_precision="ieee")
    inside = (py < box)[:, None] & (px < box)[None, :]
    tl.store(image + b * box * box + py[:, None] * box + px[None, :], out, inside)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    grad, xy, weight, scale, d_xy, d_weight, d_scale, n, box, cutoff, OWNED: tl.constexpr, COLUMNS: tl.constexpr
):
    """Moments of the gradient in the windows of ``OWNED`` Gaussians of one image: along y for each column, then along x."""
    i = tl.program_id(0) * OWNED + tl.arange(0, OWNED)
    b = tl.program_id(1).to(tl.int64)
    valid = i < n
    grad += b * box * box
    x, y = tl.load(xy + b * 2 * n + i, valid, 0.0), tl.load(xy + b * 2 * n + n + i, valid, 0.0)
    s, w = tl.load(scale + i, valid, 1.0), tl.load(weight + b * n + i, valid, 0.0)
    half = box // 2
    cx, r = _window(x, s, cutoff, half)
    cy, r = _window(y, s, cutoff, half)
    first_x, last_x = tl.min(tl.maximum(-r, -cx), 0), tl.max(tl.minimum(r, box - 1 - cx), 0)
    first_y, last_y = tl.min(tl.maximum(-r, -cy), 0), tl.max(tl.minimum(r, box - 1 - cy), 0)
    m0, mx, my, m2 = (tl.zeros((OWNED,), tl.float32),) * 4
    for start in range(first_x, last_x + 1, COLUMNS):
        px = cx[:, None] + start + tl.arange(0, COLUMNS)[None, :]
        inside_x = valid[:, None] & (px >= 0) & (px < box)
        c0, c1, c2 = (tl.zeros((OWNED, COLUMNS), tl.float32),) * 3
        for row in range(first_y, last_y + 1):
            py = cy + row
            inside = inside_x & ((py >= 0) & (py < box))[:, None]
            g = tl.load(grad + py[:, None] * box + px, inside, 0.0)
            dy = (py - half).to(tl.float32) - y
            e = _profile(py, y, cy, r, s, half)
            c0 += g * e[:, None]
            c1 += g * (e * dy)[:, None]
            c2 += g * (e * dy * dy)[:, None]
        e = _profile(px, x[:, None], cx[:, None], r[:, None], s[:, None], half)
        dx = (px - half).to(tl.float32) - x[:, None]
        m0 += tl.sum(c0 * e, 1)
        mx += tl.sum(c0 * e * dx, 1)
        my += tl.sum(c1 * e, 1)
        m2 += tl.sum((c2 + c0 * dx * dx) * e, 1)
    w = w / (s * s)
    tl.store(d_weight + b * n + i, m0, valid)
    tl.store(d_xy + b * 2 * n + i, w * mx, valid)
    tl.store(d_xy + b * 2 * n + n + i, w * my, valid)
    tl.store(d_scale + b * n + i, w * m2 / s, valid)


def forward(xy: Tensor, weight: Tensor, scale: Tensor, box: int, cutoff: float) -> Tensor:
    """Images (B, box, box); arguments, contiguous, as in ``maths.projection.splat``."""
    images, n = weight.shape
    tiles = triton.cdiv(box, TILE)
    out = torch.empty(images, box, box, device=xy.device)
    if images:
        members = torch.empty(images, tiles * tiles, max(n, 1), dtype=torch.int32, device=xy.device)
        counts = torch.empty(images, tiles * tiles, dtype=torch.int32, device=xy.device)
        grid = (tiles * tiles, images)
        _list_kernel[grid](xy, scale, members, counts, n, box, cutoff, tiles, TILE, SCAN)
        _forward_kernel[grid](xy, weight, scale, members, counts, out, n, box, cutoff, tiles, TILE, CHUNK)
    return out


def backward(grad: Tensor, xy: Tensor, weight: Tensor, scale: Tensor, cutoff: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``sum(grad * images)``: of ``xy`` (B, 2, G), of ``weight`` (B, G), and of ``scale`` for every image (B, G)."""
    images, n = weight.shape
    d_xy, d_weight, d_scale = torch.empty_like(xy), torch.empty_like(weight), torch.empty_like(weight)
    if images and n:
        grid = (triton.cdiv(n, OWNED), images)
        _backward_kernel[grid](grad, xy, weight, scale, d_xy, d_weight, d_scale, n, grad.shape[-1], cutoff, OWNED, COLUMNS)
    return d_xy, d_weight, d_scale


class Splat(torch.autograd.Function):
    """``Splat.apply(xy, weight, scale, box, cutoff)``, float32."""

    @staticmethod
    def forward(ctx: Any, xy: Tensor, weight: Tensor, scale: Tensor, box: int, cutoff: float) -> Tensor:
        xy, weight, scale = xy.contiguous(), weight.contiguous(), scale.contiguous()
        ctx.save_for_backward(xy, weight, scale)
        ctx.cutoff = cutoff
        return forward(xy, weight, scale, box, cutoff)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        xy, weight, scale = ctx.saved_tensors
        d_xy, d_weight, d_scale = backward(grads[0].contiguous(), xy, weight, scale, ctx.cutoff)
        return d_xy, d_weight, d_scale.sum(0), None, None
