"""Poses that are wrong by a known spread are found, with that spread, while the mixture is trained; right ones stay."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cryospire import kernels
from cryospire.config import Discover
from cryospire.io import stores
from cryospire.maths.poses import angle_between, corrected, random_rotations
from cryospire.training.data import Particles
from cryospire.training.distributed import seed_everything, team
from cryospire.training.loop import fit
from cryospire.training.model import Mixture

BOX, PIXEL, COUNT, GAUSSIANS = 24, 6.0, 800, 60
ENERGY = 1500.0  # of an image; its noise has variance 1 in every pixel


@pytest.mark.parametrize("wrong", [True, False])
def test_errors_of_poses_are_found(tmp_path: Path, plant: Callable[..., Path], wrong: bool) -> None:
    seed_everything(3)
    g = torch.Generator().manual_seed(0)
    centre = 24 * torch.randn(GAUSSIANS, 3, generator=g)
    rotation = random_rotations(COUNT, g).float()
    sd = torch.tensor([0.6] * 3 + [0.9] * 2) * wrong  # pixels
    given, shift = corrected(rotation, torch.zeros(COUNT, 2), sd * torch.randn(COUNT, 5, generator=g), BOX, PIXEL)
    clean = kernels.splat(rotation[:, :2] @ centre.T / PIXEL, torch.ones(COUNT, GAUSSIANS), torch.ones(GAUSSIANS), BOX)
    factor = (ENERGY / clean.square().sum((1, 2)).mean()).sqrt()
    images = factor * clean + torch.randn(clean.shape, generator=g)
    store = plant(tmp_path / "particles.zarr", images, given, PIXEL)
    stores.put(stores.writable(store), "pose/shift", shift.numpy().astype(np.float32), ("particle", "xy"), "shift")
    data = Particles(stores.open_store(store, "particles"))

    config = Discover(gaussians=GAUSSIANS, latent=2, features=4, epochs=12, lambda_z=100.0)  # nothing is heterogeneous
    model = Mixture(config, 2, 4, GAUSSIANS, BOX, PIXEL)
    model.place(centre, torch.full((GAUSSIANS,), PIXEL), (factor / (0.88 * (2 * torch.pi) ** 0.5 * PIXEL)).expand(GAUSSIANS))
    with team() as alone:
        z = torch.zeros(COUNT, 2)
        _, history = fit("test", model, z, data, config, 0, alone, tmp_path / "ckpt", tmp_path / "metrics.jsonl", {"particles": store})
    # Both against the truth up to a common turn, which the mixture is free to take.
    before, after = (float(angle_between(r, rotation).median()) for r in (given, data.rotation))
    moved = [float((x - x.mean(0)).norm(dim=1).median()) for x in (shift, data.shift)]
    turn_sd, shift_sd = history["turn_sd"][-1], history["shift_sd"][-1]
    if wrong:
        assert after < before / 3 and moved[1] < moved[0] / 5
        assert turn_sd == pytest.approx(math.degrees(0.6 * 4 / BOX), rel=0.1) and shift_sd == pytest.approx(0.9 * PIXEL, rel=0.1)
    else:
        assert after < 0.5 and moved[1] < 0.1 * PIXEL and turn_sd < history["turn_sd"][0] and shift_sd < history["shift_sd"][0]
