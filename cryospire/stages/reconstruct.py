"""Detail from the images, over any number of MPI ranks: what the Gaussians leave of each image, inserted in the frame of each part.

An image minus the mixture's projection at its own latent is, in the frame of a part, a slice of what the part still lacks: its
detail, which the moved Gaussians are too smooth or too few for.  Motion is undone in the slice's orientation and shift, absence in
its weight.  Least squares of all slices (``maths.insertion``) and the Wiener filter of its half-maps give the detail; where the
images say nothing, the mixture stays as it is.

A part's map and half-maps are made in the same way of images without the other parts' Gaussians: signal subtraction, as in
multi-body refinement (Nakane et al. 2018); its own Gaussians play no role in them but through motion and mask.
What the other parts' Gaussians leave of them is smeared, and stays where masks meet.
Latents, poses and motion come from one model of all particles: the FSC is no gold standard, as where one refinement finds all angles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cryospire import kernels
from cryospire.config import Config
from cryospire.conventions import InputError
from cryospire.io import mrc, stores
from cryospire.kernels.insertion import insert
from cryospire.log import Progress, say
from cryospire.maths import fourier, insertion, masks, metrics
from cryospire.stages.consensus import THRESHOLD, wiener
from cryospire.stages.detail import frames, part_of_gaussians
from cryospire.stages.ranks import add_up, over_ranks
from cryospire.training.data import Particles, Rows
from cryospire.training.loop import start_threads
from cryospire.training.model import Mixture, load, load_latents

BATCH = 64  # images at once: the mlp head holds a few hundred numbers for every Gaussian of each
EDGE = 4.0  # pixels over which a part's mask falls


@dataclass(frozen=True)
class Body:
    """One part at rest, maps (z, y, x) and FSCs of half-maps in the mask (shells,): the ``residual`` that all Gaussians
    leave of the images, and the map ``both`` of images without the other parts' Gaussians, with its half-maps (2, z, y, x)."""

    mask: Tensor
    residual: Tensor
    fsc_detail: Tensor
    halves: Tensor
    both: Tensor
    fsc: Tensor

    @property
    def detail(self) -> Tensor:
        """The residual map, filtered shell by shell by what its half-maps agree on, in the mask."""
        f = self.fsc_detail.clamp(min=0)
        f[:2] = f[2]  # one coefficient and a few correlate by chance
        return fourier.apply_radial(self.residual, 2 * f / (1 + f), 3) * self.mask

    @property
    def map(self) -> Tensor:
        """The part's map, filtered by the FSC of its half-maps."""
        return fourier.apply_radial(self.both, wiener(self.fsc), 3)


def run(config: Config, *, particles: Path, model: Path, output: Path, force: bool = False) -> None:
    """particles.zarr, model.zarr -> reconstruction.zarr and a folder of maps beside it; alone or under mpiexec or srun."""
    over_ranks(lambda comm: reconstruct(comm, config, particles, model, output, force))


def reconstruct(comm: Any, config: Config, particles: Path, model: Path, output: Path, force: bool) -> None:
    """What ``run`` does, over the ranks of ``comm``; each owns a range of the particles."""
    data, mixture = Particles(stores.open_store(particles, "particles")), load(model)
    latents, part = load_latents(model, data.id), part_of_gaussians(model)
    data.take_poses(stores.open_store(model, "model"))
    if not np.isin(data.half_set, (1, 2)).all():
        raise InputError(f"{particles}: half_set: particles belong to half-set 1 or 2; run preprocess again")
    if (mixture.box, mixture.pixel_size) != (data.box, data.pixel_size):
        grids = [f"box {x.box} of {x.pixel_size:g} Å" for x in (mixture, data)]
        raise InputError(f"{model}: {grids[0]}, but {particles} has {grids[1]}; run train again")
    parts = int(part.max()) + 1
    if comm.rank == 0:
        stores.check_replaceable(output, "reconstruction", config={}, force=force)
    comm.Barrier()
    start_threads(config.threads)
    numerator, weight = (x.unflatten(0, (parts, 2, 2)) for x in insertion.accumulators(4 * parts, data.box, insertion.padding(data.box)))
    blocks = np.array_split(np.arange(0, len(data), data.block), comm.size)[comm.rank]
    mine = np.arange(blocks[0], min(blocks[-1] + data.block, len(data))) if len(blocks) else np.arange(0)
    with Progress("reconstruct", len(mine), metrics=output.parent / "logs" / "reconstruct.metrics.jsonl") as progress:
        for rows in np.split(mine, range(BATCH, len(mine), BATCH)) if len(mine) else []:
            add(numerator, weight, mixture, part, latents[rows], data, rows)
            progress.advance(len(rows), f"of rank 0, {comm.size} rank(s)")
        progress.record(ranks=comm.size)
    if comm.rank == 0:
        writer = Writer(output, config, {"particles": particles, "model": model}, mixture, parts, force)
    for k in range(parts):  # one at a time: their maps need not be in memory together
        for sums in (*numerator[k].flatten(0, 1), *weight[k].flatten(0, 1)):
            add_up(comm, sums.numpy())
        if comm.rank == 0:
            writer.add(k, body(mixture, part == k, numerator[k], weight[k]))
    if comm.rank == 0:
        writer.finish()
    comm.Barrier()


def of_parts(mixture: Mixture, part: Tensor, z: Tensor, data: Particles, rows: Rows) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each part: slices (2, n, box, box // 2 + 1) of images without the other parts' Gaussians and without any, their weights
    (n, ...), and rotations (n, 3, 3).

    A point x of the part at rest is seen at ``R (R_p x + t_p) + shift``, as strongly as the part is there.
    """
    images, transfer = torch.from_numpy(data.read(rows)).float(), data.transfer(rows)
    rotation, shift = data.rotation[rows], data.shift[rows]
    with torch.no_grad():
        seen = [fourier.rfft(own) * transfer for own in mixture.project_parts(part, z, rotation, shift)]
    left = fourier.rfft(images) - torch.stack(seen).sum(0)
    turn, way, present = frames(mixture, part, z)
    for k, own in enumerate(seen):
        place = ((rotation @ way[:, k, :, None])[:, :2, 0] + shift) / mixture.pixel_size
        strength = transfer * present[:, k, None, None]
        yield torch.stack([left + own, left]) * (strength * fourier.shift_phase(data.box, -place)), strength**2, rotation @ turn[:, k]


def add(numerator: Tensor, weight: Tensor, mixture: Mixture, part: Tensor, z: Tensor, data: Particles, rows: Rows) -> None:
    """Insert images of rows into sums (P, 2, 2, ...) of each part: with and without its own Gaussians, for both half-sets."""
    half = torch.from_numpy(data.half_set[rows].astype(np.int64) - 1)
    for k, (slices, weights, rotation) in enumerate(of_parts(mixture, part, z, data, rows)):
        which = torch.cat([half, 2 + half])
        insert(
            numerator[k].flatten(0, 1),
            weight[k].flatten(0, 1),
            slices.flatten(0, 1),
            weights.repeat(2, 1, 1),
            rotation.repeat(2, 1, 1),
            which,
        )


def body(mixture: Mixture, mine: Tensor, numerator: Tensor, weight: Tensor) -> Body:
    """Maps of the part whose Gaussians are ``mine`` (G,; boolean), from its sums (2, 2, ...)."""
    grid = mixture.box, mixture.pixel_size
    peak = (mixture.relative_amplitude * mixture.amplitude_unit)[mine]
    own = kernels.render_volume(mixture.centre.T[mine] * mixture.pixel_size, peak, mixture.scale[mine], *grid)
    mask = masks.soft_mask(own, 0.0, EDGE)
    halves, residual = (
        torch.stack([insertion.reconstruct(n[h], w[h], *grid) for h in (0, 1)]) for n, w in zip(numerator, weight, strict=True)
    )
    both, detail = (insertion.reconstruct(n.sum(0), w.sum(0), *grid) for n, w in zip(numerator, weight, strict=True))
    fsc, fsc_detail = (metrics.fsc(pair[0], pair[1], mask) for pair in (halves, residual))
    return Body(mask, detail, fsc_detail, halves, both, fsc)


class Writer:
    """The store, and for each part map, half-maps and mask as .mrc: what a post-processing program takes."""

    def __init__(self, output: Path, config: Config, inputs: dict[str, Path], mixture: Mixture, parts: int, force: bool) -> None:
        grid: dict[str, Any] = {"pixel_size": mixture.pixel_size, "box": mixture.box}
        self.group = stores.create(output, "reconstruction", config={}, seed=config.seed, inputs=inputs, force=force, **grid)
        self.folder, self.pixel_size = output.with_suffix(""), mixture.pixel_size
        for old in self.folder.glob("part_*.mrc"):
            old.unlink()
        density = "image unit / Å"
        for name, lead, words, unit in (
            ("detail", (), "what the images add to the Gaussians of a part at rest, filtered and masked", density),
            ("map", (), "part at rest, of images without the other parts, filtered by the FSC of half-maps", density),
            ("half_maps", (2,), "the same from half the particles, unfiltered", density),
            ("mask", (), "soft mask of the part", ""),
        ):
            stores.empty(self.group, name, (parts, *lead), mixture.box, ("part", "half")[: 1 + len(lead)], words, unit)
        self.curves: list[Tensor] = []

    def add(self, k: int, b: Body) -> None:
        """Part ``k``; parts come in their order."""
        arrays: Any = self.group
        with stores.writing(stores.where(self.group)):
            for name, values in {"detail": b.detail, "map": b.map, "half_maps": b.halves, "mask": b.mask}.items():
                arrays[name][k] = values.numpy()
        for name, volume in {"map": b.map, "half1": b.halves[0], "half2": b.halves[1], "mask": b.mask}.items():
            mrc.write_volume(self.folder / f"part_{k + 1}_{name}.mrc", volume.numpy(), self.pixel_size)
        self.curves.append(torch.stack([b.fsc, b.fsc_detail]))
        r = metrics.resolution(b.fsc, THRESHOLD, self.pixel_size)
        edge = ", the finest that the box holds" if r <= 2.01 * self.pixel_size else ""
        share = 100 * float(b.mask.mean())
        words = f"{r:.2f} Å at FSC {THRESHOLD} of half-maps in its mask, which fills {share:.1f} % of the box{edge}"
        say(f"reconstruct: part {k + 1}: {words}; latents, poses and motion are of all particles")

    def finish(self) -> None:
        """Curves and resolutions of all parts, and the word that the store is whole."""
        fsc, detail = torch.stack(self.curves, 1)
        stores.put(self.group, "fsc", fsc.numpy(), ("part", "shell"), "FSC of half-maps in the mask")
        words = "FSC of half-maps of what all Gaussians leave of the images, in the mask"
        stores.put(self.group, "fsc_detail", detail.numpy(), ("part", "shell"), words)
        resolution = [metrics.resolution(curve, THRESHOLD, self.pixel_size) for curve in fsc]
        self.group.attrs.update({"resolution": resolution, "threshold": THRESHOLD})
        stores.finish(self.group)
