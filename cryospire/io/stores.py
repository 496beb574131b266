"""Every Zarr v3 store of the pipeline: create, open, validate.

A store is a group whose root attributes tell its story: ``schema`` and ``schema_version``, ``software_version``, ``config``
(the stage's resolved section), ``seed``, ``inputs`` (name -> path and hash), ``pixel_size`` (Å), ``box`` (pixels) and, set
last, ``complete``.  Every array carries ``dimension_names``, ``units`` and ``long_name``.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import ArrayLike, NDArray

from cryospire import __version__
from cryospire.conventions import InputError

SCHEMA_VERSION = 1
SCHEMAS = ("particles", "consensus", "discovery", "parts", "model", "reconstruction", "analysis", "volumes")
ROWS = 4096  # rows of a chunk in arrays that have one row for each particle
zarr.config.set({"array.write_empty_chunks": True})  # looking whether all values of a chunk are 0 took longer than all else in writing it


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A full or failing disk, met while writing a store, in one line."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: could not be written: {error.strerror or error}; the store is not complete") from error


def create(
    path: Path,
    schema: str,
    *,
    config: Mapping[str, Any],
    seed: int,
    inputs: Mapping[str, Path],
    pixel_size: float,
    box: int,
    force: bool = False,
) -> zarr.Group:
    """Start a store of the given schema; what an interrupted run left there is cleared.

    Raises InputError if a complete store (or anything that is not a store) stands there and ``force`` is off.
    """
    assert schema in SCHEMAS
    if path.exists():
        check_replaceable(path, schema, config=config, force=force)
        shutil.rmtree(path)
    story: dict[str, Any] = {
        "schema": f"cryospire.{schema}",
        "schema_version": SCHEMA_VERSION,
        "software_version": __version__,
        "config": dict(config),
        "seed": seed,
        "inputs": {name: {"path": str(p), "hash": fingerprint(p)} for name, p in inputs.items()},
        "pixel_size": float(pixel_size),
        "box": int(box),
        "complete": False,
    }
    with writing(path):
        group = zarr.open_group(path, mode="w", zarr_format=3)
        group.attrs.update(story)
    return group


def check_replaceable(path: Path, schema: str, *, config: Mapping[str, Any], force: bool = False) -> None:
    """Refuse, before any long work, to overwrite a complete store or a folder that is not ours."""
    if force or not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not path.is_dir():
        raise InputError(f"{path}: exists and is not a Zarr store; remove it or choose another output")
    if not (path / "zarr.json").exists():
        # Snakemake removes the declared zarr.json before a rerun; any other folder holds no such subgroups.
        if all(p.is_dir() and (p / "zarr.json").exists() for p in path.iterdir() if p.name != ".snakemake_timestamp"):
            return
        raise InputError(f"{path}: exists and is not a Zarr store; remove it or choose another output")
    attrs = zarr.open_group(path, mode="r").attrs
    if attrs.get("schema") != f"cryospire.{schema}":
        raise InputError(f"{path}: holds schema {attrs.get('schema')!r}, not cryospire.{schema}; choose another output")
    if attrs.get("complete"):
        changed = differing(attrs, config)
        what = f"was made with another config ({', '.join(changed)} differ)" if changed else "is already complete"
        raise InputError(f"{path}: {what}; pass --force to replace it")


def differing(attributes: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Names of the settings that a store with these attributes was made with another value of."""
    old = attributes.get("config") or {}
    return sorted(k for k in {*old, *config} if old.get(k) != config.get(k))


def put(
    group: zarr.Group,
    name: str,
    data: ArrayLike,
    dims: tuple[str, ...],
    long_name: str,
    units: str = "",
    chunks: tuple[int, ...] | None = None,
    **attributes: Any,
) -> zarr.Array[Any]:
    """Write a whole array (``name`` may hold slashes) with its dimensions, meaning and units."""
    values = np.asarray(data)
    if chunks is None:
        chunks = tuple(max(1, min(ROWS, n) if i == 0 else n) for i, n in enumerate(values.shape))
    digest = hashlib.blake2b(np.ascontiguousarray(values).tobytes(), digest_size=16).hexdigest()
    with writing(where(group)):
        array = group.create_array(name, data=values, chunks=chunks or "auto", dimension_names=dims, overwrite=True)
        array.attrs.update({"long_name": long_name, "units": units, "hash": digest, **attributes})
    return array


def empty(group: zarr.Group, name: str, lead: tuple[int, ...], box: int, dims: tuple[str, ...], long_name: str, units: str = "") -> None:
    """An array of volumes (*lead, z, y, x) to be written one by one, each its own chunk."""
    shape, chunks = (*lead, box, box, box), (1,) * len(lead) + (box,) * 3
    with writing(where(group)):
        array = group.create_array(name, shape=shape, chunks=chunks, dtype="float32", dimension_names=(*dims, "z", "y", "x"))
        array.attrs.update({"long_name": long_name, "units": units})


def finish(group: zarr.Group) -> None:
    """Declare the store complete: the last thing a stage writes."""
    with writing(where(group)):
        group.attrs["complete"] = True


def where(node: zarr.Group | zarr.Array[Any]) -> Path:
    """Folder of a store, or of an array in it."""
    return Path(str(node.store_path).removeprefix("file://"))


def open_store(path: Path, schema: str) -> zarr.Group:
    """Open a complete store of this schema for reading.

    Raises InputError if it is missing, of another schema or version, or incomplete.
    """
    if not (path / "zarr.json").exists():
        raise InputError(f"{path}: no such store (expected cryospire.{schema})")
    group = zarr.open_group(path, mode="r")
    if group.attrs.get("schema") != f"cryospire.{schema}":
        raise InputError(f"{path}: schema is {group.attrs.get('schema')!r}, expected 'cryospire.{schema}'")
    if group.attrs.get("schema_version") != SCHEMA_VERSION:
        raise InputError(
            f"{path}: schema version {group.attrs.get('schema_version')} was written by cryospire "
            f"{group.attrs.get('software_version')}; this is version {SCHEMA_VERSION} of cryospire {__version__}"
        )
    if not group.attrs.get("complete"):
        raise InputError(f"{path}: incomplete; the stage that writes it was interrupted, run it again")
    return group


def open_partial(path: Path) -> zarr.Group:
    """Open any store for looking at, complete or not.  Raises InputError if there is none or it is not ours."""
    if not (path / "zarr.json").exists():
        raise InputError(f"{path}: {'not a store: it has no zarr.json' if path.exists() else 'no such store'}")
    group = zarr.open_group(path, mode="r")
    if not str(group.attrs.get("schema", "")).startswith("cryospire."):
        raise InputError(f"{path}: schema is {group.attrs.get('schema')!r}, not one of cryospire's")
    return group


def writable(path: Path) -> zarr.Group:
    """A store that another process has begun, for writing whole chunks (shards) of its arrays: one owner a chunk."""
    return zarr.open_group(path, mode="r+")


def read(group: zarr.Group, name: str) -> NDArray[Any]:
    """A whole array as numpy.  Raises InputError where it is not there or damaged."""
    try:
        array = group[name]
        assert isinstance(array, zarr.Array)
        return np.asarray(array[...])
    except KeyError:
        raise InputError(f"{where(group)}: the array {name} is not there; run the stage that writes the store again") from None
    except (RuntimeError, ValueError) as error:  # of the decoder, or of a chunk that is too short
        raise InputError(f"{where(group)}: the array {name} is damaged ({error}); run the stage that writes the store again") from None


def join(ids: NDArray[np.int64], other: NDArray[np.int64], what: str) -> NDArray[np.intp]:
    """Rows of ``other`` in the order of ``ids``.  Raises InputError naming the first rows that are missing."""
    order = np.argsort(other, kind="stable")
    place = np.minimum(np.searchsorted(other, ids, sorter=order), len(other) - 1)
    rows = order[place]
    missing = np.flatnonzero(other[rows] != ids)
    if len(missing):
        shown = ", ".join(f"row {i} (id {ids[i]})" for i in missing[:5])
        raise InputError(f"{what}: {len(missing)} particle ids have no partner: {shown}")
    return rows


def fingerprint(path: Path) -> str:
    """Hash of a file: size and BLAKE2b of its first and last MiB; of a store: of every zarr.json, which hold
    settings, inputs, and the hashes of arrays written whole by ``put`` (not of images and volumes, which are written in pieces).
    """
    files = sorted(path.rglob("zarr.json")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        return "missing"
    h = hashlib.blake2b(digest_size=16)
    for file in files:
        h.update(str(file.stat().st_size).encode())
        with file.open("rb") as f:
            h.update(f.read(1 << 20))
            f.seek(max(0, file.stat().st_size - (1 << 20)))
            h.update(f.read())
    return h.hexdigest()


def check_made_from(group: zarr.Group, name: str, path: Path, stage: str) -> None:
    """Raises InputError where the store was made from another ``name`` than the one at ``path``: ``stage`` must run again."""
    inputs: Any = group.attrs["inputs"]
    if inputs[name]["hash"] != fingerprint(path):
        raise InputError(f"{where(group)}: made from another {name} than {path}; run {stage} again")
