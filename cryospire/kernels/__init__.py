"""Fast twins of ``maths``: numba on CPU, Triton on GPU.  This page dispatches by device and carries the gradients."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numba
import torch
from torch import Tensor

from cryospire.kernels import pairhead_cpu, splat_cpu
from cryospire.maths import projection


def _numpy(x: Tensor) -> Any:
    return x.detach().contiguous().numpy()


class _Splat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, xy: Tensor, weight: Tensor, scale: Tensor, box: int, cutoff: float) -> Tensor:
        ctx.save_for_backward(xy, weight, scale)
        ctx.cutoff = cutoff
        return torch.from_numpy(splat_cpu.forward(_numpy(xy), _numpy(weight), _numpy(scale), box, cutoff))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        xy, weight, scale = ctx.saved_tensors
        d = splat_cpu.backward(_numpy(grads[0]), _numpy(xy), _numpy(weight), _numpy(scale), ctx.cutoff)
        d_xy, d_weight, d_scale = map(torch.from_numpy, d)
        return d_xy, d_weight, d_scale.sum(0), None, None


def splat(xy: Tensor, weight: Tensor, scale: Tensor, box: int, cutoff: float = 3.0) -> Tensor:
    """Truncated splatting, differentiable in its first three arguments; see ``maths.projection.splat``.

    float32 runs in numba on CPU and in Triton, where it is installed, on GPU; anything else in the plain twin.
    """
    if xy.device.type == "cuda" and xy.dtype == torch.float32 and find_spec("triton"):
        from cryospire.kernels import splat_gpu

        on_gpu: Tensor = splat_gpu.Splat.apply(xy, weight, scale, box, cutoff)
        return on_gpu
    if xy.device.type == "cpu" and xy.dtype == torch.float32:
        image: Tensor = _Splat.apply(xy, weight, scale, box, cutoff)
        return image
    return projection.splat(xy, weight, scale, box, cutoff)


def pair_head(a: Tensor, f: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``relu(a_b + f_g) weight^T + bias`` of every pair: (B, O, G) of ``a`` (B, H), ``f`` (G, H), ``weight`` (O, H), ``bias`` (O).

    float32 runs in numba on CPU, without writing the hidden layer (B, G, H) to memory; anything else in plain torch.
    """
    if a.device.type == "cpu" and a.dtype == torch.float32:
        fused: Tensor = pairhead_cpu.Pairs.apply(a, f, weight, bias)
        return fused
    return pair_head_plain(a, f, weight, bias)


def pair_head_plain(a: Tensor, f: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Plain twin of ``pair_head``."""
    return torch.nn.functional.linear(torch.relu(a[:, None] + f[None]), weight, bias).transpose(1, 2)


def render_volume(centre: Tensor, amplitude: Tensor, scale: Tensor, box: int, pixel_size: float, cutoff: float = 4.0) -> Tensor:
    """Volume (box, box, box) as [z, y, x] of ``sum_i m_i exp(-|p - c_i|^2 / 2 s_i^2)`` at voxel centres.

    ``centre`` (G, 3) and ``scale`` (G) in Å, ``amplitude`` (G); the origin is voxel ``box // 2``.
    """
    c, s = centre.detach().cpu().float() / pixel_size, scale.detach().cpu().float() / pixel_size
    return torch.from_numpy(splat_cpu.volume(_numpy(c), _numpy(amplitude.cpu().float()), _numpy(s), box, cutoff))


def set_threads(count: int) -> None:
    """Threads of this process for torch and numba alike."""
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
    torch.set_num_threads(count)  # after numba, which sets OpenMP to all CPUs when it starts


__all__ = ["pair_head", "pair_head_plain", "render_volume", "set_threads", "splat"]
