"""Damaged files end in InputError or in a table that passed every check; nothing else comes out of a reader."""

import pickle
from pathlib import Path

import builders
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from cryospire.conventions import InputError
from cryospire.io import metadata, metadata_cs, metadata_pkl, metadata_star, mrc

MANY = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DAMAGE = st.lists(
    st.tuples(st.integers(0, 1 << 20), st.sampled_from(["flip", "delete", "insert", "cut", "double"]), st.binary(min_size=1, max_size=6)),
    min_size=1,
    max_size=4,
)
STAR_WORDS = st.sampled_from(
    [
        "data_",
        "data_particles",
        "loop_",
        "_rlnImageName",
        "_rlnAngleRot #2",
        "#",
        "1",
        "nan",
        '"',
        "'a b'",
        "x@y",
        "\n",
        "\r\n",
        " ",
        "\t",
        "é",
    ]
)


def damaged(data: bytes, damage: list[tuple[int, str, bytes]]) -> bytes:
    for place, kind, new in damage:
        at = place % (len(data) + 1)
        if kind == "flip":
            data = data[:at] + new + data[at + len(new) :]
        elif kind == "delete":
            data = data[:at] + data[at + len(new) :]
        elif kind == "insert":
            data = data[:at] + new + data[at:]
        elif kind == "cut":
            data = data[:at]
        else:
            data = data[:at] + data[max(0, at - 50) : at] + data[at:]
    return data


def check(error: InputError, path: Path) -> None:
    assert path.name in str(error) and "\n" not in str(error)


@MANY
@given(damage=DAMAGE, kind=st.sampled_from(["star", "cs"]))
def test_damaged_tables(tmp_path: Path, damage: list[tuple[int, str, bytes]], kind: str) -> None:
    p = builders.planted(tmp_path, 6)
    path = builders.star31(tmp_path / "p.star", p) if kind == "star" else builders.cs(tmp_path / "p.cs", builders.cs_rows(p))
    path.write_bytes(damaged(path.read_bytes(), damage))
    try:
        table = metadata.read(path)
    except InputError as error:
        check(error, path)
    else:
        assert np.isfinite(table.rotation).all() and len(table) == len(table.image_names) == len(table.id)


@MANY
@given(words=st.lists(STAR_WORDS, max_size=40), raw=st.binary(max_size=60))
def test_star_scanner_survives_any_text(tmp_path: Path, words: list[str], raw: bytes) -> None:
    path = tmp_path / "f.star"
    path.write_bytes(" ".join(words).encode() + raw)
    try:
        for block in metadata_star.scan(path):
            found = metadata_star.read_columns(path, block, ["rlnAngleRot"], ["rlnImageName"])
            assert all(len(v) == max(block.rows, bool(block.pairs)) for v in found.values())
    except InputError as error:
        check(error, path)


WORD = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z"), exclude_characters="\"'#_"), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.tuples(WORD, st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(["", " ", "a b"])), min_size=1, max_size=8
    ),
    quotes=st.booleans(),
)
def test_what_a_loop_says_is_what_is_read(tmp_path: Path, rows: list[tuple[str, float, str]], quotes: bool) -> None:
    assume(not any(r[0].lower().startswith(("data_", "loop_")) for r in rows))
    path = tmp_path / "f.star"
    columns = {"name": [r[0] for r in rows], "value": [repr(r[1]) for r in rows]} | (
        {"note": [f'"{r[2]}"' for r in rows]} if quotes else {}
    )
    path.write_text(builders.loop("x", columns), encoding="utf-8")
    (block,) = metadata_star.scan(path)
    found = metadata_star.read_columns(path, block, ["value"], ["name", "note"])
    assert found["name"] == [r[0] for r in rows]
    np.testing.assert_allclose(found["value"], [r[1] for r in rows], rtol=1e-15)
    assert not quotes or found["note"] == [r[2] for r in rows]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=DAMAGE, protocol=st.integers(0, 5))
def test_damaged_pickles(tmp_path: Path, damage: list[tuple[int, str, bytes]], protocol: int) -> None:
    path = tmp_path / "f.pkl"
    path.write_bytes(damaged(pickle.dumps((np.zeros((3, 3, 3), np.float32), np.ones((3, 2))), protocol), damage))
    try:
        metadata_pkl.poses(path)
    except InputError as error:
        check(error, path)


@MANY
@given(raw=st.binary(max_size=300))
def test_any_bytes_as_pickle_cs_or_mrc(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "f.bin"
    path.write_bytes(raw)
    for reader in (metadata_pkl.load, metadata_cs.load, mrc.open_stack, mrc.read_volume):
        try:
            reader(path)
        except InputError as error:
            check(error, path)


BOMBS = {
    "a memo of four billion entries": b"\x80\x02]r\xff\xff\xff\x7f.",
    "bytes that are not there": b"\x80\x04\x8e\xff\xff\xff\xff\x00\x00\x00\x00.",
    "an array of a terabyte": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nM\xff\xff\x85C\x01b\x87R.",
    "getattr": b"cbuiltins\ngetattr\n(cos\nS'system'\ntR.",
    "an attribute path": b"\x80\x04\x8c\x05numpy\x8c\x0bdtype.mro.x\x93.",
    "an extension code": b"\x80\x02\x82\x01.",
    "a persistent id": b"Phello\n.",
    "a state for a function": b"\x80\x04\x8c\x07_codecs\x8c\x06encode\x93}\x8c\x04code\x8c\x01xsb.",
    "a name with a line break": b"\x80\x04\x8c\x05num\npy\x8c\x05dt\nype\x93.",
    "many nested lists": b"(" + b"l(" * 5000 + b".",
}


@pytest.mark.parametrize("name", BOMBS)
def test_pickles_that_ask_for_more_than_arrays_are_refused_at_once(tmp_path: Path, name: str) -> None:
    path = tmp_path / "f.pkl"
    path.write_bytes(BOMBS[name])
    with pytest.raises(InputError) as error:
        metadata_pkl.poses(path)
    check(error.value, path)


def test_a_large_table_in_pieces_is_the_table_in_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    p = builders.planted(tmp_path, 40)
    path = builders.star31(tmp_path / "p.star", p)
    whole = metadata.read(path)
    monkeypatch.setattr(metadata_star, "CHUNK", 300)
    pieces = metadata.read(path)
    np.testing.assert_array_equal(pieces.rotation, whole.rotation)
    assert pieces.image_names == whole.image_names


def test_plain_rows_are_parsed_in_bulk_to_the_values_of_the_slow_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    p = builders.planted(tmp_path, 40)
    path = builders.star31(tmp_path / "p.star", p)
    block = metadata_star.scan(path)[1]
    numbers, strings = ["rlnAngleRot", "rlnOpticsGroup"], ["rlnImageName"]
    chunk = next(metadata_star.row_lines(path, block))
    slow = metadata_star._parse_slowly(path, block, chunk, numbers, strings)
    monkeypatch.delattr(metadata_star, "_parse_slowly")
    fast = metadata_star.read_columns(path, block, numbers, strings)
    assert fast["rlnImageName"] == slow["rlnImageName"] == p.names
    np.testing.assert_allclose(fast["rlnAngleRot"], slow["rlnAngleRot"], rtol=1e-15)
