"""The fast splat against its plain twin, forward and backward, and the plain twin against finite differences."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cryospire import kernels
from cryospire.maths import projection


def scene(images: int, gaussians: int, box: int, scales: tuple[float, float], seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centres that reach well over the border, weights of both signs, scales in a range; and a gradient for the images."""
    g = torch.Generator().manual_seed(seed)
    xy = torch.randn(images, 2, gaussians, generator=g) * box / 2
    weight = torch.randn(images, gaussians, generator=g)
    scale = scales[0] + (scales[1] - scales[0]) * torch.rand(gaussians, generator=g)
    return xy, weight, scale, torch.randn(images, box, box, generator=g)


def both_ways(xy: Tensor, weight: Tensor, scale: Tensor, grad: Tensor, cutoff: float) -> tuple[list[Tensor], list[Tensor]]:
    """Image and gradients by the fast kernel in float32 and by the plain twin in float64."""
    results = []
    for splat, dtype in ((kernels.splat, torch.float32), (projection.splat, torch.float64)):
        leaves = [t.detach().to(dtype).clone().requires_grad_() for t in (xy, weight, scale)]
        image = splat(*leaves, grad.shape[-1], cutoff)
        image.backward(grad.to(dtype))
        results.append([image.detach(), *[t.grad for t in leaves if t.grad is not None]])
    return results[0], results[1]


def sizes(xy: Tensor, weight: Tensor, scale: Tensor, grad: Tensor, cutoff: float) -> list[Tensor]:
    """Root sums of squares of the terms that each result adds up, about: what rounding is relative to where they cancel.

    The square of a Gaussian is one of ``1 / sqrt(2)`` its scale, in the same window.
    """
    xy, weight, scale, square = xy.double(), weight.double(), scale.double(), grad.double() ** 2
    narrow, wide = scale / math.sqrt(2), cutoff * math.sqrt(2)
    ones = torch.ones_like(weight).requires_grad_()
    projection.splat(xy, ones, narrow, grad.shape[-1], wide).backward(square)
    assert ones.grad is not None
    terms = ones.grad.sqrt()
    image = projection.splat(xy, weight**2, narrow, grad.shape[-1], wide).sqrt()
    moved = weight.abs() / scale * terms
    return [image, moved[:, None].expand_as(xy), terms, moved.square().sum(0).sqrt()]


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 3),
    st.integers(1, 70),
    st.sampled_from([8, 22, 64]),
    st.sampled_from([(0.35, 0.6), (0.8, 1.5), (2.0, 9.0)]),
    st.integers(0, 99),
)
def test_twins_agree(images: int, gaussians: int, box: int, scales: tuple[float, float], seed: int) -> None:
    drawn = scene(images, gaussians, box, scales, seed)
    fast, plain = both_ways(*drawn, cutoff=3.0)
    for a, b, size in zip(fast, plain, sizes(*drawn, cutoff=3.0), strict=True):
        assert a.shape == b.shape
        # Exponents reach (3 + 1.5 / 0.35)^2 / 2 = 27 along either axis, known to five roundings (2^-24) of that: 1.6e-5 where both do.
        assert (a - b).norm() <= 2e-5 * max(size.norm(), b.norm())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_what_is_not_finite_harms_nothing_else(bad: float) -> None:
    """A centre, weight or scale that has run away: no crash, and Gaussians of other images stay as they are."""
    xy, weight, scale, grad = scene(3, 40, 22, (0.5, 3.0))
    whole = kernels.splat(xy, weight, scale, 22)
    for what in ("xy", "weight"):
        broken = {"xy": xy.clone(), "weight": weight.clone()}
        broken[what][1, ..., 7] = bad
        assert torch.equal(kernels.splat(broken["xy"], broken["weight"], scale, 22)[[0, 2]], whole[[0, 2]])
    if bad != 1e30:
        for place in (0, 20, 39):
            runaway = scale.clone()
            runaway[place] = bad
            leaves = [t.clone().requires_grad_() for t in (xy, weight, runaway)]
            kernels.splat(*leaves, 22).backward(grad)


def test_plain_twin_passes_gradcheck() -> None:
    xy, weight, scale, _ = scene(2, 5, 12, (0.8, 1.6))
    leaves = tuple(t.double().requires_grad_() for t in (xy / 3, weight, scale))
    assert torch.autograd.gradcheck(lambda *a: projection.splat(*a, 12, math.inf), leaves)


def test_gradient_does_not_depend_on_threads() -> None:
    args = scene(7, 300, 32, (0.5, 2.0))
    before = torch.get_num_threads()
    try:
        kernels.set_threads(1)
        one, _ = both_ways(*args, cutoff=3.0)
        kernels.set_threads(before)
        many, _ = both_ways(*args, cutoff=3.0)
    finally:
        kernels.set_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


@pytest.mark.parametrize(("cutoff", "bound"), [(3.0, 0.012), (4.0, 4e-4), (5.0, 5e-6)])
def test_truncation_error_is_the_tail_of_the_gaussian(cutoff: float, bound: float) -> None:
    """The largest error at a pixel is the profile just outside the window, at most ``exp(-cutoff^2 / 2)`` of the peak."""
    xy = torch.zeros(1, 2, 1, dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    scale = torch.tensor([2.0], dtype=torch.float64)
    error = projection.splat(xy, one, scale, 64, cutoff) - projection.splat(xy, one, scale, 64, math.inf)
    assert 0 < error.abs().max() <= math.exp(-(cutoff**2) / 2) <= bound


def test_projection_of_a_gaussian_is_its_line_integral() -> None:
    """Summing a finely sampled volume along z gives the splat with ``peak_weight``."""
    pixel, box, scale = 2.0, 32, 5.0
    centre = torch.tensor([[3.0, -7.0, 1.5]])
    volume = kernels.render_volume(centre, torch.tensor([0.7]), torch.tensor([scale]), box, pixel, cutoff=6)
    weight = projection.peak_weight(torch.tensor([[0.7]]), torch.tensor([scale]))
    image = kernels.splat(centre[:, :2, None] / pixel, weight, torch.tensor([scale / pixel]), box, 6.0)
    torch.testing.assert_close(volume.sum(0) * pixel, image[0], rtol=1e-4, atol=1e-5)


def test_volume_twins_agree() -> None:
    g = torch.Generator().manual_seed(1)
    centre, amplitude, scale = torch.randn(40, 3, generator=g) * 8, torch.randn(40, generator=g), 0.5 + torch.rand(40, generator=g)
    fast = kernels.render_volume(centre, amplitude, scale, 24, 1.0)
    plain = projection.render(centre.double(), amplitude.double(), scale.double(), 24)
    assert (fast - plain).norm() < 1e-5 * plain.norm()
