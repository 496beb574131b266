import numba
import pytest
import torch

from cryospire.kernels import insertion as fast
from cryospire.maths import insertion as plain
from cryospire.maths.ctf import ctf
from cryospire.maths.metrics import fsc
from cryospire.maths.poses import random_rotations
from cryospire.maths.projection import peak_weight, render, splat

BOX, PIXEL = 32, 3.0


def blob() -> tuple[torch.Tensor, ...]:
    """Gaussians well inside the box: centres and scales (pixels), amplitudes, and the map."""
    g = torch.Generator().manual_seed(0)
    centre = torch.randn(60, 3, generator=g, dtype=torch.float64) * 4
    centre *= (BOX * 0.25 / centre.norm(dim=1, keepdim=True)).clamp(max=1)
    scale, amplitude = 1.0 + 0.5 * torch.rand(60, generator=g, dtype=torch.float64), torch.rand(60, generator=g, dtype=torch.float64)
    return centre, scale, amplitude, render(centre, amplitude, scale, BOX, cutoff=12)


def images(n: int, shifted: bool = True) -> tuple[torch.Tensor, ...]:
    """Projections, analytic, through CTFs: images, transfer, shift (pixels), rotation."""
    g = torch.Generator().manual_seed(1)
    centre, scale, amplitude, _ = blob()
    rotation = random_rotations(n, g)
    shift = 1.5 * torch.randn(n, 2, generator=g, dtype=torch.float64) * shifted
    weight = peak_weight(amplitude, scale * PIXEL).expand(n, -1)
    pure = splat(rotation[:, :2] @ centre.T + shift[:, :, None], weight, scale, BOX, cutoff=12)
    defocus = 1e4 + 1e4 * torch.rand(n, generator=g, dtype=torch.float64)
    constants = (torch.full((n,), v, dtype=torch.float64) for v in (300, 2.7, 0.1))
    transfer = ctf(BOX, PIXEL, defocus, defocus - 500, 180 * torch.rand(n, generator=g, dtype=torch.float64), *constants)
    return torch.fft.irfft2(torch.fft.rfft2(pure) * transfer, s=(BOX, BOX)), transfer, shift, rotation


@pytest.mark.parametrize(("pad", "tolerance"), [(2, 0.06), (1, 0.2)])
def test_back_projection_of_noise_free_images_returns_the_map_in_its_units(pad, tolerance):
    x, transfer, shift, rotation = images(1500)
    truth = blob()[-1]
    numerator, weight = plain.accumulators(1, BOX, pad)
    fast.insert(numerator, weight, *plain.weighted_slices(x, transfer, shift), rotation, torch.zeros(1500))
    found = plain.reconstruct(numerator[0], weight[0], BOX, PIXEL).double()
    assert (found - truth).norm() / truth.norm() < tolerance
    assert (found * truth).sum() / (truth**2).sum() == pytest.approx(1, abs=tolerance / 2)
    # Beyond 0.8 Nyquist the sampled Gaussians themselves alias.
    assert fsc(found, truth)[1 : int(0.4 * BOX)].min() > (0.998 if pad == 2 else 0.97)


@pytest.mark.parametrize("pad", [1, 2])
def test_numba_is_the_plain_twin(pad):
    x, transfer, shift, rotation = images(23)
    slices, weights = plain.weighted_slices(x, transfer, shift)
    which = torch.arange(23) % 3
    exact, single = plain.accumulators(3, BOX, pad, torch.float64), plain.accumulators(3, BOX, pad)
    plain.insert(*exact, slices, weights, rotation, which)
    fast.insert(*single, slices, weights, rotation, which)
    for a, b in zip(exact, single, strict=True):
        assert (a - b).abs().max() < 1e-4 * a.abs().max()


def test_sums_do_not_depend_on_the_number_of_threads():
    x, transfer, shift, rotation = images(40)
    slices, weights = plain.weighted_slices(x, transfer, shift)
    before, results = numba.get_num_threads(), []
    for threads in {1, before}:
        numba.set_num_threads(threads)
        results.append(plain.accumulators(4, BOX, 1))
        fast.insert(*results[-1], slices, weights, rotation, torch.arange(40) % 4)
    numba.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[-1], strict=True))


def test_inserted_weight_is_kept_but_for_the_edge():
    _, _, _, rotation = images(8)
    weights = torch.ones(8, BOX, BOX // 2 + 1, dtype=torch.float64)
    numerator, weight = plain.accumulators(1, BOX, 2, torch.float64)
    plain.insert(numerator, weight, weights + 0j, weights, rotation, torch.zeros(8, dtype=torch.long))
    inside = int(plain.slice_points(BOX).sum()) * 8
    assert 0.97 * inside < weight.sum() <= inside + 1e-6
    assert torch.allclose(numerator.real, weight)


def test_slicing_projects_as_the_gaussians_do():
    centre, scale, amplitude, volume = blob()
    rotation = random_rotations(20, torch.Generator().manual_seed(5))
    expected = splat(rotation[:, :2] @ centre.T, peak_weight(amplitude, scale * PIXEL).expand(20, -1), scale, BOX, cutoff=12)
    found = plain.project(volume, rotation, PIXEL)
    assert (found - expected).norm() / expected.norm() < 0.03


def test_project_then_back_project_judged_by_fsc():
    volume = blob()[-1]
    rotation = random_rotations(1500, torch.Generator().manual_seed(6))
    x = plain.project(volume, rotation, PIXEL)
    numerator, weight = plain.accumulators(1, BOX, 2)
    slices, weights = plain.weighted_slices(x, torch.ones(1500, BOX, BOX // 2 + 1), torch.zeros(1500, 2))
    fast.insert(numerator, weight, slices, weights, rotation, torch.zeros(1500))
    curve = fsc(plain.reconstruct(numerator[0], weight[0], BOX, PIXEL).double(), volume)
    assert curve[1 : int(0.4 * BOX)].min() > 0.99
