import numpy as np
import pytest
import torch

from cryospire.maths.fourier import shells
from cryospire.maths.metrics import auc, fsc, resolution


def noise(seed: int, box: int = 32) -> torch.Tensor:
    return torch.randn(box, box, box, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_fsc_of_a_map_with_itself_its_negative_and_any_scale():
    a = noise(0)
    assert torch.allclose(fsc(a, 3 * a), torch.ones(17, dtype=torch.float64))
    assert torch.allclose(fsc(a, -a), -torch.ones(17, dtype=torch.float64))
    assert (fsc(a, torch.zeros_like(a)) == 0).all()


def test_fsc_is_the_definition_summed_over_the_whole_transform():
    a, b = noise(0, 12), noise(1, 12)
    fa, fb = np.fft.fftn(a.numpy()), np.fft.fftn(b.numpy())
    k = np.fft.fftfreq(12, 1 / 12)
    index = np.rint(np.sqrt(k[:, None, None] ** 2 + k[None, :, None] ** 2 + k**2)).astype(int)
    for shell in range(7):
        m = index == shell
        expected = (fa[m] * fb[m].conj()).sum().real / np.sqrt((abs(fa[m]) ** 2).sum() * (abs(fb[m]) ** 2).sum())
        assert fsc(a, b)[shell] == pytest.approx(expected)


def test_fsc_of_signal_plus_independent_noise_is_the_ratio_of_variances():
    signal = noise(0, 48)
    curve = fsc(signal + noise(1, 48), signal + noise(2, 48))
    assert curve[6:].mean() == pytest.approx(0.5, abs=0.02)


def test_shells_are_indexed_by_their_radius():
    a, b = noise(0), noise(1)
    fa, fb = torch.fft.rfftn(a), torch.fft.rfftn(b)
    mixed = torch.fft.irfftn(torch.where(shells(32, 3) == 5, fa, fb), [32] * 3)
    curve = fsc(a, mixed)
    assert curve[5] == pytest.approx(1) and curve[[4, 6]].abs().max() < 0.35


def test_mask_hides_what_lies_outside():
    a, b = noise(0), noise(1)
    mask = torch.zeros_like(a)
    mask[8:24, 8:24, 8:24] = 1
    assert torch.allclose(fsc(a, torch.where(mask > 0, a, b), mask), torch.ones(17, dtype=torch.float64))


def test_auc_is_the_area_in_cycles_per_pixel():
    assert auc(torch.ones(33)) == pytest.approx(0.5)
    assert auc(torch.linspace(1, 0, 33)) == pytest.approx(0.25)
    assert torch.allclose(auc(torch.stack([torch.ones(17), -torch.ones(17)])), torch.tensor([0.5, -0.5]))


def test_resolution_where_the_curve_crosses():
    curve = torch.tensor([1.0, 1.0, 1.0, 0.643, -0.357, 0.0, 0.0, 0.0, 0.0])
    assert resolution(curve, 0.143, 2.0) == pytest.approx(16 * 2 / 3.5, rel=1e-5)
    assert resolution(torch.ones(9), 0.143, 2.0) == pytest.approx(4.0)
    nothing = torch.tensor([1.0, 0.1, 0.9, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert resolution(nothing, 0.143, 2.0) == 32.0  # the box: no wave fits in it that is coarser
