"""MRC files: volumes in and out, particle stacks as memory maps whose length has been checked.

Arrays are [z, y, x] and [particle, y, x].  Modes 0 (int8), 1 (int16), 2 (float32), 6 (uint16) and 12 (float16), either byte order.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
from mrcfile.dtypes import HEADER_DTYPE
from numpy.typing import NDArray

from cryospire.conventions import InputError

MODES: dict[int, type[np.generic]] = {0: np.int8, 1: np.int16, 2: np.float32, 6: np.uint16, 12: np.float16}
HEADER_BYTES = 1024


@dataclass(frozen=True)
class Header:
    """What a file says of itself: shape (sections, rows, columns), dtype with byte order, data offset (bytes), voxel size (Å; x, y, z)."""

    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    offset: int
    voxel: tuple[float, float, float]
    axes: tuple[int, int, int]  # MAPC, MAPR, MAPS


def read_header(path: Path) -> Header:
    """Header of an .mrc/.mrcs file, checked against the file's length.

    Raises InputError: missing, too short for a header, not MRC, unknown mode, truncated, or longer than its header says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            raw = f.read(HEADER_BYTES)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    if len(raw) < HEADER_BYTES:
        raise InputError(f"{path}: {size} bytes is too short for an MRC header ({HEADER_BYTES})")
    header = _in_byte_order(path, raw)
    shape = (int(header["nz"]), int(header["ny"]), int(header["nx"]))
    dtype = np.dtype(MODES[int(header["mode"])]).newbyteorder(header.dtype["mode"].byteorder)
    offset = HEADER_BYTES + int(header["nsymbt"])
    expected = offset + shape[0] * shape[1] * shape[2] * dtype.itemsize
    if size != expected:
        what = f"{shape[0]} images of {shape[2]} x {shape[1]} ({dtype.name})"
        raise InputError(f"{path}: {'truncated' if size < expected else 'too long'}: {what} take {expected} bytes, the file has {size}")
    cell, sampling = header["cella"], (header["mx"], header["my"], header["mz"])
    voxel = [float(cell[a]) / int(m) if int(m) > 0 else 0.0 for a, m in zip("xyz", sampling, strict=True)]
    axes = (int(header["mapc"]), int(header["mapr"]), int(header["maps"]))
    return Header(shape, dtype, offset, (voxel[0], voxel[1], voxel[2]), axes if sorted(axes) == [1, 2, 3] else (1, 2, 3))


def _in_byte_order(path: Path, raw: bytes) -> Any:
    """The header in the byte order in which its size and mode make sense; the machine stamp is often wrong, so it only breaks ties."""
    orders = "><" if raw[212] == 0x11 else "<>"
    headers = [np.frombuffer(raw, HEADER_DTYPE.newbyteorder(order))[0] for order in orders]
    sane = [h for h in headers if all(0 < int(h[n]) < 1 << 24 for n in ("nx", "ny", "nz")) and 0 <= int(h["nsymbt"]) < 1 << 30]
    if not sane:
        h = headers[0]
        raise InputError(f"{path}: not an MRC file: size {int(h['nx'])} x {int(h['ny'])} x {int(h['nz'])}, mode {int(h['mode'])}")
    for h in sane:
        if int(h["mode"]) in MODES:
            return h
    raise InputError(f"{path}: MRC mode {int(sane[0]['mode'])} is not supported (supported: {', '.join(map(str, MODES))})")


def stack_shape(path: Path) -> tuple[int, int, float]:
    """Number of images, box (pixels) and pixel size (Å; 0 where the header has none) of a stack of square images."""
    header = read_header(path)
    n, ny, nx = header.shape
    if ny != nx:
        raise InputError(f"{path}: images of {nx} x {ny} pixels are not square")
    return n, nx, header.voxel[0]


def open_stack(path: Path) -> NDArray[Any]:
    """Read-only memory map [particle, y, x] of a stack, in the file's own dtype and byte order."""
    header = read_header(path)
    return np.memmap(path, header.dtype, "r", header.offset, header.shape)


def read_volume(path: Path) -> tuple[NDArray[np.float32], float]:
    """A cubic volume [z, y, x] and its pixel size (Å).

    Raises InputError where it is not cubic, not finite, has no voxel size or different ones along its axes.
    """
    header = read_header(path)
    # File order is (section, row, column) = axes (MAPS, MAPR, MAPC), 1 = x; put them into z, y, x.
    order = [list(header.axes[::-1]).index(axis) for axis in (3, 2, 1)]
    data = np.memmap(path, header.dtype, "r", header.offset, header.shape).transpose(order).astype(np.float32)
    if len(set(data.shape)) != 1:
        raise InputError(f"{path}: a volume of {' x '.join(map(str, data.shape[::-1]))} voxels is not a cube")
    x, y, z = header.voxel
    if not (np.isfinite(header.voxel).all() and x > 0):
        raise InputError(f"{path}: the header has no voxel size ({x} Å)")
    if max(abs(y - x), abs(z - x)) > 1e-3 * x:
        raise InputError(f"{path}: voxels of {x:.4f} x {y:.4f} x {z:.4f} Å are not cubes")
    if not np.isfinite(data).all():
        raise InputError(f"{path}: holds {np.size(data) - np.isfinite(data).sum()} values that are not finite")
    return np.ascontiguousarray(data), x


def write_volume(path: Path, array: NDArray[Any], pixel_size: float, origin: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> None:
    """Write a volume [z, y, x] as float32, header origin (x, y, z) in Å; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with mrcfile.new(temporary, overwrite=True) as mrc:
        mrc.set_data(np.ascontiguousarray(array, np.float32))
        mrc.set_volume()
        mrc.voxel_size = pixel_size
        _label(mrc)
        mrc.header.origin.x, mrc.header.origin.y, mrc.header.origin.z = origin
    temporary.replace(path)


def _label(mrc: Any) -> None:
    """One label without the time of day: the same data make the same bytes."""
    mrc.header.label[0], mrc.header.nlabl = "cryospire", 1


def write_stack(path: Path, images: NDArray[Any], pixel_size: float) -> None:
    """Write images [particle, y, x], float16 as mode 12 and the rest as they are."""
    create_stack(path, images.shape[0], images.shape[-1], pixel_size, images.dtype)[...] = images


def create_stack(path: Path, n: int, box: int, pixel_size: float, dtype: np.dtype[Any] | type[np.generic] = np.float32) -> NDArray[Any]:
    """A new stack of n images on disk, as a writable memory map [particle, y, x] to be filled."""
    path.parent.mkdir(parents=True, exist_ok=True)
    modes = {np.dtype(v): k for k, v in MODES.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mrcfile remarks on float16, which is intended
        with mrcfile.new_mmap(path, (n, box, box), mrc_mode=modes[np.dtype(dtype)], overwrite=True) as mrc:
            mrc.set_image_stack()
            mrc.voxel_size = pixel_size
            _label(mrc)
    return np.memmap(path, np.dtype(dtype), "r+", HEADER_BYTES, (n, box, box))
