"""Selections go back byte for byte, by id, state or latent box; what was not selected is gone and nothing else has changed."""

import pickle
from pathlib import Path

import builders
import numpy as np
import pytest
import starfile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cryospire.config import Config
from cryospire.conventions import InputError, particle_id
from cryospire.io import metadata, stores
from cryospire.maths.poses import random_rotations
from cryospire.stages import distortions, export

POSE = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "rlnOriginXAngst", "rlnOriginYAngst")
SMALL = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def config(source: Path, **extra: object) -> Config:
    return Config.model_validate({"particles": source} | extra)


def listed(path: Path, names: list[str]) -> Path:
    path.write_text("".join(f"{name}\n" for name in names))
    return path


def rich_star(folder: Path, p: builders.Planted, end: str = "\n") -> Path:
    """Columns and blocks that cryospire knows nothing of, comments, quotes, odd spacing."""
    columns = {"wrongNote": ['"two words"', "it's", "-0", "1e-3"] * (len(p.names) // 4)} | builders.particle_columns(p)
    path = builders.star31(folder / "rich.star", p, particles=columns, end=end)
    extra = builders.loop("micrographs", {"rlnMicrographName": ["a.mrc", "b.mrc"], "x": ["007", "+1.50"]}, end)
    path.write_bytes(b"# by hand\n" + path.read_bytes() + extra.encode() + b"# the end")
    return path


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_everything_selected_is_the_file_itself(tmp_path: Path, end: str) -> None:
    p = builders.planted(tmp_path, 12)
    source = rich_star(tmp_path, p, end)
    export.run(config(source), tmp_path / "out.star", ids=listed(tmp_path / "ids.txt", p.names))
    assert (tmp_path / "out.star").read_bytes() == source.read_bytes()


@SMALL
@given(keep=st.lists(st.integers(0, 11), min_size=1, unique=True), by_name=st.booleans())
def test_star_keeps_selected_rows_and_all_else_byte_for_byte(tmp_path: Path, keep: list[int], by_name: bool) -> None:
    p = builders.planted(tmp_path, 12)
    source = rich_star(tmp_path, p)
    names = [p.names[i] if by_name else str(particle_id(p.names[i])) for i in keep]
    export.run(config(source), tmp_path / "out.star", ids=listed(tmp_path / "ids.txt", names), force=True)
    gone = {p.names[i] for i in range(12)} - {p.names[i] for i in keep}
    expected = [line for line in source.read_bytes().splitlines(True) if not any(name.encode() in line for name in gone)]
    assert (tmp_path / "out.star").read_bytes() == b"".join(expected)
    table = metadata.read(tmp_path / "out.star")
    assert table.id.tolist() == [particle_id(p.names[i]) for i in sorted(keep)]


@SMALL
@given(keep=st.lists(st.integers(0, 11), min_size=1, unique=True))
def test_cs_rows_are_bit_for_bit(tmp_path: Path, keep: list[int]) -> None:
    p = builders.planted(tmp_path, 12)
    rows = builders.cs_rows(p)
    rows["alignments3D/shift"][3] = np.frombuffer(b"\x01\x00\xc0\x7f\xff\xff\xff\x7f", "<f4")  # NaN payloads survive, untouched
    source = builders.cs(tmp_path / "p.cs", rows)
    export.run(config(source), tmp_path / "out.cs", ids=listed(tmp_path / "ids.txt", [p.names[i] for i in keep]), force=True)
    with (tmp_path / "out.cs").open("rb") as f:
        back = np.load(f)
    assert back.dtype == rows.dtype and back.tobytes() == rows[sorted(keep)].tobytes()


def test_last_line_without_newline_keeps_the_next_row_apart(tmp_path: Path) -> None:
    p = builders.planted(tmp_path, 4)
    source = builders.star31(tmp_path / "p.star", p)
    source.write_text(source.read_text().rstrip())
    export.run(config(source), tmp_path / "out.star", ids=listed(tmp_path / "ids.txt", p.names[2:]))
    assert metadata.read(tmp_path / "out.star").image_names == p.names[2:]
    assert len(starfile.read(tmp_path / "out.star")["particles"]) == 2


def test_index_files_and_conversion_to_star(tmp_path: Path) -> None:
    p = builders.planted(tmp_path, 12, stacks=2)
    files = builders.cryodrgn(tmp_path, p)
    ids = listed(tmp_path / "ids.txt", [p.names[7], p.names[2]])
    for suffix in ("pkl", "txt", "star"):
        export.run(config(**{"source": files["particles"]}, poses=files["poses"], ctf=files["ctf"]), tmp_path / f"out.{suffix}", ids=ids)
    rows = pickle.loads((tmp_path / "out.pkl").read_bytes())
    assert rows.tolist() == [2, 7] == np.loadtxt(tmp_path / "out.txt", dtype=int).tolist()
    back = metadata.read(tmp_path / "out.star")
    whole = metadata.read(**files)
    np.testing.assert_allclose(back.rotation, whole.rotation[[2, 7]], atol=1e-7)
    assert back.id.tolist() == whole.id[[2, 7]].tolist()


def analysis(path: Path, ids: np.ndarray) -> tuple[Path, np.ndarray, np.ndarray]:
    n = len(ids)
    label = np.arange(n, dtype=np.int32) % 3
    z = np.random.default_rng(0).normal(0, 1, (n, 2)).astype(np.float32)
    group = stores.create(path, "analysis", config={}, seed=0, inputs={}, pixel_size=1.0, box=16)
    stores.put(group, "id", ids, ("particle",), "permanent particle id")
    stores.put(group, "clusters/label", label, ("particle",), "state")
    stores.put(group, "pca/coordinates", z, ("particle", "component"), "coordinates")
    stores.finish(group)
    return path, label, z


def test_states_and_latent_boxes_pick_the_planted_particles_whatever_the_order(tmp_path: Path) -> None:
    p = builders.planted(tmp_path, 12)
    source = builders.star31(tmp_path / "p.star", p)
    order = np.random.default_rng(1).permutation(12)
    store, label, z = analysis(tmp_path / "analysis.zarr", np.array([particle_id(p.names[i]) for i in order]))
    output = tmp_path / "out.txt"
    export.run(config(source), output, analysis=store, states=[0, 2])
    assert np.loadtxt(output, dtype=int).tolist() == sorted(order[(label == 0) | (label == 2)].tolist())
    export.run(config(source), output, analysis=store, states=[1], box="0:-0.5:,1::0.8", force=True)
    inside = (label == 1) & (z[:, 0] >= -0.5) & (z[:, 1] <= 0.8)
    assert np.loadtxt(output, dtype=int, ndmin=1).tolist() == sorted(order[inside].tolist())


REFUSED = {
    "stranger": (dict(ids="000099@s0.mrcs\n"), "no partner"),
    "word": (dict(ids="lasso\n"), "line 1"),
    "repeat": (dict(ids="000001@s0.mrcs\n000001@s0.mrcs\n"), "twice"),
    "empty": (dict(ids="\n"), "empty"),
    "no analysis": (dict(states=[1]), "analysis"),
    "state": (dict(states=[9], analysis=True), "no state 9"),
    "component": (dict(box="5:0:1", analysis=True), "component 5"),
    "box": (dict(box="0:1", analysis=True), "COMPONENT:LOW:HIGH"),
    "suffix": (dict(output="out.cs"), "can be written as"),
    "itself": (dict(output="p.star", force=True), "source itself"),
    "exists": (dict(output="ids.txt"), "--force"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_selections_that_cannot_be_met_are_refused(tmp_path: Path, name: str) -> None:
    p = builders.planted(tmp_path, 12)
    source = builders.star31(tmp_path / "p.star", p)
    options, words = REFUSED[name]
    options = dict(options)
    ids = tmp_path / "ids.txt"
    ids.write_text(options.pop("ids", "000001@s0.mrcs\n"))
    if options.pop("analysis", False):
        options["analysis"] = analysis(tmp_path / "analysis.zarr", metadata.read(source).id)[0]
    output = tmp_path / options.pop("output", "out.star")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=words):
        export.run(config(source), output, ids=ids, **options)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("kind", ["star", "star30", "cs"])
def test_refined_poses_replace_the_sources_and_nothing_else(tmp_path: Path, kind: str) -> None:
    """Read again, the rows have the poses of the model; every other column is as it was, in every row."""
    p = builders.planted(tmp_path)
    if kind == "cs":
        source = builders.cs(tmp_path / "p.cs", builders.cs_rows(p))
    else:
        source = rich_star(tmp_path, p) if kind == "star" else builders.star30(tmp_path / "old.star", p)
    table = metadata.read(source)
    n, g = len(table), torch.Generator().manual_seed(0)
    some = np.sort(np.random.default_rng(0).choice(n, n // 2, replace=False))[::-1]
    rotation, shift = random_rotations(len(some), g).numpy(), np.random.default_rng(1).normal(0, 5, (len(some), 2))
    model = stores.create(tmp_path / "discovery.zarr", "discovery", config={}, seed=0, inputs={}, pixel_size=1, box=16)
    for name, values in (("id", table.id[some]), ("pose/rotation", rotation.astype("f4")), ("pose/shift", shift.astype("f4"))):
        stores.put(model, name, values, tuple(f"d{k}" for k in range(values.ndim)), name)
    stores.finish(model)
    out = tmp_path / f"refined{source.suffix}"
    export.run(config(source), out, poses=tmp_path / "discovery.zarr")
    again = metadata.read(out, datadir=tmp_path)
    order = np.argsort(some)
    assert np.array_equal(again.id, table.id[some[order]])
    assert np.allclose(again.rotation, rotation[order], atol=2e-6) and np.allclose(again.shift, shift[order], atol=1e-5)
    for name in ("defocus_u", "defocus_v", "defocus_angle", "half_set", "index"):
        assert np.array_equal(getattr(again, name), getattr(table, name)[some[order]]), name
    if kind == "star":
        before, after = (starfile.read(f)["particles"].drop(columns=list(POSE)) for f in (source, out))
        assert before.iloc[some[order]].reset_index(drop=True).equals(after)
    with pytest.raises(InputError, match="rows have no poses"):
        export.run(config(source), tmp_path / "rows.txt", poses=tmp_path / "discovery.zarr")


def test_refined_shifts_lie_in_the_images_as_they_are(tmp_path: Path) -> None:
    """Where magnification is anisotropic, poses that nothing has changed come back as they were."""
    p = builders.planted(tmp_path)
    optics = builders.optics_columns() | {"rlnMagMat00": [1.02], "rlnMagMat01": [0.01], "rlnMagMat10": [-0.02], "rlnMagMat11": [0.97]}
    source = builders.star31(tmp_path / "p.star", p, optics=optics)
    table = metadata.read(source)
    kept = distortions.undistorted(table)
    assert np.abs(kept.shift - table.shift).max() > 0.01
    model = stores.create(tmp_path / "discovery.zarr", "discovery", config={}, seed=0, inputs={}, pixel_size=1, box=16)
    for name, values in (("id", table.id), ("pose/rotation", kept.rotation.astype("f4")), ("pose/shift", kept.shift.astype("f4"))):
        stores.put(model, name, values, tuple(f"d{k}" for k in range(values.ndim)), name)
    stores.finish(model)
    export.run(config(source), tmp_path / "out.star", poses=tmp_path / "discovery.zarr")
    again = metadata.read(tmp_path / "out.star", datadir=tmp_path)
    assert np.allclose(again.shift, table.shift, atol=1e-4) and np.allclose(again.rotation, table.rotation, atol=2e-6)
