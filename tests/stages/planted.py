"""Particles planted from Gaussians: a star file, its stack, and the true map."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from cryospire.conventions import particle_id
from cryospire.io import metadata, mrc
from cryospire.io.table import Optics, ParticleTable
from cryospire.maths.ctf import ctf
from cryospire.maths.poses import random_rotations
from cryospire.maths.projection import peak_weight, render, splat


@dataclass
class Planted:
    star: Path
    table: ParticleTable
    images: np.ndarray  # with noise, as in the stack
    clean: np.ndarray
    truth: torch.Tensor  # (box, box, box)


def plant(
    folder: Path, n: int = 300, box: int = 32, pixel: float = 4.0, noise: float = 3.0, colour: float = 0.0, sign: int = 1, seed: int = 0
) -> Planted:
    """``noise``: standard deviation over that of the clean images; ``colour``: how much its amplitude falls towards Nyquist."""
    g = torch.Generator().manual_seed(seed)
    centre = torch.randn(50, 3, generator=g) * box / 9
    centre *= (box * 0.25 / centre.norm(dim=1, keepdim=True)).clamp(max=1)
    scale, amplitude = 1.0 + 0.5 * torch.rand(50, generator=g), torch.rand(50, generator=g)
    rotation = random_rotations(n, g).float()
    shift = torch.randn(n, 2, generator=g)
    pure = splat(rotation[:, :2] @ centre.T + shift[:, :, None], peak_weight(amplitude, scale * pixel).expand(n, -1), scale, box, cutoff=8)
    u, angle = 1e4 + 1e4 * torch.rand(n, generator=g), 180 * torch.rand(n, generator=g)
    transfer = ctf(box, pixel, u, u - 400, angle, *(torch.full((n,), v) for v in (300.0, 2.7, 0.1)))
    clean = torch.fft.irfft2(torch.fft.rfft2(pure) * transfer, s=(box, box))
    k = torch.hypot(torch.fft.fftfreq(box)[:, None], torch.fft.rfftfreq(box)[None])
    white = torch.randn(n, box, box, generator=g)
    coloured = torch.fft.irfft2(torch.fft.rfft2(white) * (1 - colour * k / 0.5).clamp(min=0.1), s=(box, box))
    images = sign * (clean + noise * float(clean.std()) * coloured) + 7.0
    names = [f"{i + 1:06d}@particles.mrcs" for i in range(n)]
    one = np.ones(1)
    optics = Optics(["one"], 300 * one, 2.7 * one, 0.1 * one, pixel * one, np.array([box]), 0 * one, 0 * one, [[]], [[]])
    table = ParticleTable(
        folder / "particles.star", np.array([particle_id(x) for x in names]), names, [folder / "particles.mrcs"], np.zeros(n, np.int32),
        np.arange(n), np.arange(n), rotation.double().numpy(), shift.double().numpy() * pixel, u.double().numpy(), u.double().numpy() - 400,
        angle.double().numpy(), np.zeros(n), np.ones(n), np.zeros(n, np.int8), np.zeros(n, np.int32), optics,
    )  # fmt: skip
    mrc.write_stack(folder / "particles.mrcs", images.numpy(), pixel)
    metadata.write_star(table.source, table)
    return Planted(table.source, table, images.numpy(), clean.numpy(), render(centre, amplitude, scale, box, cutoff=8))


def with_groups(folder: Path, a: Planted, b: Planted) -> Path:
    """One star file of two planted sets, an optics group each; returns its path."""
    names = [x.replace("particles.mrcs", f"{p.star.parent.name}/particles.mrcs") for p in (a, b) for x in p.table.image_names]
    o, q = a.table.optics, b.table.optics
    optics = Optics(["one", "two"], *(np.concatenate([getattr(o, f), getattr(q, f)]) for f in ARRAYS), [[], []], [[], []])
    arrays = {
        f: np.concatenate([getattr(a.table, f), getattr(b.table, f)])
        for f in ("rotation", "shift", "defocus_u", "defocus_v", "defocus_angle", "phase_shift", "ctf_scale", "half_set", "index")
    }
    group = np.repeat(np.arange(2, dtype=np.int32), [len(a.table), len(b.table)])
    row = np.arange(len(group))
    table = replace(a.table, optics=optics, image_names=names, group=group, row=row, id=row, stack=group, **arrays)
    metadata.write_star(folder / "both.star", table)
    return folder / "both.star"


ARRAYS = ("voltage", "cs", "amplitude_contrast", "pixel_size", "box", "beam_tilt_x", "beam_tilt_y")
