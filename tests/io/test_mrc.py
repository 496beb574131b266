"""MRC files: what is written is what mrcfile reads, whatever the mode and byte order; broken files are named."""

import struct
from pathlib import Path

import mrcfile
import numpy as np
import pytest

from cryospire.conventions import InputError
from cryospire.io import mrc


def images(n: int = 3, box: int = 8) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 20, (n, box, box))


@pytest.mark.parametrize("mode,dtype", [(0, np.int8), (1, np.int16), (2, np.float32), (6, np.uint16), (12, np.float16)])
@pytest.mark.parametrize("order", ["<", ">"])
def test_every_mode_and_byte_order_reads_as_its_own_values(tmp_path: Path, mode: int, dtype: type, order: str) -> None:
    data = np.abs(images()).astype(dtype)
    header = np.zeros(256, f"{order}i4")
    header[:10] = 8, 8, 3, mode, 0, 0, 0, 8, 8, 3
    header[10:13] = np.array([8 * 1.5, 8 * 1.5, 3 * 1.5], f"{order}f4").view(f"{order}i4")
    header[16:19], header[52] = (1, 2, 3), 0
    raw = bytearray(header.tobytes())
    raw[208:216] = b"MAP " + (b"\x44\x44\0\0" if order == "<" else b"\x11\x11\0\0")
    path = tmp_path / "a.mrcs"
    path.write_bytes(bytes(raw) + data.astype(np.dtype(dtype).newbyteorder(order)).tobytes())
    assert mrc.stack_shape(path) == (3, 8, 1.5)
    np.testing.assert_array_equal(mrc.open_stack(path), data)
    raw[212:214] = b"\0\0"  # no machine stamp: the order is found from the numbers
    path.write_bytes(bytes(raw) + data.astype(np.dtype(dtype).newbyteorder(order)).tobytes())
    np.testing.assert_array_equal(mrc.open_stack(path), data)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_stacks_are_read_by_another_program(tmp_path: Path, dtype: type) -> None:
    mrc.write_stack(tmp_path / "a.mrcs", images().astype(dtype), 2.5)
    with mrcfile.open(tmp_path / "a.mrcs") as f:
        np.testing.assert_array_equal(f.data, images().astype(dtype))
        assert f.is_image_stack() and float(f.voxel_size.x) == 2.5
    assert mrcfile.validate(tmp_path / "a.mrcs")


def test_volume_round_trip_keeps_axes_pixel_size_and_origin(tmp_path: Path) -> None:
    volume = images(8)
    mrc.write_volume(tmp_path / "v.mrc", volume, 1.7, origin=(1.0, 2.0, 3.0))
    back, pixel = mrc.read_volume(tmp_path / "v.mrc")
    np.testing.assert_array_equal(back, volume.astype(np.float32))
    assert abs(pixel - 1.7) < 1e-6
    with mrcfile.open(tmp_path / "v.mrc") as f:
        assert f.is_volume() and [float(f.header.origin[a]) for a in "xyz"] == [1, 2, 3]
    assert [p.name for p in tmp_path.iterdir()] == ["v.mrc"]


def test_axis_order_of_the_header_is_honoured(tmp_path: Path) -> None:
    volume = images(8).astype(np.float32)
    with mrcfile.new(tmp_path / "v.mrc") as f:
        f.set_data(np.ascontiguousarray(volume.transpose(2, 1, 0)))  # columns run along z, sections along x
        f.header.mapc, f.header.mapr, f.header.maps = 3, 2, 1
        f.voxel_size = 1.0
    np.testing.assert_array_equal(mrc.read_volume(tmp_path / "v.mrc")[0], volume)


BROKEN = ["truncated", "longer", "header only in part", "empty", "mode 4 is complex", "text", "negative size", "huge extended header"]


def broken(name: str, path: Path) -> None:
    mrc.write_stack(path, images().astype(np.float32), 1.0)
    raw = bytearray(path.read_bytes())
    changes = {
        "truncated": lambda: raw[:-1],
        "longer": lambda: raw + b"0",
        "header only in part": lambda: raw[:500],
        "empty": lambda: b"",
        "mode 4 is complex": lambda: raw[:12] + struct.pack("<i", 4) + raw[16:],
        "text": lambda: b"data_particles\n" * 100,
        "negative size": lambda: struct.pack("<i", -8) + raw[4:],
        "huge extended header": lambda: raw[:92] + struct.pack("<i", 1 << 29) + raw[96:],
    }
    path.write_bytes(bytes(changes[name]()))


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_one_clear_line(tmp_path: Path, name: str) -> None:
    broken(name, tmp_path / "a.mrcs")
    with pytest.raises(InputError) as error:
        mrc.open_stack(tmp_path / "a.mrcs")
    assert "a.mrcs" in str(error.value) and "\n" not in str(error.value)


def test_volumes_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.mrc"
    with pytest.raises(InputError, match="No such file"):
        mrc.read_volume(path)
    bad = images(8)
    bad[0, 0, 0] = np.nan
    for array, pixel, words in [(images(4), 1.0, "not a cube"), (images(8), 0.0, "no voxel size"), (bad, 1.0, "1 values .* not finite")]:
        mrc.write_volume(path, array, pixel)
        with pytest.raises(InputError, match=words):
            mrc.read_volume(path)
    mrc.write_stack(tmp_path / "s.mrcs", np.zeros((2, 8, 8), np.float32), 1.0)
    with pytest.raises(InputError, match="not square"):
        _rectangular(tmp_path / "r.mrcs")


def _rectangular(path: Path) -> None:
    with mrcfile.new(path) as f:
        f.set_data(np.zeros((2, 8, 6), np.float32))
    mrc.stack_shape(path)
