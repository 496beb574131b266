"""Refusals that name file, row and value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryospire.conventions import InputError


def refuse(bad: Any, source: Path, column: str, values: Any, why: str, first: int = 0) -> None:
    """Raise InputError naming the file, the first bad row (from 1, before which there were ``first``) and its value."""
    if bad.any():
        i = int(np.argmax(bad))
        value = shown(values[i])
        more = f" ({int(bad.sum())} such rows)" if bad.sum() > 1 else ""
        raise InputError(f"{source}: row {first + i + 1}: {column} is {value}: {why}{more}")


def shown(value: Any) -> str:
    """A value as it stands in a message of one line."""
    text = str(np.asarray(value).tolist())
    return text if text.isprintable() else repr(text)


def unique(source: Path, column: str, ids: NDArray[Any], values: Any) -> None:
    """Refuse an id that appears twice, naming both rows."""
    order = np.argsort(ids, kind="stable")
    twice = np.flatnonzero(ids[order][1:] == ids[order][:-1])
    if len(twice):
        first, second = sorted(order[twice[0] : twice[0] + 2].tolist())
        value = shown(values[second])
        raise InputError(f"{source}: row {second + 1}: {column} is {value}: already in row {first + 1} ({len(twice)} repeats)")
