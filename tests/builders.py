"""Small particle tables of every program, written by hand from the published formats, with planted values.

Nothing here uses cryospire: files are text, numpy arrays and pickles, stacks are bytes.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

BOX, PIXEL = 16, 2.5


def stack(path: Path, n: int, box: int = BOX, pixel: float = PIXEL, dtype: Any = "<f4", data: np.ndarray | None = None) -> Path:
    """An MRC stack, header written field by field."""
    order = np.dtype(dtype).byteorder.replace("=", "<").replace("|", "<")
    values = np.random.default_rng(n).normal(0, 1, (n, box, box)) if data is None else data
    header = np.zeros(256, f"{order}i4")
    header[:10] = box, box, n, {"f4": 2, "f2": 12, "i2": 1, "i1": 0, "u2": 6}[np.dtype(dtype).str[1:]], 0, 0, 0, box, box, n
    header[10:13] = np.array([box * pixel, box * pixel, n * pixel], f"{order}f4").view(f"{order}i4")
    header[16:19] = 1, 2, 3
    raw = bytearray(header.tobytes())
    raw[208:216] = b"MAP " + (b"\x11\x11\0\0" if order == ">" else b"\x44\x44\0\0")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(raw) + values.astype(dtype).tobytes())
    return path


@dataclass
class Planted:
    """What a table says, in RELION's terms; float32 values, so that every format can hold them."""

    names: list[str]
    euler: np.ndarray  # degrees
    origin: np.ndarray  # Å, RELION's sign
    u: np.ndarray
    v: np.ndarray
    angle: np.ndarray
    half: np.ndarray  # 1 or 2

    @property
    def matrices(self) -> np.ndarray:
        return Rotation.from_euler("ZYZ", self.euler, degrees=True).as_matrix().transpose(0, 2, 1)


def planted(folder: Path, n: int = 12, stacks: int = 1, seed: int = 0) -> Planted:
    """n particles in as many stacks, which are written."""
    rng = np.random.default_rng(seed)
    per = -(-n // stacks)
    names = [f"{i % per + 1:06d}@s{i // per}.mrcs" for i in range(n)]
    for s in range(stacks):
        stack(folder / f"s{s}.mrcs", min(per, n - s * per))
    euler = np.stack([rng.uniform(-180, 180, n), rng.uniform(1, 179, n), rng.uniform(-180, 180, n)], 1)
    return Planted(
        names,
        euler,
        rng.normal(0, 3, (n, 2)),
        rng.uniform(1e4, 2e4, n),
        rng.uniform(1e4, 2e4, n),
        rng.uniform(-90, 90, n),
        np.arange(n) % 2 + 1,
    )


def loop(name: str, columns: dict[str, Any], end: str = "\n") -> str:
    head = f"{end}data_{name}{end}{end}loop_{end}" + "".join(f"_{c} #{i}{end}" for i, c in enumerate(columns, 1))
    rows = [" ".join(str(v) for v in row) + end for row in zip(*columns.values(), strict=True)]
    return head + "".join(rows) + end


def optics_columns(box: int = BOX, pixel: float = PIXEL) -> dict[str, Any]:
    return {
        "rlnOpticsGroup": [1],
        "rlnOpticsGroupName": ["opticsGroup1"],
        "rlnVoltage": [300.0],
        "rlnSphericalAberration": [2.7],
        "rlnAmplitudeContrast": [0.1],
        "rlnImagePixelSize": [pixel],
        "rlnImageSize": [box],
        "rlnImageDimensionality": [2],
    }


def particle_columns(p: Planted) -> dict[str, Any]:
    return {
        "rlnImageName": list(p.names),
        "rlnAngleRot": list(p.euler[:, 0]),
        "rlnAngleTilt": list(p.euler[:, 1]),
        "rlnAnglePsi": list(p.euler[:, 2]),
        "rlnOriginXAngst": list(p.origin[:, 0]),
        "rlnOriginYAngst": list(p.origin[:, 1]),
        "rlnDefocusU": list(p.u),
        "rlnDefocusV": list(p.v),
        "rlnDefocusAngle": list(p.angle),
        "rlnRandomSubset": list(p.half),
        "rlnOpticsGroup": [1] * len(p.names),
    }


def star31(path: Path, p: Planted, optics: dict[str, Any] | None = None, particles: dict[str, Any] | None = None, end: str = "\n") -> Path:
    text = (
        f"{end}# version 30001{end}"
        + loop("optics", optics or optics_columns(), end)
        + loop("particles", particles or particle_columns(p), end)
    )
    path.write_bytes(text.encode())
    return path


def columns30(p: Planted) -> dict[str, Any]:
    """RELION 3.0: no optics table, origins in pixels, pixel size from detector and magnification."""
    n = len(p.names)
    columns = particle_columns(p)
    for name in ("rlnOriginXAngst", "rlnOriginYAngst", "rlnOpticsGroup"):
        del columns[name]
    return columns | {
        "rlnOriginX": list(p.origin[:, 0] / PIXEL),
        "rlnOriginY": list(p.origin[:, 1] / PIXEL),
        "rlnVoltage": [300.0] * n,
        "rlnSphericalAberration": [2.7] * n,
        "rlnAmplitudeContrast": [0.1] * n,
        "rlnMagnification": [1e4] * n,
        "rlnDetectorPixelSize": [PIXEL] * n,
    }


def star30(path: Path, p: Planted, columns: dict[str, Any] | None = None) -> Path:
    path.write_text(loop("", columns or columns30(p)))
    return path


def cs_rows(p: Planted) -> np.ndarray:
    n = len(p.names)
    fields = [
        ("uid", "<u8"),
        ("blob/path", "S20"),
        ("blob/idx", "<u4"),
        ("blob/shape", "<u4", (2,)),
        ("blob/psize_A", "<f4"),
        ("blob/sign", "<f4"),
        ("ctf/exp_group_id", "<u4"),
        ("ctf/accel_kv", "<f4"),
        ("ctf/cs_mm", "<f4"),
        ("ctf/amp_contrast", "<f4"),
        ("ctf/df1_A", "<f4"),
        ("ctf/df2_A", "<f4"),
        ("ctf/df_angle_rad", "<f4"),
        ("ctf/phase_shift_rad", "<f4"),
        ("ctf/scale", "<f4"),
        ("alignments3D/split", "<u4"),
        ("alignments3D/shift", "<f4", (2,)),
        ("alignments3D/pose", "<f4", (3,)),
        ("alignments3D/psize_A", "<f4"),
    ]
    rows = np.zeros(n, np.dtype(fields))
    rows["uid"] = np.random.default_rng(n).permutation(10 * n)[:n] + (1 << 60)
    rows["blob/path"] = [(">" + name.split("@")[1]).encode() for name in p.names]
    rows["blob/idx"] = [int(name.split("@")[0]) - 1 for name in p.names]
    rows["blob/shape"], rows["blob/psize_A"], rows["blob/sign"] = BOX, PIXEL, -1
    rows["ctf/accel_kv"], rows["ctf/cs_mm"], rows["ctf/amp_contrast"], rows["ctf/scale"] = 300, 2.7, 0.1, 1
    rows["ctf/df1_A"], rows["ctf/df2_A"], rows["ctf/df_angle_rad"] = p.u, p.v, np.radians(p.angle)
    rows["alignments3D/split"], rows["alignments3D/psize_A"] = p.half - 1, 2 * PIXEL  # aligned at half the box
    rows["alignments3D/shift"] = p.origin / (2 * PIXEL)
    rows["alignments3D/pose"] = -Rotation.from_matrix(p.matrices).as_rotvec()
    return rows


def cs(path: Path, rows: np.ndarray) -> Path:
    with path.open("wb") as f:
        np.save(f, rows)
    return path


def with_column(rows: np.ndarray, name: str, width: int, value: float) -> np.ndarray:
    """cryoSPARC rows with one more column of equal values."""
    out = np.zeros(len(rows), np.dtype([*rows.dtype.descr, (name, "<f4", (width,))]))
    for old in rows.dtype.names:
        out[old] = rows[old]
    out[name] = value
    return out


def ctf_table(p: Planted) -> np.ndarray:
    n = len(p.names)
    columns = [np.full(n, BOX), np.full(n, PIXEL), p.u, p.v, p.angle, np.full(n, 300.0), np.full(n, 2.7), np.full(n, 0.1), np.zeros(n)]
    return np.stack(columns, 1).astype(np.float32)


def pickled(path: Path, value: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(value, protocol))
    return path


def cryodrgn(folder: Path, p: Planted, protocol: int = 4) -> dict[str, Path]:
    """poses.pkl, ctf.pkl and a list of stacks."""
    names = dict.fromkeys(name.split("@")[1] for name in p.names)
    (folder / "stacks.txt").write_text("".join(f"{name}\n" for name in names))
    pickled(folder / "poses.pkl", (p.matrices.astype(np.float32), (p.origin / (BOX * PIXEL)).astype(np.float32)), protocol)
    pickled(folder / "ctf.pkl", ctf_table(p), protocol)
    return {"particles": folder / "stacks.txt", "poses": folder / "poses.pkl", "ctf": folder / "ctf.pkl"}
