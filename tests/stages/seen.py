"""A particles.zarr whose images show given Gaussians, through CTFs, with unit noise."""

from pathlib import Path

import torch

from cryospire.io import stores
from cryospire.maths import projection
from cryospire.stages import bench_feed
from cryospire.training.data import Particles

SHELL = 64  # images


def images(data: Particles, centre: torch.Tensor, amplitude: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Images (N, box, box) without noise of Gaussians at centres (N, G, 3), Å, with amplitudes (N, G) and scales (G,), Å; no truncation."""
    pixel, out = data.pixel_size, []
    for at in torch.arange(len(data)).split(SHELL):
        xy = (data.rotation[at, :2] @ centre[at].mT + data.shift[at, :, None]) / pixel
        plain = projection.splat(xy, projection.peak_weight(amplitude[at], scale), scale / pixel, data.box, cutoff=float("inf"))
        out.append(torch.fft.irfft2(torch.fft.rfft2(plain) * data.transfer(at.numpy()), s=plain.shape[-2:]))
    return torch.cat(out)


def empty(path: Path, count: int, box: int, pixel: float) -> Particles:
    """Particles at random poses, shifts and defoci, with images of noise."""
    return bench_feed.simulated(path, count, box, field=box * pixel)


def fill(path: Path, data: Particles, clean: torch.Tensor, seed: int = 0) -> None:
    """Write images with noise into the store."""
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    stores.writable(path)["images"][:] = (clean + noise).numpy()
