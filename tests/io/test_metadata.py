"""The same particles through every format give the same table; files of every RELION version; what is written is read elsewhere."""

import tracemalloc
from pathlib import Path

import builders
import numpy as np
import pytest
import starfile

from cryospire.conventions import InputError, particle_id
from cryospire.io import metadata, metadata_pkl, metadata_relion, metadata_star, table

FORMATS = ["relion 3.1", "relion 3.0", "cryosparc", "cryodrgn"]


def read(kind: str, folder: Path, p: builders.Planted) -> metadata.ParticleTable:
    if kind == "relion 3.1":
        return metadata.read(builders.star31(folder / "p.star", p))
    if kind == "relion 3.0":
        return metadata.read(builders.star30(folder / "p30.star", p))
    if kind == "cryosparc":
        return metadata.read(builders.cs(folder / "p.cs", builders.cs_rows(p)))
    return metadata.read(**builders.cryodrgn(folder, p))


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_planted_table(tmp_path: Path, kind: str) -> None:
    p = builders.planted(tmp_path, 12, stacks=2)
    t = read(kind, tmp_path, p)
    np.testing.assert_allclose(t.rotation, p.matrices, atol=2e-6)
    np.testing.assert_allclose(t.shift, -p.origin, atol=2e-5)
    np.testing.assert_allclose([t.defocus_u, t.defocus_v], [p.u, p.v], rtol=1e-6)
    np.testing.assert_allclose(t.defocus_angle, p.angle, atol=1e-4)
    assert t.id.tolist() == [particle_id(name) for name in p.names]
    assert [t.stacks[s].name for s in t.stack] == [name.split("@")[1] for name in p.names]
    assert t.index.tolist() == [int(name.split("@")[0]) - 1 for name in p.names]
    assert t.half_set.tolist() == ([0] * 12 if kind == "cryodrgn" else p.half.tolist())
    o = t.optics
    found = [float(x[0]) for x in (o.voltage, o.cs, o.amplitude_contrast, o.pixel_size, o.box)]
    np.testing.assert_allclose(found, [300, 2.7, 0.1, builders.PIXEL, builders.BOX], rtol=1e-6)
    assert t.sign == (-1 if kind == "cryosparc" else 0)
    assert all(path.is_absolute() for path in t.stacks)
    metadata.check_stacks(t)


def test_several_optics_groups_keep_their_own_pixel_size_box_and_voltage(tmp_path: Path) -> None:
    p = builders.planted(tmp_path, 12, stacks=2)
    builders.stack(tmp_path / "s1.mrcs", 6, box=20)
    optics = {
        "rlnOpticsGroup": [7, 3],
        "rlnOpticsGroupName": ['"two words"', "b"],
        "rlnVoltage": [200, 300],
        "rlnSphericalAberration": [1.4, 2.7],
        "rlnAmplitudeContrast": [0.07, 0.1],
        "rlnImagePixelSize": [1.5, 2.5],
        "rlnImageSize": [20, 16],
        "rlnBeamTiltX": [0.5, -0.25],
        "rlnBeamTiltY": [0, 1],
        "rlnOddZernike": ["[0.1,-0.2]", "[]"],
    }
    t = metadata.read(builders.star31(tmp_path / "p.star", p, optics, builders.particle_columns(p) | {"rlnOpticsGroup": [3] * 6 + [7] * 6}))
    metadata.check_stacks(t)
    assert t.optics.name == ["two words", "b"] and t.optics.odd_zernike == [[0.1, -0.2], []]
    assert t.group.tolist() == [1] * 6 + [0] * 6
    assert t.optics.box[t.group].tolist() == [16] * 6 + [20] * 6
    assert t.optics.beam_tilt_x[t.group].tolist() == [-0.25] * 6 + [0.5] * 6
    assert any("aberrations" in note for note in t.notes)
    two = builders.columns30(p) | {"rlnMagnification": [1e4] * 6 + [2e4] * 6}
    assert sorted(metadata.read(builders.star30(tmp_path / "old.star", p, two)).optics.pixel_size) == [1.25, 2.5]


def test_origins_in_pixels_use_each_groups_pixel_size(tmp_path: Path) -> None:
    p = builders.planted(tmp_path, 4)
    columns = builders.columns30(p) | {"rlnMagnification": [1e4, 1e4, 2e4, 2e4], "rlnOriginX": [4.0] * 4}
    t = metadata.read(builders.star30(tmp_path / "p.star", p, columns))
    assert t.shift[:, 0].tolist() == [-10.0, -10.0, -5.0, -5.0]


@pytest.mark.parametrize(
    "name", ["windows", "comments and blanks", "quotes", "no final newline", "bom", "reordered columns", "defaults", "pairs"]
)
def test_star_dialects(tmp_path: Path, name: str) -> None:
    p = builders.planted(tmp_path, 6)
    path = builders.star31(tmp_path / "p.star", p, end="\r\n" if name == "windows" else "\n")
    columns = builders.particle_columns(p)
    text = path.read_text()
    if name == "comments and blanks":
        path.write_text(text.replace("000003@", "\n# a remark\n\n000003@"))
    elif name == "quotes":
        builders.star31(path, p, particles={"rlnNote": ["'a b'", '"c d"', '""', "it's", "x", "y"]} | columns)
    elif name == "no final newline":
        path.write_text(text.rstrip())
    elif name == "bom":
        path.write_bytes(b"\xef\xbb\xbf" + text.strip().encode())
    elif name == "reordered columns":
        builders.star31(path, p, particles=dict(reversed(columns.items())))
    elif name == "defaults":
        for c in ("rlnOriginXAngst", "rlnOriginYAngst", "rlnRandomSubset", "rlnOpticsGroup", "rlnDefocusV"):
            del columns[c]
        t = metadata.read(builders.star31(path, p, particles=columns))
        assert not t.shift.any() and not t.half_set.any() and (t.defocus_v == t.defocus_u).all()
    elif name == "pairs":  # a table of one row, as some programs write it
        pairs = "".join(f"_{k} {v[0]}\n" for k, v in builders.optics_columns().items())
        path.write_text("data_optics\n\n" + pairs + builders.loop("particles", columns))
    t = metadata.read(path)
    np.testing.assert_allclose(t.rotation, p.matrices, atol=1e-9)
    assert t.optics.voltage.tolist() == [300] and len(t) == 6


def test_one_half_of_a_refinement_is_divided_anew(tmp_path: Path) -> None:
    p = builders.planted(tmp_path, n=6)
    columns = builders.particle_columns(p) | {"rlnRandomSubset": np.ones(6, int)}
    t = metadata.read(builders.star31(tmp_path / "half.star", p, particles=columns))
    assert not t.half_set.any() and any("divided anew" in note for note in t.notes)


def test_stacks_are_found_beside_the_table_above_it_or_under_datadir(tmp_path: Path) -> None:
    p = builders.planted(tmp_path / "project" / "Extract" / "job001", 6)
    p.names = [name.replace("@", "@Extract/job001/") for name in p.names]
    job = tmp_path / "project" / "Refine3D" / "job002"
    job.mkdir(parents=True)
    star = builders.star31(job / "run_data.star", p)
    expected = (tmp_path / "project/Extract/job001/s0.mrcs").resolve()
    assert metadata.read(star).stacks[0].resolve() == expected
    alone = builders.star31(tmp_path / "alone.star", p)
    with pytest.raises(InputError, match="datadir"):
        metadata.read(alone)
    assert metadata.read(alone, datadir=tmp_path / "project").stacks[0].resolve() == expected
    assert metadata.read(alone, datadir=tmp_path / "project/Extract/job001").stacks[0].resolve() == expected


def test_ids_follow_the_image_and_not_the_row_or_the_way_it_is_written(tmp_path: Path) -> None:
    p = builders.planted(tmp_path, 6)
    first = metadata.read(builders.star31(tmp_path / "a.star", p))
    columns = {k: v[::-1] for k, v in builders.particle_columns(p).items()}
    columns["rlnImageName"] = [f"{int(n.split('@')[0])}@./{n.split('@')[1]}" for n in columns["rlnImageName"]]
    second = metadata.read(builders.star31(tmp_path / "b.star", p, particles=columns))
    assert second.id.tolist() == first.id.tolist()[::-1]
    assert (first.id >= 0).all() and len(np.unique(first.id)) == 6


def test_cryosparc_passthrough_is_joined_on_uid_whatever_the_order(tmp_path: Path) -> None:
    p = builders.planted(tmp_path, 8)
    rows = builders.cs_rows(p)
    blob = [n for n in rows.dtype.names if n.startswith("blob/")]
    main = rows[[n for n in rows.dtype.names if n not in blob]]
    extra = rows[["uid", *blob]][np.random.default_rng(1).permutation(8)]
    builders.cs(tmp_path / "main.cs", main)
    builders.cs(tmp_path / "pass.cs", extra)
    with pytest.raises(InputError, match=r"blob/path.*passthrough"):
        metadata.read(tmp_path / "main.cs")
    t = metadata.read(tmp_path / "main.cs", passthrough=[tmp_path / "pass.cs"])
    assert t.image_names == p.names
    np.testing.assert_allclose(t.rotation, p.matrices, atol=2e-6)


def test_distortions_become_the_optics_groups_own(tmp_path: Path) -> None:
    p = builders.planted(tmp_path, 6)
    rows = builders.with_column(builders.cs_rows(p), "ctf/anisomag", 4, 0)
    rows["ctf/anisomag"][3:] = [0.02, 0.01, -0.005, -0.03]
    t = metadata.read(builders.cs(tmp_path / "p.cs", rows))
    np.testing.assert_allclose(t.optics.magnification[t.group[3:]], np.tile([[1.02, 0.01], [-0.005, 0.97]], (3, 1, 1)), atol=1e-6)
    np.testing.assert_array_equal(t.optics.magnification[t.group[0]], np.eye(2))
    small = builders.with_column(builders.cs_rows(p), "ctf/trefoil_A", 2, 500.0)
    assert any("trefoil_A is not corrected: at most 0.003" in n for n in metadata.read(builders.cs(tmp_path / "q.cs", small)).notes)
    metadata.write_star(tmp_path / "out.star", t)
    back = metadata.read(tmp_path / "out.star")
    np.testing.assert_allclose(back.optics.magnification, t.optics.magnification, atol=1e-6)
    np.testing.assert_allclose(back.shift, t.shift, atol=1e-5)


def test_cryosparc_zero_rotation_and_several_classes(tmp_path: Path) -> None:
    p = builders.planted(tmp_path, 6)
    rows = builders.cs_rows(p)
    rows["alignments3D/pose"][2] = 0
    t = metadata.read(builders.cs(tmp_path / "p.cs", rows))
    np.testing.assert_array_equal(t.rotation[2], np.eye(3))
    assert any("zero" in note for note in t.notes)
    multi = [d for d in rows.dtype.descr if not d[0].startswith("alignments3D/")]
    k = "alignments3D_multi"
    multi += [(f"{k}/pose", "<f4", (2, 3)), (f"{k}/shift", "<f4", (2, 2)), (f"{k}/class_posterior", "<f4", (2,)), (f"{k}/psize_A", "<f4")]
    several = np.zeros(6, np.dtype(multi))
    for name in rows.dtype.names:
        if name in several.dtype.names:
            several[name] = rows[name]
    best = np.arange(6) % 2
    several[f"{k}/pose"] = np.random.default_rng(0).normal(0, 1, (6, 2, 3))
    several[f"{k}/pose"][np.arange(6), best] = rows["alignments3D/pose"]
    several[f"{k}/shift"][np.arange(6), best] = rows["alignments3D/shift"]
    several[f"{k}/class_posterior"][np.arange(6), best] = 0.9
    several[f"{k}/psize_A"] = rows["alignments3D/psize_A"]
    u = metadata.read(builders.cs(tmp_path / "m.cs", several))
    np.testing.assert_allclose(u.rotation, t.rotation, atol=1e-6)
    np.testing.assert_allclose(u.shift, t.shift, atol=1e-6)


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_every_protocol_and_precision(tmp_path: Path, protocol: int) -> None:
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float64, ">f4", np.int64, np.uint32):
        for array in (
            rng.normal(0, 9, (5, 3, 3)).astype(dtype),
            np.asfortranarray(rng.normal(0, 9, (4, 2)).astype(dtype)),
            np.zeros((0, 2), dtype),
        ):
            np.testing.assert_array_equal(metadata_pkl.load(builders.pickled(tmp_path / "a.pkl", array, protocol)), array)
            both = metadata_pkl.load(builders.pickled(tmp_path / "a.pkl", (array, array[:1]), protocol))
            np.testing.assert_array_equal(both[0], array)
    numbers = builders.pickled(tmp_path / "a.pkl", [np.int64(3), np.int64(5), 7], protocol)
    assert metadata_pkl.indices(numbers, 8).tolist() == [3, 5, 7]


def test_ctf_pkl_of_images_before_downsampling(tmp_path: Path) -> None:
    """CryoBench's ctf.pkl is of box 256 at 1.5 Å, its images of 128: shifts and field of view stay in Å."""
    p = builders.planted(tmp_path, 12)
    files = builders.cryodrgn(tmp_path, p)
    straight = metadata.read(**files)
    ctf = builders.ctf_table(p)
    ctf[:, 0], ctf[:, 1] = 2 * builders.BOX, builders.PIXEL / 2
    files["ctf"] = builders.pickled(tmp_path / "larger.pkl", ctf)
    t = metadata.read(**files)
    metadata.check_stacks(t)
    assert t.optics.box.tolist() == [builders.BOX] and t.optics.pixel_size.tolist() == [builders.PIXEL]
    np.testing.assert_allclose(t.shift, straight.shift)
    assert any("box 32 at 1.25 Å" in note and "16 pixels, so 2.5 Å" in note for note in t.notes)


def test_a_selection_by_ind_pkl_keeps_rows_of_the_source(tmp_path: Path) -> None:
    p = builders.planted(tmp_path, 8)
    whole = metadata.read(builders.star31(tmp_path / "p.star", p))
    part = metadata.read(tmp_path / "p.star", ind=builders.pickled(tmp_path / "ind.pkl", np.array([6, 1])))
    assert part.row.tolist() == [6, 1] and part.image_names == [p.names[6], p.names[1]]
    assert part.id.tolist() == whole.id[[6, 1]].tolist()
    (tmp_path / "rows.txt").write_text("6\n1\n")
    cs = builders.cs(tmp_path / "p.cs", builders.cs_rows(p))
    for source in ({"particles": tmp_path / "p.star"}, {"particles": cs}, builders.cryodrgn(tmp_path, p)):
        other = metadata.read(**source, ind=tmp_path / "rows.txt")
        assert other.id.tolist() == part.id.tolist() and other.row.tolist() == [6, 1]
        np.testing.assert_allclose(other.rotation, p.matrices[[6, 1]], atol=2e-6)


def test_bare_poses_without_translations(tmp_path: Path) -> None:
    p = builders.planted(tmp_path, 6)
    files = builders.cryodrgn(tmp_path, p)
    builders.pickled(files["poses"], p.matrices)
    t = metadata.read(tmp_path / "s0.mrcs", poses=files["poses"], ctf=files["ctf"])
    assert not t.shift.any() and t.image_names == p.names


@pytest.mark.parametrize("kind", FORMATS)
def test_written_star_is_read_back_and_by_another_reader(tmp_path: Path, kind: str) -> None:
    p = builders.planted(tmp_path, 12, stacks=2)
    t = read(kind, tmp_path, p)
    metadata.write_star(tmp_path / "out.star", t)
    back = metadata.read(tmp_path / "out.star")
    np.testing.assert_allclose(back.rotation, t.rotation, atol=1e-7)
    np.testing.assert_allclose(back.shift, t.shift, atol=1e-6)
    assert back.id.tolist() == t.id.tolist() and back.half_set.tolist() == t.half_set.tolist()
    tables = starfile.read(tmp_path / "out.star", always_dict=True)
    assert list(tables) == ["optics", "particles"] and list(tables["particles"]["rlnImageName"]) == t.image_names
    np.testing.assert_allclose(tables["particles"]["rlnOriginXAngst"], p.origin[:, 0], atol=1e-4)


def test_rotations_at_the_poles_survive_writing(tmp_path: Path) -> None:
    p = builders.planted(tmp_path, 4)
    p.euler[:, 1] = [0, 180, 0, 180]
    t = metadata.read(builders.star31(tmp_path / "p.star", p))
    metadata.write_star(tmp_path / "out.star", t)
    np.testing.assert_allclose(metadata.read(tmp_path / "out.star").rotation, p.matrices, atol=1e-6)


def test_a_long_table_costs_its_columns_and_no_strings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak memory a row, whatever the length: a table of ten million rows takes 2.4 GB."""
    n = 40_000
    p = builders.planted(tmp_path, 4)
    columns = {k: v * (n // 4) for k, v in builders.particle_columns(p).items()}
    columns["rlnImageName"] = [f"{i % 1000 + 1:06d}@Extract/job012/Micrographs/a_long_name_{i // 1000:06d}.mrcs" for i in range(n)]
    (tmp_path / "Extract/job012/Micrographs").mkdir(parents=True)
    for k in range(n // 1000):
        (tmp_path / f"Extract/job012/Micrographs/a_long_name_{k:06d}.mrcs").touch()
    star = builders.star31(tmp_path / "p.star", p, particles=columns)
    monkeypatch.setattr(metadata_star, "CHUNK", 1 << 16)
    for module in (table, metadata_relion):
        monkeypatch.setattr(module, "ROWS", 1000)
    tracemalloc.start()
    t = metadata.read(star)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 280 * n, peak / n  # 9 numbers of a rotation, 12 others, and what sorting the ids takes
    assert t.image_names[n - 1] == columns["rlnImageName"][n - 1] and t.image_names[::-1000][1] == columns["rlnImageName"][n - 1001]
