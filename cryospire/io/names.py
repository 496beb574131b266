"""Image names, ``000012@path/to/stack.mrcs``: taken apart as they are read, and kept in thirteen bytes each instead of a string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, overload

import numpy as np
from numpy.typing import NDArray

from cryospire.conventions import InputError, particle_id
from cryospire.io.checks import refuse, unique

CHUNK = 1 << 16  # names


def key(name: str) -> str:
    """The name an id is made of: six digits at least, '@', path without a leading '>' or './'; one without '@' is a stack's first image.

    Raises ValueError where the image number is not a whole number.
    """
    number, at, path = name.partition("@")
    if not at:
        number, path = "1", name
    if not number.isdecimal():
        raise ValueError(number)
    path = path.lstrip(">")
    while path.startswith("./"):
        path = path[2:].lstrip("/")
    return f"{int(number):06d}@{path}"


class ImageNames(Sequence[str]):
    """Names as they were written, put together again from number, digits and path when asked for."""

    def __init__(self, index: NDArray[np.int64], digits: NDArray[np.int8], path: NDArray[np.int32], paths: list[str]) -> None:
        """0-based number, its digits (0: the name is a path alone) and entry of ``paths`` (N,)."""
        self.index_of, self.digits, self.path, self.paths = index, digits, path, paths

    def __len__(self) -> int:
        return len(self.index_of)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> ImageNames: ...
    def __getitem__(self, i: int | slice) -> str | ImageNames:
        if isinstance(i, slice):
            return self.take(np.arange(len(self))[i])
        path, digits = self.paths[self.path[i]], int(self.digits[i])
        return f"{int(self.index_of[i]) + 1:0{digits}d}@{path}" if digits else path

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def take(self, rows: NDArray[Any]) -> ImageNames:
        return ImageNames(self.index_of[rows], self.digits[rows], self.path[rows], self.paths)


@dataclass(frozen=True)
class Images:
    """Image names taken apart: permanent ids, 0-based index, stack number, the stacks' names, and the names as written."""

    id: NDArray[np.int64]
    index: NDArray[np.int64]
    stack: NDArray[np.int32]
    names: list[str]
    written: ImageNames


class ImageReader:
    """Takes names apart a chunk at a time.  Raises InputError at the first malformed, zero-based, or repeated one."""

    def __init__(self, source: Path, column: str) -> None:
        self.source, self.column, self.rows = source, column, 0
        self.paths: dict[str, tuple[int, str]] = {}  # as written -> its entry, and the stack that it means
        self.chunks: list[tuple[NDArray[Any], ...]] = []  # id, index, digits, path

    def extend(self, names: Sequence[str]) -> None:
        chunk: list[tuple[int, int, int, int]] = []
        for name in names:
            number, at, path = name.partition("@")
            if not at:
                number, path = "", name  # the first image of a stack
            if at and not (number.isdecimal() and len(number) < 19):
                self._refuse(len(chunk), name, "expected NUMBER@STACK")
            entry, stack = self.paths.get(path) or self._new(len(chunk), name, path)
            count = int(number) if at else 1
            chunk.append((particle_id(f"{count:06d}@{stack}"), count, len(number), entry))
        columns = np.array(chunk, np.int64).reshape(-1, 4).T
        refuse(columns[1] < 1, self.source, self.column, names, "images of a stack count from 1", first=self.rows)
        self.rows += len(names)
        self.chunks.append((columns[0].copy(), columns[1] - 1, columns[2].astype(np.int8), columns[3].astype(np.int32)))

    def _new(self, i: int, name: str, path: str) -> tuple[int, str]:
        stack = key(f"1@{path}").partition("@")[2]
        if not stack:
            self._refuse(i, name, "no stack is named")
        return self.paths.setdefault(path, (len(self.paths), stack))

    def _refuse(self, i: int, name: str, why: str) -> NoReturn:
        raise InputError(f"{self.source}: row {self.rows + i + 1}: {self.column} is {name!r}: {why}")

    def finish(self) -> Images:
        """Raises InputError naming both rows of a repeat."""
        ids, index, digits, path = (np.concatenate(column) for column in zip(*self.chunks, strict=True))
        self.chunks.clear()
        written = ImageNames(index, digits, path, list(self.paths))
        unique(self.source, self.column, ids, written)
        stacks = {stack: i for i, stack in enumerate(dict.fromkeys(stack for _, stack in self.paths.values()))}
        stack_of = np.array([stacks[stack] for _, stack in self.paths.values()], np.int32)
        return Images(ids, index, stack_of[path], list(stacks), written)


def images(source: Path, column: str, names: Sequence[str]) -> Images:
    """Take image names apart.  Raises InputError at the first malformed, zero-based, or repeated one, with both rows of a repeat."""
    reader = ImageReader(source, column)
    for start in range(0, max(len(names), 1), CHUNK):
        reader.extend(names[start : start + CHUNK])
    return reader.finish()
