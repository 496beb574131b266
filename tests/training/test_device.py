"""Training on a device that is not the CPU: of one without kernels of its own, which no machine lacks (``far``)."""

from pathlib import Path

import far
import pytest
import test_loop
import torch

from cryospire import kernels
from cryospire.maths import projection
from cryospire.training import loop
from cryospire.training.distributed import Team


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on any device."""

    def adam(model: torch.nn.Module, config: object) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), lr=1e-2, foreach=False)

    monkeypatch.setattr(kernels, "splat", projection.splat)
    monkeypatch.setattr(kernels, "pair_head", kernels.pair_head_plain)
    monkeypatch.setattr(loop, "optimizer", adam)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_same_bits_on_another_device(plain: None, particles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int) -> None:
    """Nothing is left behind on the CPU, restarts of latents, probes and checkpoints included."""
    expected, model, history = test_loop.train(particles, tmp_path / "here", stage)
    with monkeypatch.context() as patch, far.device(patch):
        patch.setattr(Team, "device", property(lambda team: far.FAR, lambda team, device: None), raising=False)
        z, again, other = test_loop.train(particles, tmp_path / "there", stage)
    assert expected is not None and z is not None and not isinstance(z, far.Far) and torch.equal(z, expected)
    assert history["loss"] == other["loss"]
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


@pytest.mark.parametrize(("stage", "epochs"), [(1, (1, 3)), (2, (6, 8))])
def test_no_step_waits_for_the_device(
    plain: None, particles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int, epochs: tuple[int, int]
) -> None:
    """But where the latents' Fisher information is learnt, and where ranks agree: kernels are launched while others run."""
    waited = []
    for count in epochs:
        with monkeypatch.context() as patch, far.device(patch) as waits:
            patch.setattr(Team, "device", property(lambda team: far.FAR, lambda team, device: None), raising=False)
            patch.setattr(loop, "AGREE_SECONDS", 1e9)
            test_loop.train(particles, tmp_path / str(count), stage, epochs=count, batch=4)
        waited.append(waits)
    steps = 2 * 50
    assert max((waited[1] - waited[0]).values()) <= steps / loop.PROBE_EVERY + 2, waited[1] - waited[0]
