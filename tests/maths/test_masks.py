import numpy as np
import torch

from cryospire.maths.fourier import radius
from cryospire.maths.masks import otsu, soft_mask


def ball(box: int, r: float, centre: tuple[float, float, float] = (0, 0, 0)) -> torch.Tensor:
    return (radius(box, 3, centre) <= r).float()


def test_otsu_lies_between_two_classes():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0, 1, 5000), rng.normal(10, 1, 500)])
    assert 3 < otsu(values) < 7


def test_mask_of_a_ball_is_the_ball_widened_with_a_soft_edge():
    mask = soft_mask(ball(48, 8), 0.5, edge=4, dilation=2)
    r = radius(48, 3)
    assert (mask[r <= 9.5] == 1).all() and (mask[r > 15] == 0).all()
    # A soft edge of width 4 is halfway at its middle.
    assert abs(mask[24, 24, 24 + 12].item() - 0.5) < 0.1
    assert (torch.diff(mask[24, 24, 24:]) <= 1e-6).all()


def test_faint_density_is_kept_and_noise_is_not():
    g = torch.Generator().manual_seed(0)
    noise = 0.003 * torch.randn(48, 48, 48, generator=g)
    faint = ball(48, 4, (11, 0, 0))
    mask = soft_mask(ball(48, 8) + 0.06 * faint + noise, 0.0, edge=3)
    assert (mask[(faint > 0)] > 0.9).all()
    assert mask[radius(48, 3) > 20.5].max() == 0
    assert mask.mean() < 3 * (ball(48, 8) + faint).clamp(max=1).mean()


def test_density_below_zero_is_no_core():
    """Holes outweigh the density: a threshold from the map falls below zero, but what is empty stays out."""
    mask = soft_mask(ball(48, 6, (10, 0, 0)) - 2 * ball(48, 9, (-10, 0, 0)), 0.0, edge=3)
    assert mask[radius(48, 3, (10, 0, 0)) < 6].min() > 0.9
    assert mask[radius(48, 3, (10, 0, 0)) > 11.5].max() == 0
