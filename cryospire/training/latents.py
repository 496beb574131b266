"""Latents of the particles a rank owns, with their own Adam: only the rows of a batch are touched in a step."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BETA1, BETA2, EPS = 0.9, 0.999, 1e-12


class Latents:
    """``z`` (n, D) for global rows ``start <= row < start + n``.

    torch's SparseAdam corrects its averages by the number of steps taken by the table; a row that is first met late in an epoch
    would leap.  Here each row counts its own steps.
    """

    def __init__(self, z: Tensor, start: int) -> None:
        self.z, self.start = z, start
        self.mean, self.square = torch.zeros_like(z), torch.zeros_like(z)
        self.steps = torch.zeros(len(z), 1)

    def take(self, rows: NDArray[np.int64]) -> Tensor:
        return self.z[torch.from_numpy(rows - self.start)].requires_grad_()

    def step(self, rows: NDArray[np.int64], grad: Tensor, lr: float) -> None:
        """Adam (Kingma & Ba 2015, algorithm 1) on the given rows."""
        at = torch.from_numpy(rows - self.start)
        count = self.steps[at] + 1
        mean = self.mean[at].lerp(grad, 1 - BETA1)
        square = self.square[at].lerp(grad.square(), 1 - BETA2)
        self.steps[at], self.mean[at], self.square[at] = count, mean, square
        corrected = (square / (1 - BETA2**count)).sqrt() + EPS
        self.z[at] -= lr * (mean / (1 - BETA1**count)) / corrected

    def columns(self) -> Tensor:
        """Everything of a row side by side (n, 3 D + 1), for checkpoints and stores."""
        return torch.cat([self.z, self.mean, self.square, self.steps], 1)

    def restore(self, columns: Tensor) -> None:
        d = self.z.shape[1]
        self.z, self.mean, self.square, self.steps = (c.clone() for c in columns.split([d, d, d, 1], 1))
