"""The lock of a folder of results, taken by real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cryospire.conventions import InputError
from cryospire.site import lock

HOLD = "import sys, time; from pathlib import Path; from cryospire.site import lock; lock.acquire(Path(sys.argv[1]))"


def holder(folder: Path, seconds: float) -> subprocess.Popen[str]:
    """A process that holds the lock, or has failed to get it."""
    program = f"{HOLD}; print('held', flush=True); time.sleep({seconds})"
    return subprocess.Popen([sys.executable, "-c", program, folder], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_the_living_keep_it_the_dead_do_not(tmp_path: Path) -> None:
    first = holder(tmp_path, 60)
    assert line(first) == "held"
    with pytest.raises(InputError, match=f"another workflow .* process {first.pid} on {os.uname().nodename}"):
        lock.acquire(tmp_path)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert (tmp_path / lock.NAME).exists(), "a killed process cleans nothing up"
    second = holder(tmp_path, 0)
    assert line(second) == "held"
    second.wait()
    assert list(tmp_path.iterdir()) == [], "an owner that ends takes its lock away"


def test_a_stage_that_has_outlived_its_workflow_is_waited_for(tmp_path: Path) -> None:
    """As after ``kill -9`` of Snakemake alone: two would write one store.  A cluster's jobs are taken up by other means."""
    program = tmp_path / "cryospire"
    program.write_text("import time; print('up', flush=True); time.sleep(60)")
    stage = [sys.executable, str(program), "parts", "--output", "results/parts.zarr"]
    with subprocess.Popen(stage, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as left:
        assert line(left) == "up"
        with pytest.raises(InputError, match=f"still written to by process {left.pid} .writing parts.zarr."):
            lock.acquire(tmp_path / "results")
        assert list((tmp_path / "results").iterdir()) == []
        lock.acquire(tmp_path / "other")
        left.kill()
    lock.acquire(tmp_path / "results")


def test_of_many_that_find_a_dead_owner_one_gets_it(tmp_path: Path) -> None:
    dead = lock.whoami() | {"born": "1"}  # this process id, of an earlier process
    (tmp_path / lock.NAME).write_text(json.dumps(dead))
    racers = [holder(tmp_path, 8) for _ in range(6)]
    outs = [r.communicate(timeout=60) for r in racers]
    assert sorted(out.strip() for out, _ in outs) == [""] * 5 + ["held"], outs
    assert all("another workflow" in err for out, err in outs if not out)


def test_an_owner_elsewhere_lives_as_long_as_it_renews(tmp_path: Path) -> None:
    elsewhere = lock.whoami() | {"host": "another-node", "pid": 1, "job": "77"}
    path = tmp_path / lock.NAME
    path.write_text(json.dumps(elsewhere))
    with pytest.raises(InputError, match="another-node, job 77"):
        lock.acquire(tmp_path)
    old = time.time() - lock.STALE - 5
    os.utime(path, (old, old))
    taker = holder(tmp_path, 0)
    assert line(taker) == "held"
    taker.wait()
