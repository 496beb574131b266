"""Back-projection of a sample of particles under competing conventions, judged by what one half-set explains of the other.

Half-set A's map, in a soft sphere, predicts half-set B's images and the reverse.  With the accumulators N (CTF-weighted
slices) and W (CTF^2) of one half and the map's transform T of the other, the energy that the prediction removes from the
images in a shell, at its best radial scale, is ``<N, T>^2 / <T, W T>``: twice the gain in log likelihood, as the images are
whitened.  A wrong convention blurs T or decorrelates it from N; both lower the number, with noise or without.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryospire.conventions import InputError
from cryospire.io import mrc
from cryospire.io.table import ParticleTable
from cryospire.kernels import insertion as kernel
from cryospire.maths import fourier, insertion, metrics, noise
from cryospire.maths.ctf import ctf
from cryospire.stages import distortions
from cryospire.stages.preprocess import Geometry, Recipe, common_grid, on_grid

BOX = 64  # pixels of the images that are back-projected
PAD = 1  # of the Fourier grid: a coarse grid treats all readings alike, and costs an eighth
BATCH = 250
OVERFOCUS = "overfocus positive"
GIVEN, SHUFFLED = "as given", "shuffled among particles"


@dataclass(frozen=True)
class Sample:
    """Whitened images of some particles as transforms (n, box, box // 2 + 1) about the origin, and what the table says of them."""

    table: ParticleTable  # the same particles
    transforms: Tensor
    whitening: Tensor  # (shell,)
    half: Tensor  # 0 or 1
    box: int
    pixel_size: float
    images: Tensor  # the first few, as they are shown
    even: Tensor | None = None  # phases (group, box, box // 2 + 1) of even aberrations


@dataclass(frozen=True)
class Survey:
    """What was met while reading: dead images and pairs of equal ones, as positions in the table, and deviations of those alive."""

    rows: NDArray[np.int64]
    dead: list[int]
    twins: list[tuple[int, int]]
    deviation: list[float]


@dataclass(frozen=True)
class Convention:
    """How the table is read; the default is as the conventions of its format say."""

    rotation: str = "given"  # or transposed, flipped, shuffled
    shift: float = 1.0  # factor
    ctf: str = "given"  # or negated, flipped, none
    pixel: float = 1.0  # factor on the pixel size in the CTF


@dataclass(frozen=True)
class Evidence:
    """Energy explained across half-sets (noise variances), FSC (shell,) in the sphere, its resolution (Å), and the half-maps."""

    explained: float
    fsc: Tensor
    resolution: float
    maps: Tensor


def working_grid(table: ParticleTable, largest: int = BOX) -> Geometry:
    """The grid of about ``largest`` pixels on which every optics group meets.  Raises InputError where there is none."""
    box = int(table.optics.box[np.unique(table.group)].min())
    tries = [b for b in range(min(largest, box), box + 1, 2) if b % 2 == 0]
    for b in tries[:-1]:
        try:
            return common_grid(table, b)
        except InputError:
            continue
    return common_grid(table, 0)


def read_sample(table: ParticleTable, n: int, seed: int) -> tuple[Sample, Survey]:
    """At most n particles, drawn at random; dead images (constant, or not finite) are left out of the sample."""
    rng = np.random.default_rng((seed, 3))
    rows = np.sort(rng.choice(len(table), min(n, len(table)), replace=False))
    grid = working_grid(table)
    size = grid.box, grid.pixel_size
    undo = Recipe(grid, 1.0, False, torch.empty(0), distortions.odd_phases(table, *size), distortions.magnification(table))
    stacks = {int(s): mrc.open_stack(table.stacks[s]) for s in np.unique(table.stack[rows])}
    survey, kept, cropped = Survey(rows, [], [], []), [], []
    seen: dict[int, int] = {}
    for start in range(0, len(rows), BATCH):
        for g, here, images in _alive(table, rows[start : start + BATCH], stacks, survey, seen):
            kept.append(here)
            cropped.append(on_grid(images, g, undo))
    if sum(map(len, kept)) < 2:
        first = table.row[survey.dead[0]] + 1
        raise InputError(f"{table.source}: {len(survey.dead)} of {len(rows)} sampled images are constant or not finite; first: row {first}")
    images = torch.cat(cropped)
    white = noise.whitening(noise.background_power(images).mean(0))
    filters = white[fourier.shells(grid.box).clamp(max=grid.box // 2)]
    transforms = fourier.rfft(images * fourier.window(grid.box)) * filters
    own = distortions.undistorted(table.take(np.concatenate(kept)))
    known = len(np.unique(own.half_set)) == 2 and not (own.half_set == 0).any()
    half = own.half_set - 1 if known else rng.permutation(len(own)) % 2
    even = distortions.even_phases(table, *size)
    half_sets = torch.from_numpy(half.astype(np.int64))
    return Sample(own, transforms, white, half_sets, *size, images[:12], even), survey


def _alive(
    table: ParticleTable, rows: NDArray[np.int64], stacks: dict[int, Any], survey: Survey, seen: dict[int, int]
) -> Iterator[tuple[int, NDArray[np.int64], Tensor]]:
    """Optics group, rows and images (n, box, box) of the rows that are not dead; what is met goes into ``survey``."""
    read: dict[int, list[tuple[int, NDArray[np.float32]]]] = {}
    for row in rows.tolist():
        image = np.array(stacks[int(table.stack[row])][table.index[row]], np.float32)
        spread = float(image.std())
        if not np.isfinite(spread) or spread == 0:
            survey.dead.append(row)
            continue
        first = seen.setdefault(hash(image.tobytes()), row)
        if first != row:
            survey.twins.append((first, row))
        survey.deviation.append(spread)
        read.setdefault(int(table.group[row]), []).append((row, image))
    for g, pairs in read.items():
        yield g, np.array([row for row, _ in pairs]), torch.from_numpy(np.stack([image for _, image in pairs]))


def transfer(sample: Sample, rows: slice, convention: Convention) -> Tensor:
    """Whitened CTFs (n, box, box // 2 + 1) of some of the sample under a convention."""
    t, o = sample.table, sample.table.optics
    white = sample.whitening[fourier.shells(sample.box).clamp(max=sample.box // 2)]
    if convention.ctf == "none":
        return white.expand(len(t.id[rows]), -1, -1)
    sign = -1.0 if convention.ctf == "negated" else 1.0
    g = t.group[rows]
    even = None if sample.even is None else sample.even[torch.from_numpy(g).long()]
    own = (t.defocus_u, t.defocus_v, t.defocus_angle, t.phase_shift, t.ctf_scale)
    u, v, angle, phase, scale = (torch.from_numpy(c[rows]).float() for c in own)
    kv, cs, contrast = (torch.from_numpy(c[g]).float() for c in (o.voltage, o.cs, o.amplitude_contrast))
    pixel = sample.pixel_size * convention.pixel
    values = ctf(sample.box, pixel, sign * u, sign * v, angle, kv, cs, contrast, phase, scale, even)
    return (values.abs() if convention.ctf == "flipped" else values) * white


def poses(sample: Sample, convention: Convention) -> tuple[Tensor, Tensor]:
    """Rotations (n, 3, 3) and shifts (n, 2; pixels) under a convention."""
    rotation, shift = torch.from_numpy(sample.table.rotation).float(), torch.from_numpy(sample.table.shift).float() * convention.shift
    if convention.rotation == "transposed":
        rotation = rotation.transpose(1, 2)
    elif convention.rotation == "flipped":  # images upside down: y counts the other way, in view and model
        mirror = torch.tensor([1.0, -1.0, 1.0])
        rotation, shift = mirror[:, None] * rotation * mirror, shift * mirror[:2]
    elif convention.rotation == "shuffled":
        rotation = rotation[torch.from_numpy(np.random.default_rng(0).permutation(len(rotation)))]
    return rotation.contiguous(), shift / sample.pixel_size


def evaluate(sample: Sample, convention: Convention) -> Evidence:
    """Half-maps and their agreement under a convention."""
    box, pixel = sample.box, sample.pixel_size
    pad = PAD
    numerator, weight = insertion.accumulators(2, box, pad)
    rotation, shift = poses(sample, convention)
    for start in range(0, len(sample.half), BATCH):
        rows = slice(start, start + BATCH)
        g = transfer(sample, rows, convention)
        slices = sample.transforms[rows] * g * fourier.shift_phase(box, -shift[rows])
        kernel.insert(numerator, weight, slices, g**2, rotation[rows], sample.half[rows])
    mask = sphere(box)
    maps = torch.stack([insertion.reconstruct(n, w, box, pixel) * mask for n, w in zip(numerator, weight, strict=True)])
    explained = sum(_explained(numerator[i], weight[i], maps[1 - i], pixel) for i in (0, 1))
    curve = metrics.fsc(maps[0], maps[1])
    return Evidence(float(explained), curve, metrics.resolution(curve, 0.143, pixel), maps)


def sphere(box: int) -> Tensor:
    """Soft mask (box, box, box): 1 inside 0.8 of the half box, 0 beyond."""
    return fourier.soft_step(0.85 * box / 2 - fourier.radius(box, 3), 0.05 * box / 2)


def _explained(numerator: Tensor, weight: Tensor, volume: Tensor, pixel_size: float) -> float:
    """Energy that a map of one half explains of the other half's images, in noise variances; see the head of this file."""
    box, p = volume.shape[-1], numerator.shape[-2]
    edge = (p - box) // 2
    predicted = fourier.rfft(torch.nn.functional.pad(volume / insertion.gridding(box, p, volume.dtype), [edge] * 6), 3) * pixel_size
    shell = (fourier.shells(p, 3).flatten() * box) // p
    cross = torch.bincount(shell, (numerator.conj() * predicted).real.double().flatten())
    norm = torch.bincount(shell, (weight * predicted.abs() ** 2).double().flatten())
    kept = (norm > 0) & (cross > 0)
    # Each pair (k, -k) was inserted once; a coefficient of unit noise has variance box^2.
    return float((2 * cross[kept] ** 2 / norm[kept]).sum() / box**2)


def variants(convention: Convention, axis: str, pixel_size: float) -> dict[str, Convention]:
    """Readings along one axis, in words; the first is the table's own."""
    if axis == "rotation":
        values: dict[str, Any] = {
            "transposed (view to model)": "transposed",
            "images upside down (y reversed)": "flipped",
            SHUFFLED: "shuffled",
        }
    elif axis == "shift":
        values = {"opposite direction": -1.0, "not applied": 0.0, "in pixels, not Å": pixel_size, "Å, read as pixels": 1 / pixel_size}
        values = {words: v for words, v in values.items() if abs(v - 1) > 0.1}
    elif axis == "ctf":
        values = {OVERFOCUS: "negated", "images already phase-flipped": "flipped", "no CTF in the images": "none"}
    else:
        values = {f"{f:g} times as large": f for f in (0.5, 0.9, 0.95, 1.05, 1.1, 2.0)}
    return {GIVEN: convention} | {words: replace(convention, **{axis: v}) for words, v in values.items()}
