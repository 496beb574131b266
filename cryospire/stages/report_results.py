"""What the report reads: the folder of a run, and a word for what is not there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from cryospire.conventions import InputError
from cryospire.io import stores


class Missing(Exception):
    """An input of a section is not there; the section says so in a line."""


@dataclass(frozen=True)
class Results:
    """The folder of a run."""

    root: Path

    def store(self, name: str) -> Any:
        """The complete store ``name``.zarr; Missing otherwise."""
        try:
            return stores.open_store(self.root / f"{name}.zarr", name)
        except InputError as error:
            raise Missing(str(error)) from None

    def json(self, name: str) -> Any:
        path = self.root / name
        if not path.exists():
            raise Missing(f"{path}: no such file")
        return json.loads(path.read_text())


def array(group: Any, name: str) -> NDArray[Any]:
    """An array of a store; Missing where the store has none."""
    if name not in group:
        raise Missing(f"{group.attrs['schema']} has no array {name}")
    return stores.read(group, name)
