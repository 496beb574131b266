"""The likelihood: half the squared distance between whitened images and the model seen through the CTF."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _ResidualEnergy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projection: Tensor, transfer: Tensor, images: Tensor) -> Tensor:
        box = projection.shape[-1]
        residual = torch.fft.rfft2(projection) * transfer - torch.fft.rfft2(images)
        ctx.save_for_backward(transfer, residual)
        power = torch.view_as_real(residual).square().sum(-1)
        # Parseval on the half plane: every column but the first and the last stands for two.
        energy = 2 * power.sum((-2, -1)) - power[..., 0].sum(-1) - power[..., -1].sum(-1)
        return energy / (2 * box * box)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        transfer, residual = ctx.saved_tensors
        box = residual.shape[-2]
        return torch.fft.irfft2(residual * transfer, s=(box, box)) * grads[0][:, None, None], None, None


def residual_energy(projection: Tensor, transfer: Tensor, images: Tensor) -> Tensor:
    """``1/2 sum_pixels (F^-1[transfer F projection] - image)^2`` for each image: (B,).

    ``projection``, ``images`` (B, box, box); ``transfer`` (B, box, box // 2 + 1) real: CTF times whitening.  Differentiable
    in ``projection``, by the adjoint written out: three FFTs a step instead of four.
    """
    energy: Tensor = _ResidualEnergy.apply(projection, transfer, images)
    return energy


def residual_energy_plain(projection: Tensor, transfer: Tensor, images: Tensor) -> Tensor:
    """Plain twin of ``residual_energy``."""
    box = projection.shape[-1]
    model = torch.fft.irfft2(torch.fft.rfft2(projection) * transfer, s=(box, box))
    return 0.5 * (model - images).square().sum((-2, -1))
