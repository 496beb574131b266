"""cryoSPARC particle tables: numpy structured arrays, joined with their passthrough files on ``uid``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cryospire.conventions import InputError
from cryospire.io.checks import refuse, unique
from cryospire.io.names import images
from cryospire.io.table import Floats, Optics, ParticleTable, checked, finite, locate

# Phase (radians) per Å of a column's largest value, at frequency s (1/Å) and wavelength w (Å): what its sign is, no document says.
UNSIGNED: dict[str, Callable[[Floats, Floats], Floats]] = {
    "ctf/shift_A": lambda s, w: 2 * np.pi * s,
    "ctf/trefoil_A": lambda s, w: 2 * np.pi / 3 * w**2 * s**3,
    "ctf/tetra_A": lambda s, w: 2 * np.pi * w**3 * s**4,
}
CTF = ["ctf/accel_kv", "ctf/cs_mm", "ctf/amp_contrast", "ctf/df1_A", "ctf/df2_A", "ctf/df_angle_rad"]
NEGLIGIBLE = np.pi / 4  # radians at Nyquist: the signal there keeps at least 0.7 of its amplitude
BLOB = ["blob/path", "blob/idx", "blob/shape", "blob/psize_A"]


def load(path: Path) -> NDArray[np.void]:
    """Rows of one .cs file, their ``uid`` checked to be there and unique.  Raises InputError."""
    try:
        with path.open("rb") as f:
            rows = np.lib.format.read_array(f, allow_pickle=False, max_header_size=200_000)
            rest = f.read(1)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or 'truncated'}") from None
    except Exception as error:
        raise InputError(f"{path}: not a cryoSPARC table: {' '.join(str(error).split())[:200]}") from None
    if rows.dtype.names is None or rows.ndim != 1 or "uid" not in rows.dtype.names or rows.dtype["uid"].kind not in "ui":
        raise InputError(f"{path}: not a cryoSPARC table: no column uid")
    if rest:
        raise InputError(f"{path}: bytes follow the {len(rows)} rows of the table; the file is damaged")
    unique(path, "uid", rows["uid"], rows["uid"])
    return rows


def joined(path: Path, passthrough: Sequence[Path]) -> NDArray[np.void]:
    """Rows of ``path`` with the columns that only the passthrough files have, by ``uid``.

    Raises InputError naming the first row whose uid a passthrough file lacks.
    """
    rows = load(path)
    for other_path in passthrough:
        other = load(other_path)
        if not len(other):
            raise InputError(f"{other_path}: holds no rows")
        order = np.argsort(other["uid"])
        place = order[np.minimum(np.searchsorted(other["uid"][order], rows["uid"]), len(other) - 1)]
        refuse(other["uid"][place] != rows["uid"], path, "uid", rows["uid"], f"not in the passthrough file {other_path}")
        rows = _beside(rows, other[place])
    return rows


def _beside(rows: NDArray[np.void], other: NDArray[np.void]) -> NDArray[np.void]:
    """Rows with the columns of ``other`` that they lack."""
    old = rows.dtype.names or ()
    new = [name for name in other.dtype.names or () if name not in old]
    both = np.empty(len(rows), np.dtype([(n, rows.dtype[n]) for n in old] + [(n, other.dtype[n]) for n in new]))
    for name in old:
        both[name] = rows[name]
    for name in new:
        both[name] = other[name]
    return both


def image_names(path: Path, rows: NDArray[np.void]) -> list[str]:
    """``000012@stack.mrc`` of every row: path as written, without its leading '>', and the 1-based index."""
    _require(path, rows, ["blob/path", "blob/idx"])
    try:
        paths = [p.decode() if isinstance(p, bytes) else str(p) for p in rows["blob/path"].tolist()]
    except UnicodeDecodeError:
        raise InputError(f"{path}: blob/path: not UTF-8 text") from None
    return [f"{i + 1:06d}@{p.lstrip('>')}" for i, p in zip(rows["blob/idx"].astype(np.int64).tolist(), paths, strict=True)]


def _require(path: Path, rows: NDArray[np.void], names: Sequence[str]) -> None:
    missing = [name for name in names if name not in (rows.dtype.names or ())]
    if missing:
        plural = "s" * (len(missing) > 1)
        raise InputError(f"{path}: missing column{plural} {', '.join(missing)}; give the passthrough file that has it")


def read(path: Path, passthrough: Sequence[Path] = (), datadir: Path | None = None) -> ParticleTable:
    """The particle table of a .cs file and its passthrough files.  Raises InputError naming file, row and value."""
    rows = joined(path, passthrough)
    n = len(rows)
    if not n:
        raise InputError(f"{path}: holds no particles")
    _require(path, rows, BLOB + CTF)
    names = image_names(path, rows)
    taken = images(path, "blob/path", names)

    def column(name: str, default: float = 0.0) -> Floats:
        return finite(path, name, rows[name]) if name in (rows.dtype.names or ()) else np.full(n, default)

    pose, shift, split = _alignment(path, rows)
    psize = column("blob/psize_A")
    optics, group = _optics(path, rows, column)
    sign = column("blob/sign")
    refuse(sign != sign[0], path, "blob/sign", sign, f"but row 1 has {sign[0]:g}; one table must hold images of one contrast")
    # exp([v]x) transposed is exp([-v]x); scipy is exact at v = 0 as well.
    rotation = Rotation.from_rotvec(-pose).as_matrix()
    return checked(
        ParticleTable(
            source=path, id=taken.id, image_names=names, stacks=locate(path, taken.names, datadir),
            stack=taken.stack, index=taken.index, row=np.arange(n), rotation=rotation,
            shift=-shift * _shift_pixel(path, rows, psize)[:, None],
            defocus_u=column("ctf/df1_A"), defocus_v=column("ctf/df2_A"), defocus_angle=np.degrees(column("ctf/df_angle_rad")),
            phase_shift=np.degrees(column("ctf/phase_shift_rad")), ctf_scale=column("ctf/scale", 1.0),
            half_set=split, group=group, optics=optics, sign=int(np.sign(sign[0])), notes=tuple(_notes(path, rows, pose)),
        )
    )  # fmt: skip


def _alignment(path: Path, rows: NDArray[np.void]) -> tuple[Floats, Floats, NDArray[np.int8]]:
    """Rotation vectors (N, 3), shifts (N, 2) in pixels, half-sets (N,) 1, 2 or 0; of several classes the most probable one."""
    names = rows.dtype.names or ()
    prefix = next((p for p in ("alignments3D", "alignments3D_multi") if f"{p}/pose" in names and f"{p}/shift" in names), None)
    if prefix is None:
        have_2d = " (it has 2D alignments only)" if "alignments2D/pose" in names else ""
        raise InputError(f"{path}: missing columns alignments3D/pose, alignments3D/shift{have_2d}; give a 3D refinement's particles")
    pose = finite(path, f"{prefix}/pose", rows[f"{prefix}/pose"])
    shift = finite(path, f"{prefix}/shift", rows[f"{prefix}/shift"])
    if pose.ndim == 3:
        _require(path, rows, [f"{prefix}/class_posterior"])
        best = finite(path, f"{prefix}/class_posterior", rows[f"{prefix}/class_posterior"]).argmax(1)
        pose, shift = pose[np.arange(len(rows)), best], shift[np.arange(len(rows)), best]
    if pose.shape != (len(rows), 3) or shift.shape != (len(rows), 2):
        raise InputError(f"{path}: {prefix}/pose has shape {pose.shape} and {prefix}/shift {shift.shape}; expected 3 and 2 values a row")
    if f"{prefix}/split" not in names:
        return pose, shift, np.zeros(len(rows), np.int8)
    split = rows[f"{prefix}/split"]
    refuse(~np.isin(split, (0, 1)), path, f"{prefix}/split", split, "expected 0 or 1")
    # A refinement that made no half-sets leaves a single value; that tells nothing.
    return pose, shift, (split + 1).astype(np.int8) if len(np.unique(split)) == 2 else np.zeros(len(rows), np.int8)


def _shift_pixel(path: Path, rows: NDArray[np.void], psize: Floats) -> Floats:
    for name in ("alignments3D/psize_A", "alignments3D_multi/psize_A"):
        if name in (rows.dtype.names or ()):
            values = finite(path, name, rows[name])
            refuse(values <= 0, path, name, values, "expected Å")
            return values
    return psize


def _optics(path: Path, rows: NDArray[np.void], column: Any) -> tuple[Optics, NDArray[np.int32]]:
    """Groups of rows with the same exposure group, microscope, pixel size, box and beam tilt."""
    shape = rows["blob/shape"].astype(np.float64)
    if shape.shape != (len(rows), 2):
        raise InputError(f"{path}: blob/shape has shape {shape.shape}; expected 2 values a row")
    refuse(shape[:, 0] != shape[:, 1], path, "blob/shape", shape, "images are not square")
    tilt = np.zeros((len(rows), 2))
    if "ctf/tilt_A" in (rows.dtype.names or ()):
        cs = np.maximum(column("ctf/cs_mm") * 1e7, 1.0)[:, None]
        tilt = np.arcsin(np.clip(finite(path, "ctf/tilt_A", rows["ctf/tilt_A"]) / cs, -1, 1)) * 1e3
    keys = [column("ctf/exp_group_id"), column("ctf/accel_kv"), column("ctf/cs_mm"), column("ctf/amp_contrast"), column("blob/psize_A")]
    matrix = np.tile([1.0, 0, 0, 1], (len(rows), 1))
    if "ctf/anisomag" in (rows.dtype.names or ()):
        matrix += finite(path, "ctf/anisomag", rows["ctf/anisomag"])
    values, group = np.unique(np.column_stack([*keys, shape[:, 0], tilt, matrix]).round(6), axis=0, return_inverse=True)
    names = [f"exposure group {int(v)}" for v in values[:, 0]]
    none: list[list[float]] = [[] for _ in names]
    kv, cs_mm, contrast, psize = values[:, 1:5].T
    optics = Optics(names, kv, cs_mm, contrast, psize, values[:, 5].astype(np.int64), values[:, 6], values[:, 7], none, none)
    matrix = values[:, 8:].reshape(-1, 2, 2)
    if np.any(matrix != np.eye(2)):
        optics = replace(optics, magnification=matrix)
    return optics, group.reshape(-1).astype(np.int32)


def _notes(path: Path, rows: NDArray[np.void], pose: Floats) -> list[str]:
    """What is corrected and what is left out, in words.  Refuses aberrations of unknown sign that matter at the images' Nyquist."""
    names, notes = rows.dtype.names or (), []
    still = int((np.abs(pose).max(1) == 0).sum())
    if still:
        notes.append(f"{still} of {len(rows)} rotation vectors are exactly zero")
    if "ctf/anisomag" in names and np.any(rows["ctf/anisomag"] != 0):
        notes.append(f"anisotropic magnification (up to {np.abs(rows['ctf/anisomag']).max():.2%}) is undone in the images")
    nyquist, length = 0.5 / rows["blob/psize_A"].astype(float), _wavelength(rows["ctf/accel_kv"].astype(float))
    for name in [n for n in UNSIGNED if n in names and np.any(rows[n] != 0)]:
        phase = np.abs(finite(path, name, rows[name])).max(1) * UNSIGNED[name](nyquist, length)
        why = f"a phase of {phase.max():.2f} radians at Nyquist that is not corrected; downsample the particles, or refine without it"
        refuse(phase > NEGLIGIBLE, path, name, rows[name], why)
        notes.append(f"{name} is not corrected: at most {phase.max():.2g} radians at Nyquist")
    if "ctf/bfactor" in names and np.any(rows["ctf/bfactor"] != 0):
        notes.append("ctf/bfactor is not zero and is not used")
    return notes


def _wavelength(kilovolts: Floats) -> Floats:
    """Å; see ``maths.ctf.wavelength``."""
    volts = kilovolts * 1e3
    return 12.2643 / np.sqrt(volts + 0.978466e-6 * volts**2)


def write_rows(source: Path, rows: NDArray[np.int64], output: Path, posed: ParticleTable | None = None) -> None:
    """Write the given rows (0-based, ascending) of a .cs file bit for bit, same columns and types, but for poses where ``posed``
    is given."""
    kept = load(source)[rows]
    if posed is not None:
        names = kept.dtype.names or ()
        if "alignments3D/pose" not in names or "alignments3D/shift" not in names:
            raise InputError(f"{source}: has no columns alignments3D/pose and alignments3D/shift for refined poses")
        kept["alignments3D/pose"] = -Rotation.from_matrix(posed.rotation).as_rotvec()
        kept["alignments3D/shift"] = -posed.shift / _shift_pixel(source, kept, kept["blob/psize_A"])[:, None]
    with output.open("wb") as f:
        np.lib.format.write_array(f, kept, allow_pickle=False)
