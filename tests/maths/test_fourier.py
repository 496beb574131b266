import pytest
import torch

from cryospire.maths import fourier
from cryospire.maths.projection import render


def gaussian(box: int, sigma: float, centre: tuple[float, float, float]) -> torch.Tensor:
    one = torch.ones(1, dtype=torch.float64)
    return render(torch.tensor([centre], dtype=torch.float64), one, sigma * one, box, cutoff=float("inf"))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("n", "m"), [(64, 32), (32, 64), (48, 36), (32, 32)])
def test_crop_keeps_a_band_limited_function_its_values_and_its_origin(n, m, dims):
    # The same Gaussian sampled on two grids of one physical size: sigma 2 of the coarser voxels.
    scale = n / m
    sigma, centre = 2.0 * max(1.0, scale), (2.3 * scale, -1.1 * scale, 0.7 * scale)
    a = gaussian(n, sigma, centre)
    b = gaussian(m, sigma / scale, tuple(c / scale for c in centre))
    if dims == 2:
        a, b = a.sum(0) / scale, b.sum(0)
    assert torch.allclose(fourier.crop(a, m, dims), b, atol=3e-5)


def test_crop_keeps_the_mean_and_down_then_up_is_a_projection():
    x = torch.randn(3, 48, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    small = fourier.crop(x, 32)
    assert torch.allclose(small.mean((1, 2)), x.mean((1, 2)))
    assert torch.allclose(fourier.crop(fourier.crop(small, 48), 32), small)


def test_transform_of_a_centred_point_is_flat_and_inverts():
    x = torch.zeros(16, 16, dtype=torch.float64)
    x[8, 8] = 1
    assert torch.allclose(fourier.rfft(x), torch.ones(16, 9, dtype=torch.complex128))
    v = torch.randn(12, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(fourier.irfft(fourier.rfft(v, 3), 3), v)


def test_shift_phase_moves_by_whole_pixels_x_first():
    x = torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = fourier.irfft(fourier.rfft(x) * fourier.shift_phase(32, torch.tensor([[3.0, -5.0]], dtype=torch.float64)))
    assert torch.allclose(moved, torch.roll(x, (-5, 3), (1, 2)))


def test_shells_count_the_whole_plane_and_radial_mean_of_the_radius():
    index = fourier.shells(16)
    assert index[0, 0] == 0 and index[3, 4] == 5 and index[-3, 4] == 5 and index[8, 8] == 11
    assert fourier.half_plane_weight(16, 2).sum() == 256 and fourier.half_plane_weight(8, 3).sum() == 512
    assert torch.allclose(fourier.radial_mean(index.double(), 16), torch.arange(9, dtype=torch.float64))


def test_white_noise_has_a_flat_spectrum_of_its_variance():
    x = 2 * torch.randn(400, 32, 32, generator=torch.Generator().manual_seed(0))
    power = torch.fft.rfft2(x, norm="ortho").abs() ** 2
    assert torch.allclose(fourier.radial_mean(power, 32).mean(0), torch.full((17,), 4.0), rtol=0.25)  # the mean of 400 powers: 5%


def test_lowpass_removes_what_is_beyond_and_keeps_what_is_below():
    x = torch.arange(32, dtype=torch.float64)
    slow, fast = torch.cos(2 * torch.pi * 3 * x / 32), torch.cos(2 * torch.pi * 12 * x / 32)
    volume = (slow + fast).expand(32, 32, 32)
    # Voxels of 2 Å: shell 3 is 21 Å, shell 12 is 5.3 Å.
    assert torch.allclose(fourier.lowpass(volume, 2.0, 8.0), slow.expand(32, 32, 32), atol=1e-12)


def test_window_is_one_inside_and_zero_at_the_rim():
    w = fourier.window(64)
    assert w[32, 32] == 1 and w[32, 32 + 27] == 1 and w[0, 0] == 0 and w[32, 0] == 0
    assert w[32, 32 + 29] == pytest.approx((0.99 - 29 / 32) / 0.14, abs=1e-5)
