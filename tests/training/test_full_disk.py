"""A disk that fills up, a real one: one clear error, nothing that claims to be complete, and the same result once there is room."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from builders import planted, star31

from cryospire import config as configuration
from cryospire.conventions import InputError
from cryospire.io import stores
from cryospire.stages import discover, preprocess

COMMAND = str(Path(sys.executable).parent / "cryospire")
ENV = os.environ | {"OMP_NUM_THREADS": "1"}
CONFIG = """
particles: {particles}
threads: 1
preprocess: {{workers: 2}}
discover: {{gaussians: 24, epochs: 40, batch: 16, lanes: 4, latent: 2, features: 4, hidden: 8}}
"""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A small file system of its own; called again, it has another size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def size(words: str) -> Path:
        again = ",remount" if folder.is_mount() else ""
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={words}{again}", "tmpfs", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"NEEDS a mount: {done.stderr.strip()}; a full disk is not tested here")
        return folder

    yield size
    if folder.is_mount():
        subprocess.run(["umount", folder], check=True)


def one_error(code: int, said: str, *words: str) -> None:
    """Exit code 2 and a last line that says what happened, without a traceback."""
    assert code == 2 and "Traceback" not in said, said
    last = said.strip().splitlines()[-1]
    assert last.startswith("cryospire: error:") and "No space left on device" in last and all(w in last for w in words), said


def complete(path: Path) -> bool:
    try:
        return bool(stores.open_partial(path).attrs.get("complete"))
    except InputError:
        return False


def test_while_writing_a_shard(tmp_path: Path, disk: Callable[[str], Path]) -> None:
    star31(tmp_path / "p.star", planted(tmp_path, 2000))
    (tmp_path / "config.yaml").write_text(CONFIG.format(particles=tmp_path / "p.star"))
    output = disk("700k") / "particles.zarr"
    command = [COMMAND, "preprocess", "--config", str(tmp_path / "config.yaml"), "--output", str(output)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120, env=ENV)
    one_error(done.returncode, done.stderr, "particles.zarr/images", "not complete")
    assert not complete(output)
    disk("8m")
    settings = configuration.load(tmp_path / "config.yaml")
    preprocess.run(settings.model_copy(update={"preprocess": configuration.Preprocess(workers=1)}), output=output)
    stores.open_store(output, "particles")


@pytest.fixture
def inputs(tmp_path: Path, particles: Path) -> dict[str, Path]:
    attrs = stores.open_store(particles, "particles").attrs
    box, pixel = int(attrs["box"]), float(attrs["pixel_size"])  # type: ignore[arg-type]
    group = stores.create(tmp_path / "consensus.zarr", "consensus", config={}, seed=0, inputs={}, pixel_size=pixel, box=box)
    for name in ("map", "mask"):
        stores.put(group, name, np.ones((box, box, box), np.float32), ("z", "y", "x"), name)
    stores.finish(group)
    (tmp_path / "config.yaml").write_text(CONFIG.format(particles="none.star"))
    return {"particles": particles, "consensus": tmp_path / "consensus.zarr"}


def test_while_writing_a_checkpoint_and_a_store(tmp_path: Path, disk: Callable[[str], Path], inputs: dict[str, Path]) -> None:
    config = configuration.load(tmp_path / "config.yaml")
    full, roomy = disk("8m") / "discovery.zarr", tmp_path / "roomy.zarr"
    words = [w for name, path in inputs.items() for w in (f"--{name}", str(path))]
    command = [COMMAND, "discover", "--config", str(tmp_path / "config.yaml"), *words, "--output", str(full)]
    training = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENV)
    last = full.parent / "checkpoints/discover/last.ckpt"
    until = time.monotonic() + 60
    while not last.exists():
        assert time.monotonic() < until and training.poll() is None
        time.sleep(0.01)
    filler = full.parent / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):  # until nothing more fits
        while file.write(b"0" * 4096):
            pass
    _, said = training.communicate(timeout=60)
    one_error(training.returncode, said)
    assert last.exists() and not complete(full)

    # Room for checkpoints, elsewhere; none for the store.
    for name in ("checkpoints", "logs"):
        subprocess.run(["mv", full.parent / name, tmp_path / name], check=True)
        (full.parent / name).symlink_to(tmp_path / name)
    with pytest.raises(InputError, match=r"discovery\.zarr: could not be written: No space left on device; the store is not complete"):
        discover.run(config, **inputs, output=full)
    assert not complete(full)
    assert last.exists()

    filler.unlink()
    discover.run(config, **inputs, output=full)
    discover.run(config, **inputs, output=roomy)
    assert np.array_equal(*(stores.read(stores.open_store(p, "discovery"), "latents") for p in (full, roomy)))
