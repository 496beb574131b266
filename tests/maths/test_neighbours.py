"""Agreement of two neighbourhoods, on orders whose answer is known."""

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from cryospire.maths import neighbours


def distances(points: torch.Tensor) -> torch.Tensor:
    return neighbours.others(torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist"))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_others_leaves_out_the_point_itself() -> None:
    d = torch.arange(16.0).view(4, 4)
    assert neighbours.others(d).tolist() == [[x for j, x in enumerate(row) if i != j] for i, row in enumerate(d.tolist())]


def test_a_turned_and_scaled_copy_is_perfect_and_an_unrelated_one_is_chance() -> None:
    x, y = normal(800, 3), normal(800, 2, seed=1)
    a, copy, other = distances(x), distances(7 * x.roll(1, 1) + 4), distances(y)
    assert neighbours.similarity(a, copy, 20) == (1, pytest.approx(20 / 799))
    assert neighbours.information_imbalance(a, copy) == pytest.approx(2 / 800)
    share, chance = neighbours.similarity(a, other, 20)
    assert share == pytest.approx(chance, abs=0.006)
    assert neighbours.information_imbalance(a, other) == pytest.approx(1, abs=0.05)


def test_a_plane_tells_all_of_its_axis_and_the_axis_not_all_of_the_plane() -> None:
    """The asymmetry that the measure is for (Glielmo et al. 2022, figure 1)."""
    plane = normal(800, 2) * torch.tensor([1.0, 0.1])
    d, axis = distances(plane), distances(plane[:, 1:])
    assert neighbours.information_imbalance(d, distances(plane[:, :1])) < 0.05
    assert neighbours.information_imbalance(axis, d) > 0.5


def test_against_the_definition_written_out() -> None:
    """Random distances: overlap of two sets of k, and mean conditional rank, as their papers define them."""
    a, b = (distances(normal(60, 2, seed=s)) for s in (2, 3))
    nearest = [set(np.argsort(row)[:7]) for row in a.numpy()], [set(np.argsort(row)[:7]) for row in b.numpy()]
    assert neighbours.similarity(a, b, 7)[0] == pytest.approx(np.mean([len(p & q) / 7 for p, q in zip(*nearest, strict=True)]))
    ranks = [rankdata(row)[first] for row, first in zip(b.numpy(), a.numpy().argmin(1), strict=True)]
    assert neighbours.information_imbalance(a, b) == pytest.approx(2 / 60 * np.mean(ranks))


def test_states_with_ties() -> None:
    """Ten states on a line, 60 points each: a latent that knows the state is perfect, one that knows it for half of them is half so."""
    label = torch.arange(600) % 10
    truth = distances(label[:, None].double())
    lumps = distances(label[:, None] + 0.01 * normal(600, 1))
    assert neighbours.similarity(lumps, truth, 30) == (1, pytest.approx(59 / 599))
    floor = neighbours.information_imbalance(truth, truth)
    assert floor == pytest.approx(2 / 600 * 30)
    assert neighbours.information_imbalance(lumps, truth) == pytest.approx(floor)
    assert neighbours.information_imbalance(truth, lumps) == pytest.approx(floor, abs=0.02)
    lost = torch.arange(600) < 300
    place = torch.where(lost, 100 + 10 * torch.rand(600, generator=torch.Generator().manual_seed(0)), label + 0.01 * normal(600, 1)[:, 0])
    half = distances(place[:, None].double())
    assert neighbours.similarity(half, truth, 20)[0] == pytest.approx(0.5 + 0.5 * 29 / 299, abs=0.02)
    assert neighbours.information_imbalance(half, truth) == pytest.approx((1 + floor) / 2, abs=0.05)
