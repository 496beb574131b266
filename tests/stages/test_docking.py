"""Docking: what it compares is the log-likelihood of images, and planted parts are found where they are, however wrong the start."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import seen
import torch

from cryospire.kernels import render_volume
from cryospire.maths import fourier, projection
from cryospire.maths.poses import angle_between, even_rotations, exp_so3, random_rotations
from cryospire.stages import docking
from cryospire.training.data import Particles

BOX, PIXEL, SHAPES, EACH = 32, 6.0, 6, 100
PEAK = 0.03  # density of a Gaussian: an image has some 20 units of the noise's log-likelihood
POINTS = {"rest": 40, "arm": 24}


def cloud(n: int, spread: tuple[float, float, float], seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=g) * torch.tensor(spread)
    x[: n // 4] += torch.tensor([0.0, 18, 10])  # a nose, so that no half turn is a symmetry
    return x - x.mean(0)


@dataclass
class World:
    views: docking.Views
    data: Particles
    shape: torch.Tensor  # (N,), of every image
    bodies: list[torch.Tensor]  # about their centres, Å
    parts: list[docking.Part]
    truth: list[docking.Pose]

    def direct(self, part: int, rotation: torch.Tensor, centre: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Log-likelihood (K,) that a part adds at given poses, image by image, beside all else that is there."""
        here = [(b @ pose.rotation[self.shape].mT) + pose.centre[self.shape, None] for b, pose in zip(self.bodies, self.truth, strict=True)]
        amplitude = [pose.strength[self.shape, None].mul(PEAK).expand(-1, len(b)) for b, pose in zip(self.bodies, self.truth, strict=True)]
        other = 1 - part
        rest = seen.images(self.data, here[other], amplitude[other], scale[: here[other].shape[1]])
        moved = (self.bodies[part] @ rotation[self.shape].mT) + centre[self.shape, None]
        drawn = seen.images(self.data, moved, torch.full(moved.shape[:2], PEAK), scale[: moved.shape[1]])
        left = torch.from_numpy(np.array(self.data.images[:])).float() - rest
        energy = (left.square() - (left - drawn).square()).sum((1, 2)) / 2
        return torch.zeros(SHAPES).index_add_(0, self.shape, energy)


SCALE = torch.full((64,), 7.0)


def make_world(path: Path, turn: torch.Tensor, strength: torch.Tensor, each: int = EACH) -> World:
    """A body that rests and an arm that turns (K, 3, 3) and is as strong as ``strength`` (K,) says; a shape's latent is its number."""
    count = len(turn)
    data = seen.empty(path, count * each, BOX, PIXEL)
    bodies = [cloud(POINTS["rest"], (16, 10, 10), 1), cloud(POINTS["arm"], (14, 7, 5), 2)]
    centre = turn @ torch.tensor([30.0, 10, 0]) + torch.tensor([12.0, 0, 0])
    still = docking.Pose(torch.eye(3).repeat(count, 1, 1), torch.tensor([-40.0, 0, 0]).repeat(count, 1), torch.ones(count))
    truth = [still, docking.Pose(turn, centre, strength)]
    shape = torch.arange(len(data)) % count
    here = torch.cat([(b @ p.rotation[shape].mT) + p.centre[shape, None] for b, p in zip(bodies, truth, strict=True)], 1)
    amplitude = torch.cat([p.strength[shape, None].mul(PEAK).expand(-1, len(b)) for b, p in zip(bodies, truth, strict=True)], 1)
    seen.fill(path, data, seen.images(data, here, amplitude, SCALE))
    latent = torch.arange(count).float()[:, None]
    views = docking.Views.of(data, np.arange(len(data)), latent[shape], latent)
    drawn = [docking.Part.of(views, b, torch.full((len(b),), PEAK), SCALE[: len(b)]) for b in bodies]
    return World(views, data, shape, bodies, drawn, truth)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The arm turns far and is away at the last shape."""
    turn = exp_so3(torch.tensor([[0.0, 0, 0], [0, 0, 0.6], [0, 0, 1.8], [0, 1.5, 1.5], [0, 0, 2.4], [0, 0, 0]]))
    return make_world(tmp_path_factory.mktemp("docking") / "particles.zarr", turn, torch.tensor([1.0, 1, 1, 1, 1, 0]))


def by_number(shapes: int) -> torch.Tensor:
    """For each shape all shapes in the order of their distance from it (K, K)."""
    return torch.cdist(*[torch.arange(shapes).float()[:, None]] * 2).argsort(1)


def test_a_part_is_the_transform_of_its_projection(world: World) -> None:
    rotation = random_rotations(5, torch.Generator().manual_seed(0)).float()
    for body, part in zip(world.bodies, world.parts, strict=True):
        scale = SCALE[: len(body)]
        plain = projection.splat(
            (rotation[:, :2] @ body.T) / PIXEL,
            projection.peak_weight(torch.full((5, len(body)), PEAK), scale),
            scale / PIXEL,
            BOX,
            float("inf"),
        )
        kx, ky = world.views.points.T
        expected = fourier.rfft(plain)[:, ky, kx] / BOX
        found = part.at(world.views.points.float() @ rotation[:, :2])
        assert float((found - expected).abs().max()) < 0.02 * float(expected.abs().max())


def test_a_map_of_a_part_is_drawn_as_its_gaussians_are(world: World) -> None:
    """The density of a cloud, in voxels, has the transform that the cloud has written down; what lies beside the part is cut off."""
    for body, part in zip(world.bodies, world.parts, strict=True):
        density = render_volume(body, torch.full((len(body),), PEAK), SCALE[: len(body)], BOX, PIXEL)
        beside = render_volume(torch.tensor([[-80.0, -80, 0]]), torch.tensor([PEAK]), SCALE[:1], BOX, PIXEL)
        drawn = part.drawn((density + beside) * PIXEL**3 / world.views.unit)
        assert float((drawn.transform - part.transform).norm() / part.transform.norm()) < 0.03


def test_the_images_draw_a_part(world: World) -> None:
    """A part of which stage 1 has a quarter of the Gaussians, and these too wide, is drawn by the images as it is; of the body nothing
    gets in, whose place the arm takes in turn."""
    still, true = world.truth
    body, arm = world.bodies[1][::4], world.parts[1]
    wide = torch.full((len(body),), 1.5 * float(SCALE[0]))
    poor = docking.Part.of(world.views, body, torch.full((len(body),), PEAK / 1.5**3 * 4), wide)
    poor = replace(poor, where=arm.where)

    def off(part: docking.Part) -> float:
        low = world.views.points[world.views.points.square().sum(1) < 10**2]
        k = low.float() @ random_rotations(20, torch.Generator().manual_seed(0))[:, :2].float()
        return float((part.at(k) - arm.at(k)).abs().square().sum().sqrt() / arm.at(k).abs().square().sum().sqrt())

    seen_arm = poor.drawn(docking.in_frame(world.views, true, [(world.parts[0], still)]))
    assert off(poor) > 0.3 and off(seen_arm) < 0.2


def test_a_half_turn_is_told_by_the_images_of_all_shapes(world: World) -> None:
    """The arm is drawn so that a half turn changes nothing, and turned by one at a shape; drawn as all images show it, it is put right."""
    still, true = world.truth
    flip = torch.diag(torch.tensor([-1.0, -1, 1]))
    both = torch.cat([world.bodies[1], world.bodies[1] @ flip])
    alike = docking.Part.of(world.views, both, torch.full((len(both),), PEAK / 2), torch.full((len(both),), float(SCALE[0])))
    rotation = true.rotation.clone()
    rotation[3] = rotation[3] @ flip
    parts, poses = [world.parts[0], alike], [still, replace(true, rotation=rotation)]
    for drawn_anew in (False, True):
        if drawn_anew:
            parts[1] = alike.drawn(docking.in_frame(world.views, poses[1], [(parts[0], poses[0])]))
        poses, _ = docking.dock(world.views, parts, poses, [False, False], True, 0, by_number(SHAPES))
        frame = true.rotation[:5].mT @ poses[1].rotation[:5]  # the same at all shapes, but for what is wrong
        off = angle_between(frame, frame[0])
        assert (float(off.max()) < 12) == drawn_anew


def test_sums_hold_the_log_likelihood_of_the_images(world: World) -> None:
    """At the truth and off it, of images without the other part: 2 <N, F> - <W, |F|^2> against image by image."""
    true = world.truth[1]
    sums = docking.Sums.of(world.views, SHAPES, true.centre, [(world.parts[0], world.truth[0])])
    for turned, moved in ((0.0, 0.0), (0.3, 5.0), (1.5, 12.0)):
        rotation = exp_so3(torch.tensor([0.0, turned, 0])) @ true.rotation
        offset = torch.tensor([moved, 0, 0]).repeat(SHAPES, 1)
        cross, norm = sums.compare(world.parts[1], rotation, offset)
        expected = world.direct(1, rotation, true.centre + offset, SCALE)
        torch.testing.assert_close(2 * cross - norm, expected, rtol=0.03, atol=0.03 * float(norm.mean()))


def test_parts_are_found_from_a_wrong_start(world: World) -> None:
    """The arm starts at rest everywhere, or turned half round where it is; it is found, and found to be away."""
    near = by_number(SHAPES)
    still, true = world.truth
    flipped = torch.diag(torch.tensor([-1.0, -1, 1]))
    for start in (
        docking.Pose(true.rotation[:1].repeat(SHAPES, 1, 1), true.centre[:1].repeat(SHAPES, 1), torch.ones(SHAPES)),
        docking.Pose(true.rotation @ flipped, true.centre, torch.ones(SHAPES)),
    ):
        poses = [still, start]
        for _ in range(2):  # parts learn from each other
            poses, real = docking.dock(world.views, world.parts, poses, [False, False], True, 0, near)
            assert real == [True, True]
        arm = poses[1]
        assert arm.there.tolist() == [True] * 5 + [False] and bool(poses[0].there.all())
        assert float(angle_between(arm.rotation, true.rotation)[:5].max()) < 8, "degrees"
        assert float((arm.centre - true.centre)[:5].norm(dim=1).max()) < PIXEL / 2
        assert float(angle_between(torch.eye(3), poses[0].rotation).max()) < 8
        torch.testing.assert_close(arm.strength[:5], torch.ones(5), rtol=0, atol=0.1)


def test_what_another_part_explains_is_none(world: World) -> None:
    """A third part is a copy of the arm where the arm ends up; the arm's motion was followed only to the shape before."""
    near = by_number(SHAPES)
    still, true = world.truth
    short = torch.tensor([1.0, 1, 1, 1, 0, 0])
    arm = docking.Pose(true.rotation, torch.where(short[:, None] > 0, true.centre, true.centre[:1]), short)
    copy = docking.Pose(true.rotation, true.centre, true.strength - short)
    three = [*world.parts, world.parts[1]]
    poses, real = docking.dock(world.views, three, [still, arm, copy], [False, False, True], True, 0, near)
    assert real == [True, True, False]
    poses, _ = docking.dock(world.views, world.parts, poses[:2], [False, False], True, 0, near)
    assert float((poses[1].centre - true.centre)[:5].norm(dim=1).max()) < PIXEL / 2
    # And a faint part that is one stays: the arm itself.
    _, real = docking.dock(world.views, world.parts, [still, true], [False, True], True, 0, near)
    assert real == [True, True]


def test_what_rests_is_not_moved_by_noise(world: World) -> None:
    """Where a part rests, its own pose is kept, to the bit: no other is taken for what noise alone would give."""
    still = world.truth[0]
    sums = docking.Sums.of(world.views, SHAPES, still.centre, [(world.parts[1], world.truth[1])])
    pose = docking.look(sums, world.parts[0], still, by_number(SHAPES)[:, 1:3], even_rotations(docking.TURNS))
    assert torch.equal(pose.rotation, still.rotation) and torch.equal(pose.centre, still.centre)
    torch.testing.assert_close(pose.strength, torch.ones(SHAPES), rtol=0, atol=0.1)


def test_noise_alone_is_no_part(world: World, tmp_path: Path) -> None:
    """Images without any part: none is moved, and none has the strength with which it is drawn."""
    data = seen.empty(tmp_path / "particles.zarr", SHAPES * EACH, BOX, PIXEL)
    latent = torch.arange(SHAPES).float()[:, None]
    views = docking.Views.of(data, np.arange(len(data)), latent[torch.arange(len(data)) % SHAPES], latent)
    for part, true in zip(world.parts, world.truth, strict=True):
        sums = docking.Sums.of(views, SHAPES, true.centre, [])
        pose = docking.look(sums, part, true, by_number(SHAPES)[:, 1:3], even_rotations(docking.TURNS))
        assert torch.equal(pose.rotation, true.rotation) and torch.equal(pose.centre, true.centre)
        assert float(pose.strength.max()) < docking.THERE


def test_a_rare_part_stays_rare(tmp_path: Path) -> None:
    """There at one shape of twelve: noise at the others is not taken for it."""
    strength = torch.zeros(12)
    strength[4] = 1
    world = make_world(tmp_path / "particles.zarr", torch.eye(3).repeat(12, 1, 1), strength, each=60)
    poses, _ = docking.dock(world.views, world.parts, world.truth, [False, False], True, 0, by_number(12))
    assert poses[1].there.tolist() == (strength > 0).tolist()


def test_what_docking_says_does_not_depend_on_blocks(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents are compared with the shapes some at a time."""
    latent = torch.arange(SHAPES).float()[:, None]
    monkeypatch.setattr(docking, "NEIGHBOURS", 37)
    again = docking.Views.of(world.data, np.arange(len(world.data)), latent[world.shape], latent)
    assert torch.equal(again.shape, world.views.shape) and torch.equal(again.slices, world.views.slices)


def test_a_part_is_seen_in_its_own_frame(world: World) -> None:
    """Its motion undone, the images show the arm as it is drawn, and the body smeared; in the frame of the body it is the other way."""
    own, other = (docking.in_frame(world.views, pose) for pose in reversed(world.truth))
    body, arm = world.bodies
    true = world.truth[1]
    shape = 2  # turned by 1.8
    seen_arm = docking.read(own, arm, world.views.field).mean()
    seen_body = docking.read(other, body, world.views.field).mean()
    arm_there = arm @ true.rotation[shape].T + true.centre[shape] - world.truth[0].centre[shape]
    body_there = (body + world.truth[0].centre[shape] - true.centre[shape]) @ true.rotation[shape]
    assert float(seen_arm) > 2 * float(docking.read(other, arm_there, world.views.field).mean())
    assert float(seen_body) > 2 * float(docking.read(own, body_there, world.views.field).mean())


def test_a_map_is_read_where_it_is() -> None:
    """A density that grows along x, y and z, read between its voxels; 0 outside."""
    z, y, x = torch.meshgrid(*[torch.arange(8.0) - 4] * 3, indexing="ij")
    volume = x + 10 * y + 100 * z
    place = torch.tensor([[[0.0, 0, 0], [3, -2, 1.5]], [[-6, 2, 4.6], [40, 0, 0]]])  # voxels of 2 Å
    expected = torch.tensor([[0.0, 1.5 - 10 + 75], [-3 + 10 + 230, 0]])
    torch.testing.assert_close(docking.read(volume, place, 16.0), expected)
