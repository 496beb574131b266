"""Restarts of latents: an image that is stuck at a shape which it does not show begins anew at one that it does.

The likelihood of one image has several maxima over the latents, and a latent climbs the nearest.  So the mixture is drawn at nodes all
over the latents, and every image is compared with every drawing, as Fourier slices of low resolution: 64 nodes cost less than the step
of a training.  Where another node explains an image better by more than the drawings' error, the mixture itself decides, in all pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from cryospire.kernels import render_volume
from cryospire.maths import fourier, insertion
from cryospire.training.data import Batch
from cryospire.training.model import Mixture

NODES = 64
BOX = 32  # pixels of the drawings, which cover the field of the images
WIDER = 0.4  # of these pixels: aliases stay below 0.2 %
FINER = 2  # lattice of their transforms
GAIN = 1.0  # in log-likelihood, for which a node is tried
SAMPLE = 50_000  # latents among which nodes are placed


def nodes(latents: Tensor, seed: tuple[int, ...]) -> Tensor:
    """Latents (K, D) all over those given (N, D): centres of k-means."""
    from sklearn.cluster import KMeans

    rng = np.random.default_rng(seed)
    some = latents[torch.from_numpy(np.sort(rng.permutation(len(latents))[:SAMPLE]))]
    found = KMeans(min(NODES, len(some)), n_init=1, random_state=int(rng.integers(2**31))).fit(some.double().numpy())
    return torch.from_numpy(found.cluster_centers_).float()


@dataclass(frozen=True)
class Drawings:
    """The mixture at nodes ``latent`` (K, D): ``table`` (n^3, 2 K) of the values of their transforms, real parts and imaginary ones,
    on a lattice [kz, ky, kx] of n points an axis, frequency 0 in the middle; images are compared at ``points`` (m, 2), kx and ky."""

    latent: Tensor
    table: Tensor
    points: Tensor
    n: int

    @staticmethod
    def of(model: Mixture, latent: Tensor, device: torch.device) -> Drawings:
        box = min(BOX, model.box)
        pixel = model.pixel_size * model.box / box
        # A coefficient of an image is a sum over its pixels over their number along a side: it has the noise of a pixel.
        unit = (model.box / box) ** 3 * model.pixel_size / model.box
        # Rendered in half these pixels, Gaussians are made wide enough to be sampled there; what that does to the transform is undone.
        k = torch.fft.fftfreq(box)
        sharp = torch.exp(2 * (math.pi * WIDER * k) ** 2)
        undone = unit * sharp[:, None, None] * sharp[:, None] * sharp[: box // 2 + 1]
        columns = []
        for z in latent.to(device):
            centre, amplitude, scale = model.forward_gaussians(z[None])
            if model.anchor_sizes:
                turn, way = model.swayed(z[None])
                centre = centre @ turn.mT + way[:, None] * model.pixel_size
            wide = (scale.square() + (WIDER * pixel) ** 2).sqrt()
            drawn = render_volume(centre[0], amplitude[0] * (scale / wide) ** 3, wide, 2 * box, pixel / 2)
            volume = fourier.irfft(fourier.rfft(fourier.crop(drawn, box, 3), 3) * undone, 3)
            fine = pad(volume / insertion.gridding(box, FINER * box, volume.dtype), [(FINER - 1) * box // 2] * 6)
            transform = torch.fft.fftshift(torch.fft.fftn(torch.fft.ifftshift(fine)))
            columns.append(torch.view_as_real(transform).reshape(-1, 2))
        table = torch.stack(columns, 2).flatten(1)  # real parts of all nodes, then imaginary ones
        y, x = torch.nonzero(insertion.slice_points(box) & (fourier.shells(box) < box // 2), as_tuple=True)
        points = torch.stack([x, torch.where(y < box // 2, y, y - box)], 1)
        return Drawings(latent, table.to(device), points.to(device), FINER * box)

    def slices(self, rotation: Tensor) -> Tensor:
        """Values (B, m, 2, K) of the transforms where images at ``rotation`` (B, 3, 3) have ``points``."""
        at = FINER * (self.points.float() @ rotation[:, :2]) + self.n // 2  # x, y, z
        low = at.floor()
        part, low = at - low, low.long()
        index, weight = [], []
        for corner in range(8):
            step = torch.tensor([corner & 1, corner >> 1 & 1, corner >> 2], device=at.device)
            x, y, z = (low + step).unbind(-1)
            index.append((z * self.n + y) * self.n + x)
            weight.append(torch.where(step.bool(), part, 1 - part).prod(-1))
        rows, shares = (torch.stack(v, -1).flatten(0, 1) for v in (index, weight))
        values = embedding_bag(rows, self.table, per_sample_weights=shares, mode="sum")
        return values.view(len(rotation), len(self.points), 2, -1)

    def likelihood(self, batch: Batch, pixel_size: float, sd: float) -> Tensor:
        """Log-likelihood (B, K) of each image with each drawing in it, over that of noise alone;
        ``sd`` of their strengths as in ``maths.losses``."""
        box = batch.images.shape[-1]
        kx, ky = self.points.T
        image = (fourier.rfft(batch.images) / box * fourier.shift_phase(box, -batch.shift / pixel_size))[:, ky, kx]
        transfer = batch.transfer[:, ky, kx]
        seen = self.slices(batch.rotation)
        # Each coefficient stands for two.
        norm = 2 * torch.einsum("bm,bmck->bk", transfer**2, seen.square())
        cross = 2 * torch.einsum("bmc,bmck->bk", torch.view_as_real(image * transfer), seen)
        s = (sd**2 * cross + 1) / (sd**2 * norm + 1)
        return ((s + 1) * cross - s * norm) / 2


@torch.no_grad()
def restarted(model: Mixture, drawings: Drawings, z: Tensor, batch: Batch, precision: float) -> Tensor:
    """Latents (B, D) of a batch, those at ``z`` (B, D) or at the node that suits the image better; ``precision`` lambda of their prior."""
    node = drawings.latent.to(z.device)
    worth = drawings.likelihood(batch, model.pixel_size, model.strength_sd) - precision / 2 * node.square().sum(1)
    own, best = torch.cdist(z, node).argmin(1), worth.argmax(1)
    each = torch.arange(len(z), device=z.device)
    tried = torch.nonzero(worth[each, best] > worth[each, own] + GAIN)[:, 0]
    if not len(tried):
        return z
    on = batch.rotation[tried], batch.shift[tried], batch.transfer[tried], batch.images[tried]
    new = node[best[tried]]
    energy = [model(latent, *on) + precision / 2 * latent.square().sum(1) for latent in (z[tried], new)]
    better = energy[1] < energy[0]
    out = z.clone()
    out[tried[better]] = new[better]
    return out
