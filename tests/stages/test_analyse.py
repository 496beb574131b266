"""Planted latents: known axes, known lumps, known density, a ring with a hole."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import adjusted_rand_score

from cryospire.config import Analyse, Config
from cryospire.conventions import InputError
from cryospire.io import stores
from cryospire.stages import analyse

LUMPS = np.array([[0, 0, 0, 0], [6, 0, 0, 0], [0, 5, 0, 0.0]])


def lumps(sizes: tuple[int, ...], seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    return LUMPS[truth] + rng.normal(0, 0.3, (len(truth), 4)), truth


def test_pca_finds_planted_axes() -> None:
    rng = np.random.default_rng(0)
    turn, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    sd = np.array([4.0, 2.0, 1.0, 0.5])
    found = analyse.pca(rng.normal(size=(20_000, 4)) * sd @ turn + 3)
    assert np.allclose(np.sqrt(found.variance), sd, rtol=0.03)
    assert np.allclose(np.abs(np.diag(found.components @ turn.T)), 1, atol=0.01)
    assert np.allclose(np.cov(found.coordinates.T, bias=True), np.diag(found.variance), atol=1e-9)


def test_states_are_the_lumps_largest_first() -> None:
    z, truth = lumps((100, 300, 200))
    found = analyse.states(z, 3, seed=0)
    assert adjusted_rand_score(truth, found.label) == 1
    assert found.weight.tolist() == [300 / 600, 200 / 600, 100 / 600]
    assert np.allclose(found.centre, LUMPS[[1, 2, 0]], atol=0.1)
    assert (found.label[found.member] == np.arange(3)).all()  # a state's latent is one of its own particles
    assert np.array_equal(analyse.states(z, 3, seed=0).label, found.label)


def test_no_more_states_than_distinct_latents() -> None:
    assert len(analyse.states(np.repeat(LUMPS, 5, axis=0), 10, seed=0).weight) == 3


@pytest.mark.parametrize("d", [1, 2])
def test_density_of_a_normal_sample(d: int) -> None:
    x = np.random.default_rng(2).normal(size=(20_000, d))
    true = norm.pdf(x).prod(1)
    inside = true > true.max() * 0.2
    ratio = analyse.density(x, 200)[inside] / true[inside]
    assert abs(np.median(ratio) - 1) < 0.05 and ratio.std() < 0.15


def ring(n: int) -> np.ndarray:
    rng = np.random.default_rng(3)
    angle = rng.uniform(0, 2 * np.pi, n)
    return np.stack([4 * np.cos(angle), 3 * np.sin(angle)], 1) + rng.normal(0, 0.1, (n, 2))


def test_trajectories_stay_on_a_ring() -> None:
    """The straight way crosses the hole; both kinds of trajectory must keep to the ring."""
    z = ring(2000)
    straight = analyse.along_component(analyse.pca(z), z, 0, 9)
    start, stop = np.argmin(z[:, 0]), np.argmax(z[:, 0])
    path = analyse.between(int(start), int(stop), z, 9, np.random.default_rng(0))
    for line in (straight, path):
        assert np.abs(np.hypot(line[:, 0] / 4, line[:, 1] / 3) - 1).max() < 0.12
    assert np.allclose(path[[0, -1]], z[[start, stop]])
    step = np.linalg.norm(np.diff(path, axis=0), axis=1)
    assert step.max() < 2 * step.mean()  # half an ellipse in equal steps, no jump across
    assert abs(step.sum() - 11.05) < 0.7  # half the perimeter of the ellipse (Ramanujan)


def test_percentiles_bound_the_trajectory() -> None:
    z = np.random.default_rng(4).normal(size=(5000, 3)) * [5, 1, 1]
    axes = analyse.pca(z)
    line = (analyse.along_component(axes, z, 0, 8) - axes.mean) @ axes.components[0]
    assert np.allclose(np.sort(np.abs(line[[0, -1]])), 5 * 1.645, rtol=0.1)
    assert (np.diff(line) > 0).all()


def test_store_and_umap(tmp_path: Path, synthetic: SimpleNamespace) -> None:
    z, truth = lumps((60, 90, 50))
    model = synthetic.write_latents(tmp_path / "model.zarr", z)
    config = Config(output=tmp_path, analyse=Analyse(states=3, trajectories=2, steps=5))
    analyse.run(config, model=model, output=tmp_path / "analysis.zarr")
    group = stores.open_store(tmp_path / "analysis.zarr", "analysis")
    assert np.array_equal(stores.read(group, "id"), stores.read(stores.open_store(model, "model"), "id"))
    assert adjusted_rand_score(truth, stores.read(group, "clusters/label")) == 1
    assert stores.read(group, "trajectories/latent").shape == (3, 5, 4)  # two components and the way between states
    plane = stores.read(group, "umap")
    within = np.mean([plane[truth == s].std(0).max() for s in range(3)])
    between = min(np.linalg.norm(plane[truth == a].mean(0) - plane[truth == b].mean(0)) for a, b in ((0, 1), (0, 2), (1, 2)))
    assert between > 3 * within
    with pytest.raises(InputError, match="already complete"):
        analyse.run(config, model=model, output=tmp_path / "analysis.zarr")


def test_nan_latent_is_named(tmp_path: Path, synthetic: SimpleNamespace) -> None:
    z, _ = lumps((5, 5, 5))
    z[7, 2] = np.nan
    with pytest.raises(InputError, match="row 7"):
        analyse.run(Config(), model=synthetic.write_latents(tmp_path / "model.zarr", z), output=tmp_path / "analysis.zarr")
