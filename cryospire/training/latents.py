"""Latents of the particles a rank owns: only the rows of a batch are touched in a step."""

from __future__ import annotations

import torch
from torch import Tensor

from cryospire.training.distributed import Team

MEMORY = 0.2  # weight of a new probe in the running Fisher information
REACH = 1.0  # longest step of a latent, in standard deviations of the prior


class Latents:
    """``z`` (n, D) for global rows ``start <= row < start + n``, moved by natural gradients (Amari 1998); all on the device of ``z``.

    Images have unit noise, so the Fisher information of a latent is F = J^T J, J the derivative of the image; averaged over
    particles it turns a gradient g of the negative log-likelihood into Newton's step under the prior,
    ``z -= rate (F + lambda)^-1 (g + lambda z)``.  A particle moves as far as its image says; Adam, which divides by each row's
    own gradient, would move a row that saw only noise as far as one that saw signal.
    """

    def __init__(self, z: Tensor, start: int) -> None:
        self.z, self.start = z, start
        self.fisher = torch.zeros(z.shape[1], z.shape[1], device=z.device)

    def take(self, rows: Tensor) -> Tensor:
        return self.z[rows - self.start].requires_grad_()

    def learn(self, probe: Tensor, team: Team) -> None:
        """Update F from ``J^T e`` (B, D), e unit white noise: its covariance is J^T J (Hutchinson's estimator), over all ranks."""
        dims = probe.shape[1]
        total = torch.tensor(team.sum(*(probe.T @ probe).flatten().tolist(), float(len(probe))))
        new = (total[:-1] / total[-1]).reshape(dims, dims).float().to(self.z.device)
        self.fisher = torch.lerp(self.fisher, new, MEMORY) if self.fisher.any() else new

    def step(self, rows: Tensor, gradient: Tensor, precision: float, rate: float) -> None:
        """``gradient`` (B, D) of the negative log-likelihood of each image; ``precision`` lambda of the prior."""
        at = rows - self.start
        metric = self.fisher + precision * torch.eye(self.z.shape[1], device=self.z.device)
        # Positive definite; without the check for that, for which the CPU would wait.
        step = rate * torch.linalg.solve_ex(metric, (gradient + precision * self.z[at]).T).result.T
        self.z[at] -= step * (REACH / step.norm(dim=1, keepdim=True).clamp(min=REACH))
