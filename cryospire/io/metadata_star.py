"""STAR files: where their blocks and loops lie, chosen columns in bounded memory, and rows copied byte for byte.

Rows are read a few MiB at a time, so that a table of ten million rows costs its columns and no more; a loop's other bytes
are never interpreted and can be written back as they were.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cryospire.conventions import InputError

CHUNK = 1 << 24  # bytes
TOKEN = re.compile(r"""\s*(?:"([^"]*)"(?=\s|$)|'([^']*)'(?=\s|$)|([^\s"']\S*))""", re.ASCII)


@dataclass
class Block:
    """``data_NAME``: either pairs of names and values, or one loop whose rows lie in bytes ``start:end``, from line ``line`` on."""

    name: str
    pairs: dict[str, str] = field(default_factory=dict)
    columns: list[str] = field(default_factory=list)
    rows: int = 0
    start: int = 0
    end: int = 0
    line: int = 0


def scan(path: Path) -> list[Block]:
    """All blocks of a file, in order.  Raises InputError with the line that cannot be understood."""
    try:
        with path.open("rb") as f:
            return _scan(path, f)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def _scan(path: Path, f: BinaryIO) -> list[Block]:
    blocks: list[Block] = []
    loop = False  # between "loop_" and the next block
    offset = 0
    for number, raw in enumerate(f, 1):
        offset += len(raw)
        text = raw.strip()
        if number == 1:
            if b"\0" in raw or raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise InputError(f"{path}: line 1: not a text file (or UTF-16); expected a STAR file in UTF-8")
            text = text.removeprefix(b"\xef\xbb\xbf")
        if not text or text[0] == 35:  # '#'
            continue
        if text[0] in b"dlDL_" and _heading(path, number, text, blocks, loop):
            loop = text.lower() == b"loop_" if text[0] != 95 else loop
            continue
        if not loop or not blocks[-1].columns:
            raise InputError(f"{path}: line {number}: {_show(text)}: expected data_, loop_ or _name")
        block = blocks[-1]
        if block.rows == 0:
            block.start, block.line = offset - len(raw), number
        block.rows, block.end = block.rows + 1, offset
    if not blocks:
        raise InputError(f"{path}: no data_ block; not a STAR file")
    return blocks


def _heading(path: Path, number: int, text: bytes, blocks: list[Block], loop: bool) -> bool:
    """Take in a data_, loop_ or _name line; False where the line is a row after all."""
    words = _decode(path, number, text).split()
    if words[0].lower().startswith("data_") and len(words) == 1:
        name = words[0][5:]
        if any(b.name == name for b in blocks):
            raise InputError(f"{path}: line {number}: block data_{name} appears twice")
        blocks.append(Block(name))
        return True
    if text[0] != 95 and text.lower() != b"loop_":
        return False
    if not blocks:
        raise InputError(f"{path}: line {number}: {_show(text)}: stands before any data_ block")
    block = blocks[-1]
    if text[0] != 95:
        if block.columns or block.pairs:
            raise InputError(f"{path}: line {number}: a second table in block data_{block.name}")
        return True
    name = words[0][1:]
    if block.rows:
        raise InputError(f"{path}: line {number}: {words[0]} stands after the rows of block data_{block.name}")
    if name in block.columns or name in block.pairs:
        raise InputError(f"{path}: line {number}: column {words[0]} appears twice")
    if loop:
        if len(words) > 1 and not words[1].startswith("#"):
            raise InputError(f"{path}: line {number}: {_show(text)}: a loop's column takes no value")
        block.columns.append(name)
    else:
        values = tokens(path, number, text)
        if len(values) < 2 or (len(values) > 2 and not values[2].startswith("#")):
            raise InputError(f"{path}: line {number}: {_show(text)}: expected a name and one value")
        block.pairs[name] = values[1]
    return True


def tokens(path: Path, number: int, line: bytes) -> list[str]:
    """Values of one row; quotes (double or single) hold values with blanks, or empty ones."""
    text, at, values = _decode(path, number, line.rstrip()), 0, []
    while at < len(text):
        match = TOKEN.match(text, at)
        if match is None:
            raise InputError(f"{path}: line {number}: {_show(line)}: a quote that does not end")
        values.append(next(g for g in match.groups() if g is not None))
        at = match.end()
    return values


def _decode(path: Path, number: int, line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: line {number}: not UTF-8 text (byte {line[error.start]:#x})") from None


def _show(text: bytes) -> str:
    shown = text[:60].decode(errors="replace")
    return repr(shown + ("..." if len(text) > 60 else ""))


def row_lines(path: Path, block: Block) -> Iterator[list[tuple[int, bytes]]]:
    """The block's rows as they are in the file, a few MiB at a time: (line number, bytes)."""
    number = block.line
    with path.open("rb") as f:
        f.seek(block.start)
        left = block.end - block.start
        while left > 0 and (lines := f.readlines(min(CHUNK, left))):
            left -= sum(map(len, lines))
            yield [(number + i, line) for i, line in enumerate(lines) if (t := line.lstrip()) and t[0] != 35]
            number += len(lines)


class Sink(Protocol):
    """What takes a column's strings as they are read."""

    def extend(self, values: list[str], /) -> None: ...


def read_columns(
    path: Path, block: Block, numbers: Sequence[str], strings: Sequence[str] = (), sinks: Mapping[str, Sink] | None = None
) -> dict[str, Any]:
    """Columns of a block: those in ``numbers`` as float64 (N,), those in ``strings`` as lists; absent ones are left out.

    Strings of the columns that ``sinks`` names go there a chunk at a time, and are not kept.

    Raises InputError naming the line that has too few or too many values, or a value that is not a number.
    """
    if block.pairs and not block.columns:
        return _pairs(path, block, numbers, strings)
    sinks = sinks or {}
    number_columns, string_columns = [[c for c in names if c in block.columns] for names in (numbers, [*strings, *sinks])]
    arrays = {c: np.empty(block.rows) for c in number_columns}
    lists: dict[str, list[str]] = {c: [] for c in string_columns if c not in sinks}
    done = 0
    for chunk in row_lines(path, block):
        part = _parse(path, block, chunk, number_columns, string_columns)
        for c, array in arrays.items():
            array[done : done + len(chunk)] = part[c]
        for c in string_columns:
            (lists[c] if c in lists else sinks[c]).extend(part[c])
        done += len(chunk)
    return {**arrays, **lists}


def _pairs(path: Path, block: Block, numbers: Sequence[str], strings: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {c: [block.pairs[c]] for c in strings if c in block.pairs}
    for c in numbers:
        if c in block.pairs:
            found[c] = np.array([_number(f"{path}: block data_{block.name}", c, block.pairs[c])])
    return found


def _number(where: str, column: str, value: str) -> float:
    try:
        return float(value.replace("_", "?"))  # float() would take 1_000
    except ValueError:
        raise InputError(f"{where}: {column} is {value!r}: not a number") from None


def _parse(path: Path, block: Block, chunk: list[tuple[int, bytes]], numbers: list[str], strings: list[str]) -> Mapping[str, Any]:
    data = b"".join(line for _, line in chunk)
    if b'"' in data or b"'" in data:
        return _parse_slowly(path, block, chunk, numbers, strings)
    n = len(block.columns)
    if any(len(line.split()) != n for _, line in chunk):
        return _parse_slowly(path, block, chunk, numbers, strings)
    place = {c: block.columns.index(c) for c in numbers + strings}
    dtypes: dict[int, Any] = {place[c]: np.float64 for c in numbers} | {place[c]: object for c in strings}
    try:
        frame = pd.read_csv(
            io.BytesIO(data), sep=r"\s+", header=None, names=list(range(n)), usecols=sorted(dtypes), dtype=dtypes,
            index_col=False, quoting=3, na_filter=False, engine="c", low_memory=False,
        )  # fmt: skip
    except (ValueError, OverflowError):
        return _parse_slowly(path, block, chunk, numbers, strings)  # which names the line
    if len(frame) != len(chunk):
        return _parse_slowly(path, block, chunk, numbers, strings)
    columns: dict[str, Any] = {c: frame[place[c]].to_numpy() for c in numbers}
    return columns | {c: frame[place[c]].tolist() for c in strings}


def _parse_slowly(path: Path, block: Block, chunk: list[tuple[int, bytes]], numbers: list[str], strings: list[str]) -> Mapping[str, Any]:
    """Row by row: rows with quotes, and the line at which a table is broken."""
    columns: dict[str, list[Any]] = {c: [] for c in numbers + strings}
    places = [(c, block.columns.index(c), c in numbers) for c in columns]
    for number, line in chunk:
        values = tokens(path, number, line)
        if len(values) != len(block.columns):
            raise InputError(f"{path}: line {number}: {len(values)} values for the {len(block.columns)} columns of data_{block.name}")
        for c, place, numeric in places:
            columns[c].append(_number(f"{path}: line {number}", c, values[place]) if numeric else values[place])
    return columns


def copy_rows(
    source: Path, block: Block, rows: NDArray[np.int64], output: Path, changed: Mapping[str, Sequence[str]] | None = None
) -> None:
    """Copy a file with only the given rows (0-based, ascending) of one block, the rest byte for byte.

    ``changed``: columns with a new value for each of these rows.
    """
    kept = np.zeros(block.rows, bool)
    kept[rows] = True
    done = written = 0
    places = {block.columns.index(name): values for name, values in (changed or {}).items()}
    with source.open("rb") as f, output.open("wb") as out:
        out.write(f.read(block.start))
        for chunk in row_lines(source, block):
            selected = [line for k, (_, line) in zip(kept[done : done + len(chunk)], chunk, strict=True) if k]
            if places:
                selected = [_replaced(line, {k: v[written + i] for k, v in places.items()}) for i, line in enumerate(selected)]
                written += len(selected)
            if selected and not selected[-1].endswith(b"\n"):
                selected[-1] += b"\n"  # the last line of a file may have none
            out.writelines(selected)
            done += len(chunk)
        f.seek(block.end)
        while rest := f.read(CHUNK):
            out.write(rest)


def _replaced(line: bytes, values: Mapping[int, str]) -> bytes:
    """A row with other values in some columns; the space between them stays."""
    text = line.decode()
    spans = [m.span(m.lastindex or 0) for m in TOKEN.finditer(text)]
    for place in sorted(values, reverse=True):
        start, end = spans[place]
        text = text[:start] + values[place] + text[end:]
    return text.encode()
