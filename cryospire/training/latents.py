"""What is found of each particle a rank owns, latent and pose: only the rows of a batch are touched in a step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from cryospire.config import Training
from cryospire.training.distributed import Team

MEMORY = 0.2  # weight of a new probe in the running Fisher information
REACH = 1.0  # longest step, in standard deviations of the prior, and at most this where it knows less
POSE_SD = 1.0, 1.0  # of turns and shifts, pixels (``maths.poses.corrected``), before anything is learnt of it


class Latents:
    """``z`` (n, D) for global rows ``start <= row < start + n``, moved by natural gradients (Amari 1998); all on the device of ``z``.

    Columns are the latent and, where poses are refined, the correction of the pose; ``precision`` (D,) is of their normal prior, whose
    mean (n, D) is zero but for what poses have wrong in common, by all images (``training.still``).

    Images have unit noise, so the Fisher information of a latent is F = J^T J, J the derivative of the image; averaged over
    particles it turns a gradient g of the negative log-likelihood into Newton's step under the prior,
    ``z -= rate (F + precision)^-1 (g + precision z)``.  A particle moves as far as its image says; Adam, which divides by each row's
    own gradient, would move a row that saw only noise as far as one that saw signal.
    """

    def __init__(self, z: Tensor, start: int, precision: Tensor) -> None:
        self.z, self.start, self.precision = z, start, precision.to(z.device)
        self.mean = torch.zeros_like(z)
        self.fisher = torch.zeros(z.shape[1], z.shape[1], device=z.device)

    @staticmethod
    def of(config: Training, latent: int, z: Tensor, start: int, pose_sd: tuple[float, float] = POSE_SD) -> Latents:
        """From latents (n, D), with corrections that begin at zero, or from both (n, D + 5); ``pose_sd`` of turns and shifts."""
        turn, shift = pose_sd
        precision = torch.tensor([config.lambda_z] * latent + ([turn**-2] * 3 + [shift**-2] * 2 if config.refine_poses else []))
        return Latents(pad(z, (0, len(precision) - z.shape[1])).clone(), start, precision)

    def take(self, rows: Tensor) -> Tensor:
        return self.z[rows - self.start].requires_grad_()

    def draw(self, rows: Tensor, noise: Tensor) -> Tensor:
        """What the images of ``rows`` leave open, drawn by white ``noise`` (B, D) from a normal of covariance ``(F + precision)^-1`` about
        their estimates (Laplace): shape and pose together, which an image may take for each other.

        A mixture that sees these learns the mean of the shapes which an image may show (variational EM; Kingma & Welling 2014); by the
        likeliest ones alone it would learn one shape for the noise of each.
        """
        root = torch.linalg.cholesky_ex(self.fisher + self.precision.diag()).L
        drawn = torch.linalg.solve_triangular(root.T, noise.T, upper=True).T
        return (self.z[rows - self.start] + drawn).requires_grad_()

    def learn(self, probe: Tensor, team: Team) -> None:
        """Update F from ``J^T e`` (B, D), e unit white noise: its covariance is J^T J (Hutchinson's estimator), over all ranks."""
        dims = probe.shape[1]
        total = torch.tensor(team.sum(*(probe.T @ probe).flatten().tolist(), float(len(probe))))
        new = (total[:-1] / total[-1]).reshape(dims, dims).float().to(self.z.device)
        self.fisher = torch.lerp(self.fisher, new, MEMORY) if self.fisher.any() else new

    def step(self, rows: Tensor, z: Tensor, gradient: Tensor, rate: float) -> None:
        """By the ``gradient`` (B, D) of the negative log-likelihood of each image at ``z`` (B, D), its own or drawn: on average over images
        the draw is taken back."""
        at = rows - self.start
        metric = self.fisher + self.precision.diag()
        # Positive definite; without the check for that, for which the CPU would wait.
        newton = torch.linalg.solve_ex(metric, (gradient + self.precision * (z - self.mean[at])).T).result.T
        step = rate * (newton - (z - self.z[at]))
        length = (step.square() * self.precision.clamp(min=1)).sum(1, keepdim=True).sqrt()
        self.z[at] -= step * (REACH / length.clamp(min=REACH))

    def learn_poses(self, latent: int, team: Team) -> tuple[float, float]:
        """Standard deviations of the poses' errors, of turns and shifts, that all images tell of; the prior is learnt from them.

        Expectation maximisation (Dempster, Laird & Rubin 1977): what the corrections are, and what is uncertain of them.
        """
        uncertain = torch.linalg.inv((self.fisher + self.precision.diag()).cpu()).diagonal()[latent:]

        def spread(corrections: Tensor) -> tuple[float, float]:
            total = torch.tensor(team.sum(*corrections.double().square().sum(0).tolist(), float(len(corrections))))
            variance = uncertain + total[:-1] / total[-1]
            return float(variance[:3].mean()), float(variance[3:].mean())

        turn, shift = spread((self.z - self.mean)[:, latent:])
        self.precision[latent : latent + 3], self.precision[latent + 3 :] = 1 / turn, 1 / shift
        turn, shift = spread(self.z[:, latent:])
        return turn**0.5, shift**0.5
