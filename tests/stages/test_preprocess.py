import numpy as np
import pytest
import torch
from planted import plant, with_groups

from cryospire.config import Config
from cryospire.conventions import InputError
from cryospire.io import mrc, stores
from cryospire.maths.ctf import beam_tilt_phase
from cryospire.maths.fourier import radial_mean, window
from cryospire.stages import preprocess


def run(tmp_path, star, output="particles.zarr", seed=0, **settings):
    config = Config.model_validate({"particles": star, "seed": seed, "preprocess": {"workers": 1, "dtype": "float32", **settings}})
    preprocess.run(config, output=tmp_path / output)
    return stores.open_store(tmp_path / output, "particles")


def test_coloured_noise_comes_out_white_with_unit_variance(tmp_path):
    planted = plant(tmp_path, n=600, noise=20.0, colour=0.7)
    images = torch.from_numpy(stores.read(run(tmp_path, planted.star, window=False), "images"))
    power = radial_mean(torch.fft.rfft2(images, norm="ortho").abs() ** 2, 32).mean(0)
    assert (power[2:] - 1).abs().max() < 0.12
    assert images[:, 12:20, 12:20].var() == pytest.approx(1, abs=0.1)


def test_images_are_whitening_times_the_model_whatever_the_input_contrast(tmp_path):
    planted = plant(tmp_path, n=200, noise=1.0, colour=0.5, sign=-1)
    group = run(tmp_path, planted.star, contrast="black")
    images, whitening = stores.read(group, "images"), torch.from_numpy(stores.read(group, "noise/whitening"))[0]
    k = torch.hypot(torch.fft.fftfreq(32)[:, None] * 32, torch.fft.rfftfreq(32)[None] * 32).round().long().clamp(max=16)
    model = torch.fft.irfft2(torch.fft.rfft2(torch.from_numpy(planted.clean)) * whitening[k], s=(32, 32)) * window(32)
    scale = (model.numpy() * images).sum() / (model.numpy() ** 2).sum()
    assert scale == pytest.approx(1, abs=0.05)
    residual = (images - model.numpy())[:, 8:24, 8:24]
    assert residual.std() == pytest.approx(1, abs=0.1)


def test_rows_poses_ctf_and_provenance_follow_the_source(tmp_path):
    planted = plant(tmp_path, n=50)
    group = run(tmp_path, planted.star, dtype="float16")
    t = planted.table
    assert (stores.read(group, "id") == t.id).all() and (stores.read(group, "source/index") == np.arange(50)).all()
    assert np.allclose(stores.read(group, "pose/rotation"), t.rotation, atol=1e-5)
    assert np.allclose(stores.read(group, "pose/shift"), t.shift, atol=1e-4)
    assert np.allclose(stores.read(group, "ctf/defocus_v"), t.defocus_v, rtol=1e-5)
    assert group.attrs["stacks"] == [str(tmp_path / "particles.mrcs")] and group.attrs["pixel_size"] == pytest.approx(4)
    half = stores.read(group, "half_set")
    assert sorted(np.bincount(half)[1:]) == [25, 25]
    other = run(tmp_path, planted.star, "other.zarr", seed=1)
    assert (stores.read(other, "half_set") != half).any()


def test_one_worker_or_two_and_any_shard_size_give_the_same_store(tmp_path):
    planted = plant(tmp_path, n=1200, box=32)
    one = stores.read(run(tmp_path, planted.star, "one.zarr", shard_mib=64), "images")
    group = run(tmp_path, planted.star, "two.zarr", shard_mib=2, workers=2)
    assert group["images"].shards[0] < 1200
    assert np.allclose(stores.read(group, "images"), one, atol=1e-5)
    assert (np.abs(one).max((1, 2)) > 0).all()


def test_cropping_keeps_density_units(tmp_path):
    planted = plant(tmp_path, n=100, box=48, noise=1e-3)
    group = run(tmp_path, planted.star, box=32, window=False)
    assert group.attrs["pixel_size"] == pytest.approx(6)
    whitening = torch.from_numpy(stores.read(group, "noise/whitening"))[0]
    k = torch.hypot(torch.fft.fftfreq(32)[:, None] * 32, torch.fft.rfftfreq(32)[None] * 32).round().long()
    inside = (k > 1) & (k < 15)
    found = torch.fft.rfft2(torch.from_numpy(stores.read(group, "images")))[:, inside] / whitening[k[inside]] / 32**2
    full = torch.fft.rfft2(torch.from_numpy(planted.clean))
    expected = torch.cat([full[:, :16, :17], full[:, -16:, :17]], 1)[:, inside] / 48**2
    assert (found - expected).abs().norm() / expected.abs().norm() < 0.05


def test_optics_groups_meet_on_one_grid_or_are_named(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    a, b = plant(tmp_path / "a", n=40, box=32, pixel=6.0), plant(tmp_path / "b", n=40, box=48, pixel=4.0)
    group = run(tmp_path, with_groups(tmp_path, a, b))
    assert group.attrs["pixel_size"] == pytest.approx(6) and group["images"].shape == (80, 32, 32)
    b = plant(tmp_path / "b", n=40, box=48, pixel=4.1)
    with pytest.raises(InputError, match=r"both.star.*'one'.*'two'.*32\.8"):
        run(tmp_path, with_groups(tmp_path, a, b), "bad.zarr")


@pytest.mark.parametrize(("value", "what"), [(np.nan, "not finite"), (3.0, "constant")])
def test_a_dead_image_is_named_and_nothing_is_left(tmp_path, value, what):
    planted = plant(tmp_path, n=30)
    planted.images[17] = value
    mrc.write_stack(tmp_path / "particles.mrcs", planted.images, 4.0)
    with pytest.raises(InputError, match=rf"particles.mrcs: image 18 \(row 18 of .*particles.star\).*{what}"):
        run(tmp_path, planted.star)
    assert not (tmp_path / "particles.zarr").exists()


def test_only_whole_shards_are_written(tmp_path):
    planted = plant(tmp_path, n=600)
    array = stores.writable(tmp_path / "particles.zarr")["images"] if run(tmp_path, planted.star, shard_mib=1) else None
    whole = len(preprocess.shards(array)[0])
    with pytest.raises(ValueError, match="shard 0 holds"):
        preprocess.write_shard(array, 0, np.zeros((whole - 1, 32, 32)))
    rows = np.concatenate(preprocess.shards(array))
    assert (rows == np.arange(600)).all()


def test_beam_tilt_is_undone(tmp_path):
    planted = plant(tmp_path, n=20, noise=0.01)
    phase = beam_tilt_phase(32, 4.0, torch.tensor([[40.0, -25.0]]), torch.tensor([300.0]), torch.tensor([2.7]))
    phase[:, 16] = phase[:, :, 16] = 0
    tilted = torch.fft.irfft2(torch.fft.rfft2(torch.from_numpy(planted.images)) * torch.exp(-1j * phase), s=(32, 32)).numpy()
    straight = stores.read(run(tmp_path, planted.star, "straight.zarr", window=False), "images")
    mrc.write_stack(tmp_path / "particles.mrcs", tilted, 4.0)
    text = planted.star.read_text().replace("_rlnImageDimensionality #8", "_rlnImageDimensionality #8\n_rlnBeamTiltX #9\n_rlnBeamTiltY #10")
    planted.star.write_text("\n".join(x + "\t40\t-25" if x.startswith("1\tone") else x for x in text.split("\n")))
    group = run(tmp_path, planted.star, "tilted.zarr", window=False)
    found = stores.read(group, "images") / stores.read(group, "noise/whitening").mean() * 1.0
    expected = straight / stores.read(stores.open_store(tmp_path / "straight.zarr", "particles"), "noise/whitening").mean()
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.98
