"""Detail of parts from planted images: recovered where it was, nothing made of noise, and the same on any number of ranks."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mrcfile
import numpy as np
import pytest
import torch
from scipy import ndimage

from cryospire.config import Config
from cryospire.conventions import InputError
from cryospire.io import particles, stores
from cryospire.kernels import render_volume
from cryospire.maths import insertion
from cryospire.maths.poses import exp_so3
from cryospire.stages import bench_feed, detail, reconstruct
from cryospire.training.data import Particles
from cryospire.training.model import Mixture

COUNT = 480
MPIEXEC = Path(sys.executable).parent / "mpiexec"


def still(mixture: Mixture) -> Mixture:
    """Without flex: parts move as their anchors do, and fade with the latent."""
    with torch.no_grad():
        for parameter in mixture.flex.parameters():
            parameter.zero_()
        for parameter in mixture.occupancy.parameters():
            parameter.normal_(0, 0.6)
    return mixture


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, synthetic: SimpleNamespace) -> Path:
    """model.zarr of two moving parts, a particles.zarr of noise, and a config.yaml."""
    out = tmp_path_factory.mktemp("reconstruct")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(particles, "CHUNK", 64 * synthetic.box**2)
        bench_feed.simulated(out / "particles.zarr", COUNT, synthetic.box, field=synthetic.box * synthetic.pixel)
    synthetic.write_model(out / "model.zarr", np.random.default_rng(1).normal(size=(COUNT, 2)))
    model = stores.writable(out / "model.zarr")
    model["id"][:] = np.arange(COUNT)
    for name in ("pose/rotation", "pose/shift"):
        given = stores.read(stores.open_store(out / "particles.zarr", "particles"), name)
        stores.put(model, name, given, tuple(f"d{k}" for k in range(given.ndim)), name)
    halves = stores.writable(out / "particles.zarr")["half_set"]
    halves[:] = np.arange(COUNT) % 2 + 1
    (out / "config.yaml").write_text(f"output: {out}\nthreads: 1\n")
    return out


def bodies(mixture: Mixture, part: torch.Tensor, z: torch.Tensor, data: Particles, images: torch.Tensor) -> list[reconstruct.Body]:
    """Both parts from given images."""
    data.images = images.numpy()
    numerator, weight = (x.unflatten(0, (2, 2, 2)) for x in insertion.accumulators(8, data.box, 2))
    reconstruct.add(numerator, weight, mixture, part, z, data, np.arange(len(data)))
    return [reconstruct.body(mixture, part == k, numerator[k], weight[k]) for k in (0, 1)]


def at_rest(mixture: Mixture, mine: torch.Tensor) -> torch.Tensor:
    peak = (mixture.relative_amplitude * mixture.amplitude_unit)[mine]
    return render_volume(mixture.centre.T[mine] * mixture.pixel_size, peak, mixture.scale[mine], mixture.box, mixture.pixel_size)


def seen(mixture: Mixture, z: torch.Tensor, data: Particles) -> torch.Tensor:
    """Images of a mixture through the particles' own CTFs."""
    rows = np.arange(len(data))
    plain = mixture.project(z, data.rotation, data.shift)
    return torch.fft.irfft2(torch.fft.rfft2(plain) * data.transfer(rows), s=plain.shape[-2:])


def test_frames_are_the_anchors_motion(synthetic: SimpleNamespace) -> None:
    mixture = still(synthetic.two_part_mixture())
    z = torch.randn(7, 2, generator=torch.Generator().manual_seed(0))
    part = (torch.arange(mixture.centre.shape[1]) >= mixture.centre.shape[1] // 2).long()
    rotation, translation, present = detail.frames(mixture, part, z)
    own, way = mixture.anchor_pose(z)
    middle = mixture.anchor_centre.T
    expected = (middle + way - (own @ middle[..., None])[..., 0]) * synthetic.pixel
    assert torch.allclose(rotation, own, atol=1e-4) and torch.allclose(translation, expected, atol=0.02)
    occupancy = mixture.occupancies(z, mixture.features)
    low, high = occupancy.aminmax(dim=1, keepdim=True)
    assert torch.all(present > low - 1e-6) and torch.all(present < high + 1e-6) and float(high.max() - low.min()) > 0.2


def test_what_the_gaussians_lack_is_found(folder: Path, synthetic: SimpleNamespace) -> None:
    """The images show sharper Gaussians than the mixture has, in parts that turn, move and fade; the detail makes up for it."""
    data = Particles(stores.open_store(folder / "particles.zarr", "particles"))
    true, blurred = still(synthetic.two_part_mixture()), still(synthetic.two_part_mixture())
    with torch.no_grad():
        blurred.log_scale += 0.6
        blurred.relative_amplitude *= 0.6**3
    part = (torch.arange(true.centre.shape[1]) >= true.centre.shape[1] // 2).long()
    z = torch.randn(COUNT, 2, generator=torch.Generator().manual_seed(1))
    images = seen(true, z, data)
    noise = 0.5 * images.std() * torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    found = bodies(blurred, part, z, data, images + noise)
    for k in (0, 1):
        missing = (at_rest(true, part == k) - at_rest(blurred, part == k)) * found[k].mask
        likeness = float((found[k].detail * missing).sum() / (found[k].detail.norm() * missing.norm()))
        size = float((found[k].detail * missing).sum() / missing.square().sum())
        assert likeness > 0.9 and size == pytest.approx(1, abs=0.15), (likeness, size)
        assert float((found[k].detail - missing).norm() / missing.norm()) < 0.5


def test_noise_has_no_resolution_though_gaussians_do(folder: Path, synthetic: SimpleNamespace) -> None:
    """Half-maps hold the Gaussians and what the images deny them: noise stays uncorrelated, and the detail takes the Gaussians back."""
    data = Particles(stores.open_store(folder / "particles.zarr", "particles"))
    mixture = still(synthetic.two_part_mixture())
    half = mixture.centre.shape[1] // 2
    part = (torch.arange(2 * half) >= half).long()
    with torch.no_grad():
        mixture.relative_amplitude[half:] *= 1e-3  # the other part, which images of noise deny as well, would be found missing
    z = torch.zeros(COUNT, 2)
    signal = seen(mixture, z, data)
    noise = signal.std() * torch.randn(signal.shape, generator=torch.Generator().manual_seed(3))
    (body, _), (real, _) = (bodies(mixture, part, z, data, images) for images in (noise, signal + noise))
    assert abs(float(body.fsc[2:].mean())) < 0.15 and float(real.fsc[2:9].mean()) > 0.6
    own = at_rest(mixture, part == 0) * body.mask
    assert float((own + body.detail).norm() / own.norm()) < 0.5


def test_a_part_without_gaussians_is_absent(folder: Path, synthetic: SimpleNamespace) -> None:
    data = Particles(stores.open_store(folder / "particles.zarr", "particles"))
    mixture = still(synthetic.two_part_mixture())
    part = 2 * (torch.arange(mixture.centre.shape[1]) >= mixture.centre.shape[1] // 2).long()
    z = torch.zeros(COUNT, 2)
    rotation, translation, present = detail.frames(mixture, part, z)
    assert rotation.isfinite().all() and translation.isfinite().all() and torch.all(present[:, 1] == 0)
    data.images = seen(mixture, z, data).numpy()
    numerator, weight = (x.unflatten(0, (3, 2, 2)) for x in insertion.accumulators(12, data.box, 2))
    reconstruct.add(numerator, weight, mixture, part, z, data, np.arange(len(data)))
    none = reconstruct.body(mixture, part == 1, numerator[1], weight[1])
    for values in (none.mask, none.map, none.halves, none.detail, none.fsc):
        assert torch.all(values == 0)
    assert float(reconstruct.body(mixture, part == 2, numerator[2], weight[2]).fsc[2:9].mean()) > 0.9


def run(folder: Path, output: str, ranks: int) -> None:
    files = ["--config", "config.yaml", "--particles", "particles.zarr", "--model", "model.zarr", "--output", f"{output}.zarr"]
    command = [str(MPIEXEC), "-n", str(ranks), sys.executable, "-m", "cryospire", "reconstruct", *files]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("occupancy", [1.0, 1e-2, 1e-5, 0.0])
def test_detail_stays_what_it_is_where_a_part_is_hardly_there(monkeypatch: pytest.MonkeyPatch, occupancy: float) -> None:
    """Splines ring beyond a mask: where only a part lies that is hardly there, that must not be blown up to the density of one that is."""
    g = torch.Generator().manual_seed(0)
    mask = torch.zeros(2, 24, 24, 24)
    mask[0, 6:18, 6:18, 4:12] = 1
    mask[1, 6:18, 6:18, 12:20] = 1
    values = ndimage.gaussian_filter(torch.randn(2, 24, 24, 24, generator=g).numpy(), (0, 1.5, 1.5, 1.5)) * mask.numpy()
    splines = np.stack([ndimage.spline_filter(v, output=np.float32) for v in values])
    there, turn = torch.tensor([[1.0, occupancy]]), exp_so3(torch.tensor([[[0.0, 0.1, 0.2], [0.0, 0.1, 0.2]]]))
    monkeypatch.setattr(detail, "frames", lambda *given: (turn, torch.zeros(1, 2, 3), there))
    shown = detail.Details(None, torch.zeros(1), splines, mask.numpy(), 1.0).at(torch.zeros(2))  # type: ignore[arg-type]
    back = detail.carry(shown, turn[0, 0].T.numpy(), np.zeros(3), order=1)
    assert np.abs(shown).max() < 1.2 * np.abs(values).max()
    inner = np.s_[8:16, 8:16, 6:10], np.s_[8:16, 8:16, 14:18]
    expected = [(a * b).sum() / (b * b).sum() for a, b in ((back[k], values[i][k]) for i, k in enumerate(inner))]
    assert expected == pytest.approx([expected[0], occupancy * expected[0]], abs=0.1) and expected[0] > 0.8


def test_same_maps_on_more_ranks(folder: Path) -> None:
    for ranks in (1, 2, 3):
        run(folder, f"ranks{ranks}", ranks)
    alone = stores.open_store(folder / "ranks1.zarr", "reconstruction")
    for ranks in (2, 3):
        other = stores.open_store(folder / f"ranks{ranks}.zarr", "reconstruction")
        for name in ("half_maps", "map", "detail", "fsc"):
            a, b = stores.read(alone, name), stores.read(other, name)
            assert np.abs(a - b).max() < 1e-3 * np.abs(a).max(), name  # sums in another order
    half = stores.read(alone, "half_maps")[1, 0]
    with mrcfile.open(folder / "ranks1" / "part_2_half1.mrc") as file:
        assert np.array_equal(file.data, half)


def test_images_have_the_poses_that_training_refined(folder: Path, tmp_path: Path) -> None:
    """However wrong the table's are."""
    wrong = Path(shutil.copytree(folder, tmp_path / "wrong", ignore=shutil.ignore_patterns("ranks*")))
    group = stores.writable(wrong / "particles.zarr")
    group["pose/rotation"][:] = np.roll(group["pose/rotation"][:], 1, 0)
    group["pose/shift"][:] = 0
    for where in (folder, wrong):
        run(where, "posed", 1)
    one, other = (stores.read(stores.open_store(where / "posed.zarr", "reconstruction"), "map") for where in (folder, wrong))
    assert np.array_equal(one, other) and np.abs(one).max() > 0


def test_another_grid_is_refused(folder: Path, synthetic: SimpleNamespace, tmp_path: Path) -> None:
    bench_feed.simulated(tmp_path / "other.zarr", 32, 32)
    config = Config(output=tmp_path)
    with pytest.raises(InputError, match=r"box 24 of 5 Å.*box 32 of 12 Å"):
        reconstruct.run(config, particles=tmp_path / "other.zarr", model=folder / "model.zarr", output=tmp_path / "r.zarr")
    assert not (tmp_path / "r.zarr").exists()
