"""One particle table, whatever program wrote the particles, and the checks that each one passes at the door."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryospire.conventions import InputError
from cryospire.io import mrc
from cryospire.io.checks import refuse, shown
from cryospire.io.names import ImageNames

ROWS = 1 << 20  # at a time, where temporaries are large
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Optics:
    """Optics groups, one entry each: kV, mm, 1, Å, pixels, mrad; Zernike coefficients as in RELION's files."""

    name: list[str]
    voltage: Floats
    cs: Floats
    amplitude_contrast: Floats
    pixel_size: Floats
    box: NDArray[np.int64]
    beam_tilt_x: Floats
    beam_tilt_y: Floats
    odd_zernike: list[list[float]]
    even_zernike: list[list[float]]
    magnification: Floats | None = None  # (G, 2, 2) as rlnMagMat: frequency k of an image is frequency M k of the particle


@dataclass(frozen=True)
class ParticleTable:
    """Particles (N,) in the order of their source; rows of messages count from 1, arrays from 0."""

    source: Path
    id: NDArray[np.int64]
    image_names: Sequence[str]  # "000012@stack.mrcs", as written
    stacks: list[Path]  # absolute
    stack: NDArray[np.int32]  # entry of stacks
    index: NDArray[np.int64]  # 0-based image in the stack
    row: NDArray[np.int64]  # 0-based row of the source
    rotation: Floats  # (N, 3, 3), x_view = R x_model
    shift: Floats  # (N, 2) Å, where the particle's centre lies; RELION's origin is minus it
    defocus_u: Floats  # Å, underfocus positive
    defocus_v: Floats
    defocus_angle: Floats  # degrees, from +x towards +y
    phase_shift: Floats  # degrees
    ctf_scale: Floats
    half_set: NDArray[np.int8]  # 1, 2, or 0 where unknown
    group: NDArray[np.int32]  # entry of optics
    optics: Optics
    sign: int = 0  # what the table says of the images: +1 protein white, -1 protein black, 0 nothing
    notes: tuple[str, ...] = ()  # what was found and is not used, in words

    def __len__(self) -> int:
        return len(self.id)

    def take(self, rows: NDArray[Any]) -> ParticleTable:
        """The given rows (0-based positions), in their order; stacks and optics stay whole."""
        arrays = {f.name: getattr(self, f.name)[rows] for f in fields(self) if isinstance(getattr(self, f.name), np.ndarray)}
        names, places = self.image_names, np.arange(len(self))[rows]
        kept = names.take(places) if isinstance(names, ImageNames) else [names[i] for i in places]
        return replace(self, image_names=kept, **arrays)


def finite(source: Path, column: str, values: Floats) -> Floats:
    """The values as float64, all finite."""
    values = np.asarray(values, np.float64)
    refuse(~np.isfinite(values.reshape(len(values), -1)).all(1), source, column, values, "not a finite number")
    return values


def locate(source: Path, names: Sequence[str], datadir: Path | None) -> list[Path]:
    """Absolute paths of stacks: under ``datadir``, else relative to the table, to a folder above it (the project), or to here.

    Raises InputError naming the first stack that is nowhere, and where it was sought.
    """
    here = source.absolute().parent
    bases = [datadir.absolute()] if datadir else [here, *here.parents[:5], Path.cwd()]
    paths = []
    for name in names:
        tried = [base / name for base in bases]
        if datadir:
            tried.append(bases[0] / Path(name).name)
        path = next((p for p in tried if p.is_file()), None)
        if path is None:
            where = f"under {bases[0]}" if datadir else f"from {here}, the folders above it, or {Path.cwd()}; set datadir"
            raise InputError(f"{source}: stack {shown(name)}: no such file {where}")
        bases.sort(key=lambda base, p=path: base not in p.parents)  # type: ignore[misc]
        paths.append(path)
    return paths


def checked(table: ParticleTable) -> ParticleTable:
    """The same table, its boxes filled in from the stacks where the source has none.

    Raises InputError on values that no microscope or refinement can have, naming file, row and value.
    """
    t, o, source = table, table.optics, table.source
    if not len(t):
        raise InputError(f"{source}: holds no particles")
    for name in ("voltage", "cs", "amplitude_contrast", "pixel_size", "beam_tilt_x", "beam_tilt_y"):
        _optics(~np.isfinite(getattr(o, name)), table, name, "not a finite number")
    _optics((o.voltage < 40) | (o.voltage > 1500), table, "voltage", "expected kV, between 40 and 1500")
    _optics((o.cs < 0) | (o.cs > 20), table, "cs", "expected mm, between 0 and 20")
    _optics((o.amplitude_contrast < 0) | (o.amplitude_contrast > 1), table, "amplitude_contrast", "expected a fraction between 0 and 1")
    _optics((o.pixel_size < 0.05) | (o.pixel_size > 100), table, "pixel_size", "expected Å, between 0.05 and 100")
    if o.magnification is not None:
        off = np.abs(o.magnification - np.eye(2)).max((1, 2))
        _optics(~(off < 0.2), table, "magnification", "expected a matrix within 0.2 of identity")
    table = t = replace(table, optics=_boxes(table))
    o = t.optics
    _optics((o.box < 8) | (o.box % 2 == 1), table, "box", "expected an even number of pixels, at least 8")
    for start in range(0, len(t), ROWS):
        part = t.rotation[start : start + ROWS]
        product = np.einsum("nij,nkj->nik", part, part) - np.eye(3)
        bad = ~(np.abs(product).max((1, 2)) < 1e-3) | ~(np.linalg.det(part) > 0)
        refuse(bad, source, "rotation", part, "not a rotation matrix", first=start)
    refuse(np.abs(t.shift).max(1) > (o.box * o.pixel_size)[t.group], source, "shift", t.shift, "Å, larger than the box")
    for name in ("defocus_u", "defocus_v"):
        values = getattr(t, name)
        refuse(values < 0, source, name, values, "negative; expected Å, underfocus positive")
        refuse(values > 2e5, source, name, values, "more than 20 µm; expected Å")
    middle = float(np.median(t.defocus_u))
    if 0 < middle < 100:
        raise InputError(f"{source}: defocus_u: median {middle:g}; expected Å, this looks like µm or nm")
    return table


def _optics(bad: NDArray[np.bool_], table: ParticleTable, name: str, why: str) -> None:
    if bad.any():
        g = int(np.argmax(bad))
        raise InputError(f"{table.source}: optics group {table.optics.name[g]!r}: {name} is {shown(getattr(table.optics, name)[g])}: {why}")


def _boxes(table: ParticleTable) -> Optics:
    box = table.optics.box.copy()
    for g in np.flatnonzero(box == 0):
        rows = np.flatnonzero(table.group == g)
        box[g] = mrc.stack_shape(table.stacks[table.stack[rows[0]]])[1] if len(rows) else 8  # a group without particles
    return replace(table.optics, box=box)


def check_stacks(table: ParticleTable) -> None:
    """Check by their headers that stacks are whole, long enough, and of their optics group's box."""
    order = np.argsort(table.stack, kind="stable")
    starts = np.searchsorted(table.stack[order], np.arange(len(table.stacks) + 1))
    for s, path in enumerate(table.stacks):
        rows = order[starts[s] : starts[s + 1]]
        if not len(rows):
            continue
        n, box, _ = mrc.stack_shape(path)
        last = rows[np.argmax(table.index[rows])]
        if table.index[last] >= n:
            raise InputError(f"{table.source}: row {last + 1}: image {table.image_names[last]}: {path} holds {n} images")
        expected = table.optics.box[table.group[rows]]
        if (expected != box).any():
            i = int(np.argmax(expected != box))
            name = table.optics.name[table.group[rows[i]]]
            raise InputError(f"{table.source}: row {rows[i] + 1}: optics group {name!r} has box {expected[i]}, {path} has {box}")
