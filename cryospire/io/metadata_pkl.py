"""cryoDRGN's files: stacks and lists of stacks, with poses.pkl, ctf.pkl and ind.pkl.

A pickle is a program.  The unpickler here knows how to build numpy arrays, and it does that itself, out of
bytes, a shape and a plain number type; every other call is refused before it happens.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryospire.conventions import InputError
from cryospire.io import mrc
from cryospire.io.checks import refuse, unique
from cryospire.io.names import images
from cryospire.io.table import Floats, Optics, ParticleTable, checked, finite, locate

CTF = ["box", "pixel size", "defocus U", "defocus V", "defocus angle", "voltage", "Cs", "amplitude contrast", "phase shift"]
LIMIT = 1 << 32  # bytes: cryoDRGN's largest pickles, for ten million particles, take less


class Refused(Exception):
    """The pickle asks for something that is not a numpy array of numbers."""


class _Dtype:
    """Stands for ``numpy.dtype`` while unpickling."""

    def __init__(self, code: str, *_: Any) -> None:
        if not isinstance(code, str) or code.lstrip("<>|=")[:1] not in tuple("fiub") or len(code) > 4:
            raise Refused(f"numpy type {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        order = state[1]
        if order not in ("<", ">", "|", "="):
            raise Refused(f"byte order {order!r}")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Stands for ``numpy.ndarray`` while unpickling; ``value`` is set from plain bytes."""

    value: NDArray[Any] | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.value = _from_bytes(data, dtype, shape, "F" if fortran else "C")


def _from_bytes(data: Any, dtype: Any, shape: Any, order: str = "C") -> NDArray[Any]:
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes | bytearray) or order not in ("C", "F"):
        raise Refused("an array that is not plain numbers")
    if not isinstance(shape, tuple) or not all(isinstance(n, int) and 0 <= n <= LIMIT for n in shape) or len(shape) > 4:
        raise Refused(f"shape {shape!r}")
    flat = np.frombuffer(bytes(data), dtype.dtype)
    return flat.reshape(shape, order="F" if order == "F" else "C")


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _frombuffer(data: Any, dtype: Any, shape: Any, order: str) -> _Array:
    array = _Array()
    array.value = _from_bytes(data, dtype, shape, order)
    return array


def _scalar(dtype: Any, data: Any) -> int | float:
    value: int | float = _from_bytes(data, dtype, ()).item()
    return value


def _encode(text: Any, encoding: Any) -> bytes:
    """Protocols 0 to 2 keep bytes as latin-1 text."""
    if not isinstance(text, str) or encoding != "latin1":
        raise Refused("text")
    return text.encode("latin1")


def _no_bytes(*values: Any) -> bytes:
    """Protocols 0 to 2 write empty bytes as the call ``bytes()``."""
    if values:
        raise Refused("bytes of a given length")
    return b""


KNOWN: dict[tuple[str, str], Any] = {("numpy", "dtype"): _Dtype, ("numpy", "ndarray"): "ndarray", ("_codecs", "encode"): _encode}
KNOWN["__builtin__", "bytes"] = KNOWN["builtins", "bytes"] = _no_bytes
for _core in ("numpy.core", "numpy._core"):
    KNOWN[f"{_core}.multiarray", "_reconstruct"] = _reconstruct
    KNOWN[f"{_core}.multiarray", "scalar"] = _scalar
    KNOWN[f"{_core}.numeric", "_frombuffer"] = _frombuffer


class _Unpickler(pickle._Unpickler):  # the one in Python: its memo is a dict, so a forged index allocates nothing
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in KNOWN:
            raise Refused(f"{module}.{name}")
        return KNOWN[module, name]

    def load_build(self) -> None:
        if not isinstance(self.stack[-2], _Array | _Dtype):  # type: ignore[attr-defined]
            raise Refused("a state for something that is not an array")
        super().load_build()  # type: ignore[misc]

    dispatch = pickle._Unpickler.dispatch | {pickle.BUILD[0]: load_build}  # type: ignore[assignment]

    def get_extension(self, code: int) -> Any:
        raise Refused(f"extension {code}")


def load(path: Path) -> Any:
    """The arrays of a pickle: an array, or a tuple or list of arrays and numbers.

    Raises InputError where it is not a pickle, is damaged, or asks for anything but arrays of numbers; nothing in it runs.
    """
    try:
        if path.stat().st_size > LIMIT:
            raise InputError(f"{path}: {path.stat().st_size} bytes is too large for a table of poses or CTFs")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    try:
        return _plain(_Unpickler(io.BytesIO(data)).load())
    except Refused as refused:
        asked = " ".join(str(refused).split())[:100]
        raise InputError(f"{path}: refused: the pickle asks for {asked}; only numpy arrays of numbers are read") from None
    except Exception as error:
        raise InputError(f"{path}: not a pickle of numpy arrays ({type(error).__name__}: {' '.join(str(error).split())[:100]})") from None


def _plain(value: Any, depth: int = 0) -> Any:
    if isinstance(value, _Array) and value.value is not None:
        return value.value
    if isinstance(value, tuple | list) and depth < 2:
        if len(value) > 0 and all(isinstance(v, int | float) for v in value):
            return np.array(value)
        if len(value) <= 16:
            return tuple(_plain(v, depth + 1) for v in value)
    raise Refused(f"a {type(value).__name__}")


def poses(path: Path) -> tuple[Floats, Floats]:
    """Rotations (N, 3, 3) and translations (N, 2; fraction of the box, RELION's sign; zero where the file has none)."""
    value = load(path)
    parts = value if isinstance(value, tuple) else (value,)
    if len(parts) not in (1, 2) or not all(isinstance(p, np.ndarray) for p in parts):
        raise InputError(f"{path}: expected rotations, or a tuple of rotations and translations")
    rotation = parts[0]
    if rotation.ndim != 3 or rotation.shape[1:] != (3, 3):
        raise InputError(f"{path}: rotations have shape {rotation.shape}, expected (N, 3, 3)")
    translation = parts[1] if len(parts) == 2 else np.zeros((len(rotation), 2))
    if translation.shape != (len(rotation), 2):
        raise InputError(f"{path}: translations have shape {translation.shape}, expected ({len(rotation)}, 2)")
    translation = finite(path, "translation", translation)
    refuse(np.abs(translation).max(1, initial=0) > 1, path, "translation", translation, "expected a fraction of the box")
    return finite(path, "rotation", rotation), translation


def ctf(path: Path) -> Floats:
    """The table of CTF parameters (N, 9), in the order of ``CTF``."""
    value = load(path)
    if not isinstance(value, np.ndarray) or value.ndim != 2 or value.shape[1] != len(CTF):
        raise InputError(f"{path}: expected an array (N, 9) ({', '.join(CTF)}), found {getattr(value, 'shape', type(value).__name__)}")
    for i, name in enumerate(CTF):
        finite(path, name, value[:, i])
    return value.astype(np.float64)


def indices(path: Path, n: int) -> NDArray[np.int64]:
    """0-based rows to keep, of a pickle or a text file with one a line, checked against the number of particles."""
    value = _listed(path) if path.suffix == ".txt" else load(path)
    if not isinstance(value, np.ndarray) or value.ndim != 1 or value.dtype.kind not in "iu":
        raise InputError(f"{path}: expected an array of whole numbers")
    refuse((value < 0) | (value >= n), path, "index", value, f"there are {n} particles, counted from 0")
    unique(path, "index", value, value)
    if not len(value):
        raise InputError(f"{path}: selects no particles")
    return value.astype(np.int64)


def _listed(path: Path) -> NDArray[np.int64]:
    try:
        words = path.read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or 'not a text file'}") from None
    bad = next((i for i, word in enumerate(words) if not (word.isdecimal() and len(word) < 19)), None)
    if bad is not None:
        raise InputError(f"{path}: row {bad + 1}: index is {words[bad][:40]!r}: expected a whole number, counted from 0")
    return np.array(words, np.int64)


def stacks(path: Path, datadir: Path | None) -> list[tuple[str, int]]:
    """Name (as written) and number of images of every stack: one .mrcs/.mrc, or the lines of a .txt."""
    if path.suffix != ".txt":
        return [(path.name, mrc.stack_shape(path)[0])]
    try:
        names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    if not names:
        raise InputError(f"{path}: lists no stacks")
    return [(name, mrc.stack_shape(p)[0]) for name, p in zip(names, locate(path, names, datadir), strict=True)]


def image_names(path: Path, datadir: Path | None = None) -> list[str]:
    """``000012@stack.mrcs`` of every image, stacks one after another."""
    return [f"{i + 1:06d}@{name}" for name, n in stacks(path, datadir) for i in range(n)]


def on_images(table: Floats, box: NDArray[np.int64]) -> tuple[Floats, list[str]]:
    """The CTF table (N, 9) for images of ``box`` (N,) pixels, with a note where its own box is another.

    cryoDRGN keeps ctf.pkl when images are downsampled, and takes the field of view from it and the box from the images: so here.
    """
    other = table[:, 0] != box
    if not other.any():
        return table, []
    scaled = table.copy()
    scaled[:, 0], scaled[:, 1] = box, table[:, 0] * table[:, 1] / box
    i = int(np.argmax(other))
    said = f"ctf.pkl is for box {table[i, 0]:g} at {table[i, 1]:.4g} Å; the images have {box[i]} pixels, so {scaled[i, 1]:.4g} Å each"
    return scaled, [said]


def read(path: Path, poses_file: Path | None, ctf_file: Path | None, datadir: Path | None = None) -> ParticleTable:
    """The particle table of a stack, or of a list of stacks, with poses.pkl and ctf.pkl.  Raises InputError."""
    if poses_file is None or ctf_file is None:
        raise InputError(f"{path}: a bare stack needs {'poses' if poses_file is None else 'ctf'} (cryoDRGN's .pkl) beside it")
    names = image_names(path, datadir)
    taken = images(path, "image", names)
    rotation, translation = poses(poses_file)
    table = ctf(ctf_file)
    for file, rows in ((poses_file, len(rotation)), (ctf_file, len(table))):
        if rows != len(names):
            raise InputError(f"{file}: {rows} rows, but {path} holds {len(names)} images")
    refuse(table[:, 0] % 1 != 0, ctf_file, "box", table[:, 0], "expected whole pixels")
    located = locate(path, taken.names, datadir)
    table, notes = on_images(table, np.array([mrc.stack_shape(p)[1] for p in located])[taken.stack])
    # box, pixel size, voltage, Cs and amplitude contrast make an optics group; float32 is rounded to the digits it carries.
    keys = np.array([float(f"{v:.6g}") for v in table[:, [0, 1, 5, 6, 7]].ravel()]).reshape(-1, 5)
    values, inverse = np.unique(keys, axis=0, return_inverse=True)
    group: NDArray[np.int32] = inverse.reshape(-1).astype(np.int32)
    zero = np.zeros(len(values))
    none: list[list[float]] = [[] for _ in values]
    labels = [f"group {i + 1}" for i in range(len(values))]
    optics = Optics(labels, values[:, 2], values[:, 3], values[:, 4], values[:, 1], values[:, 0].astype(np.int64), zero, zero, none, none)
    return checked(
        ParticleTable(
            source=path, id=taken.id, image_names=names, stacks=located, stack=taken.stack,
            index=taken.index, row=np.arange(len(names)), rotation=rotation,
            shift=-translation * (optics.box * optics.pixel_size)[group][:, None],
            defocus_u=table[:, 2], defocus_v=table[:, 3], defocus_angle=table[:, 4], phase_shift=table[:, 8],
            ctf_scale=np.ones(len(names)), half_set=np.zeros(len(names), np.int8), group=group, optics=optics,
            notes=("cryoDRGN's CTF starts at minus the amplitude contrast: images made with it look inverted here", *notes),
        )
    )  # fmt: skip
