"""RELION 3.1 itself, as Debian packages it, against our projection, CTF and insertion.

The tests that need it are skipped with a reason where it is not installed (``apt install relion``).
"""

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from cryospire.io import metadata, mrc
from cryospire.io.names import images
from cryospire.io.table import Optics, ParticleTable
from cryospire.kernels import insertion as kernel
from cryospire.maths import fourier, insertion, metrics
from cryospire.maths.ctf import ctf

needs_relion = pytest.mark.skipif(
    not (shutil.which("relion_project") and shutil.which("relion_reconstruct")),
    reason="RELION IS NOT INSTALLED: conventions are not checked against it (apt install relion)",
)
BOX, PIXEL, N = 48, 3.0, 600
BALLS = np.array([[0, 0, 0], [24, 6, -9], [-18, 21, 12], [9, -27, 15], [12, 12, 27], [-21, -12, -24], [30, -15, 9]], float)


def relion(folder: Path, *command: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def density(centre: np.ndarray, radius: float = 4.0) -> np.ndarray:
    """Gaussian balls at centres (n, 3; x, y, z in Å) about voxel n // 2, as [z, y, x]."""
    grid = (np.arange(BOX) - BOX // 2) * PIXEL
    parts = [np.exp(-((grid - c[:, None]) ** 2) / (2 * radius**2)) for c in centre.T]
    return np.einsum("b,bz,by,bx->zyx", 1 + np.arange(len(centre)) / 4, parts[2], parts[1], parts[0]).astype(np.float32)


def table(folder: Path, n: int, defocus: bool, stack: str) -> ParticleTable:
    rng = np.random.default_rng(2)
    names = [f"{i + 1:06d}@{stack}" for i in range(n)]
    taken = images(folder / "x", "name", names)
    one = np.ones(1)
    optics = Optics(["o"], 300 * one, 2.7 * one, 0.1 * one, PIXEL * one, np.array([BOX]), 0 * one, 0 * one, [[]], [[]])
    u = rng.uniform(8e3, 2e4, n) if defocus else np.zeros(n)
    return ParticleTable(
        folder / "x", taken.id, names, [folder / stack], taken.stack, taken.index, np.arange(n),
        Rotation.random(n, random_state=3).as_matrix(), rng.normal(0, 5, (n, 2)), u, u * 0.9, rng.uniform(0, 180, n),
        np.zeros(n), np.ones(n), (np.arange(n) % 2 + 1).astype(np.int8), np.zeros(n, np.int32), optics,
    )  # fmt: skip


def our_ctf(t: ParticleTable) -> torch.Tensor:
    full = [torch.from_numpy(x) for x in (t.defocus_u, t.defocus_v, t.defocus_angle)]
    constant = [torch.full((len(t),), v, dtype=torch.float64) for v in (300.0, 2.7, 0.1)]
    return ctf(BOX, PIXEL, *full, *constant).float()


def correlation(a: torch.Tensor, b: torch.Tensor, limit: float = 0.9) -> np.ndarray:
    """Fourier ring correlation over all images, shells up to ``limit`` of Nyquist."""
    fa, fb = torch.fft.rfft2(a.double()), torch.fft.rfft2(b.double())
    shell = fourier.shells(BOX).flatten()

    def total(x: torch.Tensor) -> torch.Tensor:
        return torch.bincount(shell, x.sum(0).flatten())[: BOX // 2 + 1]

    frc = total((fa * fb.conj()).real) / (total(fa.abs() ** 2) * total(fb.abs() ** 2)).sqrt()
    return frc[1 : int(limit * BOX / 2) + 1].numpy()


@pytest.fixture(scope="module")
def projected(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Images that RELION projected from a map at planted poses, with its CTF, and the table that described them."""
    folder = tmp_path_factory.mktemp("relion")
    volume = density(BALLS)
    mrc.write_volume(folder / "map.mrc", volume, PIXEL)
    t = table(folder, N, True, "proj.mrcs")
    metadata.write_star(folder / "in.star", t)
    relion(folder, "relion_project", "--i", "map.mrc", "--ang", "in.star", "--o", "proj", "--ctf", "--angpix", str(PIXEL))
    found = metadata.read(folder / "proj.star")
    data = torch.from_numpy(np.array(mrc.open_stack(folder / "proj.mrcs"), np.float32))
    return SimpleNamespace(folder=folder, volume=torch.from_numpy(volume), table=t, found=found, images=data)


@needs_relion
def test_relion_reads_what_we_write_and_we_read_it_back(projected: SimpleNamespace) -> None:
    t, found = projected.table, projected.found
    np.testing.assert_allclose(found.rotation, t.rotation, atol=1e-5)
    np.testing.assert_allclose(found.shift, t.shift, atol=1e-4)
    np.testing.assert_allclose(found.defocus_u, t.defocus_u, rtol=1e-5)
    metadata.check_stacks(found)


@needs_relion
def test_projection_shift_and_ctf_agree_with_relion_project(projected: SimpleNamespace) -> None:
    t = projected.table
    ours = insertion.project(projected.volume, torch.from_numpy(t.rotation).float(), PIXEL)
    transform = fourier.rfft(ours) * our_ctf(t) * fourier.shift_phase(BOX, torch.from_numpy(t.shift).float() / PIXEL)
    ours = fourier.irfft(transform)
    frc = correlation(ours, projected.images)
    assert frc.min() > 0.99, frc
    scale = float((ours * projected.images).sum() / (ours * ours).sum())
    assert scale > 0  # the same sign: +amplitude contrast at zero frequency
    # No sub-pixel offset: the phase of the mean cross spectrum has no slope.
    cross = (torch.fft.rfft2(projected.images) * torch.fft.rfft2(ours).conj()).sum(0)
    slope_x = float(torch.angle(cross[0, 1:8]).mean()) / (4 * 2 * np.pi / BOX)
    slope_y = float(torch.angle(cross[1:8, 0]).mean()) / (4 * 2 * np.pi / BOX)
    assert abs(slope_x) < 0.02 and abs(slope_y) < 0.02


@needs_relion
def test_analytic_projection_agrees_with_relion_project(projected: SimpleNamespace) -> None:
    """The pose convention itself: balls turned by our matrices and moved by our shifts, no Fourier interpolation of ours."""
    t = projected.table
    grid = (np.arange(BOX) - BOX // 2) * PIXEL
    view = np.einsum("nij,bj->nbi", t.rotation, BALLS)[..., :2] + t.shift[:, None]
    x, y = (np.exp(-((grid - view[..., i : i + 1]) ** 2) / 32) for i in (0, 1))
    clean = torch.from_numpy(np.einsum("b,nby,nbx->nyx", 1 + np.arange(len(BALLS)) / 4, y, x))
    ours = fourier.irfft(fourier.rfft(clean) * our_ctf(t))
    # Beyond 0.7 of Nyquist these balls hold less power than RELION's own interpolation error.
    assert correlation(ours, projected.images, 0.7).min() > 0.99


@needs_relion
def test_insertion_agrees_with_relion_reconstruct(projected: SimpleNamespace) -> None:
    folder, t = projected.folder, projected.found
    relion(folder, "relion_reconstruct", "--i", "proj.star", "--o", "rec.mrc", "--ctf", "--angpix", str(PIXEL))
    theirs = torch.from_numpy(mrc.read_volume(folder / "rec.mrc")[0])
    numerator, weight = insertion.accumulators(1, BOX, 2)
    g = our_ctf(t)
    slices, weights = insertion.weighted_slices(projected.images, g, torch.from_numpy(t.shift).float() / PIXEL)
    kernel.insert(numerator, weight, slices, weights, torch.from_numpy(t.rotation).float(), torch.zeros(N, dtype=torch.long))
    ours = insertion.reconstruct(numerator[0], weight[0], BOX, PIXEL)
    mask = fourier.soft_step(0.8 * BOX / 2 - fourier.radius(BOX, 3), 2.0)
    last = int(0.9 * BOX / 2) + 1
    agreement = metrics.fsc(ours, theirs, mask)[1:last]
    mirrored = metrics.fsc(torch.roll(ours.flip(0), 1, 0), theirs, mask)[1:last]
    truth = metrics.fsc(ours, projected.volume, mask)[1:last]
    assert agreement.min() > 0.99, agreement
    assert truth.min() > 0.99, truth
    assert mirrored[4:].mean() < 0.5  # hand
    # No sub-pixel offset: the slope of the cross spectrum's phase along each axis, weighted by its power.
    cross = torch.fft.fftn((ours * mask).double()) * torch.fft.fftn((theirs * mask).double()).conj()
    k = torch.fft.fftfreq(BOX, 1 / BOX, dtype=torch.float64)
    for axis in range(3):
        along = k.reshape([-1 if a == axis else 1 for a in range(3)])
        slope = (cross.abs() * torch.angle(cross) * along).sum() / (cross.abs() * along**2).sum()
        assert abs(float(slope)) * BOX / (2 * np.pi) < 0.02  # pixels


@needs_relion
def test_relion_accepts_an_exported_selection(projected: SimpleNamespace) -> None:
    from cryospire.config import Config
    from cryospire.stages import export

    folder = projected.folder
    (folder / "ids.txt").write_text("\n".join(projected.found.image_names[::2]))
    export.run(Config(particles=folder / "proj.star"), folder / "half.star", ids=folder / "ids.txt", force=True)
    relion(folder, "relion_reconstruct", "--i", "half.star", "--o", "half.mrc", "--ctf", "--angpix", str(PIXEL))
    half = torch.from_numpy(mrc.read_volume(folder / "half.mrc")[0])
    assert metrics.fsc(half, projected.volume)[1 : BOX // 4].min() > 0.95
