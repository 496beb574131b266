"""One workflow at a time in a folder of results: a lock file that says who holds it, and that the dead do not keep.

The owner renews the file's time while it lives.  An owner on this host is asked for by process id; one on another host counts as
dead when it has not renewed the file for ``STALE`` seconds of the file system's own clock.
"""

from __future__ import annotations

import atexit
import json
import os
import secrets
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from cryospire.conventions import InputError, explained

NAME = ".cryospire.lock"
RENEW, STALE = 20.0, 180.0  # seconds


def acquire(results: Path, *, here: bool = True) -> None:
    """Take the lock of a folder of results until this process ends.  Raises InputError naming a living owner, or, where stages run
    ``here`` and not as a cluster's jobs, a stage that has outlived its workflow.
    """
    path, mine = results / NAME, whoami()
    try:
        results.mkdir(parents=True, exist_ok=True)
        _take(path, mine)
        if here and (left := orphans(results)):
            _release(path, mine)
            raise InputError(f"{results}: still written to by {', '.join(left)}; wait for it or end it first")
    except OSError as error:
        raise InputError(explained(error)) from None
    threading.Thread(target=_renew, args=(path, mine["token"]), daemon=True).start()
    atexit.register(_release, path, mine)


def _take(path: Path, mine: dict[str, Any]) -> None:
    while not _create(path, mine):
        owner = _owner(path)
        if owner and alive(owner, _age(path)):
            job = f", job {owner['job']}" if owner["job"] else ""
            raise InputError(
                f"{path}: another workflow writes to this folder: process {owner['pid']} on {owner['host']}{job}, "
                f"started in {owner['folder']} at {owner['since']}; wait for it or end it first"
            )
        # Renaming is atomic: of two that find the same dead owner, one carries its file away, and the other sees that below.
        grave = path.with_name(f"{NAME}.{mine['token']}")
        try:
            path.rename(grave)
        except FileNotFoundError:
            continue
        if _owner(grave).get("token") == owner.get("token"):
            grave.unlink()
        else:  # somebody was quicker and lives: back with it
            grave.replace(path)


def held(results: Path) -> bool:
    """Whether a living workflow holds the lock of a folder of results."""
    path = results / NAME
    try:
        return alive(_owner(path), time.time() - path.stat().st_mtime)
    except OSError:
        return False


def orphans(results: Path) -> list[str]:
    """Stages of this host that write into a folder of results."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            if "--output" in words[:-1] and "cryospire" in (Path(word).name for word in words[:3]):
                target = Path(process.cwd()) / words[words.index("--output") + 1]
                if results.resolve() in target.resolve().parents:
                    found.append(f"process {process.pid} (writing {target.name})")
        except psutil.Error:  # it has ended, or is another user's
            continue
    return found


def whoami() -> dict[str, Any]:
    """Who a lock belongs to."""
    return {
        "host": os.uname().nodename, "pid": os.getpid(), "born": born(os.getpid()), "job": os.environ.get("SLURM_JOB_ID", ""),
        "folder": str(Path.cwd()), "since": time.strftime("%Y-%m-%d %H:%M:%S"), "token": secrets.token_hex(8),
    }  # fmt: skip


def born(pid: int) -> str:
    """Start of a process in clock ticks since boot: a process id alone is given to others later.  Empty where there is none."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if words[0] == "Z" else words[19]


def alive(owner: dict[str, Any], age: float) -> bool:
    """Whether the owner of a lock that was renewed ``age`` seconds ago still lives."""
    if owner.get("host") == os.uname().nodename:
        return bool(owner.get("born")) and born(int(owner["pid"])) == owner["born"]
    return age < STALE


def _create(path: Path, owner: dict[str, Any]) -> bool:
    """Write the file under its name unless one is there.  A hard link makes it appear whole, on network file systems too."""
    draft = path.with_name(f"{NAME}.{owner['token']}")
    draft.write_text(json.dumps(owner))
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    return True


def _owner(path: Path) -> dict[str, Any]:
    """Who holds a lock; empty where the file is gone or damaged."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return found


def _age(path: Path) -> float:
    """Seconds since a lock was renewed, by the clock of the file system that holds it."""
    now = path.with_name(f"{NAME}.{secrets.token_hex(8)}")
    now.touch()
    try:
        return now.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
    finally:
        now.unlink()


def _renew(path: Path, token: str) -> None:
    """Until another's lock is there, or none.  A file system that fails for a while is asked again."""
    while True:
        with suppress(OSError):
            owner = _owner(path)
            if owner.get("token") != token and (owner or not path.exists()):
                return
            os.utime(path)
        time.sleep(RENEW)


def _release(path: Path, owner: dict[str, Any]) -> None:
    if os.getpid() == owner["pid"] and _owner(path).get("token") == owner["token"]:
        path.unlink(missing_ok=True)
