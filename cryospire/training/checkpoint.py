"""Checkpoints that survive: written to a temporary name, synced, renamed; the one before is kept; verified on load."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import torch

from cryospire.conventions import InputError
from cryospire.log import say

MAGIC = b"cryospire-checkpoint-1\n"
LAST, PREVIOUS, OTHER, TEMPORARY = "last.ckpt", "previous.ckpt", "other.ckpt", "writing.tmp"


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write ``last.ckpt``, keeping the one before as ``previous.ckpt``."""
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()
    temporary = folder / TEMPORARY
    try:
        with temporary.open("wb") as f:
            f.write(MAGIC + hashlib.blake2b(payload, digest_size=32).digest())
            f.write(payload)
            f.flush()
            os.fsync(f.fileno())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{temporary}: checkpoint could not be written: {error.strerror}; the last good one is kept") from None
    last = folder / LAST
    if last.exists():
        last.replace(folder / PREVIOUS)
    temporary.replace(last)


def load(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The newest sound checkpoint of this identity (config, particles), or None to start anew.

    A damaged file is named and passed over.  A sound one of another identity is kept as ``other.ckpt`` until the stage ends or one more
    is set aside: of it a run goes on whose config is changed back.
    """
    found = {name: state for name in (LAST, PREVIOUS, OTHER) if (state := _read(folder / name)) is not None}
    differing = {name: _differing(state["identity"], identity) for name, state in found.items()}
    mine = next((name for name in found if not differing[name]), None)
    stranger = next((name for name in (LAST, PREVIOUS) if differing.get(name)), None)
    if stranger:
        say(f"{folder / stranger}: belongs to another run ({', '.join(differing[stranger])} differ); kept as {OTHER}")
        (folder / stranger).replace(folder / TEMPORARY)
        if mine == OTHER:
            (folder / OTHER).replace(folder / LAST)
        (folder / TEMPORARY).replace(folder / OTHER)
        if differing.get(PREVIOUS):
            (folder / PREVIOUS).unlink(missing_ok=True)
    return found[mine] if mine else None


def _read(path: Path) -> dict[str, Any] | None:
    """What a checkpoint holds; None where there is none that is sound."""
    if not path.exists():
        return None
    data = path.read_bytes()
    digest, payload = data[len(MAGIC) : len(MAGIC) + 32], data[len(MAGIC) + 32 :]
    if not data.startswith(MAGIC) or hashlib.blake2b(payload, digest_size=32).digest() != digest:
        say(f"{path}: damaged, passed over")
        return None
    state: dict[str, Any] = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    return state


def _differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what differs, those of settings instead of the config as a whole."""
    one, other = ({k: v for k, v in d.items() if k != "config"} | d.get("config", {}) for d in (one, other))
    return sorted(k for k in {*one, *other} if one.get(k) != other.get(k))


def clear(folder: Path) -> None:
    """Remove this stage's checkpoints, once its output is complete or a new start is asked for."""
    for path in folder.glob("*"):
        if path.name in (LAST, PREVIOUS, OTHER, TEMPORARY):
            path.unlink()
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()
