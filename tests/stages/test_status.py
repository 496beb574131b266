"""States told from real stores, metrics and logs."""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cryospire.config import Config, section
from cryospire.conventions import InputError
from cryospire.io import stores
from cryospire.log import Progress
from cryospire.site import lock
from cryospire.stages import status


def states(folder: Path) -> dict[str, str]:
    return {s.name: s.state for s in status.read(folder)}


def test_states_of_a_run(tmp_path: Path, synthetic: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    synthetic.write_latents(tmp_path / "model.zarr", np.zeros((4, 2)))
    stores.create(tmp_path / "consensus.zarr", "consensus", config={}, seed=0, inputs={}, pixel_size=1, box=16)  # begun, never finished
    long_ago = time.time() - 3600
    os.utime(tmp_path / "consensus.zarr", (long_ago, long_ago))
    logs = tmp_path / "logs"
    with Progress("discover", 3000, metrics=logs / "discover.metrics.jsonl") as progress:
        progress.advance(1000)
        progress.record(epoch=1, loss=212.5, images_per_second=100.0)
    (tmp_path / lock.NAME).write_text(json.dumps(lock.whoami()))
    (logs / "parts.log").write_text("working\ncryospire: error: parts.anchors: 1 anchors cannot serve 2 parts\n")
    found = states(tmp_path)
    assert found["train"] == "complete" and found["consensus"] == "stopped" and found["discover"] == "running"
    assert found["parts"] == "failed" and found["assemble"] == "waiting" and "evaluate" not in found
    discover = next(s for s in status.read(tmp_path) if s.name == "discover")
    assert discover.left == pytest.approx(20)  # 2,000 images at 100 a second
    status.run(tmp_path)
    shown = capsys.readouterr().out
    assert "212.500" in shown and "parts.log" in shown and "cannot serve" in shown


def test_a_narrow_terminal_cuts_names_of_nodes_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record: dict[str, object] = {"done": 345_678, "total": 1_234_567, "epoch": 15, "loss": 4212.512}
    record |= {"images_per_second": 12345.0, "memory_gb": 123.45, "job": "12345678"}
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/preprocess.metrics.jsonl").write_text(json.dumps(record | {"host": "gpu-0123.cluster.uni.edu"}) + "\n")
    monkeypatch.setenv("COLUMNS", "80")
    status.run(tmp_path)
    shown = next(line for line in capsys.readouterr().out.splitlines() if "preprocess" in line)
    assert len(shown) <= 80
    assert all(word in shown for word in ("running", "4212.512", "12,345", "123.45", "gpu", "12345678"))


def test_what_a_workflow_has_begun_ends_with_it(tmp_path: Path) -> None:
    """On one machine; a job of a cluster goes on."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/train.log").write_text("train: 100 particles\n")
    (tmp_path / lock.NAME).write_text(json.dumps(lock.whoami()))
    assert states(tmp_path)["train"] == "running"
    (tmp_path / lock.NAME).unlink()
    assert states(tmp_path)["train"] == "stopped"
    (tmp_path / "logs/train.metrics.jsonl").write_text('{"done": 1, "total": 2, "job": "17"}\n')
    assert states(tmp_path)["train"] == "running"


def test_what_was_made_of_an_older_input_is_outdated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever folder it was made from, and is looked at from."""

    def write(name: str, **inputs: Path) -> None:
        stores.finish(stores.create(tmp_path / name, Path(name).stem, config={}, seed=0, inputs=inputs, pixel_size=1, box=16, force=True))

    write("discovery.zarr")
    monkeypatch.chdir(tmp_path)
    write("parts.zarr", discovery=Path("discovery.zarr"))
    monkeypatch.chdir(tmp_path.parent)
    assert states(tmp_path)["parts"] == "complete"
    (tmp_path / "parts.zarr").rename(tmp_path / "kept.zarr")
    stores.put(stores.writable(tmp_path / "discovery.zarr"), "latents", np.ones((3, 2)), ("particle", "latent"), "latents")
    (tmp_path / "kept.zarr").rename(tmp_path / "parts.zarr")
    assert states(tmp_path)["parts"] == "outdated"
    status.run(tmp_path)
    assert "made of discovery as it was before" in " ".join(capsys.readouterr().out.split())


def test_trainings_on_half_sets_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("train", 3000, metrics=tmp_path / "half2/logs/train.metrics.jsonl") as progress:
        progress.advance(1000)
        progress.record(epoch=1, loss=212.5)
    found = states(tmp_path)
    assert found["train half2"] == "running" and found["train"] == found["discover half2"] == "waiting" and "train half1" not in found
    status.run(tmp_path)
    assert "212.500" in capsys.readouterr().out


def test_stores_made_with_other_settings_are_named(tmp_path: Path) -> None:
    """Also those of half-sets, whose trainings have seeds of their own; not unfinished ones, nor for what changes no result."""
    config = Config.model_validate({"particles": "p.star", "output": tmp_path, "seed": 3})

    def write(name: str, seed: int, settings: dict[str, object], whole: bool = True) -> None:
        group = stores.create(tmp_path / name, Path(name).stem, config=settings, seed=seed, inputs={}, pixel_size=1, box=16)
        if whole:
            stores.finish(group)

    write("discovery.zarr", 3, section(config.discover) | {"checkpoint_minutes": 64.0})
    write("parts.zarr", 3, section(config.parts) | {"anchors": 7, "max_parts": 3})
    write("model.zarr", 3, section(config.train) | {"epochs": 2}, whole=False)
    write("reconstruction.zarr", 4, {})
    write("half2/discovery.zarr", 5, section(config.discover))
    write("half2/parts.zarr", 3, section(config.parts))
    write("half2/model.zarr", 5, section(config.train) | {"lr": 1.0})
    assert status.altered(config) == {"parts": ["anchors", "max_parts"], "reconstruct": ["seed"], "train_half": ["lr"]}


def test_a_long_first_epoch_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Node and job from the start; after a resume, epoch and loss of the last epoch that ended; after a new start, none."""
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURMD_NODENAME", "gpu07")
    metrics = tmp_path / "logs/train.metrics.jsonl"
    with Progress("train", 3000, metrics=metrics) as progress:
        progress.advance(10)
        first = status.read_stage(tmp_path, "train", time.time(), {})
        assert (first.state, first.last["done"], first.last["host"], first.last["job"]) == ("running", 10, "gpu07", "4711")
        progress.advance(990)
        progress.record(epoch=1, loss=212.5)
    with Progress("train", 3000, metrics=metrics) as progress:
        progress.skip(1000)
        progress.advance(10)
    resumed = status.read_stage(tmp_path, "train", time.time(), {}).last
    assert (resumed["done"], resumed["epoch"], resumed["loss"]) == (1010, 1, 212.5)
    with Progress("train", 3000, metrics=metrics) as progress:
        progress.advance(10)
    assert "loss" not in status.read_stage(tmp_path, "train", time.time(), {}).last


def test_half_written_line_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({"epoch": 1}) + "\n" + '{"epoch": 2, "lo')
    assert status.read_metrics(path) == [{"epoch": 1}]


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        status.read(tmp_path / "nowhere")
