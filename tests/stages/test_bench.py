"""The benchmark runs from end to end on tiny sizes, and its arithmetic is right; nothing here is timed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from cryospire import kernels
from cryospire.stages import bench, bench_feed, bench_machine
from cryospire.training.data import batches


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("bench")
    threads = torch.get_num_threads()
    bench.run(folder / "bench.json", quick=True)
    kernels.set_threads(threads)
    assert [p.name for p in folder.iterdir()] == ["bench.json"]
    return json.loads((folder / "bench.json").read_text())


def test_every_case_has_every_number(result: dict) -> None:
    cases = result["devices"]["cpu"]["cases"]
    assert {(c["stage"], c["head"]) for c in cases} == {(1, "mlp"), (2, "factorized"), (2, "mlp")}
    for c in cases:
        assert set(c["ms"]) == {*bench_machine.PARTS, "step"}
        ratios = [c["step_over_floor"], c["dense_over_splat"], c["dense_splat_ms"]]
        numbers = [*c["ms"].values(), *ratios, c["images_per_second"], c["floor_ms"], c["peak_GB"]]
        assert np.isfinite(numbers).all() and min(numbers) > 0


def test_growth_has_three_points(result: dict) -> None:
    for growth in result["devices"]["cpu"]["exponents"].values():
        assert len(growth["points"]) == 3
    assert len(result["feed"]["against_particles"]) == 3
    assert all(0.1 < p["training_peak_GB"] < 5 for p in result["feed"]["against_particles"])
    p = result["preprocess"]
    limits = p["transforms_per_second_of_a_core"], p["images_per_second_of_the_disk"]
    rates = [*(r["images_per_second"] for r in p["runs"]), *limits]
    assert len(rates) >= 3 and np.isfinite(rates).all() and min(rates) > 0


def test_tables_name_machine_and_rates(result: dict) -> None:
    console = Console(record=True, width=240)
    bench_machine.show(result, console)
    text = console.export_text()
    words = (
        "factorized", "dense/splat", "cost ~ gaussians^p", "cost ~ box^p", "page cache", "a training of stage 2", "~ particles^p",
        "there and back",
    )  # fmt: skip
    for word in (result["machine"]["cpu"], *words):
        assert word in text


def test_fit_finds_the_exponent() -> None:
    assert bench.fit([(x, 3 * x**1.7) for x in (2.0, 8.0, 64.0)]) == pytest.approx(1.7)


def test_floor_counts_the_network(tmp_path: Path) -> None:
    """Doubling the rates halves the floor; a network of twice the Gaussians costs close to twice."""
    floors = []
    for gaussians in (1024, 2048):
        case = bench.Case(2, "mlp", gaussians, 16, 4)
        model, _ = bench.mixture(case)
        on = [torch.randn(4, bench.LATENT), torch.eye(3).expand(4, 3, 3), torch.zeros(4, 2), torch.ones(4, 16, 9), torch.randn(4, 16, 16)]
        floors.append(bench.floor_seconds(case, model, on, {"matmul_flops": 1e9, "bytes_per_second": 1e12}))
        assert bench.floor_seconds(case, model, on, {"matmul_flops": 2e9, "bytes_per_second": 2e12}) == pytest.approx(floors[-1] / 2)
    assert floors[1] / floors[0] == pytest.approx(2, rel=0.05)
    by_hand = 4 * 1024 * 2 * (2 * 128 * 128 * 2 + 128 * 4) * 3  # both heads, forward and twice that backward
    assert floors[0] * 1e9 == pytest.approx(by_hand, rel=0.1)


def test_shards_that_are_links_read_like_others(tmp_path: Path) -> None:
    """A simulated store serves every particle once, finite and of unit variance, linked or not."""
    for alike in (False, True):
        data = bench_feed.simulated(tmp_path / f"{alike}.zarr", 5000, 96, alike=alike)
        assert data.images.shards[0] < 5000  # several shards
        found = list(batches(data, range(8), 8, 64, 64, seed=0, epoch=0))
        assert np.array_equal(np.sort(np.concatenate([b.rows.numpy() for b in found])), np.arange(5000))
        assert float(found[-1].images.square().mean()) == pytest.approx(1, abs=0.05)
