"""RELION particle tables of versions 3.0 (no optics table), 3.1, 4 and 5, to and from the particle table."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import starfile
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryospire.conventions import InputError
from cryospire.io import metadata_star as star
from cryospire.io.checks import refuse
from cryospire.io.names import ImageNames, ImageReader
from cryospire.io.table import Floats, Optics, ParticleTable, checked, finite, locate

ANGLES = ["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]
PARTICLE = [
    *ANGLES, "rlnOriginXAngst", "rlnOriginYAngst", "rlnOriginX", "rlnOriginY", "rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle",
    "rlnPhaseShift", "rlnCtfScalefactor", "rlnCtfBfactor", "rlnRandomSubset", "rlnOpticsGroup",
]  # fmt: skip
IDENTITY = {"rlnMagMat00": 1, "rlnMagMat01": 0, "rlnMagMat10": 0, "rlnMagMat11": 1}
MICROSCOPE = ["rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast"]
PIXEL = ["rlnImagePixelSize", "rlnPixelSize", "rlnDetectorPixelSize", "rlnMagnification"]
OPTICS = [
    *MICROSCOPE, *PIXEL, "rlnImageSize", "rlnBeamTiltX", "rlnBeamTiltY", "rlnImageDimensionality", "rlnOpticsGroup",
    "rlnCtfDataAreCtfPremultiplied", "rlnCtfDataArePhaseFlipped", *IDENTITY,
]  # fmt: skip
ROWS = 1 << 20
ZERNIKE = ["rlnOddZernike", "rlnEvenZernike"]


def particle_block(path: Path, blocks: list[star.Block]) -> star.Block:
    """The block that holds the particles.  Raises InputError where there is none, or where it holds subtomograms."""
    found = [b for b in blocks if "rlnImageName" in b.columns]
    if not found:
        names = ", ".join(f"data_{b.name}" for b in blocks)
        raise InputError(f"{path}: no table with the column rlnImageName (blocks: {names}); is it a particle star file?")
    block = found[0]
    if "rlnTomoName" in block.columns:
        raise InputError(f"{path}: column rlnTomoName: subtomograms are not supported, only single particles")
    if not block.rows:
        raise InputError(f"{path}: block data_{block.name} holds no particles")
    return block


def image_names(path: Path) -> ImageNames:
    """``rlnImageName`` of every row."""
    block = particle_block(path, star.scan(path))
    reader = ImageReader(path, "rlnImageName")
    star.read_columns(path, block, [], sinks={"rlnImageName": reader})
    return reader.finish().written


def read(path: Path, datadir: Path | None = None) -> ParticleTable:
    """The particle table of a RELION star file.  Raises InputError naming file, row and value."""
    blocks = star.scan(path)
    block = particle_block(path, blocks)
    optics_block = next((b for b in blocks if b.name == "optics"), None)
    required = [*ANGLES, "rlnDefocusU", *([] if optics_block else MICROSCOPE)]
    missing = [c for c in required if c not in block.columns]
    if missing:
        what = "this file has no poses: run a refinement" if missing[0] in ANGLES else "CTF parameters are needed"
        raise InputError(f"{path}: block data_{block.name}: missing column{'s' * (len(missing) > 1)} {', '.join(missing)} ({what})")
    wanted = PARTICLE if optics_block else PARTICLE + OPTICS
    reader = ImageReader(path, "rlnImageName")
    columns = star.read_columns(path, block, list(dict.fromkeys(wanted)), sinks={"rlnImageName": reader})
    for name in columns:
        finite(path, name, columns[name])
    if optics_block:
        optics, group, notes = _optics_table(path, optics_block, columns, block.rows)
    else:
        optics, group, notes = _optics_of_rows(path, columns)

    def column(name: str, default: float = 0.0) -> Floats:
        return columns.get(name, np.full(block.rows, default))

    taken = reader.finish()
    half = column("rlnRandomSubset")
    refuse(~np.isin(half, (0, 1, 2)), path, "rlnRandomSubset", half, "expected 1 or 2")
    if (half == 1).any() != (half == 2).any():
        half = np.zeros(block.rows)
        notes.append("all particles are of one half-set (rlnRandomSubset); they are divided anew at random")
    if np.any(column("rlnCtfBfactor") != 0):
        notes.append("rlnCtfBfactor is not zero and is not used")
    shift = _shift(columns, optics.pixel_size[group])
    half_set = half.astype(np.int8)
    # What has been used is let go: at ten million rows a column is 80 MB.
    half = np.empty(0)
    for name in [c for c in columns if c.startswith("rlnOrigin") or c in ("rlnRandomSubset", "rlnOpticsGroup", "rlnCtfBfactor")]:
        del columns[name]
    rotation = matrices([columns.pop(a) for a in ANGLES])
    u = column("rlnDefocusU")
    return checked(
        ParticleTable(
            source=path, id=taken.id, image_names=taken.written, stacks=locate(path, taken.names, datadir),
            stack=taken.stack, index=taken.index, row=np.arange(block.rows),
            rotation=rotation, shift=shift,
            defocus_u=u, defocus_v=columns.get("rlnDefocusV", u), defocus_angle=column("rlnDefocusAngle"),
            phase_shift=column("rlnPhaseShift"), ctf_scale=column("rlnCtfScalefactor", 1.0),
            half_set=half_set, group=group, optics=optics, notes=tuple(notes),
        )
    )  # fmt: skip


def matrices(angles: list[Floats]) -> Floats:
    """Rotations (N, 3, 3), x_view = R x_model, of ``rlnAngleRot``, ``Tilt``, ``Psi`` (N,), degrees."""
    out = np.empty((len(angles[0]), 3, 3))
    for start in range(0, len(out), ROWS):
        part = np.stack([a[start : start + ROWS] for a in angles], 1)
        out[start : start + ROWS] = Rotation.from_euler("ZYZ", part, degrees=True).as_matrix().transpose(0, 2, 1)
    return out


def _shift(columns: dict[str, Any], pixel_size: Floats) -> Floats:
    """Where the particle's centre lies (N, 2), Å: minus ``rlnOriginXAngst``, or minus ``rlnOriginX`` pixels."""
    zero = np.zeros(len(pixel_size))
    parts = [-columns.get(f"rlnOrigin{a}Angst", columns.get(f"rlnOrigin{a}", zero) * pixel_size) for a in "XY"]
    return np.stack(parts, 1)


def _optics_table(path: Path, block: star.Block, columns: dict[str, Any], n: int) -> tuple[Optics, NDArray[np.int32], list[str]]:
    names = ["rlnOpticsGroupName", *ZERNIKE]
    table = star.read_columns(path, block, OPTICS, names)
    where = f"{path}: block data_optics"
    missing = [c for c in MICROSCOPE if c not in table]
    if missing:
        raise InputError(f"{where}: missing column{'s' * (len(missing) > 1)} {', '.join(missing)}")
    count = len(table["rlnVoltage"])
    if not count:
        raise InputError(f"{where}: holds no optics groups")
    number = table.get("rlnOpticsGroup", np.arange(1.0, count + 1))
    if len(np.unique(number)) != count:
        raise InputError(f"{where}: rlnOpticsGroup: a group appears twice ({', '.join(f'{g:g}' for g in number)})")
    if "rlnOpticsGroup" not in columns and count > 1:
        raise InputError(f"{path}: missing column rlnOpticsGroup, and there are {count} optics groups")
    given = columns.get("rlnOpticsGroup", np.full(n, number[0]))
    order = np.argsort(number)
    place = order[np.minimum(np.searchsorted(number[order], given), count - 1)]
    refuse(number[place] != given, path, "rlnOpticsGroup", given, "no such group in block data_optics")
    return _optics(where, table, count, [f"opticsGroup{g:g}" for g in number]), place.astype(np.int32), _remarks(where, table)


def _optics_of_rows(path: Path, columns: dict[str, Any]) -> tuple[Optics, NDArray[np.int32], list[str]]:
    """RELION 3.0: rows that share microscope and pixel size make a group."""
    present = [c for c in OPTICS if c in columns and c != "rlnOpticsGroup"]
    unique, group = np.unique(np.stack([columns[c] for c in present], 1), axis=0, return_inverse=True)
    table = {c: unique[:, i] for i, c in enumerate(present)}
    names = [f"opticsGroup{g + 1}" for g in range(len(unique))]
    return _optics(str(path), table, len(unique), names), group.reshape(-1).astype(np.int32), _remarks(str(path), table)


def _optics(where: str, table: dict[str, Any], count: int, names: list[str]) -> Optics:
    if "rlnImagePixelSize" in table or "rlnPixelSize" in table:
        pixel = table["rlnImagePixelSize" if "rlnImagePixelSize" in table else "rlnPixelSize"]
    elif "rlnDetectorPixelSize" in table and "rlnMagnification" in table:
        if (table["rlnMagnification"] <= 0).any():
            raise InputError(f"{where}: rlnMagnification is {table['rlnMagnification'].min():g}")
        pixel = table["rlnDetectorPixelSize"] * 1e4 / table["rlnMagnification"]
    else:
        raise InputError(f"{where}: no pixel size: missing column rlnImagePixelSize (or rlnDetectorPixelSize and rlnMagnification)")
    zero = np.zeros(count)
    box = table.get("rlnImageSize", zero)
    if not (np.isfinite(box).all() and (box % 1 == 0).all()):
        raise InputError(f"{where}: rlnImageSize is {box.tolist()}: expected whole numbers")
    matrix = np.stack([table.get(c, zero + v) for c, v in IDENTITY.items()], 1).reshape(-1, 2, 2)
    odd, even = [[_zernike(where, c, text) for text in table.get(c, [""] * count)] for c in ZERNIKE]
    return Optics(
        table.get("rlnOpticsGroupName", names), table["rlnVoltage"], table["rlnSphericalAberration"], table["rlnAmplitudeContrast"],
        pixel, box.astype(np.int64), table.get("rlnBeamTiltX", zero), table.get("rlnBeamTiltY", zero), odd, even,
        matrix if np.any(matrix != np.eye(2)) else None,
    )  # fmt: skip


def _zernike(where: str, column: str, text: str) -> list[float]:
    """``[0.1,-0.2,...]`` as numbers."""
    try:
        values = [float(v) for v in text.strip("[]").split(",") if v.strip()]
    except ValueError:
        values = [np.nan]
    if not np.isfinite(values).all():
        raise InputError(f"{where}: {column} is {text!r}: expected [number,number,...]")
    return values


def _remarks(where: str, table: dict[str, Any]) -> list[str]:
    """Refuse what would change the image model; note what is corrected."""
    if np.any(table.get("rlnImageDimensionality", np.array([2])) != 2):
        raise InputError(f"{where}: rlnImageDimensionality is {table['rlnImageDimensionality'].max():g}: only 2D images are supported")
    for column, what in (("rlnCtfDataAreCtfPremultiplied", "multiplied by their CTF"), ("rlnCtfDataArePhaseFlipped", "phase-flipped")):
        if np.any(table.get(column, np.zeros(1)) != 0):
            raise InputError(f"{where}: {column} is 1: images {what} are not supported; extract them again without it")
    notes = []
    off = max(float(np.abs(table[c] - v).max()) if c in table else 0.0 for c, v in IDENTITY.items())
    if off > 0:
        notes.append(f"anisotropic magnification (up to {off:.2%}) is undone in the images")
    if any(any(_zernike(where, c, t)) for c in ZERNIKE for t in table.get(c, [])):
        notes.append("odd aberrations (rlnOddZernike) are undone in the images, even ones (rlnEvenZernike) enter the CTF")
    return notes


def write_star(path: Path, table: ParticleTable, image_names: Sequence[str] | None = None) -> None:
    """Write a RELION 3.1 star file: optics table and particles; ``image_names`` default to the table's own.

    RELION 3.1, 4 and 5 read it.  Angles to 1e-6 degrees, lengths to 1e-6 Å.
    """
    names = table.image_names if image_names is None else image_names
    o = table.optics
    optics: dict[str, Any] = {
        "rlnOpticsGroup": list(range(1, len(o.name) + 1)), "rlnOpticsGroupName": o.name, "rlnVoltage": o.voltage,
        "rlnSphericalAberration": o.cs, "rlnAmplitudeContrast": o.amplitude_contrast, "rlnImagePixelSize": o.pixel_size,
        "rlnImageSize": o.box, "rlnImageDimensionality": [2] * len(o.name),
    }  # fmt: skip
    if np.any(o.beam_tilt_x) or np.any(o.beam_tilt_y):
        optics |= {"rlnBeamTiltX": o.beam_tilt_x, "rlnBeamTiltY": o.beam_tilt_y}
    for column, lists in zip(ZERNIKE, (o.odd_zernike, o.even_zernike), strict=True):
        if any(lists):
            optics[column] = [f"[{','.join(map(str, values))}]" for values in lists]
    if o.magnification is not None:
        optics |= dict(zip(IDENTITY, o.magnification.reshape(-1, 4).T, strict=True))
    euler = euler_angles(table.rotation)
    particles: dict[str, Any] = {
        "rlnImageName": names, "rlnAngleRot": euler[:, 0], "rlnAngleTilt": euler[:, 1], "rlnAnglePsi": euler[:, 2],
        "rlnOriginXAngst": -table.shift[:, 0], "rlnOriginYAngst": -table.shift[:, 1],
        "rlnDefocusU": table.defocus_u, "rlnDefocusV": table.defocus_v, "rlnDefocusAngle": table.defocus_angle,
        "rlnPhaseShift": table.phase_shift, "rlnCtfScalefactor": table.ctf_scale, "rlnOpticsGroup": table.group + 1,
    }  # fmt: skip
    if np.any(table.half_set):
        particles["rlnRandomSubset"] = table.half_set
    path.parent.mkdir(parents=True, exist_ok=True)
    tables = {name: pd.DataFrame(columns) for name, columns in (("optics", optics), ("particles", particles))}
    text: str = starfile.to_string(tables, float_format="%.6f", sep="\t")
    # starfile's first line is a time stamp, which would make no two files the same; RELION's own says the version.
    path.write_text("# version 30001\n" + text.split("\n", 1)[1], newline="\n")


def pose_columns(path: Path, columns: Sequence[str], table: ParticleTable) -> dict[str, list[str]]:
    """The table's poses as the columns of a star file that has ``columns``.  Raises InputError where it has none for shifts."""
    values = dict(zip(ANGLES, euler_angles(table.rotation).T, strict=True))
    for axis, shift in zip("XY", table.shift.T, strict=True):
        for name, unit in ((f"rlnOrigin{axis}Angst", 1.0), (f"rlnOrigin{axis}", table.optics.pixel_size[table.group])):
            if name in columns:
                values[name] = -shift / unit
        if not {f"rlnOrigin{axis}Angst", f"rlnOrigin{axis}"} & set(columns):
            raise InputError(f"{path}: has no column rlnOrigin{axis}Angst for refined shifts")
    return {name: [f"{v:.6f}" for v in of_rows] for name, of_rows in values.items()}


def euler_angles(rotation: Floats) -> Floats:
    """``rlnAngleRot``, ``rlnAngleTilt``, ``rlnAnglePsi`` (N, 3), degrees, of rotations (N, 3, 3)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gimbal lock at tilt 0: any split between rot and psi is right
        return Rotation.from_matrix(rotation.transpose(0, 2, 1)).as_euler("ZYZ", degrees=True)
