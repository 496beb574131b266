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
from cryospire.stages import train
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
    before, after = (float(angle_between(r, rotation).median()) for r in (given, data.rotation))
    moved = [float((x - x.mean(0)).norm(dim=1).median()) for x in (shift, data.shift)]
    turn_sd, shift_sd = history["turn_sd"][-1], history["shift_sd"][-1]
    if wrong:
        assert after < before / 3 and moved[1] < moved[0] / 5
        assert turn_sd == pytest.approx(math.degrees(0.6 * 4 / BOX), rel=0.1) and shift_sd == pytest.approx(0.9 * PIXEL, rel=0.1)
    else:
        assert after < 0.5 and moved[1] < 0.1 * PIXEL and turn_sd < history["turn_sd"][0] and shift_sd < history["shift_sd"][0]


def test_stage_2_goes_on_where_stage_1_has_come_to(particles: Path, tmp_path: Path) -> None:
    """In pixels of its own box; or it keeps those poses, where it refines none."""
    data, again = (Particles(stores.open_store(particles, "particles")) for _ in range(2))
    given = data.rotation.clone(), data.shift.clone()
    change = torch.randn(len(data), 5, generator=torch.Generator().manual_seed(0))
    rotation, shift = corrected(*given, change, data.box, data.pixel_size)
    found = stores.create(tmp_path / "discovery.zarr", "discovery", config={}, seed=0, inputs={}, pixel_size=1, box=16)
    columns = {"id": data.id[::-1], "pose/rotation": rotation.numpy()[::-1], "pose/shift": shift.numpy()[::-1]}
    for name, values in (columns | {"history/turn_sd": np.array([9.0, 4.5]), "history/shift_sd": np.array([3.0, 2.0])}).items():
        stores.put(found, name, values, tuple(f"d{k}" for k in range(values.ndim)), name)
    z = torch.randn(len(data), 2)
    start, sd = train.begin(z, data, found, True)
    torch.testing.assert_close(start, torch.cat([z, change], 1), rtol=1e-4, atol=1e-4)
    assert torch.equal(data.rotation, given[0]) and torch.equal(data.shift, given[1])
    assert sd == pytest.approx((math.radians(4.5) * data.box / 4, 2.0 / data.pixel_size))
    start, known = train.begin(z, again, found, False)
    assert torch.equal(start, z) and known == sd
    torch.testing.assert_close(again.rotation, rotation)
    torch.testing.assert_close(again.shift, shift)


@pytest.mark.parametrize("known", [(0.0, 0.0), (1.0, 2.0)])
def test_poses_stay_where_they_are_not_refined(particles: Path, tmp_path: Path, known: tuple[float, float]) -> None:
    data = Particles(stores.open_store(particles, "particles"))
    given = data.rotation.clone(), data.shift.clone()
    config = Discover(gaussians=24, latent=2, features=4, epochs=1, refine_poses=False)
    model = Mixture(config, 2, 4, 24, data.box, data.pixel_size)
    model.place(12 * torch.randn(24, 3), torch.full((24,), 5.0), torch.full((24,), 0.01))
    with team() as alone:
        z = torch.zeros(len(data), 2)
        places = tmp_path / "ckpt", tmp_path / "metrics.jsonl", {"particles": particles}
        latents, history = fit("test", model, z, data, config, 0, alone, *places, pose_sd=known)
    assert latents is not None and latents.shape == z.shape and latents.abs().max() > 0
    assert torch.equal(data.rotation, given[0]) and torch.equal(data.shift, given[1])
    assert history["turn_sd"] == [math.degrees(known[0] * 4 / data.box)] and history["shift_sd"] == [known[1] * data.pixel_size]
