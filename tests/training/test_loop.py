"""The loop: latents' Adam against torch's, resuming bit for bit, ranks against one process, damaged checkpoints."""

import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from cryospire.config import Discover, Train
from cryospire.conventions import InputError
from cryospire.io import stores
from cryospire.training import checkpoint, loop
from cryospire.training.data import Batch, Particles, batches
from cryospire.training.distributed import Team, seed_everything, team
from cryospire.training.latents import Latents
from cryospire.training.loop import Interrupted, fit, probe
from cryospire.training.model import Mixture

SETTINGS = {"gaussians": 24, "epochs": 4, "batch": 16, "lanes": 4, "hidden": 8}
STAGES = {1: Discover(latent=2, features=4), 2: Train(anchor_motion=False, head="mlp", layers=1)}


def train(store: Path, folder: Path, stage: int = 1, **changes: object) -> tuple[torch.Tensor | None, Mixture, dict[str, list[float]]]:
    config = STAGES[stage].model_copy(update=SETTINGS | changes)
    data = Particles(stores.open_store(store, "particles"))
    seed_everything(5)
    model = Mixture(config, 2, 4, 24, data.box, data.pixel_size, [16, 8] if stage == 2 else None)
    model.place(12 * torch.randn(24, 3), torch.full((24,), 5.0), torch.full((24,), 0.01))
    torch.nn.init.normal_(model.feature, std=0.1)
    with team() as ranks:
        z, history = fit(
            "test", model, 0.1 * torch.randn(len(data), 2), data, config, 1, ranks, folder / "checkpoints", folder / "metrics.jsonl",
            {"particles": store}, part=model.anchor if stage == 2 else None,
        )  # fmt: skip
    assert model.held == (stage == 2), "of what hardly moves one part is held"
    return z, model, history


def test_latents_reach_the_maximum_a_posteriori_of_a_linear_model() -> None:
    """Images ``x = A z + noise`` under a unit prior about m have the known answer ``(A^T A + I)^-1 (A^T x + m)``."""
    g = torch.Generator().manual_seed(0)
    matrix = torch.randn(30, 3, generator=g) @ torch.diag(torch.tensor([1.0, 0.5, 0.2]))
    truth = torch.randn(500, 3, generator=g)
    images = truth @ matrix.T + torch.randn(500, 30, generator=g)
    table, rows = Latents(torch.zeros(500, 3), 0, torch.ones(3)), torch.arange(500)
    table.mean = torch.randn(500, 3, generator=g)
    with team() as alone:
        for _ in range(50):
            table.learn(torch.randn(500, 30, generator=g) @ matrix, alone)
            table.step(rows, table.z, (table.z @ matrix.T - images) @ matrix, 1.0)
    answer = torch.linalg.solve(matrix.T @ matrix + torch.eye(3), (images @ matrix + table.mean).T).T
    torch.testing.assert_close(table.z, answer, rtol=1e-3, atol=1e-3)


def test_drawn_latents_find_the_scale_of_a_linear_model() -> None:
    """Images ``x = a z + noise``, unit prior: the likeliest a has ``a^2 = var(x) - 1``; by the likeliest z alone it would grow for ever."""
    g = torch.Generator().manual_seed(0)
    images = 1.5 * torch.randn(4000, 1, generator=g) + torch.randn(4000, 1, generator=g)
    table, rows, a = Latents(torch.zeros(4000, 1), 0, torch.ones(1)), torch.arange(4000), torch.tensor(0.7)
    path = []
    with team() as alone:
        for _ in range(300):
            table.learn(torch.randn(4000, 1, generator=g) * a, alone)
            z = table.draw(rows, torch.randn(4000, 1, generator=g)).detach()
            table.step(rows, z, (z * a - images) * a, 1.0)
            a = a + 0.3 * ((images - a * z) * z).mean() / z.square().mean()
            path.append(float(a))
    assert sum(path[-50:]) / 50 == pytest.approx(float(images.var() - 1) ** 0.5, rel=0.02)


def test_draws_spread_as_images_leave_open() -> None:
    """Where shape and pose look alike, a draw of one goes with that of the other."""
    g = torch.Generator().manual_seed(0)
    matrix = torch.randn(12, 5, generator=g)
    table = Latents(torch.randn(100_000, 5, generator=g), 0, torch.tensor([1.0, 1.0, 4.0, 4.0, 0.5]))
    table.fisher = matrix.T @ matrix
    rows = torch.arange(1, 100_000)
    drawn = table.draw(rows, torch.randn(len(rows), 5, generator=g)).detach() - table.z[1:]
    torch.testing.assert_close(torch.cov(drawn.T), torch.linalg.inv(table.fisher + table.precision.diag()), rtol=0.05, atol=2e-3)
    assert drawn.mean(0).abs().max() < 0.01


def test_stage_2_draws_less_and_less_and_stage_1_nothing(particles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[float] = []
    draw = Latents.draw

    def seen(self: Latents, rows: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        sizes.append(float(noise.square().mean().sqrt()))
        return draw(self, rows, noise)

    monkeypatch.setattr(Latents, "draw", seen)
    train(particles, tmp_path / "one", stage=1)
    assert not sizes
    train(particles, tmp_path / "two", stage=2)
    quarter = len(sizes) // 4
    assert sum(sizes[1:quarter]) / (quarter - 1) > 0.8 and sum(sizes[-quarter:]) / quarter < 0.2


def test_a_row_is_untouched_by_batches_without_it() -> None:
    table = Latents(torch.zeros(5, 2), 0, torch.ones(2))
    table.step(torch.tensor([1, 3]), torch.zeros(2, 2), torch.ones(2, 2), 0.1)
    assert torch.equal(table.z[[0, 2, 4]], torch.zeros(3, 2)) and (table.z[[1, 3]] < 0).all()


def test_the_loss_falls_below_a_still_mixture(particles: Path, tmp_path: Path) -> None:
    _, _, history = train(particles, tmp_path, epochs=12)
    assert history["loss"][-1] < history["loss"][0] - 0.5


@pytest.mark.parametrize("stage", [1, 2])
def test_killed_and_resumed_is_bit_for_bit_the_same(particles: Path, tmp_path: Path, stage: int) -> None:
    z, model, history = train(particles, tmp_path / "whole", stage)
    metrics = tmp_path / "cut" / "metrics.jsonl"

    def signal_in_first_epoch() -> None:
        while not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGUSR1)

    sender = threading.Thread(target=signal_in_first_epoch)
    sender.start()
    interruptions = 0
    while True:
        try:
            again, model_again, history_again = train(particles, tmp_path / "cut", stage)
            break
        except Interrupted as stop:
            assert stop.code == 75
            interruptions += 1
    sender.join()
    assert interruptions == 1
    assert z is not None and again is not None and torch.equal(z, again)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), model_again.state_dict().values(), strict=True))
    assert history["loss"] == pytest.approx(history_again["loss"], rel=1e-12)


def test_slow_steps_are_agreed_on_one_by_one(particles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal is heard in time, however long a step takes."""
    asked: list[int] = []
    alone = Team.sum

    def counted(self: Team, *values: float) -> list[float]:
        asked.append(len(values))
        return alone(self, *values)

    monkeypatch.setattr(Team, "sum", counted)
    found = []
    for name, seconds in (("slow", 1e-9), ("fast", 1e9)):
        monkeypatch.setattr(loop, "AGREE_SECONDS", seconds)
        asked.clear()
        train(particles, tmp_path / name, epochs=2, batch=4)
        found.append(asked.count(4))  # what is agreed on: loss, signal, checkpoint, time
    steps = 100
    assert found == [1 + steps - 10, steps // 10]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("stage", [1, 2])
def test_on_a_gpu_the_same_bits_twice(particles: Path, tmp_path: Path, stage: int) -> None:
    (z, _, _), (again, _, _) = (train(particles, tmp_path / name, stage, deterministic=True) for name in ("one", "two"))
    assert z is not None and again is not None and torch.equal(z, again)


def test_a_checkpoint_of_the_last_step_of_an_epoch_goes_on(particles: Path, tmp_path: Path) -> None:
    """Ten steps an epoch, and a checkpoint at every tenth: the last one is kept after the last step of all."""
    whole = train(particles, tmp_path, batch=20, epochs=2, checkpoint_minutes=0.0)
    again = train(particles, tmp_path, batch=20, epochs=2, checkpoint_minutes=0.0)
    assert whole[0] is not None and again[0] is not None and torch.equal(whole[0], again[0])
    assert whole[2]["loss"] == pytest.approx(again[2]["loss"], rel=1e-12)


def test_a_training_that_is_at_its_end_is_not_repeated(particles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was stopped while its results were written."""
    whole = train(particles, tmp_path, batch=20, epochs=2)
    monkeypatch.setattr(loop, "descend", None)
    again = train(particles, tmp_path, batch=20, epochs=2)
    assert torch.equal(whole[0], again[0]) and whole[2] == again[2]


def test_a_checkpoint_made_from_other_inputs_is_set_aside(particles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other particles, as many and of the same ids, as after another preprocessing: the run starts anew, as in an empty folder."""
    train(particles, tmp_path / "run", batch=20, epochs=1, checkpoint_minutes=0.0)
    other = Path(shutil.copytree(particles, tmp_path / "other.zarr"))
    scale = 0.9 * stores.read(stores.open_store(other, "particles"), "ctf/scale")
    stores.put(stores.writable(other), "ctf/scale", scale, ("particle",), "scale")
    z, _, _ = train(other, tmp_path / "run", batch=20, epochs=1, checkpoint_minutes=0.0)
    assert "last.ckpt: belongs to another run (particles differ); kept as other.ckpt" in capsys.readouterr().err
    anew, _, _ = train(other, tmp_path / "anew", batch=20, epochs=1, checkpoint_minutes=0.0)
    assert z is not None and anew is not None and torch.equal(z, anew)


def test_a_checkpoint_of_another_version_is_set_aside(
    particles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "FORMAT", loop.FORMAT - 1)
    train(particles, tmp_path, epochs=1)
    monkeypatch.undo()
    train(particles, tmp_path, epochs=1)
    assert "last.ckpt: belongs to another run (format differ); kept as other.ckpt" in capsys.readouterr().err


RANKS = """
import sys, torch
from dataclasses import fields
from pathlib import Path
sys.path[:0] = [{tests!r}]
import test_loop
z, model, history = test_loop.train(Path({store!r}), Path({folder!r}), epochs=2)
if z is not None:
    torch.save((z, model.state_dict(), history), {folder!r} + "/result.pt")
"""


@pytest.mark.parametrize(("ranks", "changes"), [(2, {"stage": 2}), (4, {}), (3, {"lanes": 3, "batch": 6})])
def test_ranks_reach_what_one_process_reaches(particles: Path, tmp_path: Path, ranks: int, changes: dict[str, int]) -> None:
    z, model, history = train(particles, tmp_path / "one", epochs=2, **changes)
    program = tmp_path / "program.py"
    more = "".join(f", {name}={value}" for name, value in changes.items())
    source = RANKS.replace("epochs=2", "epochs=2" + more)
    program.write_text(source.format(tests=str(Path(__file__).parent), store=str(particles), folder=str(tmp_path)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(program)]
    done = subprocess.run(
        launch, env=os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    z_ranks, state, history_ranks = torch.load(tmp_path / "result.pt")
    assert z is not None
    # Sums over a batch are taken in another order: rounding only, amplified by Adam's division on near-zero gradients.
    torch.testing.assert_close(z, z_ranks, rtol=0, atol=2e-3)
    assert history["loss"] == pytest.approx(history_ranks["loss"], rel=1e-5)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=3e-3)


def ranks_by_hand(tmp_path: Path, particles: Path, program: str) -> list[subprocess.Popen[str]]:
    """Two ranks with the variables that a launcher sets, so that each one's exit code is seen."""
    path = tmp_path / "program.py"
    path.write_text(program.format(tests=str(Path(__file__).parent), store=str(particles), folder=str(tmp_path)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    launch = [sys.executable, str(path)]
    return [
        subprocess.Popen(launch, env=common | {"RANK": str(r), "LOCAL_RANK": str(r)}, stderr=subprocess.PIPE, text=True) for r in range(2)
    ]


LONG = RANKS.replace("epochs=2", "epochs=100000")


def wait_for_checkpoint(folder: Path) -> None:
    for _ in range(1200):
        if (folder / "checkpoints" / "last.ckpt").exists():
            return
        time.sleep(0.1)
    raise AssertionError("no checkpoint within two minutes")


def test_a_signal_to_one_rank_ends_both_saved_with_the_code_that_asks_for_more(particles: Path, tmp_path: Path) -> None:
    ranks = ranks_by_hand(tmp_path, particles, LONG)
    wait_for_checkpoint(tmp_path)
    ranks[1].send_signal(signal.SIGUSR1)
    errors = [r.communicate(timeout=120)[1] for r in ranks]
    assert [r.returncode for r in ranks] == [75, 75], errors
    assert "run the same command to go on" in errors[0]


def test_a_rank_that_is_killed_ends_the_other_at_once(particles: Path, tmp_path: Path) -> None:
    ranks = ranks_by_hand(tmp_path, particles, LONG)
    wait_for_checkpoint(tmp_path)
    ranks[1].kill()
    _, said = ranks[0].communicate(timeout=60)
    assert ranks[0].returncode == 1 and "rank 0 stops: another rank, or the way to it, has failed" in said and "Traceback" not in said
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()
    ranks[1].wait()


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    identity = {"seed": 1}
    for epoch in (1, 2):
        checkpoint.save(tmp_path, {"identity": identity, "epoch": epoch})
    last = tmp_path / "last.ckpt"
    whole = last.read_bytes()
    for damage in (whole[: len(whole) // 2], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        last.write_bytes(damage)
        loaded = checkpoint.load(tmp_path, identity)
        assert loaded is not None and loaded["epoch"] == 1


def test_a_run_goes_on_when_its_config_is_changed_back(tmp_path: Path) -> None:
    one, two = {"seed": 1, "config": {"lr": 1.0, "batch": 8}}, {"seed": 1, "config": {"lr": 0.5, "batch": 8}}

    def epoch_of(identity: dict[str, object]) -> int | None:
        state = checkpoint.load(tmp_path, identity)
        return None if state is None else int(state["epoch"])

    for epoch in (1, 2):
        checkpoint.save(tmp_path, {"identity": one, "epoch": epoch})
    assert epoch_of(two) is None and epoch_of(two) is None
    assert epoch_of(one) == 2, "nothing was written in between"
    assert epoch_of(two) is None
    for epoch in (7, 8):
        checkpoint.save(tmp_path, {"identity": two, "epoch": epoch})
    assert epoch_of(two) == 8 and epoch_of(one) == 2 and epoch_of(one) == 2 and epoch_of(two) == 8
    checkpoint.clear(tmp_path)
    assert not tmp_path.exists()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, particles: Path) -> None:
    with pytest.raises(InputError, match="not finite"):
        train(particles, tmp_path, lr_density=1e30, cutoff=2.0)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc of glibc")
def test_memory_of_a_step_is_kept_for_the_next() -> None:
    code = """
import resource, torch
from cryospire.training.loop import keep_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(faults() for _ in range(40)))
keep_memory()
print(min(faults() for _ in range(40)))
"""  # 40: a small block behind a freed one keeps its hole too small for the next aligned array, up to seven times, until none lies there
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    pages_of_new_memory, pages_of_kept_memory = map(int, done.stdout.split())
    assert pages_of_kept_memory < 32 <= pages_of_new_memory  # 32 are the fewest: huge pages of 2 MiB


def test_a_rank_without_images_learns_nothing(particles: Path) -> None:
    """As in the last step of an epoch, where lanes are of unequal length."""
    data = Particles(stores.open_store(particles, "particles"))
    config = STAGES[1].model_copy(update=SETTINGS)
    batch = next(batches(data, range(4), 4, 16, 16, 0, 0))
    none = Batch(*(getattr(batch, f.name)[:0] for f in fields(Batch) if f.name != "total"), 0)
    model = Mixture(config, 2, 4, 24, data.box, data.pixel_size)
    assert probe(model, torch.zeros(0, 7), none, config, range(4), (0,)).shape == (0, 7)
    assert probe(model, torch.zeros(16, 7), batch, config, range(4), (0,)).abs().max() > 0
