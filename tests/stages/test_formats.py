"""The same particles as RELION's, cryoSPARC's and cryoDRGN's files give the same images and the same map."""

from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest
from planted import Planted, plant

from cryospire.config import Config
from cryospire.io import metadata, stores
from cryospire.io.metadata_relion import euler_angles
from cryospire.stages import consensus, preprocess

BOX, PIXEL, N = 32, 4.0, 300


def written(kind: str, folder: Path, planted: Planted) -> dict[str, Any]:
    """The planted particles in another program's format, written by hand in float32."""
    t = planted.table
    p = builders.Planted(
        t.image_names, euler_angles(t.rotation), -t.shift, t.defocus_u, t.defocus_v, t.defocus_angle, np.ones(N, int)
    )  # fmt: skip
    if kind == "relion 3.0":
        columns = builders.columns30(p) | {
            "rlnDetectorPixelSize": [PIXEL] * N,
            "rlnOriginX": list(p.origin[:, 0] / PIXEL),
            "rlnOriginY": list(p.origin[:, 1] / PIXEL),
        }
        del columns["rlnRandomSubset"]
        return {"particles": builders.star30(folder / "old.star", p, columns)}
    if kind == "cryosparc":
        rows = builders.cs_rows(p)
        rows["blob/shape"], rows["blob/psize_A"], rows["alignments3D/psize_A"] = BOX, PIXEL, 2 * PIXEL
        rows["alignments3D/shift"] = p.origin / (2 * PIXEL)
        return {"particles": builders.cs(folder / "p.cs", rows)}
    files = builders.cryodrgn(folder, p)
    table = builders.ctf_table(p)
    table[:, :2] = BOX, PIXEL
    builders.pickled(files["ctf"], table)
    builders.pickled(files["poses"], (p.matrices.astype(np.float32), (p.origin / (BOX * PIXEL)).astype(np.float32)))
    return dict(files)


def maps(folder: Path, **source: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, images and half-maps."""
    config = Config.model_validate(source | {"preprocess": {"workers": 1, "dtype": "float32"}})
    preprocess.run(config, output=folder / "particles.zarr", force=True)
    consensus.run(config, particles=folder / "particles.zarr", output=folder / "consensus.zarr", force=True)
    particles = stores.open_store(folder / "particles.zarr", "particles")
    halves = stores.read(stores.open_store(folder / "consensus.zarr", "consensus"), "half_maps")
    return stores.read(particles, "id"), stores.read(particles, "images"), halves


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Planted, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    folder = tmp_path_factory.mktemp("formats")
    planted = plant(folder, n=N, box=BOX, pixel=PIXEL, noise=1.0)
    return folder, planted, maps(folder, particles=planted.star)


@pytest.mark.parametrize("kind", ["relion 3.0", "cryosparc", "cryodrgn"])
def test_every_format_gives_the_same_map(reference: Any, kind: str) -> None:
    folder, planted, (ids, images, halves) = reference
    source = written(kind, folder, planted)
    t = metadata.read(**source)
    np.testing.assert_allclose(t.shift, planted.table.shift, atol=1e-4)
    found = maps(folder, **source)
    assert found[0].tolist() == ids.tolist()
    np.testing.assert_array_equal(found[1], images)
    assert np.abs(found[2] - halves).max() < 1e-4 * np.abs(halves).max()
