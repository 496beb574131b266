import numpy as np
import pytest
import torch
import torch_ctf

from cryospire.maths.ctf import beam_tilt_phase, ctf, wavelength, zernike_phase


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("angle", [0.0, 30.0, 110.0])
def test_ctf_is_torch_ctfs(angle):
    mine = ctf(64, 1.7, t(15000), t(13000), t(angle), t(300), t(2.7), t(0.1), t(20))[0]
    theirs = torch_ctf.calculate_ctf_2d(t(1.4)[0], 0.1, angle, 300, 2.7, 0.1, 20, 1.7, (64, 64), rfft=True, fftshift=False)
    assert (mine - theirs).abs().max() < 1e-3  # the two know the wavelength to six digits


def test_ctf_is_the_formula_at_one_frequency():
    box, px, u, v, a0, kv, cs, ac = 100, 1.1, 21000.0, 17000.0, 25.0, 200.0, 2.0, 0.07
    ky, kx = -7, 13
    volts = kv * 1e3
    lam = 12.2643 / np.sqrt(volts + 0.978466e-6 * volts**2)
    s = np.hypot(kx, ky) / (box * px)
    df = (u + v + (u - v) * np.cos(2 * (np.arctan2(ky, kx) - np.deg2rad(a0)))) / 2
    gamma = np.pi * lam * df * s**2 - np.pi / 2 * cs * 1e7 * lam**3 * s**4
    expected = np.sqrt(1 - ac**2) * np.sin(gamma) + ac * np.cos(gamma)
    got = ctf(box, px, t(u), t(v), t(a0), t(kv), t(cs), t(ac), t(0), t(0.8))[0, ky, kx]
    assert got == pytest.approx(0.8 * expected, abs=1e-10)


def test_ctf_starts_at_plus_amplitude_contrast_and_a_quarter_turn_of_phase_makes_it_a_cosine():
    assert ctf(16, 2.0, t(1e4), t(1e4), t(0), t(300), t(2.7), t(0.1))[0, 0, 0] == pytest.approx(0.1)
    assert ctf(16, 2.0, t(1e4), t(1e4), t(0), t(300), t(2.7), t(0.1), t(90))[0, 0, 0] == pytest.approx(np.sqrt(0.99))


def test_float32_is_close_to_float64_at_high_frequency():
    values = [t(30000, 8000), t(28000, 9000), t(10, 80), t(300, 200), t(2.7, 2.7), t(0.1, 0.07), t(0, 0)]
    single = ctf(256, 1.0, *(x.float() for x in values))
    assert (single - ctf(256, 1.0, *values)).abs().max() < 1e-3  # gamma reaches 600 rad


def test_wavelength_against_tables():
    # Williams & Carter, Transmission Electron Microscopy, table 1.2 (pm).
    assert torch.allclose(wavelength(t(100, 200, 300)) * 100, t(3.70, 2.51, 1.97), atol=0.006)


def test_beam_tilt_phase_is_torch_ctfs():
    def complex_ctf(**tilt: torch.Tensor) -> torch.Tensor:
        return torch_ctf.calculate_ctf_2d(
            t(1.4)[0], 0.0, 0.0, 300, 2.7, 0.1, 0, 1.3, (64, 64), rfft=True, fftshift=False, return_complex_ctf=True, **tilt
        )

    mine = beam_tilt_phase(64, 1.3, t(0.4, -0.7)[None], t(300), t(2.7))[0]
    inside = torch.ones(64, 33, dtype=torch.bool)
    inside[32] = inside[:, 32] = False  # an odd phase has no value at Nyquist
    ratio = complex_ctf(beam_tilt_mrad=t(0.4, -0.7)) / complex_ctf()  # theirs is exp(-i phase)
    assert (ratio - torch.exp(-1j * mine)).abs()[inside].max() < 5e-3


def test_odd_zernike_of_a_beam_tilt_is_its_phase():
    # RELION's TiltHelper::insertTilt writes a tilt as -scale tilt / 3 of Z(3, 1) = 3 r^3 - 2 r and twice that of Z(1, 1) = r.
    tilt, cs, kv = (0.4, -0.7), 2.7, 300.0
    x, y = (-2e4 * np.pi * cs * wavelength(t(kv)).item() ** 2 * b / 3 for b in tilt)
    odd = zernike_phase(64, 1.3, [2 * y, 2 * x, 0, y, x, 0], 1)
    # Images carry exp(i odd), and exp(-i beam_tilt_phase).
    assert torch.allclose(odd, -beam_tilt_phase(64, 1.3, t(*tilt)[None], t(kv), t(cs))[0], atol=1e-9)


def test_even_zernike_begins_with_piston_astigmatism_and_defocus():
    r2 = zernike_phase(32, 2.0, [0, 0, 1.0], 0)  # orders (0, 0), (2, -2), (2, 0): 2 r^2 - 1
    sx, sy = torch.fft.rfftfreq(32, 2.0).double(), torch.fft.fftfreq(32, 2.0).double()
    assert torch.allclose(r2, 2 * (sx[None] ** 2 + sy[:, None] ** 2) - 1)
    assert torch.allclose(zernike_phase(32, 2.0, [0, 0, 0, 1.0], 0), sx[None] ** 2 - sy[:, None] ** 2)
