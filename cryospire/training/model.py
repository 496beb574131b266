"""The mixture: Gaussians whose centres and amplitudes follow a latent, with or without anchors (method, stages 1 and 2)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cryospire import kernels
from cryospire.config import Train, Training
from cryospire.conventions import InputError
from cryospire.io import stores
from cryospire.maths.losses import residual_energy
from cryospire.maths.poses import carried, frames
from cryospire.maths.projection import peak_weight
from cryospire.maths.rigid import motion
from cryospire.training.heads import head, mlp

STRENGTH_SD = 0.2  # standard deviation, over images, of how strongly they show the particle
OCCUPANCY_BIAS = 2.0  # occupancies start at sigmoid(2) = 0.88: present, and free to vanish
FOURIER_BANDS = 4  # octaves of the positional encoding (ablation)
CHUNK, SAMPLE = 128, 512  # latents at once, and of which a mean is taken
PINS = 256  # Gaussians, at most, by which a body is held
SWAY = 32, 1  # nodes in a layer, and layers, of the network of the whole's motion


class Mixture(nn.Module):
    """``V(p | z) = sum_i m_i(z) exp(-|p - c_i(z)|^2 / 2 s_i^2)``; lengths in Å.

    Without anchors (stage 1): ``c_i(z) = c_i + MLP([z, f_i])``.  With anchors (stage 2): Gaussians come sorted by anchor,
    ``c_i(z) = c̄_a + t_a + R_a (c_i - c̄_a) + MLP([z, f_i])`` and ``f_i = f̄_a + df_i``.  ``m_i(z) = m_i sigmoid(MLP([z, f_i]))``.
    Once a body is held (``hold``), all of it is told in the frame of that body.
    """

    def __init__(
        self,
        config: Training,
        latent: int,
        features: int,
        gaussians: int,
        box: int,
        pixel_size: float,
        anchor_sizes: list[int] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.latent, self.box, self.pixel_size = config, latent, box, pixel_size
        self.anchor_sizes = anchor_sizes or []
        # Stage 1 ended at a higher loss where it might explain by the strength of images what comes and goes.
        self.strength_sd = STRENGTH_SD if isinstance(config, Train) else 0.0
        self.unit = box * pixel_size / 16  # Å; the length in which heads express displacements
        # Density parameters are of order one in units of a pixel (centres) or relative (the rest): one learning rate fits all.
        self.centre = nn.Parameter(torch.zeros(3, gaussians))  # pixels
        self.log_scale = nn.Parameter(torch.zeros(gaussians))
        self.relative_amplitude = nn.Parameter(torch.ones(gaussians))
        self.amplitude_unit: Tensor
        self.register_buffer("amplitude_unit", torch.ones(()))
        self.feature = nn.Parameter(torch.zeros(gaussians, features))  # stage 2: the offsets df
        self.positional = isinstance(config, Train) and config.positional
        inputs = 6 * FOURIER_BANDS if self.positional else features
        sizes: dict[str, Any] = {
            "kind": config.head,
            "latent": latent,
            "features": inputs,
            "hidden": config.hidden,
            "layers": config.layers,
            "rank": config.rank,
        }
        self.flex = head(outputs=3, **sizes)
        self.occupancy = head(outputs=1, **sizes)
        self.body: Tensor  # (G,), mass of Gaussians by which a body is held, 0 of others
        self.home: Tensor  # (3, G), pixels, where
        self.pins: Tensor  # these Gaussians
        self.register_buffer("pins", torch.zeros(0, dtype=torch.long), persistent=False)
        if self.anchor_sizes:
            self.register_buffer("body", torch.zeros(gaussians))
            self.register_buffer("home", torch.zeros(3, gaussians))
            self.register_load_state_dict_post_hook(lambda model, _: model.pin(model.body, model.home))
        self.anchor_motion: nn.Module | None = None
        self.anchor_centre: Tensor
        self.anchor_feature: Tensor
        self.anchor: Tensor  # (G,), of each Gaussian
        owned = torch.repeat_interleave(torch.arange(len(self.anchor_sizes)), torch.tensor(self.anchor_sizes, dtype=torch.long))
        self.register_buffer("anchor", owned, persistent=False)
        self.register_buffer("anchor_centre", torch.zeros(3, len(self.anchor_sizes)))  # pixels
        self.register_buffer("anchor_feature", torch.zeros(len(self.anchor_sizes), features))
        if isinstance(config, Train) and config.anchor_motion:
            self.anchor_motion = mlp(latent + features, config.hidden, config.layers, 9)
        if self.anchor_sizes:
            self.sway = mlp(latent, *SWAY, 9)
            self.settle()

    @property
    def scale(self) -> Tensor:
        """Scales (G,), Å; kept between 0.35 pixel, where sampling at pixel centres still holds, and an eighth of the box."""
        return self.log_scale.exp().clamp(0.35, self.box / 8) * self.pixel_size

    @property
    def features(self) -> Tensor:
        """What the heads see of each Gaussian (G, E)."""
        if self.positional:
            bands = math.pi * 2.0 ** torch.arange(FOURIER_BANDS, device=self.centre.device)
            phase = (self.centre.T[:, :, None] * (2 / self.box) * bands).flatten(1)
            return torch.cat([phase.sin(), phase.cos()], 1)
        if self.anchor_sizes:
            return self.anchor_feature[self.anchor] + self.feature
        return self.feature

    def anchor_pose(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Rigid motion of each anchor: rotations (B, A, 3, 3) and translations (B, A, 3) in pixels."""
        assert self.anchor_motion is not None
        pairs = torch.cat([z[:, None].expand(-1, len(self.anchor_sizes), -1), self.anchor_feature[None].expand(len(z), -1, -1)], -1)
        motion = self.anchor_motion(pairs)
        return frames(motion[..., :6]), motion[..., 6:] * (self.unit / self.pixel_size)

    def rigid(self, z: Tensor, few: Tensor | None = None) -> Tensor:
        """Centres (B, 3, G) in pixels after the anchors' motion, before the local flex; or of a few Gaussians alone."""
        if self.anchor_motion is None:
            return self.centre[None] if few is None else self.centre[None, :, few]
        rotation, translation = self.anchor_pose(z)
        if few is not None:
            anchor = self.anchor[few]
            rest = self.anchor_centre[:, anchor]
            return torch.einsum("bgij,jg->big", rotation[:, anchor], self.centre[:, few] - rest) + rest + translation[:, anchor].mT
        target = self.anchor_centre.T + translation
        blocks = torch.split(self.centre, self.anchor_sizes, 1)
        moved = [rotation[:, a] @ (block - self.anchor_centre[:, a : a + 1]) + target[:, a, :, None] for a, block in enumerate(blocks)]
        return torch.cat(moved, 2)

    def gaussians(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Centres (B, 3, G) in pixels and amplitudes (B, G) for latents (B, D)."""
        f = self.features
        centre = self.rigid(z) + self.flex(z, f) * (self.unit / self.pixel_size)
        if self.held:
            turn, way = self._motion(centre[:, :, self.pins])
            centre = turn.mT @ (centre - way[:, :, None])
        return centre, self.occupancies(z, f) * (self.relative_amplitude * self.amplitude_unit)

    @torch.no_grad()
    def hold(self, body: Tensor, z: Tensor) -> None:
        """Tell all in the frame of a body, of Gaussians ``body`` (G,; boolean): it stays, of its mean shape, where it is on average at
        latents z (N, D).

        Motions of the whole belong to the poses then: see ``turned``.
        """
        mine = torch.nonzero(body)[:, 0]
        pins = mine[torch.linspace(0, len(mine) - 1, min(PINS, len(mine))).round().long()]
        mass = torch.zeros_like(self.body).index_put((pins,), (self.relative_amplitude.abs() * self.scale**3)[pins])
        centre = torch.cat([self.gaussians(few)[0] for few in sample(z)]).mT
        seen, weight = centre[:, pins], mass[pins]
        turn, way = motion(seen[0].expand_as(seen), seen, weight.expand(len(seen), -1))
        shape = ((centre - way[:, None]) @ turn).mean(0)
        turn, way = motion(shape[pins], seen.mean(0), weight)
        self.pin(mass, turn @ shape.T + way[:, None])

    @torch.no_grad()
    def pin(self, body: Tensor, home: Tensor) -> None:
        """Hold the Gaussians of mass ``body`` (G,) at ``home`` (3, G), pixels."""
        self.body.copy_(body)
        self.home.copy_(home)
        self.pins = torch.nonzero(self.body)[:, 0]

    @property
    def held(self) -> bool:
        return len(self.pins) > 0

    def turned(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """How networks move the body from ``home`` at latents z (B, D): rotations (B, 3, 3) and translations (B, 3) in pixels, of least
        squares weighted by mass.  Seen at pose R and shift s, that is the body at home at pose ``R rotation`` and ``s + R translation``."""
        flex = self.flex(z, self.features[self.pins]) * (self.unit / self.pixel_size)
        return self._motion(self.rigid(z, self.pins) + flex)

    def _motion(self, centre: Tensor) -> tuple[Tensor, Tensor]:
        """That of the body, by where its pins are, ``centre`` (B, 3, pins)."""
        home, mass = self.home[:, self.pins].T, self.body[self.pins]
        return motion(home.expand(len(centre), -1, -1), centre.mT, mass.expand(len(centre), -1))

    def swayed(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """How the whole moves, once a body is held, with latents z (B, D): rotations (B, 3, 3) and translations (B, 3) in pixels.

        That is what poses of images at like latents have wrong in common.  It moves no latent: these are of the shape alone.
        """
        motion = self.sway(z.detach()) * float(self.held)
        return frames(motion[:, :6]), motion[:, 6:] * (self.unit / self.pixel_size)

    @torch.no_grad()
    def settle(self) -> None:
        """Let the whole not move."""
        for p in self.sway[-1].parameters():
            p.zero_()

    @torch.no_grad()
    def forward_gaussians(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Centres (B, G, 3) Å, amplitudes (B, G) and scales (G) Å: what renders a volume."""
        centre, amplitude = self.gaussians(z)
        return (centre * self.pixel_size).transpose(1, 2), amplitude, self.scale

    def occupancies(self, z: Tensor, features: Tensor) -> Tensor:
        """Occupancies (B, G) in (0, 1)."""
        return torch.sigmoid(self.occupancy(z, features)[:, 0] + OCCUPANCY_BIAS)

    def project(self, z: Tensor, rotation: Tensor, shift: Tensor) -> Tensor:
        """Projections (B, box, box) at poses ``rotation`` (B, 3, 3) and ``shift`` (B, 2) Å."""
        return self.splat(*self.seen(z, rotation, shift), self.scale)

    def project_parts(self, part: Tensor, z: Tensor, rotation: Tensor, shift: Tensor) -> list[Tensor]:
        """The same of each part alone; ``part`` (G,)."""
        xy, amplitude = self.seen(z, rotation, shift)
        own = [part == k for k in range(int(part.max()) + 1)]
        return [self.splat(xy[:, :, mine], amplitude[:, mine], self.scale[mine]) for mine in own]

    def seen(self, z: Tensor, rotation: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Centres (B, 2, G) in pixels of the images, and amplitudes (B, G)."""
        centre, amplitude = self.gaussians(z)
        if self.anchor_sizes:
            turn, way = self.swayed(z)
            rotation, shift = carried(rotation, shift, turn, way * self.pixel_size)
        return rotation[:, :2] @ centre + shift[:, :, None] / self.pixel_size, amplitude

    def splat(self, xy: Tensor, amplitude: Tensor, scale: Tensor) -> Tensor:
        """Images (B, box, box) of Gaussians at ``xy`` (B, 2, G), pixels, with ``amplitude`` (B, G) and ``scale`` (G,), Å."""
        return kernels.splat(xy, peak_weight(amplitude, scale), scale / self.pixel_size, self.box, self.config.cutoff)

    def forward(self, z: Tensor, rotation: Tensor, shift: Tensor, transfer: Tensor, images: Tensor) -> Tensor:
        """Negative log-likelihood (B,) of whitened images under unit noise, up to a constant."""
        return residual_energy(self.project(z, rotation, shift), transfer, images, self.strength_sd)

    def place(self, centre: Tensor, scale: Tensor, amplitude: Tensor) -> None:
        """Set the density from centres (G, 3) Å, scales (G) Å and amplitudes (G)."""
        with torch.no_grad():
            self.centre.copy_(centre.T / self.pixel_size)
            self.log_scale.copy_((scale / self.pixel_size).log())
            self.amplitude_unit.copy_(amplitude.abs().mean())
            self.relative_amplitude.copy_(amplitude / self.amplitude_unit)


def sample(z: Tensor) -> tuple[Tensor, ...]:
    """Some of many latents (N, D), a few at a time."""
    return z[torch.linspace(0, len(z) - 1, min(SAMPLE, len(z)), dtype=torch.float64).round().long()].split(CHUNK)


def save(group: Any, model: Mixture) -> None:
    """Write the mixture into a store: its Gaussians for people, its networks and shape for ``load``."""
    scale, pixel = model.scale.detach(), model.pixel_size
    stores.put(group, "gaussians/centre", (model.centre.detach().T * pixel).numpy(), ("gaussian", "xyz"), "centre at zero motion", "Å")
    stores.put(group, "gaussians/scale", scale.numpy(), ("gaussian",), "standard deviation", "Å")
    amplitude = (model.relative_amplitude * model.amplitude_unit).detach().numpy()
    stores.put(group, "gaussians/amplitude", amplitude, ("gaussian",), "peak density at full occupancy", "image unit / Å")
    stores.put(group, "gaussians/feature", model.features.detach().numpy(), ("gaussian", "feature"), "learned feature")
    if model.anchor_sizes:
        stores.put(group, "gaussians/anchor", model.anchor.numpy(), ("gaussian",), "anchor that carries the Gaussian")
        stores.put(group, "anchors/position", (model.anchor_centre.T * pixel).numpy(), ("anchor", "xyz"), "position of the anchor", "Å")
        stores.put(group, "anchors/feature", model.anchor_feature.numpy(), ("anchor", "feature"), "feature of the anchor")
    for name, value in model.state_dict().items():
        stores.put(group, f"networks/{name}", value.cpu().numpy(), tuple(f"dim_{k}" for k in range(value.ndim)), f"parameter {name}")
    group.attrs["mixture"] = {
        "kind": type(model.config).__name__,
        "latent": model.latent,
        "features": model.feature.shape[1],
        "gaussians": model.centre.shape[1],
        "anchor_sizes": model.anchor_sizes,
    }


def trained(path: Path) -> Any:
    """The store of a training, ``discovery.zarr`` or ``model.zarr``.  Raises InputError for others."""
    return stores.open_store(path, "model" if (path / "anchors").exists() else "discovery")


def load(path: Path) -> Mixture:
    """The trained mixture of ``discovery.zarr`` or ``model.zarr``, ready to evaluate.  Raises InputError for other stores."""
    from cryospire.config import Discover

    group = trained(path)
    shape: Any = group.attrs["mixture"]
    section: Any = group.attrs["config"]
    config = Train.model_validate(section) if shape["kind"] == "Train" else Discover.model_validate(section)
    box, pixel_size = int(str(group.attrs["box"])), float(str(group.attrs["pixel_size"]))
    model = Mixture(config, shape["latent"], shape["features"], shape["gaussians"], box, pixel_size, shape["anchor_sizes"])
    state: dict[str, Tensor] = {}
    for name, own in model.state_dict().items():
        found = torch.as_tensor(np.array(stores.read(group, f"networks/{name}"))) if f"networks/{name}" in group else None
        if found is None or found.shape != own.shape:
            words = "is missing" if found is None else f"has shape {tuple(found.shape)}, not {tuple(own.shape)}"
            raise InputError(f"{path}: networks/{name} {words}: written by another version of cryospire; run its stage again")
        state[name] = found
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def load_latents(path: Path, ids: NDArray[np.int64]) -> Tensor:
    """Latents (N, D) of ``discovery.zarr`` or ``model.zarr`` in the order of the particles ``ids``."""
    group = trained(path)
    rows = stores.join(ids, stores.read(group, "id"), str(path))
    return torch.from_numpy(stores.read(group, "latents")[rows]).float()
