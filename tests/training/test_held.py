"""A part that is held still: images are seen as before, and the frame no longer follows what moves."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cryospire import kernels
from cryospire.config import Train
from cryospire.io import stores
from cryospire.maths.poses import angle_between, corrected, exp_so3, random_rotations
from cryospire.maths.rigid import motion
from cryospire.stages.evaluate_model import Poses, frames
from cryospire.training.data import Particles
from cryospire.training.distributed import Team, seed_everything, team
from cryospire.training.latents import Latents
from cryospire.training.loop import fit
from cryospire.training.model import Mixture, load, save
from cryospire.training.still import held_part, hold_still, settle

BOX, PIXEL, COUNT, SIZES = 24, 6.0, 800, [90, 30]
ENERGY = 1500.0  # of an image; its noise has variance 1 in every pixel
CUTOFF = 6.0  # scales: what the splat leaves out jumps as Gaussians move by a rounding, here by 1.5e-8 of a peak
BODY = torch.arange(sum(SIZES)) < SIZES[0]


def mixture(centre: torch.Tensor, amplitude: torch.Tensor) -> Mixture:
    model = Mixture(Train(gaussians=len(BODY), epochs=30, cutoff=CUTOFF), 2, 4, len(BODY), BOX, PIXEL, SIZES)
    model.place(centre, torch.full((len(BODY),), PIXEL), amplitude)
    model.anchor_centre.copy_(torch.stack([centre[BODY].mean(0), centre[~BODY].mean(0)], 1) / PIXEL)
    model.anchor_feature.copy_(torch.eye(2, 4))
    return model


class Swinging(Mixture):
    """Part k turns about the z axis by ``degrees[k]`` times the latent's first number, about ``pivot``, Å; nothing flexes."""

    degrees: torch.Tensor
    pivot = torch.tensor([[0.0], [30.0], [0.0]])

    def rigid(self, z: torch.Tensor, few: torch.Tensor | None = None) -> torch.Tensor:
        angle = torch.deg2rad(z[:, :1] * self.degrees[self.anchor])
        x, y, height = (self.centre - self.pivot / PIXEL)[:, None]
        turned = torch.stack([angle.cos() * x - angle.sin() * y, angle.sin() * x + angle.cos() * y, height.expand_as(angle)], 1)
        moved = turned + self.pivot / PIXEL
        return moved if few is None else moved[:, :, few]

    def occupancies(self, z: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """The second number takes the first part away where it is positive, the third all."""
        return torch.where((z[:, 1:2] > 0) & (self.anchor == 0), 0.01, 1.0) * torch.where(z[:, 2:] > 0, 0.02, 1.0)


@pytest.mark.parametrize(
    ("sizes", "degrees", "missing", "empty", "rests"),
    [
        ([90, 30], [4, 40], 0.0, 0.0, 0),
        ([90, 30], [40, 4], 0.0, 0.0, 1),  # the lighter one
        ([48, 36, 36], [40, 4, -40], 0.0, 0.0, 1),
        ([84, 30, 6], [4, 40, 0], 0.0, 0.0, 0),  # too light a third to tell a frame
        ([90, 30], [4, 40], 0.0, 0.2, 0),  # a fifth of the images are of nothing
        ([54, 66], [4, 40], 0.2, 0.0, None),  # what rests is missing from a fifth; what swings gives no frame
        ([60, 60], [30, -30], 0.0, 0.0, None),
        ([120], [4], 0.0, 0.0, 0),
    ],
)
def test_the_part_that_rests_is_held(
    particles: Path, sizes: list[int], degrees: list[float], missing: float, empty: float, rests: int | None
) -> None:
    """And the poses become those that a frame without its turns has."""
    g = torch.Generator().manual_seed(0)
    model = Swinging(Train(gaussians=120, cutoff=CUTOFF), 3, 4, 120, BOX, PIXEL, sizes)
    model.degrees = torch.tensor(degrees, dtype=torch.float32)
    model.place(24 * torch.randn(120, 3, generator=g), torch.full((120,), PIXEL), torch.ones(120))
    data = Particles(stores.open_store(particles, "particles"))
    z = torch.randn(len(data), 3, generator=g)
    z[:, 1:] = torch.rand(len(data), 2, generator=g) < torch.tensor([missing, empty])
    latents = Latents.of(model.config, 3, torch.cat([z, torch.randn(len(data), 5, generator=g)], 1), 0)
    before = latents.z.clone()

    def poses() -> tuple[torch.Tensor, torch.Tensor]:
        return corrected(data.rotation, data.shift, latents.z[:, 3:], BOX, PIXEL)

    rotation, shift = poses()
    seen = model.project(z, rotation, shift).detach()
    hold_still(model, model.anchor, latents, data, Team())
    assert torch.equal(latents.z[:, :3], z)
    if rests is None:
        assert torch.equal(latents.z, before) and not model.held
    else:
        assert held_part(model, model.anchor) == rests
        torch.testing.assert_close(model.project(z, *poses()), seen, atol=2e-5 * float(seen.max()), rtol=0)
        taken = angle_between(rotation.double(), poses()[0].double())
        torch.testing.assert_close(taken.float(), (z[:, 0] * degrees[rests]).abs(), atol=0.5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_projections_stay_the_same_and_the_body_still(tmp_path: Path, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    model = mixture(24 * torch.randn(len(BODY), 3, generator=g), torch.randn(len(BODY), generator=g))
    for p in (*model.flex.parameters(), *model.occupancy.parameters(), *model.anchor_motion.parameters()):
        p.add_(0.1 * torch.randn(p.shape, generator=g))
    z, rotation, shift = torch.randn(300, 2, generator=g), random_rotations(300, g).float(), 9 * torch.randn(300, 2, generator=g)
    free, amplitude = model.gaussians(z)
    seen = model.project(z, rotation, shift)
    model.hold(BODY, z)
    turn, way = model.turned(z)
    turned, moved = rotation @ turn, shift + (rotation @ way[:, :, None])[:, :2, 0] * PIXEL
    assert float(angle_between(turned, rotation).median()) > 1 and float((moved - shift).abs().median()) > 0.1, "something has moved"
    torch.testing.assert_close(model.project(z, turned, moved), seen, atol=2e-5 * float(seen.abs().max()), rtol=0)

    torch.testing.assert_close(model.rigid(z, model.pins), model.rigid(z)[:, :, model.pins])
    held, same = model.gaussians(z)
    torch.testing.assert_close(same, amplitude)
    apart = [torch.cdist(x.mT, x.mT, compute_mode="donot_use_mm_for_euclid_dist") for x in (held, free)]
    torch.testing.assert_close(*apart, atol=1e-4, rtol=1e-4)
    turn, way = motion(model.home.T[BODY].expand(300, -1, -1), held[:, :, BODY].mT, model.body[BODY].expand(300, -1))
    torch.testing.assert_close(turn, torch.eye(3).expand_as(turn), atol=1e-5, rtol=0)
    torch.testing.assert_close(way, torch.zeros_like(way), atol=1e-4, rtol=0)

    group = stores.create(tmp_path / "model.zarr", "model", config=model.config.model_dump(), seed=0, inputs={}, pixel_size=PIXEL, box=BOX)
    save(group, model)
    stores.finish(group)
    torch.testing.assert_close(load(tmp_path / "model.zarr").gaussians(z)[0], held)


def test_the_motion_of_the_whole_goes_into_the_poses(particles: Path) -> None:
    """Nothing is drawn elsewhere, poses do not move on average, and the prior of a particle's own correction does not draw it back."""
    g = torch.Generator().manual_seed(0)
    model = mixture(24 * torch.randn(len(BODY), 3, generator=g), torch.randn(len(BODY), generator=g))
    data = Particles(stores.open_store(particles, "particles"))
    latents = Latents.of(model.config, 2, torch.randn(len(data), 7, generator=g), 0)
    z, own = latents.z[:, :2].clone(), latents.z - latents.mean
    model.hold(BODY, z)
    with torch.no_grad():
        for p in model.sway.parameters():
            p.copy_(torch.randn(p.shape, generator=g) / 8)

    def poses() -> tuple[torch.Tensor, torch.Tensor]:
        return corrected(data.rotation, data.shift, latents.z[:, 2:], BOX, PIXEL)

    seen, before = model.project(z, *poses()).detach(), poses()
    settle(model, latents, data, Team())
    turns = before[0].mT @ poses()[0]
    angles = angle_between(turns, torch.eye(3))
    mean = motion(24 * torch.eye(3), (24 * turns).mean(0).mT, torch.ones(3))[0]
    assert float(angles.median()) > 1 and float(angle_between(mean, torch.eye(3))) < 0.1 * float(angles.median())
    torch.testing.assert_close(model.project(z, *poses()).detach(), seen, atol=2e-5 * float(seen.abs().max()), rtol=0)
    torch.testing.assert_close(latents.z - latents.mean, own, atol=1e-4, rtol=0)
    turn, way = model.swayed(z)
    assert torch.equal(turn, torch.eye(3).expand_as(turn)) and not way.any()


def test_a_frame_that_follows_the_state_is_set_right(tmp_path: Path, plant: Callable[..., Path]) -> None:
    """An arm swings by 40 degrees between two states, and the poses given follow it by 8, as those of a consensus do."""
    seed_everything(3)
    g = torch.Generator().manual_seed(0)
    centre = torch.cat([18 * torch.randn(SIZES[0], 3, generator=g), torch.tensor([36.0, 0, 0]) + 8 * torch.randn(SIZES[1], 3, generator=g)])
    state = torch.randint(2, (COUNT,), generator=g)
    axis = torch.tensor([0.0, 0, math.radians(20)])
    swing = exp_so3(torch.stack([-axis, axis]))
    shapes = torch.stack([torch.cat([centre[BODY], centre[~BODY] @ r.T]) for r in swing])
    rotation = random_rotations(COUNT, g).float()
    given = rotation @ exp_so3(torch.stack([-axis, axis]) / 5)[state]
    clean = kernels.splat(rotation[:, :2] @ shapes[state].mT / PIXEL, torch.ones(COUNT, len(BODY)), torch.ones(len(BODY)), BOX)
    factor = (ENERGY / clean.square().sum((1, 2)).mean()).sqrt()
    images = factor * clean + torch.randn(clean.shape, generator=g)
    data = Particles(stores.open_store(plant(tmp_path / "particles.zarr", images, given, PIXEL), "particles"))

    model = mixture(centre, (factor / (0.88 * (2 * torch.pi) ** 0.5 * PIXEL)).expand(len(BODY)))
    z = (2.0 * state - 1)[:, None] + 0.1 * torch.randn(COUNT, 2, generator=g)
    with team() as alone:
        checkpoints, metrics = tmp_path / "checkpoints", tmp_path / "metrics.jsonl"
        fit("train", model, z, data, model.config, 1, alone, checkpoints, metrics, {}, part=(~BODY).long())
    assert model.held and bool(model.body[BODY].any()) and not model.body[~BODY].any()
    turns, ways = frames(Poses(data.rotation, data.shift), Poses(rotation, torch.zeros(COUNT, 2)), state)
    assert float(angle_between(turns[0], turns[1])) < 1 and float((ways[0] - ways[1]).norm()) < 0.2 * PIXEL
