"""The likelihood: half the squared distance between whitened images and the model seen through the CTF, as strongly as each shows it.

Ice, and what else lies in it, make one image of a particle stronger than another: an image is ``s`` times the model's and noise, with
its own ``s``, spread about 1.  It enters at its most probable value, which is known at once; nothing is kept of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _ResidualEnergy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projection: Tensor, transfer: Tensor, images: Tensor, sd: float) -> Tensor:
        seen, image = torch.fft.rfft2(projection) * transfer, torch.fft.rfft2(images)
        s = strength(seen, image, sd)
        residual = s[:, None, None] * seen - image
        ctx.save_for_backward(transfer, residual, s)
        # At the best s the prior's (s - 1) / sd^2 is minus the derivative of the rest: so it is 0 where sd is.
        return (product(residual, residual) - (s - 1) * product(residual, seen)) / 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        transfer, residual, s = ctx.saved_tensors
        box = residual.shape[-2]
        # s is where the energy is least: through it nothing changes to first order.
        return torch.fft.irfft2(residual * transfer, s=(box, box)) * (s * grads[0])[:, None, None], None, None, None


def residual_energy(projection: Tensor, transfer: Tensor, images: Tensor, sd: float) -> Tensor:
    """``min_s 1/2 sum_pixels (s F^-1[transfer F projection] - image)^2 + (s - 1)^2 / (2 sd^2)`` for each image: (B,).

    ``projection``, ``images`` (B, box, box); ``transfer`` (B, box, box // 2 + 1) real: CTF times whitening; ``sd`` 0: s is 1.
    Differentiable in ``projection``, by the adjoint written out: three FFTs a step instead of four.
    """
    if not len(images):  # a rank may have none in the last step of an epoch, and FFTs of nothing fail
        return projection.sum((-2, -1))
    energy: Tensor = _ResidualEnergy.apply(projection, transfer, images, sd)
    return energy


def residual_energy_plain(projection: Tensor, transfer: Tensor, images: Tensor, sd: float) -> Tensor:
    """Plain twin of ``residual_energy``; ``sd`` above 0."""
    box = projection.shape[-1]
    model = torch.fft.irfft2(torch.fft.rfft2(projection) * transfer, s=(box, box))
    s = ((model * images).sum((-2, -1)) + sd**-2) / (model.square().sum((-2, -1)) + sd**-2)
    return 0.5 * ((s[:, None, None] * model - images).square().sum((-2, -1)) + ((s - 1) / sd).square())


def strength(seen: Tensor, image: Tensor, sd: float) -> Tensor:
    """Most probable s (B,) of images of unit noise, given as transforms (B, box, box // 2 + 1) that show ``seen`` s times; ``sd``:
    standard deviation of s over images."""
    return (sd**2 * product(seen, image) + 1) / (sd**2 * product(seen, seen) + 1)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Scalar products (B,) of images, from their transforms (B, box, box // 2 + 1)."""
    x, y = torch.view_as_real(a), torch.view_as_real(b)
    columns = slice(None), slice(0, 1), slice(-1, None)
    whole, first, last = (torch.linalg.vecdot(x[:, :, c].flatten(1), y[:, :, c].flatten(1)) for c in columns)
    # Parseval on the half plane: every column but the first and the last stands for two.
    return (2 * whole - first - last) / a.shape[-2] ** 2
