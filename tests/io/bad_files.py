"""Builders of broken input, by label: each writes its files and returns the config's keys, beside the words of its refusal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import builders
import numpy as np

P = builders.Planted
Build = Callable[[Path, P], dict[str, Any]]
CASES: dict[str, tuple[Build, str]] = {}


def case(words: str) -> Callable[[Build], Build]:
    def add(build: Build) -> Build:
        CASES[build.__name__] = (build, words)
        return build

    return add


def column(name: str, row: int, value: Any, words: str, label: str) -> None:
    """A star file with one bad value."""

    def build(folder: Path, p: P) -> dict[str, Any]:
        columns = builders.particle_columns(p)
        columns[name] = list(columns.get(name, [0] * len(p.names)))
        columns[name][row] = value
        return {"particles": builders.star31(folder / "p.star", p, particles=columns)}

    CASES[label] = (build, words)


def optics(name: str, value: Any, words: str, label: str) -> None:
    def build(folder: Path, p: P) -> dict[str, Any]:
        return {"particles": builders.star31(folder / "p.star", p, builders.optics_columns() | {name: [value]})}

    CASES[label] = (build, words)


def text(change: Callable[[str], str | bytes], words: str, label: str) -> None:
    """A star file whose text was damaged."""

    def build(folder: Path, p: P) -> dict[str, Any]:
        path = builders.star31(folder / "p.star", p)
        new = change(path.read_text())
        path.write_bytes(new if isinstance(new, bytes) else new.encode())
        return {"particles": path}

    CASES[label] = (build, words)


def without(name: str, words: str, label: str) -> None:
    def build(folder: Path, p: P) -> dict[str, Any]:
        columns = builders.particle_columns(p)
        del columns[name]
        return {"particles": builders.star31(folder / "p.star", p, particles=columns)}

    CASES[label] = (build, words)


def cs(change: Callable[[np.ndarray], Any], words: str, label: str) -> None:
    def build(folder: Path, p: P) -> dict[str, Any]:
        rows = builders.cs_rows(p)
        changed = change(rows)
        return {"particles": builders.cs(folder / "p.cs", changed if isinstance(changed, np.ndarray) else rows)}

    CASES[label] = (build, words)


def drgn(change: Callable[[Path, dict[str, Path]], Any], words: str, label: str) -> None:
    def build(folder: Path, p: P) -> dict[str, Any]:
        files: dict[str, Any] = builders.cryodrgn(folder, p)
        change(folder, files)
        return {k: v for k, v in files.items() if v is not None}

    CASES[label] = (build, words)


def aberrated(name: str, width: int, value: float, words: str, label: str) -> None:
    def build(folder: Path, p: P) -> dict[str, Any]:
        return {"particles": builders.cs(folder / "p.cs", builders.with_column(builders.cs_rows(p), name, width, value))}

    CASES[label] = (build, words)


def selection(value: Any, words: str, label: str, name: str = "ind.pkl") -> None:
    def build(folder: Path, p: P) -> dict[str, Any]:
        ind = folder / name
        ind.write_text(value) if isinstance(value, str) else builders.pickled(ind, value)
        return {"particles": builders.star31(folder / "p.star", p), "ind": ind}

    CASES[label] = (build, words)
