"""The written configuration loads, holds every key with its meaning, and fits the particles."""

import itertools
from pathlib import Path

import builders
import numpy as np
import pytest
import yaml

from cryospire import config as configuration
from cryospire.config import Config
from cryospire.conventions import InputError
from cryospire.stages import init


def write(folder: Path, box: int, **options: bool) -> Path:
    star = builders.star31(folder / "p.star", builders.planted(folder), optics=builders.optics_columns(box, 1.31))
    init.run(star, output=folder / "config.yaml", **options)
    return folder / "config.yaml"


def test_every_key_with_a_comment(tmp_path: Path) -> None:
    path = write(tmp_path, 320)
    written, whole = yaml.safe_load(path.read_text()), Config().model_dump(mode="json")
    assert set(written) == set(whole) - {"simulate"}
    lines = path.read_text().splitlines()
    for name, values in whole.items():
        if isinstance(values, dict):
            assert set(written[name]) == set(values)
    for before, line in itertools.pairwise(lines):
        if line.strip() and not line.lstrip().startswith("#"):
            assert before.lstrip().startswith("# "), line
    assert "one of mlp, factorized" in path.read_text() and "above 0" in path.read_text()


def test_large_boxes_are_cropped(tmp_path: Path) -> None:
    path = write(tmp_path, 320)
    found = configuration.load(path)
    assert found.preprocess.box == 128 and found.particles == tmp_path / "p.star"
    assert found == Config(particles=tmp_path / "p.star", preprocess=configuration.Preprocess(box=128))
    assert "128 px of 3.275 Å: no finer than 6.55 Å" in path.read_text()  # 320 * 1.31 / 128, and twice that


def test_a_selection_becomes_a_key(tmp_path: Path) -> None:
    star = builders.star31(tmp_path / "p.star", builders.planted(tmp_path))
    init.run(star, ind=builders.pickled(tmp_path / "ind.pkl", np.array([2, 3, 7])), output=tmp_path / "config.yaml")
    assert configuration.load(tmp_path / "config.yaml").ind == tmp_path / "ind.pkl"
    assert "# 3 particles in 1 stack(s)" in (tmp_path / "config.yaml").read_text()


def test_small_boxes_stay(tmp_path: Path) -> None:
    path = write(tmp_path, 64)
    found = configuration.load(path)
    assert found.preprocess.box == 0 and found.discover.gaussians == 1024
    assert "box 64 px of 1.310 Å: no finer than 2.62 Å" in path.read_text()


@pytest.mark.parametrize(("largest", "expected"), [(128, 128), (127, 120), (100, 100), (94, 90)])
def test_boxes_are_even_with_small_factors(largest: int, expected: int) -> None:
    assert init.fitting_box(512, largest) == expected


def test_a_configuration_is_not_overwritten(tmp_path: Path) -> None:
    path = write(tmp_path, 64)
    path.write_text("mine")
    with pytest.raises(InputError, match="--force"):
        write(tmp_path, 64)
    assert path.read_text() == "mine"
    write(tmp_path, 64, force=True)
    assert configuration.load(path).discover.gaussians == 1024
