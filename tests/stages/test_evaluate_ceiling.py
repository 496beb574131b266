"""Fits to volumes that the mixture can, and cannot, express."""

import pytest
import torch

from cryospire.maths import metrics, projection
from cryospire.stages import evaluate_ceiling


def blob(gaussians: int, box: int = 24, scale: float = 1.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    centre = torch.randn(gaussians, 3, generator=g) * box / 10
    return projection.render(centre, torch.rand(gaussians, generator=g) + 0.5, torch.full((gaussians,), scale), box, cutoff=6)


def area(found: torch.Tensor, target: torch.Tensor) -> float:
    return float(metrics.auc(metrics.fsc(found, target)))


def test_renders_as_the_plain_equation() -> None:
    g = torch.Generator().manual_seed(1)
    centre, amplitude = torch.randn(40, 3, generator=g) * 4, torch.rand(40, generator=g)
    centre[0] = torch.tensor([11.4, -11.6, 0.2])  # over the edge
    scale = 0.4 + 0.6 * torch.rand(40, generator=g)
    fast = evaluate_ceiling.render(centre, amplitude, scale, 24)
    assert torch.allclose(fast, projection.render(centre, amplitude, scale, 24, cutoff=8), atol=1e-5)


def test_a_mixture_is_found_and_more_gaussians_find_a_ball_with_edges_better() -> None:
    target, everywhere = blob(60), torch.ones(24, 24, 24)
    assert area(evaluate_ceiling.fit(target, everywhere, 120, 3.0, 0, 80), target) > 0.49
    r = (torch.stack(torch.meshgrid(*[torch.arange(24.0) - 12] * 3, indexing="ij")) ** 2).sum(0).sqrt()
    ball = (r < 6).float()
    few, many = (area(evaluate_ceiling.fit(ball, everywhere, n, 3.0, 0, 40), ball) for n in (12, 250))
    assert few + 0.05 < many < 0.5


def test_the_scale_of_the_density_does_not_matter() -> None:
    target, everywhere = blob(30, scale=1.3), torch.ones(24, 24, 24)
    a = evaluate_ceiling.fit(target, everywhere, 60, 3.0, 0, 30)
    b = evaluate_ceiling.fit(1000 * target, everywhere, 60, 3.0, 0, 30)
    assert torch.allclose(1000 * a, b, rtol=1e-3, atol=1e-2 * float(b.max()))
    assert float(a.max()) == pytest.approx(float(target.max()), rel=0.2)
