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


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write ``last.ckpt``, keeping the one before as ``previous.ckpt``."""
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()
    temporary = folder / "writing.tmp"
    try:
        with temporary.open("wb") as f:
            f.write(MAGIC + hashlib.blake2b(payload, digest_size=32).digest())
            f.write(payload)
            f.flush()
            os.fsync(f.fileno())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{temporary}: checkpoint could not be written: {error.strerror}; the last good one is kept") from None
    last = folder / "last.ckpt"
    if last.exists():
        last.replace(folder / "previous.ckpt")
    temporary.replace(last)


def load(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The newest sound checkpoint of this identity (config, particles), or None to start anew.

    A damaged file is named and passed over; a sound one of another identity raises InputError.
    """
    for name in ("last.ckpt", "previous.ckpt"):
        path = folder / name
        if not path.exists():
            continue
        data = path.read_bytes()
        digest, payload = data[len(MAGIC) : len(MAGIC) + 32], data[len(MAGIC) + 32 :]
        if not data.startswith(MAGIC) or hashlib.blake2b(payload, digest_size=32).digest() != digest:
            say(f"{path}: damaged, passed over")
            continue
        state: dict[str, Any] = torch.load(io.BytesIO(payload), weights_only=True)
        differing = sorted(k for k in {*state["identity"], *identity} if state["identity"].get(k) != identity.get(k))
        if differing:
            raise InputError(f"{path}: belongs to another run ({', '.join(differing)} differ); remove it or pass --force to start anew")
        return state
    return None


def clear(folder: Path) -> None:
    """Remove this stage's checkpoints, once its output is complete or a new start is asked for."""
    for path in folder.glob("*"):
        if path.name in ("last.ckpt", "previous.ckpt", "writing.tmp"):
            path.unlink()
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()
