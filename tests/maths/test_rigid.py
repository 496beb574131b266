"""Rigid motion of densities: a planted motion is found, and pieces of one body are joined wherever it stands."""

import math

import pytest
import torch

from cryospire.maths import rigid
from cryospire.maths.poses import angle_between, exp_so3


def cloud(n: int, seed: int, spread: float = 3.0) -> torch.Tensor:
    """An irregular body: no symmetry that a turn could be taken for another by."""
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed)) * torch.tensor([2.0, 1.0, 0.5]) * spread


def turns(count: int, step: float) -> torch.Tensor:
    """Turns (count, 3, 3) about z by multiples of ``step`` degrees."""
    angle = torch.arange(count) * math.radians(step)
    return exp_so3(torch.stack([0 * angle, 0 * angle, angle], 1))


def test_overlap_is_the_integral_of_the_product_of_blurred_densities() -> None:
    x, y, sigma = torch.tensor([[0.0, 0, 0]]), torch.tensor([[1.3, 0, 0]]), 1.5
    grid = torch.linspace(-12, 12, 2001, dtype=torch.float64)
    a, b = torch.exp(-(grid**2) / (2 * sigma**2)), torch.exp(-((grid - 1.3) ** 2) / (2 * sigma**2))
    expected = float((a * b).sum() / (a * a).sum())
    assert abs(float(rigid.overlap(x, torch.ones(1), y, torch.ones(1), sigma)) - expected) < 1e-6


def test_a_motion_is_found_from_far_away() -> None:
    y = cloud(60, 0)
    rotation = exp_so3(torch.tensor([[0.3, -0.5, 0.6]]))
    x = y @ rotation[0].T + torch.tensor([6.0, -4.0, 3.0])
    weight = torch.rand(60, generator=torch.Generator().manual_seed(1)) + 0.5
    order = torch.randperm(60, generator=torch.Generator().manual_seed(2))  # which blob is which is not told
    start = torch.eye(3)[None], (x.mean(0) - y.mean(0))[None]
    r, t = rigid.register(x[order][None], weight[order][None], y[None], weight[None], *start)
    assert angle_between(r[0], rotation[0]) < 3
    assert float(((y @ r[0].T + t[0]) - x).norm(dim=1).mean()) < 0.5


@pytest.mark.parametrize("body", ["irregular", "octahedron", "flat", "mirrored"])
def test_the_gradient_of_a_motion_is_exact(body: str) -> None:
    """Also of an octahedron, whose axes are alike, where the derivative of an SVD is infinite."""
    shapes = {"octahedron": torch.cat([torch.eye(3), -torch.eye(3)]), "flat": cloud(6, 3) * torch.tensor([1.0, 1, 0])}
    source = shapes.get(body, cloud(6, 3)).double()
    weight = torch.ones(6).double() if body == "octahedron" else torch.linspace(1, 2, 6).double()
    turn = exp_so3(torch.tensor([0.3, -0.4, 1.2]).double())
    target = source @ turn.T * (torch.tensor([1, 1, -1]) if body == "mirrored" else 1) + 1
    if body == "irregular":
        target += 0.3 * cloud(6, 4)
    inputs = [x.clone().requires_grad_() for x in (source, target, weight)]
    assert torch.autograd.gradcheck(rigid.motion, inputs, atol=1e-5)


@pytest.mark.parametrize("points", [[[0.0, 0, 0]], [[0.0, 0, 0], [0, 0, 1]]])
def test_bodies_without_extent_have_a_motion_too(points: list[list[float]]) -> None:
    source = torch.tensor(points)
    target = (source + torch.tensor([1.0, 2, 3])).requires_grad_()
    rotation, translation = rigid.motion(source, target, torch.ones(len(source)))
    (rotation.sum() + translation.sum()).backward()
    torch.testing.assert_close(source @ rotation.T + translation, target)
    assert target.grad is not None and bool(target.grad.isfinite().all())


def moving_shapes() -> tuple[rigid.Shapes, torch.Tensor]:
    """A body that rests, one that swings, and one that comes and goes; true part (G,) of every Gaussian."""
    rest, arm, cap = cloud(80, 3), cloud(50, 4, 2.0) + torch.tensor([16.0, 0, 0]), cloud(30, 5, 1.5) + torch.tensor([-14.0, 6, 0])
    swing = turns(12, 12.0)
    centre = torch.cat([rest.expand(12, -1, -1), arm @ swing.transpose(1, 2), cap.expand(12, -1, -1)], 1)
    there = (torch.arange(12) % 3 > 0).float()[:, None]
    mass = torch.cat([torch.ones(12, 130), there.expand(-1, 30)], 1)
    latent = torch.stack([torch.arange(12.0), 0.1 * there[:, 0]], 1)
    return rigid.Shapes.of(centre, mass, torch.ones(12), latent), torch.repeat_interleave(torch.arange(3), torch.tensor([80, 50, 30]))


def test_fit_follows_a_swing_and_sees_absence() -> None:
    shapes, truth = moving_shapes()
    arm, cap = rigid.fit(shapes, truth == 1), rigid.fit(shapes, truth == 2)
    swing = turns(12, 12.0)
    for k in range(12):  # to what two pixels of blur tell: a turn that moves no blob by its width is not searched for
        assert angle_between(arm.rotation[k], swing[k] @ swing[arm.reference].T) < 10
    x, w = shapes.centre[0, truth == 1], torch.ones(50)
    assert float(arm.misfit.max()) < 0.05 * float(rigid.overlap(x, w, x, w))
    assert bool(arm.present.all()) and cap.present.tolist() == [k % 3 > 0 for k in range(12)]


def test_a_turn_through_the_full_circle_is_followed_thoroughly() -> None:
    body = cloud(60, 7) + torch.tensor([14.0, 0, 0])
    circle = turns(12, 30.0)
    shapes = rigid.Shapes.of(body @ circle.transpose(1, 2), torch.ones(12, 60), torch.ones(12), torch.arange(12.0)[:, None])
    found = rigid.fit(shapes, torch.ones(60, dtype=torch.bool), thorough=True)
    assert all(angle_between(found.rotation[k], circle[k] @ circle[found.reference].T) < 5 for k in range(12))


def test_fragments_are_joined_to_the_planted_parts() -> None:
    """Every part in three pieces; the losses tell that there are three parts, and they are the true ones."""
    shapes, truth = moving_shapes()
    piece = 3 * truth + torch.randint(3, truth.shape, generator=torch.Generator().manual_seed(6))
    levels, losses = rigid.merge(shapes, piece)
    assert set(levels) == set(range(1, 10)) and set(losses) == set(range(2, 10))
    assert all(losses[k] < 0.03 for k in range(4, 10)) and losses[3] > 0.1
    found = levels[3]
    assert all(len(torch.unique(found[truth == k])) == 1 for k in range(3)) and len(torch.unique(found)) == 3


def test_a_body_drawn_by_other_gaussians_wherever_it_stands_is_one_part() -> None:
    """Two copies of an arm, one at each end of its swing, of which one is there at a time: one arm."""
    rest, arm = cloud(80, 3), cloud(50, 4, 2.0) + torch.tensor([16.0, 0, 0])
    far = arm @ turns(2, 50.0)[1].T
    centre = torch.cat([rest, arm, far]).expand(8, -1, -1)
    near = (torch.arange(8) < 4).float()[:, None]
    mass = torch.cat([torch.ones(8, 80), near.expand(-1, 50), (1 - near).expand(-1, 50)], 1)
    shapes = rigid.Shapes.of(centre, mass, torch.ones(8), torch.arange(8.0)[:, None])
    levels, losses = rigid.merge(shapes, torch.repeat_interleave(torch.arange(3), torch.tensor([80, 50, 50])))
    assert losses[3] < 0.02 and losses[2] > 0.1
    assert levels[2][80] == levels[2][130] != levels[2][0]
