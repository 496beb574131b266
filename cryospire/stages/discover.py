"""Stage 1, part discovery: a coarse mixture whose features tell which Gaussians move or vanish together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryospire.config import Config, section
from cryospire.io import stores
from cryospire.log import say
from cryospire.maths import fourier
from cryospire.stages.consensus import falling
from cryospire.training import checkpoint
from cryospire.training import model as mixtures
from cryospire.training.data import Particles
from cryospire.training.distributed import seed_everything, team
from cryospire.training.latents import POSE_SD
from cryospire.training.loop import fit, start_threads

HISTORY = {
    "epoch": ("epoch, from 1", ""),
    "loss": ("mean negative log posterior of a particle; in stage 2 of drawn latents", ""),
    "latent_sd": ("standard deviation of latent coordinates", ""),
    "turn_sd": ("standard deviation of the errors of the given poses about an axis, as the images say", "degrees"),
    "shift_sd": ("standard deviation of the errors of the given shifts along an axis, as the images say", "Å"),
    "learning_rate": ("learning rate of the networks at the end of the epoch", ""),
    "images_per_second": ("images a second, all ranks", "1/s"),
    "memory_gb": ("peak memory of rank 0", "GB"),
}


def run(config: Config, *, particles: Path, consensus: Path, output: Path, half: int = 0, force: bool = False) -> None:
    """particles.zarr, consensus.zarr -> discovery.zarr; ``half`` 1 or 2: of that half-set alone, with a seed of its own."""
    section_, seed = config.discover, config.seed + half
    stores.check_replaceable(output, "discovery", config=section(section_), force=force)
    data = Particles(stores.open_store(particles, "particles"), half)
    density = stores.open_store(consensus, "consensus")
    start_threads(config.threads)
    checkpoints = output.parent / "checkpoints" / "discover"
    with team() as ranks:
        seed_everything(seed, 1)
        model = mixtures.Mixture(section_, section_.latent, section_.features, section_.gaussians, data.box, data.pixel_size)
        model.place(*seed_density(seed_map(density, half), stores.read(density, "mask"), section_.gaussians, data.pixel_size, seed))
        torch.nn.init.normal_(model.feature, std=0.1)
        z = 0.1 * torch.randn(len(data), section_.latent)
        say(f"discover: {len(data):,} particles, box {data.box}, {section_.gaussians:,} Gaussians, {ranks.size} rank(s)")
        metrics = output.parent / "logs" / "discover.metrics.jsonl"
        inputs = {"particles": particles, "consensus": consensus}
        pose_sd = POSE_SD if section_.refine_poses else (0.0, 0.0)
        latents, history = fit("discover", model, z, data, section_, seed, ranks, checkpoints, metrics, inputs, force, pose_sd=pose_sd)
        if latents is not None:
            group = stores.create(
                output,
                "discovery",
                config=section(section_),
                seed=seed,
                inputs=inputs,
                pixel_size=data.pixel_size,
                box=data.box,
                force=force,
            )
            write(group, model, latents, data, history)
            checkpoint.clear(checkpoints)


def write(group: Any, model: mixtures.Mixture, latents: Tensor, data: Particles, history: dict[str, list[float]]) -> None:
    """The contents of discovery.zarr and model.zarr."""
    stores.put(group, "id", data.id, ("particle",), "permanent particle id")
    stores.put(group, "half_set", data.half_set, ("particle",), "half-set of the particle, 1 or 2")
    stores.put(group, "latents", latents.numpy(), ("particle", "latent"), "latent of the particle, unit normal prior")
    stores.put(group, "pose/rotation", data.rotation.numpy(), ("particle", "row", "column"), "refined pose: model to view")
    stores.put(group, "pose/shift", data.shift.numpy(), ("particle", "xy"), "refined shift of the particle from the centre", "Å")
    mixtures.save(group, model)
    for name, values in history.items():
        long_name, units = HISTORY[name]
        stores.put(group, f"history/{name}", np.asarray(values), ("epoch",), long_name, units)
    stores.finish(group)


def seed_map(consensus: Any, half: int) -> NDArray[np.float32]:
    """The map that seeds the Gaussians: of all particles, or of one half-set, filtered by the FSC (Wiener's filter of a half-map)."""
    if not half:
        return stores.read(consensus, "map")
    own = torch.from_numpy(stores.read(consensus, "half_maps")[half - 1])
    return fourier.apply_radial(own, falling(torch.from_numpy(stores.read(consensus, "fsc"))), 3).numpy()


def seed_density(
    volume: NDArray[np.float32], mask: NDArray[np.float32], gaussians: int, pixel_size: float, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Centres (G, 3) Å, scales (G) Å and amplitudes (G) of equal Gaussians that follow a density.

    Positions are spread evenly over the cumulated positive density (systematic sampling, Lahiri 1951), so that none clump; the
    amplitudes together hold the density's mass.
    """
    rng = np.random.default_rng((seed, 2))
    weight = np.clip(volume * mask, 0, None).astype(np.float64).ravel()
    cumulated = np.cumsum(weight)
    voxel = np.searchsorted(cumulated, (np.arange(gaussians) + rng.random()) / gaussians * cumulated[-1])
    zyx = np.stack(np.unravel_index(voxel, volume.shape), 1) - volume.shape[0] // 2 + rng.uniform(-0.5, 0.5, (gaussians, 3))
    # Scales fill the volume that is occupied, but stay within what the pixel can carry.
    spacing = (np.count_nonzero(weight > 0.1 * weight.max()) / gaussians) ** (1 / 3)
    scale = float(np.clip(0.6 * spacing, 0.6, 2.5)) * pixel_size
    mass = cumulated[-1] * pixel_size**3
    amplitude = mass / gaussians / ((2 * np.pi) ** 1.5 * scale**3) / torch.sigmoid(torch.tensor(mixtures.OCCUPANCY_BIAS)).item()
    centre = torch.from_numpy(np.ascontiguousarray(zyx[:, ::-1])).float() * pixel_size
    return centre, torch.full((gaussians,), scale), torch.full((gaussians,), float(amplitude))
