"""What lenses do to images beyond defocus, as an optics table tells it: anisotropic magnification, odd and even aberrations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from cryospire.io.metadata import ParticleTable
from cryospire.maths import fourier
from cryospire.maths.ctf import beam_tilt_phase, zernike_phase


def magnification(table: ParticleTable) -> Tensor | None:
    """Matrices (group, 2, 2) where one of them is not the identity."""
    return None if table.optics.magnification is None else torch.from_numpy(table.optics.magnification)


def undistorted(table: ParticleTable) -> ParticleTable:
    """The table with shifts as they are in images without anisotropic magnification: ``M^-T shift``."""
    matrix = table.optics.magnification
    if matrix is None:
        return table
    return replace(table, shift=np.einsum("nji,nj->ni", np.linalg.inv(matrix)[table.group], table.shift))


def distorted(table: ParticleTable) -> ParticleTable:
    """The table with shifts as they are in the images themselves: inverse of ``undistorted``."""
    matrix = table.optics.magnification
    return table if matrix is None else replace(table, shift=np.einsum("nji,nj->ni", matrix[table.group], table.shift))


def isotropic(images: Tensor, matrix: Tensor) -> Tensor:
    """Images (n, box, box) without the anisotropic magnification ``matrix`` (2, 2): frequency M k moves from k to its place."""
    if torch.equal(matrix, torch.eye(2, dtype=matrix.dtype)):
        return images
    return fourier.resample(images, matrix.T) * torch.linalg.det(matrix).to(images.dtype)


def odd_phases(table: ParticleTable, box: int, pixel_size: float) -> Tensor | None:
    """Factors (group, box, box // 2 + 1) that undo beam tilt and odd Zernike aberrations; None where there are none."""
    o = table.optics
    tilt = torch.from_numpy(np.stack([o.beam_tilt_x, o.beam_tilt_y], 1))
    phase = beam_tilt_phase(box, pixel_size, tilt, torch.from_numpy(o.voltage), torch.from_numpy(o.cs))
    phase = phase - torch.stack([zernike_phase(box, pixel_size, c, 1) for c in o.odd_zernike])
    # An odd phase has no value at Nyquist, where both signs of a frequency meet.
    phase[:, box // 2] = phase[:, :, box // 2] = 0
    return torch.exp(1j * phase).to(torch.complex64) if phase.any() else None


def even_phases(table: ParticleTable, box: int, pixel_size: float) -> Tensor | None:
    """Phases (group, box, box // 2 + 1) that even Zernike aberrations add to the CTF; None where there are none."""
    lists = table.optics.even_zernike
    return torch.stack([zernike_phase(box, pixel_size, c, 0) for c in lists]).float() if any(map(any, lists)) else None
