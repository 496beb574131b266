import numpy as np
import pytest
import torch
from planted import plant

from cryospire.config import Config
from cryospire.conventions import InputError
from cryospire.io import mrc, stores
from cryospire.maths import fourier
from cryospire.maths.metrics import fsc
from cryospire.stages import consensus, preprocess


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("consensus")
    found = plant(folder, n=1000, noise=3.0, colour=0.6, sign=-1)
    config = Config.model_validate({"particles": found.star, "preprocess": {"workers": 1, "contrast": "black"}})
    preprocess.run(config, output=folder / "particles.zarr")
    return folder, config, found


def run(planted, tmp_path, **changes):
    folder, config, _ = planted
    consensus.run(config.model_copy(update=changes), particles=folder / "particles.zarr", output=tmp_path / "consensus.zarr")
    return stores.open_store(tmp_path / "consensus.zarr", "consensus")


@pytest.fixture(scope="module")
def result(planted):
    """Folder of a finished run, and its store."""
    return planted[0], run(planted, planted[0])


def test_the_planted_map_comes_back_in_units_of_the_unwhitened_images(planted, result):
    group = result[1]
    truth, found = planted[2].truth, torch.from_numpy(stores.read(group, "map"))
    mask = torch.from_numpy(stores.read(group, "mask"))
    assert fsc(found, truth, mask)[1:9].min() > 0.97
    halves = torch.from_numpy(stores.read(group, "half_maps"))
    band = (torch.arange(17) < 8).float()
    mean, low = (fourier.apply_radial(v, band, 3) for v in (halves.mean(0), truth))
    assert (mean * low).sum() / (low * low).sum() == pytest.approx(1, abs=0.05)
    assert (truth * (mask > 0.5)).sum() / truth.sum() > 0.99 and mask.mean() < 0.3


def test_fsc_of_half_maps_predicts_the_agreement_with_the_truth(planted, result):
    group = result[1]
    curve, halves = torch.from_numpy(stores.read(group, "fsc_unmasked")), torch.from_numpy(stores.read(group, "half_maps"))
    # Rosenthal & Henderson: FSC of the full map with the truth is sqrt(2 FSC / (1 + FSC)).
    expected = (2 * curve.clamp(min=0) / (1 + curve.clamp(min=0))).sqrt()
    against = fsc(halves.mean(0), planted[2].truth)
    assert (expected - against)[2:12].abs().max() < 0.1
    assert group.attrs["resolution"] < 5 * 4.0


def test_maps_lie_beside_the_store(result):
    folder, group = result
    for name, values in (("map", group["map"]), ("half2", group["half_maps"][1]), ("mask", group["mask"])):
        volume, pixel = mrc.read_volume(folder / f"consensus_{name}.mrc")
        assert np.array_equal(volume, values[...]) and pixel == pytest.approx(4.0)


def test_a_given_map_of_another_grid_and_scale_is_put_on_the_particles(planted, tmp_path):
    truth = planted[2].truth
    other = fourier.crop(torch.nn.functional.pad(truth, [5, 5] * 3), 63 - 1 + 2, 3)  # 42 pixels of 4 Å -> 64 of 2.625 Å
    mrc.write_volume(tmp_path / "given.mrc", 37 * other.numpy(), 4.0 * 42 / 64)
    group = run(planted, tmp_path, map=tmp_path / "given.mrc")
    found = torch.from_numpy(stores.read(group, "map"))
    assert (found - truth).norm() / truth.norm() < 0.05


@pytest.mark.parametrize(("change", "hint"), [(lambda v: -v, "contrast"), (lambda v: np.roll(v, 9, 1), "another particle, centre")])
def test_a_map_that_is_not_of_these_particles_is_refused(planted, tmp_path, change, hint):
    mrc.write_volume(tmp_path / "given.mrc", change(planted[2].truth.numpy()), 4.0)
    with pytest.raises(InputError, match=rf"given.mrc: correlation .*{hint}"):
        run(planted, tmp_path, map=tmp_path / "given.mrc")
    assert not (tmp_path / "consensus.zarr").exists()


def test_a_given_mask_of_another_grid_is_put_on_the_particles(planted, result, tmp_path):
    """A ball around half the particle: Gaussians begin, and the FSC is told, there."""
    z, y, x = np.mgrid[:64, :64, :64] - 32
    ball = np.clip((12 - np.sqrt((z - 6) ** 2 + y**2 + x**2)) / 3 + 0.5, 0, 1).astype(np.float32)
    mrc.write_volume(tmp_path / "mask.mrc", ball, 2.0)
    group = run(planted, tmp_path, mask=tmp_path / "mask.mrc")
    mask = stores.read(group, "mask")
    weight = mask / mask.sum()
    middle = [(weight * (np.arange(len(mask)) - len(mask) // 2).reshape(shape)).sum() for shape in ((-1, 1, 1), (1, -1, 1), (1, 1, -1))]
    assert middle == pytest.approx([3, 0, 0], abs=0.02) and mask.sum() * 8 == pytest.approx(ball.sum(), rel=0.02)
    assert "mask" in group.attrs["inputs"] and np.array_equal(stores.read(group, "map"), stores.read(result[1], "map")) is False
    assert np.array_equal(stores.read(group, "half_maps"), stores.read(result[1], "half_maps"))


@pytest.mark.parametrize(("values", "message"), [(7.0, "from 0 to 7"), (0.0, "holds 0.0% of the density")])
def test_what_is_no_mask_of_these_particles_is_refused(planted, tmp_path, values, message):
    mask = np.zeros((32,) * 3, np.float32)
    mask[16:20] = values
    mrc.write_volume(tmp_path / "mask.mrc", mask, 4.0)
    with pytest.raises(InputError, match=rf"mask.mrc: .*{message}"):
        run(planted, tmp_path, mask=tmp_path / "mask.mrc")
    assert not (tmp_path / "consensus.zarr").exists()


def test_result_is_bit_for_bit_the_same_on_one_thread_and_on_all(planted, result, tmp_path):
    one = run(planted, tmp_path, threads=1)
    assert np.array_equal(stores.read(one, "half_maps"), stores.read(result[1], "half_maps"))
