"""Rigid reconstruction of all particles: ``consensus.zarr`` with half-maps, FSC, soft mask, and the map that seeds the Gaussians."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cryospire.config import Config, section
from cryospire.conventions import InputError
from cryospire.io import mrc, stores
from cryospire.kernels.insertion import insert
from cryospire.log import Progress, say
from cryospire.maths import fourier, insertion, masks, metrics
from cryospire.training.data import Particles
from cryospire.training.loop import start_threads

BATCH = 512  # images inserted at a time
SLOTS = 1 << 28  # bytes of accumulators beside the two that are needed, for more threads
THRESHOLD = 0.143  # FSC of half-maps at the resolution (Rosenthal & Henderson 2003)


def run(config: Config, *, particles: Path, output: Path, force: bool = False) -> None:
    """particles.zarr (and the config's map, if any) -> consensus.zarr, and maps as .mrc beside it."""
    settings = section(config.consensus)
    stores.check_replaceable(output, "consensus", config=settings, force=force)
    data = Particles(stores.open_store(particles, "particles"))
    given = load_map(config.map, data.box, data.pixel_size) if config.map else None
    start_threads(config.threads)
    numerator, weight = insert_all(data, output.parent / "logs" / "consensus.metrics.jsonl")
    halves = torch.stack([insertion.reconstruct(n, w, data.box, data.pixel_size) for n, w in zip(numerator, weight, strict=True)])
    both = insertion.reconstruct(numerator.sum(0), weight.sum(0), data.box, data.pixel_size)
    unmasked = metrics.fsc(halves[0], halves[1])
    if given is not None:
        both = on_scale(given, both, unmasked, str(config.map))
    rough = max(1.5 * metrics.resolution(unmasked, THRESHOLD, data.pixel_size), 5 * data.pixel_size)
    mask = masks.soft_mask(fourier.lowpass(both, data.pixel_size, rough), config.consensus.mask_threshold, config.consensus.mask_soft)
    if not mask.any():
        raise InputError(f"consensus.mask_threshold: {config.consensus.mask_threshold:g} is above the map's maximum, {float(both.max()):g}")
    if config.mask:
        mask = load_mask(config.mask, mask, data.pixel_size)
    curve = metrics.fsc(halves[0], halves[1], mask)
    volume = both if given is not None else fourier.apply_radial(both, wiener(curve), 3)
    inputs = {"particles": particles} | {k: p for k, p in (("map", config.map), ("mask", config.mask)) if p}
    group = stores.create(
        output, "consensus", config=settings, seed=config.seed, inputs=inputs, pixel_size=data.pixel_size, box=data.box, force=force
    )
    resolution = metrics.resolution(curve, THRESHOLD, data.pixel_size)
    group.attrs.update({"resolution": resolution, "threshold": THRESHOLD, "given": given is not None})
    write(group, output, {"map": volume, "half_maps": halves, "mask": mask, "fsc": curve, "fsc_unmasked": unmasked}, data.pixel_size)
    share = 100 * float(mask.mean())
    say(f"consensus: {resolution:.2f} Å at FSC {THRESHOLD} of half-maps in the mask, which fills {share:.1f} % of the box")


def insert_all(data: Particles, log: Path | None = None) -> tuple[Tensor, Tensor]:
    """Numerators and weights (2, P, P, P // 2 + 1) of the half-sets, particles streamed in the order of the store."""
    pad = insertion.padding(data.box)
    # Private sums for more threads than two; their number follows from the box alone, so the result does not depend on threads.
    parts = max(1, min(4, SLOTS // (24 * (pad * data.box) ** 2 * (pad * data.box // 2 + 1))))
    numerator, weight = insertion.accumulators(2 * parts, data.box, pad)
    with Progress("consensus", len(data), metrics=log) as progress:
        for start in range(0, len(data), BATCH):
            rows = np.arange(start, min(start + BATCH, len(data)), dtype=np.int64)
            images = torch.from_numpy(data.read(rows)).float()
            slices, weights = insertion.weighted_slices(images, data.transfer(rows), data.shift[rows] / data.pixel_size)
            which = torch.from_numpy((data.half_set[rows].astype(np.int64) - 1) * parts + rows % parts)
            insert(numerator, weight, slices, weights, data.rotation[rows], which)
            progress.advance(len(rows))
        progress.record()
    return numerator.unflatten(0, (2, parts)).sum(1), weight.unflatten(0, (2, parts)).sum(1)


def wiener(curve: Tensor) -> Tensor:
    """Filter (shells,) for the sum of two half-maps of this FSC: ``2 FSC / (1 + FSC)``, never rising again once it fell."""
    return 2 * falling(curve) / (1 + falling(curve))


def falling(curve: Tensor) -> Tensor:
    """An FSC (shells,) that never rises again once it fell."""
    return torch.cat([torch.ones_like(curve[:2]), curve[2:]]).cummin(0).values.clamp(min=0)


def load_map(path: Path, box: int, pixel_size: float) -> Tensor:
    """A given map (box, box, box) on the particles' grid: padded to where Fourier cropping meets the pixel size, then cut."""
    values, pixel = mrc.read_volume(path)
    volume = torch.from_numpy(values)
    if abs(pixel / pixel_size - 1) > 1e-3:
        sizes = np.arange(len(values) + len(values) % 2, 2 * len(values) + 2, 2)
        exact = sizes * pixel / pixel_size
        wanted = 2 * np.rint(exact / 2)
        best = int(np.argmin(np.abs(exact - wanted) / exact + 1e-5 * np.arange(len(sizes))))
        volume = fourier.crop(resize(volume, int(sizes[best])), int(wanted[best]), 3)
    return resize(volume, box)


def load_mask(path: Path, density: Tensor, pixel_size: float) -> Tensor:
    """A given mask on the grid of the particles, of which ``density`` is the mask that was found.

    Raises InputError where it is no mask, or of none of the density: another place or pixel size.
    """
    values, _ = mrc.read_volume(path)
    if values.min() < -0.01 or values.max() > 1.01:
        raise InputError(f"{path}: values from {values.min():.3g} to {values.max():.3g}; a mask has them from 0 to 1")
    mask = load_map(path, len(density), pixel_size).clamp(0, 1)
    inside = float((mask * density).sum() / density.sum())
    if inside < 0.01:
        raise InputError(f"{path}: holds {inside:.1%} of the density; another centre or pixel size?")
    say(f"consensus: {path} holds {inside:.0%} of the density")
    return mask


def resize(volume: Tensor, box: int) -> Tensor:
    """Cut or zero-pad a cube so that the origin voxel ``n // 2`` stays the origin."""
    n = volume.shape[-1]
    before = box // 2 - n // 2
    return torch.nn.functional.pad(volume, [before, box - n - before] * 3)


def on_scale(given: Tensor, found: Tensor, reliable: Tensor, name: str) -> Tensor:
    """The given map brought to the particles' units by regression on their reconstruction, over shells whose FSC exceeds 0.5.

    Raises InputError where the two do not agree: another particle, place, hand or contrast.
    """
    shells = torch.arange(len(reliable))
    good = ((shells > 0) & (reliable.cummin(0).values > 0.5)) | ((shells > 0) & (shells < 4))
    band = good.to(given.dtype)
    a, b = fourier.apply_radial(given, band, 3), fourier.apply_radial(found, band, 3)

    def correlation(x: Tensor) -> float:
        return float((x * b).sum() / (x.norm() * b.norm()).clamp(min=1e-30))

    value, mirrored = correlation(a), correlation(fourier.apply_radial(given.flip(0).roll(1, 0), band, 3))
    if value < 0.5:
        other = "its hand is the other" if mirrored > 0.5 else "another particle, centre or pixel size"
        hint = "its contrast is inverted" if value < -0.5 else other
        raise InputError(f"{name}: correlation {value:.2f} with the particles' own reconstruction: {hint}")
    if mirrored > value + 0.02:
        say(f"consensus: {name} agrees better with the particles when mirrored ({mirrored:.2f} against {value:.2f}): check its hand")
    return given * ((a * b).sum() / (a * a).sum())


ARRAYS = {
    "map": (("z", "y", "x"), "map of all particles, Wiener-filtered by the FSC; or the given map", "image unit / Å"),
    "half_maps": (("half", "z", "y", "x"), "unfiltered maps of the half-sets", "image unit / Å"),
    "mask": (("z", "y", "x"), "soft mask", ""),
    "fsc": (("shell",), "Fourier shell correlation of the half-maps inside the mask", ""),
    "fsc_unmasked": (("shell",), "Fourier shell correlation of the half-maps without mask", ""),
}


def write(group: Any, output: Path, arrays: dict[str, Tensor], pixel_size: float) -> None:
    """Fill the store; its maps also go beside it, as ``<stem>_map.mrc``, ``_half1``, ``_half2``, ``_mask``."""
    for name, (dims, long_name, units) in ARRAYS.items():
        stores.put(group, name, arrays[name].numpy(), dims, long_name, units)
    half1, half2 = arrays["half_maps"]
    for name, volume in {"map": arrays["map"], "half1": half1, "half2": half2, "mask": arrays["mask"]}.items():
        mrc.write_volume(output.with_name(f"{output.stem}_{name}.mrc"), volume.numpy(), pixel_size)
    stores.finish(group)
