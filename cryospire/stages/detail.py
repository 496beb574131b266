"""What the images know beyond the Gaussians: one map of each part, carried to where the part is at a latent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from cryospire.io import stores
from cryospire.maths import fourier, rigid
from cryospire.training.model import Mixture

FAINT = 1e-6  # of a part's mass: the least that a frame is fitted to, where the part is gone; below it nothing is divided


def part_of_gaussians(path: Path) -> Tensor:
    """Part (G,) of every Gaussian: of stage 1 from parts.zarr, of stage 2 through the anchors of model.zarr."""
    if (path / "anchors").exists() and (path / "gaussians").exists():
        group = stores.open_store(path, "model")
        return torch.from_numpy(stores.read(group, "anchors/part")[stores.read(group, "gaussians/anchor")]).long()
    return torch.from_numpy(stores.read(stores.open_store(path, "parts"), "part")).long()


def frames(mixture: Mixture, part: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where each part is at latents z (B, D): rotation (B, P, 3, 3) and translation (B, P, 3), Å, from rest, and occupancy (B, P).

    The rigid motion nearest to that of the part's Gaussians, whatever moved them, weighted by the mass that is there.
    """
    with torch.no_grad():
        rest = mixture.centre.T * mixture.pixel_size
        centre, amplitude, scale = mixture.forward_gaussians(z)
        full = (mixture.relative_amplitude * mixture.amplitude_unit).abs() * scale**3
        mass = amplitude.abs() * scale**3
    found = []
    for k in range(int(part.max()) + 1):
        mine = part == k
        there = mass[:, mine]
        turn, way = rigid.motion(rest[mine].expand(len(z), -1, -1), centre[:, mine], there + FAINT * full[mine])
        found.append((turn, way, there.sum(1) / full[mine].sum().clamp(min=torch.finfo().tiny)))  # a part may be left without Gaussians
    rotation, translation, present = (torch.stack(values, 1) for values in zip(*found, strict=True))
    return rotation, translation, present


@dataclass(frozen=True)
class Details:
    """Maps of parts at rest: ``detail`` (P, z, y, x), spline coefficients, image unit / Å; ``mask`` (P, z, y, x); ``part`` (G,)."""

    mixture: Mixture
    part: Tensor
    detail: NDArray[np.float32]
    mask: NDArray[np.float32]
    pixel_size: float

    @staticmethod
    def load(path: Path, model: Path, mixture: Mixture, box: int) -> Details:
        """Of reconstruction.zarr, on the grid of ``box`` pixels that covers the same field.  Raises InputError for another model's."""
        group, part = stores.open_store(path, "reconstruction"), part_of_gaussians(model)
        stores.check_made_from(group, "model", model, "reconstruct")
        detail, mask = (torch.from_numpy(stores.read(group, name)) for name in ("detail", "mask"))
        detail, mask = fourier.crop(detail, box, 3), fourier.crop(mask, box, 3).clamp(0, 1)
        splines = np.stack([ndimage.spline_filter(d.numpy(), output=np.float32) for d in detail])
        return Details(mixture, part, splines, mask.numpy(), mixture.pixel_size * mixture.box / box)

    def at(self, latent: Tensor) -> NDArray[np.float32]:
        """What to add to the mixture's volume [z, y, x] at one latent (D,): each detail as far as its part is there; where masks meet,
        their mean, weighted by that."""
        rotation, translation, present = (values[0].numpy() for values in frames(self.mixture, self.part, latent[None]))
        total, masks, most = (np.zeros_like(self.mask[0]) for _ in range(3))
        for k, o in enumerate(present):
            pose = rotation[k], translation[k] / self.pixel_size
            mask = carry(self.mask[k], *pose, order=1)
            total += o * o * carry(self.detail[k], *pose, order=3) * (mask > 0)  # splines ring beyond it
            masks += o * mask
            most = np.maximum(most, o * (mask > 0))
        shared: NDArray[np.float32] = total / np.where(most > 0, np.maximum(masks, most), 1)
        return shared


def carry(volume: NDArray[Any], rotation: NDArray[Any], translation: NDArray[Any], order: Literal[1, 3]) -> NDArray[np.float32]:
    """Volume [z, y, x] turned about its origin, voxel n // 2, and then moved by ``translation`` (xyz, pixels).

    ``volume`` holds spline coefficients where ``order`` is 3.
    """
    back = rotation.T[::-1, ::-1]  # from where a voxel is to where it came from, as z, y, x
    origin = np.full(3, volume.shape[-1] // 2)
    offset = origin - back @ (origin + translation[::-1])
    carried: NDArray[np.float32] = ndimage.affine_transform(volume, back, offset, order=order, prefilter=False)
    return carried
