"""Latents, motions and rankings with a planted answer."""

import math

import pytest
import torch
from scipy.spatial.transform import Rotation
from sklearn.metrics import roc_auc_score

from cryospire.maths import recovery, rigid


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_separation_is_distance_over_scatter() -> None:
    """Two states 2a apart in D dimensions with sd s: a^2 / (D s^2)."""
    label = torch.arange(20_000) % 2
    z = 0.5 * normal(20_000, 3)
    z[:, 0] += torch.where(label == 0, -2.0, 2.0)
    assert recovery.separation(z, label, 2).tolist() == pytest.approx([4 / (3 * 0.25)] * 2, rel=0.03)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shape", ["round", "long", "banana"])
def test_one_lump_is_one(shape: str, seed: int) -> None:
    z = normal(1000, 4, seed=seed)
    if shape == "long":
        z[:, 1] *= 6
    if shape == "banana":
        z[:, 1] += 0.5 * z[:, 0] ** 2
    found = recovery.lumps(z)
    assert found.main == 1 and found.valley > 0.6


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_two_lumps_are_two(share: float) -> None:
    z = normal(1000, 4)
    z[: int(1000 * (1 - share)), 2] += 7
    found = recovery.lumps(z)
    assert found.main == pytest.approx(share, abs=0.02) and found.valley < 0.2


def test_rigid_motion_is_recovered_and_never_a_reflection() -> None:
    source, weight = normal(30, 3), normal(30).abs() + 0.1
    rotation = torch.from_numpy(Rotation.random(rng=4).as_matrix())
    target = source @ rotation.T + torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    found, shift = rigid.motion(source, target, weight)
    assert torch.allclose(found, rotation, atol=1e-12) and torch.allclose(shift, torch.tensor([1.0, -2, 3], dtype=torch.float64))
    mirrored, _ = rigid.motion(source, source * torch.tensor([-1.0, 1, 1], dtype=torch.float64), weight)
    assert float(torch.det(mirrored)) == pytest.approx(1)


def test_leakage_is_the_planted_share() -> None:
    """Half of the within-state variance comes from the cause; a repeated column and the states themselves change nothing."""
    label = torch.arange(4000) % 4
    cause = normal(4000, 2, seed=1)
    z = normal(4000, 3) + cause[:, :1] + 10 * label[:, None]
    doubled = torch.cat([cause, cause], 1)
    assert recovery.explained(z, label, doubled) == pytest.approx(0.5, abs=0.03)
    assert recovery.explained(normal(4000, 3, seed=2), label, cause) < 0.005


def test_ranking_is_the_area_under_the_roc_curve() -> None:
    score = normal(500).round(decimals=1)
    positive = normal(500, seed=1) + score > 0
    assert recovery.ranking_auc(score, positive) == pytest.approx(roc_auc_score(positive, score), abs=1e-12)
    assert math.isnan(recovery.ranking_auc(score, torch.ones(500, dtype=torch.bool)))
