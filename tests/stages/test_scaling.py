"""The model of many ranks against its closed form, and the measurement on tiny sizes."""

import json
from pathlib import Path

import pytest

from cryospire.conventions import InputError
from cryospire.stages import scaling
from cryospire.stages.scaling import Law, Size

FREE = Law(overhead=0.0, image=1e-3, bytes=10**6, latency=0.0, bandwidth=1e18)


def test_without_overhead_and_communication_ranks_multiply() -> None:
    for kind in ("fixed", "growing"):
        assert scaling.row(FREE, 16, 64, kind)["speed_up"] == pytest.approx(16)


def test_each_cost_limits_as_it_must() -> None:
    """Amdahl's bound for the overhead; the ring's two passes over all bytes for the bandwidth, latency grows."""
    amdahl = Law(1e-2, 1e-3, 0, 0.0, 1.0)
    assert scaling.row(amdahl, 10**6, 90, "fixed")["speed_up"] == pytest.approx(10, rel=1e-3)
    assert scaling.row(amdahl, 64, 90, "fixed")["limit"] == "overhead"
    thin = Law(0.0, 1e-3, 10**6, 0.0, 1e6)
    assert thin.parts(2, 1)["bandwidth"] == pytest.approx(1.0) and thin.parts(10**6, 1)["bandwidth"] == pytest.approx(2.0, rel=1e-5)
    slow = Law(0.0, 1e-3, 0, 1e-3, 1e9)
    assert scaling.row(slow, 64, 8, "growing")["limit"] == "latency"
    assert slow.parts(33, 1)["latency"] == pytest.approx(2 * 32 * 1e-3)


def test_measured_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = Size(stage=2, gaussians=40, box=16, batch=32)
    scaling.run(tmp_path / "s.json", latency_us=5, gbit=100, size=size, step=None, seconds=0.02)
    found = json.loads((tmp_path / "s.json").read_text())
    model, _ = scaling.mixture(size)
    assert found["law"]["bytes"] == 4 * sum(p.numel() for p in model.parameters())
    assert all(found["step"][n][b] > 0 for n in "12" for b in map(str, (2, 4, 8, 16, 32)))
    assert (tmp_path / "s.png").stat().st_size > 0 and "64 ranks" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"\.json"):
        scaling.run(tmp_path / "s.txt", latency_us=5, gbit=100, size=size, step=None)
