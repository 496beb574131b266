"""The contrast transfer function, RELION's sign: ``+amplitude_contrast`` at zero frequency.

``CTF(s) = sin(gamma(s) + asin(amplitude_contrast))``, ``gamma = pi lambda df s^2 - pi/2 Cs lambda^3 s^4 + phase_shift``,
``df = (U + V + (U - V) cos 2(theta - angle)) / 2``, theta from +x towards +y.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def wavelength(voltage: Tensor) -> Tensor:
    """Relativistic electron wavelength, Å, of a voltage in kV."""
    volts = voltage * 1e3
    return 12.2643 / (volts + 0.978466e-6 * volts**2).sqrt()


def frequencies(box: int, pixel_size: float, dtype: torch.dtype, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Spatial frequencies (1/Å) of the half plane: sx (1, box // 2 + 1) and sy (box, 1)."""
    sx = torch.fft.rfftfreq(box, pixel_size, dtype=dtype, device=device)
    sy = torch.fft.fftfreq(box, pixel_size, dtype=dtype, device=device)
    return sx[None], sy[:, None]


def ctf(
    box: int,
    pixel_size: float,
    defocus_u: Tensor,
    defocus_v: Tensor,
    defocus_angle: Tensor,
    voltage: Tensor,
    cs: Tensor,
    amplitude_contrast: Tensor,
    phase_shift: Tensor | None = None,
    scale: Tensor | None = None,
    even: Tensor | None = None,
) -> Tensor:
    """CTFs (n, box, box // 2 + 1), real, in ``rfft2`` layout; every argument (n,): Å, Å, degrees, kV, mm, 1, degrees, 1.

    ``even`` (n, box, box // 2 + 1): phase of even aberrations, radians, as ``zernike_phase`` gives it.
    """

    # gamma is a sum of five maps, the same for every image: one matrix product.  The astigmatic term s^2 cos 2(theta - angle) is
    # split by the double-angle formulas: no arctangent, and smooth at s = 0.
    sx, sy = frequencies(box, pixel_size, torch.float64, defocus_u.device)
    s2 = sx**2 + sy**2
    maps = torch.stack([s2, sx**2 - sy**2, 2 * sx * sy, s2**2, torch.ones_like(s2)]).flatten(1).to(defocus_u.dtype)
    length = wavelength(voltage)
    mean, half = math.pi * length * (defocus_u + defocus_v) / 2, math.pi * length * (defocus_u - defocus_v) / 2
    twice = 2 * torch.deg2rad(defocus_angle)
    constant = torch.asin(amplitude_contrast) + (0 if phase_shift is None else torch.deg2rad(phase_shift))
    weights = [mean, half * torch.cos(twice), half * torch.sin(twice), -math.pi / 2 * cs * 1e7 * length**3, constant]
    gamma = torch.stack([w.to(defocus_u.dtype).expand(len(defocus_u)) for w in weights], 1) @ maps
    gamma = gamma.reshape(-1, box, box // 2 + 1)
    if even is not None:
        gamma = gamma - even  # RELION's gamma is minus this one
    values = torch.sin(gamma)
    return values if scale is None else values * scale.reshape(-1, 1, 1)


def beam_tilt_phase(box: int, pixel_size: float, tilt: Tensor, voltage: Tensor, cs: Tensor) -> Tensor:
    """Phase (n, box, box // 2 + 1), radians, of axial coma by a beam tilt (n, 2; x, y in mrad); RELION's sign and formula.

    Images carry ``exp(-i phase)``; multiplying their transforms by ``exp(i phase)`` undoes it.
    """
    sx, sy = frequencies(box, pixel_size, tilt.dtype, tilt.device)
    factor = 2e-3 * math.pi * (cs.to(tilt.dtype) * 1e7) * wavelength(voltage.to(tilt.dtype)) ** 2
    along = sx * tilt[:, 0, None, None] + sy * tilt[:, 1, None, None]
    return factor.reshape(-1, 1, 1) * (sx**2 + sy**2) * along


def zernike_phase(box: int, pixel_size: float, coefficients: list[float], first: int) -> Tensor:
    """Phase (box, box // 2 + 1), radians, float64: RELION's sum of Zernike polynomials of the frequency in 1/Å.

    ``coefficients`` run over orders n = first, first + 2, ... and m = -n, -n + 2, ..., n; ``first`` is 1 for
    ``rlnOddZernike`` (images carry ``exp(i phase)``) and 0 for ``rlnEvenZernike`` (subtracted from the CTF's gamma).
    """
    sx, sy = frequencies(box, pixel_size, torch.float64)
    r, theta = torch.hypot(sx, sy), torch.atan2(sy, sx.expand(box, -1))
    indices = [(n, m) for n in range(first, first + 2 * len(coefficients) + 2, 2) for m in range(-n, n + 1, 2)]
    phase = torch.zeros_like(r)
    for value, (n, m) in zip(coefficients, indices, strict=False):
        angular = torch.cos(m * theta) if m >= 0 else torch.sin(-m * theta)
        phase += value * _radial(n, abs(m), r) * angular
    return phase


def _radial(n: int, m: int, r: Tensor) -> Tensor:
    """Zernike's radial polynomial R_n^m(r)."""
    f = math.factorial
    terms = [(-1) ** k * f(n - k) / (f(k) * f((n + m) // 2 - k) * f((n - m) // 2 - k)) * r ** (n - 2 * k) for k in range((n - m) // 2 + 1)]
    return torch.stack(terms).sum(0)
