"""Broken input: each file gives one clear line, which names the file and says what is wrong, and exit code 2."""

import os
import pickle
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest
import yaml
from bad_files import CASES, aberrated, case, column, cs, drgn, optics, selection, text, without

from cryospire import cli

P = builders.Planted


column("rlnAngleRot", 3, "nan", r"row 4: rlnAngleRot is nan", "nan angle")
column("rlnAngleTilt", 3, "inf", r"row 4: rlnAngleTilt is inf", "infinite angle")
column("rlnOriginXAngst", 2, "1,5", r"line \d+: rlnOriginXAngst is '1,5': not a number", "decimal comma")
column("rlnOriginXAngst", 2, "1_5", r"rlnOriginXAngst is '1_5': not a number", "underscored number")
column("rlnDefocusU", 1, -15000.0, r"row 2: defocus_u is -15000.0: negative", "negative defocus")
column("rlnDefocusV", 1, 9e6, r"row 2: defocus_v is 9000000.0: more than 20 µm", "huge defocus")
column("rlnOriginYAngst", 5, 4000.0, r"row 6: shift .* larger than the box", "shift larger than the box")
column("rlnRandomSubset", 0, 3, r"row 1: rlnRandomSubset is 3.0", "third half-set")
column("rlnOpticsGroup", 6, 2, r"row 7: rlnOpticsGroup is 2.0: no such group", "missing optics group")
column("rlnImageName", 4, "000000@s0.mrcs", r"row 5: .*count from 1", "zero-based image")
column("rlnImageName", 4, "000013@s0.mrcs", r"row 5: image 000013@s0.mrcs: .*s0.mrcs holds 12 images", "image beyond the stack")
column("rlnImageName", 4, "000001@s0.mrcs", r"row 5: rlnImageName is 000001@s0.mrcs: already in row 1", "repeated image")
column("rlnImageName", 4, "a@s0.mrcs", r"row 5: rlnImageName is 'a@s0.mrcs': expected NUMBER@STACK", "no image number")
column("rlnImageName", 4, "000005@", r"row 5: .*no stack is named", "no stack name")
column("rlnImageName", 4, "000005@gone.mrcs", r"stack gone.mrcs: no such file", "missing stack")
column("rlnTomoName", 0, "tomo1", r"rlnTomoName: subtomograms", "subtomograms")
optics("rlnVoltage", 300000.0, r"voltage is 300000.0: expected kV", "voltage in volts")
optics("rlnSphericalAberration", 2.7e7, r"cs is 27000000.0: expected mm", "aberration in ångström")
optics("rlnAmplitudeContrast", 10, r"amplitude_contrast is 10.0: expected a fraction", "amplitude contrast in percent")
optics("rlnImagePixelSize", 0.0, r"pixel_size is 0.0", "pixel size zero")
optics("rlnImagePixelSize", "nan", r"pixel_size is nan", "pixel size nan")
optics("rlnImageSize", 15, r"box is 15: expected an even", "odd box")
optics("rlnImageSize", 32, r"optics group 'opticsGroup1' has box 32, .*s0.mrcs has 16", "box unlike the stack")
optics("rlnImageSize", 16.5, r"rlnImageSize is \[16.5\]", "fractional box")
optics("rlnImageDimensionality", 3, r"rlnImageDimensionality is 3", "volumes instead of images")
optics("rlnCtfDataAreCtfPremultiplied", 1, r"multiplied by their CTF", "premultiplied images")
optics("rlnOddZernike", "[0.1;2]", r"rlnOddZernike is '\[0.1;2\]'", "garbled aberrations")
without("rlnAnglePsi", r"missing column rlnAnglePsi .*no poses", "no psi")
without("rlnDefocusU", r"missing column rlnDefocusU", "no defocus")
without("rlnImageName", r"no table with the column rlnImageName", "no image names")
text(lambda t: t.replace("000003@s0.mrcs ", "000003@s0.mrcs 1 "), r"line \d+: 12 values for the 11 columns", "a value too many")
text(lambda t: t.replace("000003@s0.mrcs ", ""), r"line \d+: 10 values for the 11 columns", "a value too few")
text(lambda t: t.replace("000003@", '"000003@'), r"line \d+: .*a quote that does not end", "open quote")
text(lambda t: t.split("000001@")[0], r"block data_particles holds no particles", "empty loop")
text(lambda t: t.replace("\n", "\r"), r"STAR|expected|data_|not", "lone carriage returns")
text(lambda t: t.encode("utf-16"), r"not a text file", "utf-16")
text(lambda t: t.replace("000004@", "00000\xff4@").encode("latin-1"), r"line \d+: not UTF-8|is '00000", "latin-1")
text(lambda t: "", r"no data_ block", "empty file")
text(lambda t: t.replace("_rlnAnglePsi #4", "_rlnAngleRot #4"), r"line \d+: column _rlnAngleRot appears twice", "column twice")
text(lambda t: t.replace("data_particles", "data_optics"), r"line \d+: block data_optics appears twice", "block twice")
text(lambda t: t.replace("loop_", "lop_"), r"line \d+", "misspelt loop")
text(lambda t: t[: int(len(t) * 0.9)].rsplit(" ", 1)[0], r"line \d+: \d+ values for the 11 columns", "cut off in a row")
text(lambda t: t.replace("300.0", "x"), r"block data_optics|line \d+: rlnVoltage is 'x'", "voltage in words")
cs(lambda r: r["uid"].__setitem__(3, r["uid"][7]), r"row 8: uid is \d+: already in row 4", "uid twice")
cs(lambda r: r["alignments3D/pose"].__setitem__(2, np.nan), r"row 3: alignments3D/pose", "cs nan pose")
cs(lambda r: r["blob/sign"].__setitem__(2, 1), r"row 3: blob/sign is 1.0: but row 1 has -1", "cs mixed signs")
cs(lambda r: r["blob/shape"].__setitem__(2, (16, 12)), r"row 3: blob/shape .*not square", "cs oblong images")
cs(lambda r: r["alignments3D/split"].__setitem__(2, 2), r"row 3: alignments3D/split is 2", "cs third split")
cs(lambda r: np.negative(r["ctf/df1_A"], r["ctf/df1_A"]) is None, r"row 1: defocus_u .*negative", "cs overfocus")
cs(lambda r: r[:0], r"holds no particles", "cs empty")
cs(lambda r: r[[n for n in r.dtype.names if n != "uid"]].copy(), r"no column uid", "cs without uid")
cs(lambda r: r[[n for n in r.dtype.names if not n.startswith("align")]].copy(), r"missing columns alignments3D/pose", "cs without poses")
cs(lambda r: np.zeros(4), r"not a cryoSPARC table", "cs plain numbers")
cs(lambda r: np.add(r["blob/idx"], 1, r["blob/idx"]) is None, r"row 12: image 000013@s0.mrcs", "cs one-based")


aberrated("ctf/trefoil_A", 2, 1e6, r"row 1: ctf/trefoil_A .*phase of 6.\d+ radians at Nyquist that is not corrected", "cs large trefoil")
aberrated("ctf/tetra_A", 4, 1e8, r"row 1: ctf/tetra_A .*phase of 7.\d+ radians at Nyquist that is not corrected", "cs large tetrafoil")
aberrated("ctf/shift_A", 2, 3.0, r"row 1: ctf/shift_A .*phase of 3.77 radians at Nyquist that is not corrected", "cs beam shift")
aberrated("ctf/anisomag", 4, 1.0, r"magnification is .*within 0.2 of identity", "cs magnification of two")
aberrated("ctf/anisomag", 4, np.nan, r"row 1: ctf/anisomag is .*not a finite number", "cs nan magnification")
optics("rlnMagMat00", 2.0, r"magnification is .*within 0.2 of identity", "magnification of two")
optics("rlnEvenZernike", "[nan]", r"rlnEvenZernike is '\[nan\]'", "nan aberrations")


def rewrite(key: str, value: Any) -> Callable[[Path, dict[str, Path]], None]:
    return lambda folder, files: builders.pickled(files[key], value)


EYE = np.tile(np.eye(3), (12, 1, 1))
drgn(rewrite("poses", EYE[:11]), r"poses.pkl: 11 rows, but .*holds 12 images", "a pose too few")
drgn(rewrite("poses", EYE * 2), r"row 1: rotation .*not a rotation matrix", "scaled rotations")
drgn(rewrite("poses", EYE * [1, 1, -1]), r"row 1: rotation .*not a rotation matrix", "reflections")
drgn(rewrite("poses", np.zeros((12, 3))), r"rotations have shape \(12, 3\)", "euler angles as rotations")
drgn(rewrite("poses", (EYE, np.full((12, 2), 7.0))), r"row 1: translation .*fraction of the box", "translations in pixels")
drgn(rewrite("poses", {"rotations": 1}), r"refused: .*a dict", "a dictionary")
drgn(rewrite("ctf", np.zeros((12, 8))), r"expected an array \(N, 9\)", "ctf of eight columns")
drgn(lambda d, f: f["poses"].write_bytes(f["poses"].read_bytes()[:-30]), r"poses.pkl: not a pickle", "truncated pickle")
drgn(lambda d, f: f["poses"].write_text("hello"), r"poses.pkl: not a pickle", "text as pickle")
drgn(lambda d, f: f.__setitem__("ctf", None), r"needs ctf", "no ctf.pkl")
drgn(lambda d, f: f["particles"].write_text("\n"), r"lists no stacks", "empty list")
drgn(lambda d, f: f["particles"].write_text("s0.mrcs\nnone.mrcs\n"), r"stack none.mrcs: no such file", "list of a missing stack")


selection(np.array([3, 12]), r"ind.pkl: row 2: index is 12: there are 12 particles, counted from 0", "index beyond the table")
selection(np.array([3, -1]), r"ind.pkl: row 2: index is -1: there are 12", "negative index")
selection(np.array([3, 5, 3]), r"ind.pkl: row 3: index is 3: already in row 1", "index twice")
selection(np.array([0.5]), r"ind.pkl: expected an array of whole numbers", "fractional index")
selection(np.zeros(0, int), r"ind.pkl: selects no particles", "empty selection")
selection("3\n4\nx5\n", r"ind.txt: row 3: index is 'x5': expected a whole number", "garbled list of rows", "ind.txt")


class Hostile:
    def __reduce__(self) -> Any:
        return os.system, ("touch hacked",)


drgn(rewrite("poses", Hostile()), r"refused: the pickle asks for \w+.system", "hostile pickle")
drgn(rewrite("ctf", [np.zeros(3), Hostile()]), r"refused: the pickle asks for \w+.system", "hostile list")
drgn(rewrite("ctf", np.array([Hostile()] * 9, object)), r"refused", "object array")


@case(r"s0.mrcs: truncated: 12 images of 16 x 16 \(float32\)")
def truncated_stack(folder: Path, p: P) -> dict[str, Any]:
    path = folder / "s0.mrcs"
    path.write_bytes(path.read_bytes()[:-1000])
    return {"particles": builders.star31(folder / "p.star", p)}


@case(r"s0.mrcs: not an MRC file")
def stack_that_is_not_mrc(folder: Path, p: P) -> dict[str, Any]:
    (folder / "s0.mrcs").write_bytes(b"II*\0" + bytes(range(256)) * 100)
    return {"particles": builders.star31(folder / "p.star", p)}


@case(r"s0.mrcs: MRC mode 4 is not supported")
def complex_stack(folder: Path, p: P) -> dict[str, Any]:
    path = folder / "s0.mrcs"
    raw = path.read_bytes()
    path.write_bytes(raw[:12] + struct.pack("<i", 4) + raw[16:])
    return {"particles": builders.star31(folder / "p.star", p)}


@case(r"median 1.\d+; .*looks like µm")
def defocus_in_micrometres(folder: Path, p: P) -> dict[str, Any]:
    p.u, p.v = p.u / 1e4, p.v / 1e4
    return {"particles": builders.star31(folder / "p.star", p)}


@case(r"row \d+: uid is \d+: not in the passthrough file .*other.cs")
def passthrough_of_another_job(folder: Path, p: P) -> dict[str, Any]:
    rows = builders.cs_rows(p)
    builders.cs(folder / "p.cs", rows)
    rows["uid"] += 1000
    return {"particles": folder / "p.cs", "passthrough": [builders.cs(folder / "other.cs", rows)]}


@case(r"p.cs: not a cryoSPARC table: .*allow_pickle")
def cs_with_a_pickle_inside(folder: Path, p: P) -> dict[str, Any]:
    return {"particles": builders.cs(folder / "p.cs", np.array([Hostile()], object))}


@case(r"p.cs: ")
def truncated_cs(folder: Path, p: P) -> dict[str, Any]:
    path = builders.cs(folder / "p.cs", builders.cs_rows(p))
    path.write_bytes(path.read_bytes()[:-7])
    return {"particles": path}


@case(r"p.star: no pixel size")
def relion30_without_pixel_size(folder: Path, p: P) -> dict[str, Any]:
    columns = builders.columns30(p)
    del columns["rlnDetectorPixelSize"]
    return {"particles": builders.star30(folder / "p.star", p, columns)}


@case(r"missing column rlnVoltage")
def relion30_without_voltage(folder: Path, p: P) -> dict[str, Any]:
    columns = builders.columns30(p)
    del columns["rlnVoltage"]
    return {"particles": builders.star30(folder / "p.star", p, columns)}


@case(r"missing column rlnOpticsGroup, and there are 2")
def two_groups_and_no_column(folder: Path, p: P) -> dict[str, Any]:
    columns = builders.particle_columns(p)
    del columns["rlnOpticsGroup"]
    two = {k: [*v, *v] for k, v in builders.optics_columns().items()} | {"rlnOpticsGroup": [1, 2]}
    return {"particles": builders.star31(folder / "p.star", p, two, columns)}


@case(r"particles.xlsx: unknown kind")
def unknown_format(folder: Path, p: P) -> dict[str, Any]:
    (folder / "particles.xlsx").write_text("x")
    return {"particles": folder / "particles.xlsx"}


@case(r"gone.star: No such file")
def missing_table(folder: Path, p: P) -> dict[str, Any]:
    return {"particles": folder / "gone.star"}


@case(r"poses.pkl: poses and CTFs come with")
def pickles_beside_a_star(folder: Path, p: P) -> dict[str, Any]:
    files = builders.cryodrgn(folder, p)
    return {"particles": builders.star31(folder / "p.star", p), "poses": files["poses"]}


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 40


@pytest.mark.parametrize("name", CASES)
def test_bad_file_is_one_clear_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    build, words = CASES[name]
    monkeypatch.chdir(tmp_path)
    values = build(tmp_path, builders.planted(tmp_path))
    plain = {k: [str(x) for x in v] if isinstance(v, list) else str(v) for k, v in values.items()}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(plain))
    monkeypatch.setattr(sys, "argv", ["cryospire", "preflight", "--config", "config.yaml", "--output", "out/preflight.json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    message = capsys.readouterr().err.strip()
    assert stop.value.code == 2, message
    assert message.count("\n") == 0 and message.startswith("cryospire: error: ")
    assert str(tmp_path) in message
    assert re.search(words, message), message
    assert not (tmp_path / "hacked").exists() and not (tmp_path / "out").exists()


def test_the_hostile_pickle_would_have_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Hostile()))
    assert (tmp_path / "hacked").exists()
