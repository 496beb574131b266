"""Resources follow the data, and a site's bounds are kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cryospire.config import Config, Simulate, Train
from cryospire.conventions import InputError
from cryospire.site import estimate, settings
from cryospire.site.estimate import Data
from cryospire.site.settings import Site

ROOT = Path(__file__).parents[2]
LARGE = Data(1_000_000, 320, 256)


@pytest.mark.parametrize("stage", estimate.STAGES)
def test_more_data_never_asks_for_less(stage: str) -> None:
    config = Config()
    small, large = (estimate.need(config, stage, d, None, cores=4) for d in (Data(10_000, 128, 128), Data(1_000_000, 128, 128)))
    wide = estimate.need(config, stage, Data(10_000, 256, 256), None, cores=4)
    for other in (large, wide):
        assert other.mem_mb >= small.mem_mb and other.runtime >= small.runtime and other.disk_mb >= small.disk_mb


@pytest.mark.parametrize("stage", estimate.STAGES)
def test_a_retry_gets_more(stage: str) -> None:
    first, second = (estimate.need(Config(), stage, LARGE, Site(), attempt) for attempt in (1, 2))
    assert second.mem_mb > first.mem_mb
    assert second.runtime > first.runtime or first.runtime == Site().max_runtime


def test_gpus_divide_the_lanes_and_fill_nodes() -> None:
    site = Site(gpus_per_node=2, max_gpus=6)
    found = estimate.need(Config(), "train", Data(20_000_000, 256, 256), site)
    assert found.gpu == found.tasks == 4  # the largest power of two within six
    assert found.nodes == 2
    assert Train().lanes % found.tasks == 0


def test_ranks_of_the_site_have_to_divide_the_lanes() -> None:
    assert estimate.need(Config(), "train", LARGE, Site(ranks=4)).tasks == 4
    with pytest.raises(InputError, match=r"ranks: 3 of the site file do not divide train\.lanes, 8"):
        estimate.need(Config(), "train", LARGE, Site(ranks=3))


def test_mpi_ranks_are_spread_over_the_nodes_that_the_site_gives_them() -> None:
    for stage in ("reconstruct", "assemble"):
        found = estimate.need(Config(), stage, LARGE, Site(mpi_ranks=4, mpi_nodes=2))
        assert (found.nodes, found.tasks) == (2, 4)
        assert found.mem_mb < estimate.need(Config(), stage, LARGE, Site(mpi_ranks=4)).mem_mb


def test_small_data_take_one_gpu() -> None:
    assert estimate.need(Config(), "train", Data(10_000, 64, 64), Site(gpus_per_node=4)).gpu == 1


def test_bounds_of_the_site() -> None:
    found = estimate.need(Config(), "train", LARGE, Site(max_mem_mb=2000, max_runtime=90), attempt=3)
    assert found.mem_mb == 2000 and found.runtime == 90


def test_alone_there_is_one_task() -> None:
    assert {estimate.need(Config(), s, LARGE, None).tasks for s in estimate.STAGES} == {1}


def test_rows_and_box_of_a_star_file(tmp_path: Path) -> None:
    star = tmp_path / "p.star"
    star.write_text(
        "# version 30001\n\ndata_optics\n\nloop_\n_rlnOpticsGroup #1\n_rlnImageSize #2\n1 96\n\n"
        "data_particles\n\nloop_\n_rlnImageName #1\n_rlnAngleRot #2\n000001@a.mrcs 1.0\n000002@a.mrcs 2.0\n000003@a.mrcs 3.0\n"
    )
    assert estimate.measure(Config(particles=star)) == Data(3, 96, 96)


def test_box_of_an_old_star_file_is_that_of_its_first_stack_and_rows_those_selected(tmp_path: Path) -> None:
    """RELION 3.0: no optics table; image paths from the project's folder, two above the table's."""
    folder = tmp_path / "Refine3D/job007"
    folder.mkdir(parents=True)
    (tmp_path / "a.mrcs").write_bytes(np.array([40, 40, 7], "<i4").tobytes() + bytes(1012))
    (folder / "p.star").write_text("data_\n\nloop_\n_rlnAngleRot #1\n_rlnImageName #2\n" + "1.0 000001@a.mrcs\n" * 7)
    (tmp_path / "kept.txt").write_text("0\n4\n5\n")
    assert estimate.measure(Config(particles=folder / "p.star")) == Data(7, 40, 40)
    assert estimate.measure(Config(particles=folder / "p.star", ind=tmp_path / "kept.txt")) == Data(3, 40, 40)


@pytest.mark.parametrize("order", ["<", ">"])
def test_rows_and_box_of_a_stack(tmp_path: Path, order: str) -> None:
    stack = tmp_path / "p.mrcs"
    stack.write_bytes(np.array([40, 40, 7], f"{order}i4").tobytes() + bytes(1012))
    assert estimate.measure(Config(particles=stack)) == Data(7, 40, 40)


def test_rows_and_box_of_a_cs_file(tmp_path: Path) -> None:
    table = np.zeros(5, [("uid", "u8"), ("blob/shape", "u4", 2)])
    table["blob/shape"] = 64
    with (tmp_path / "p.cs").open("wb") as file:
        np.save(file, table)
    assert estimate.measure(Config(particles=tmp_path / "p.cs")) == Data(5, 64, 64)


def test_simulated_size_needs_no_file() -> None:
    assert estimate.measure(Config(simulate=Simulate(particles=50, box=32))) == Data(50, 32, 32)


def test_summary_names_every_stage() -> None:
    text = estimate.summary(Config(), {"simulate", "evaluate"}, LARGE, Site(gpus_per_node=4))
    assert "preprocess" in text and "GPU-hours" in text and "1,000,000 particles" in text
    assert not any(name in text for name in ("simulate", "evaluate", "validate", "half"))


def test_gpu_hours_are_not_cut_off_by_the_longest_job() -> None:
    sites = [Site(gpus_per_node=4, ranks=1, max_runtime=minutes) for minutes in (60, 99_999)]
    short, long = (estimate.summary(Config(), {"simulate"}, LARGE, site).splitlines()[-1] for site in sites)
    assert short == long


def test_both_halves_together_take_about_as_long_as_the_whole() -> None:
    asked = estimate.needs(Config(halves=True), set(), LARGE, None, 4)
    for stage in ("discover", "train"):
        whole, half = (asked[name].runtime - estimate.MINUTES for name in (stage, f"{stage} half2"))
        assert 0.45 * whole < half <= 0.55 * whole
    assert "validate" in asked and "validate" not in estimate.needs(Config(), set(), LARGE, Site())


def test_the_site_file_holds_the_defaults() -> None:
    assert settings.load(ROOT / "cluster/site.yaml") == Site()


def test_a_wrong_key_of_the_site_is_named(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("acount: x\n")
    with pytest.raises(InputError, match="acount"):
        settings.load(tmp_path / "site.yaml")
