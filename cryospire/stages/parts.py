"""Part clustering: Gaussians that move or vanish together become parts, large parts get several anchors.

Features give many small fragments, alike inside. Fragments are joined to parts by physics: as long as the whole still is, at every
shape that the latents know, there as one rigid body or absent (``maths.rigid``). An arm that is drawn by other Gaussians wherever
it stands is one part then, though no two of them have near features.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import Tensor

from cryospire import config as configuration
from cryospire.config import Config
from cryospire.conventions import InputError
from cryospire.io import mrc, stores
from cryospire.kernels import render_volume
from cryospire.log import Progress, say
from cryospire.maths import rigid
from cryospire.training.model import Mixture, load

Array = NDArray[Any]

FRAGMENTS = 12  # into which features are clustered before they are joined
SHAPES = 16  # of the molecule, at which fragments are compared
POSES = 64  # and along which parts are followed
# Of all that changes, above which fragments are not joined: simulated sets lost 0.18 or more below the true number, at most 0.12 above it.
LOSS = 0.15
NEAR = 0.04  # fraction of the Gaussians over which a feature is averaged


def run(config: Config, *, discovery: Path, output: Path, force: bool = False) -> None:
    """discovery.zarr -> parts.zarr and a soft mask (.mrc) for each part."""
    settings = config.parts
    values = configuration.section(settings)
    stores.check_replaceable(output, "parts", config=values, force=force)
    group = stores.open_store(discovery, "discovery")
    model = load(discovery)
    rng = np.random.default_rng((config.seed, 3))

    latents = stores.read(group, "latents")
    reference = torch.from_numpy(latents[central(latents)])[None]
    position = model.forward_gaussians(reference)[0][0].numpy()
    feature = stores.read(group, "gaussians/feature")
    mass = np.abs(stores.read(group, "gaussians/amplitude")) * stores.read(group, "gaussians/scale") ** 3
    if settings.anchors < max(1, settings.parts):
        raise InputError(f"parts.anchors: {settings.anchors} anchors cannot serve {settings.parts} parts; at least one a part")

    feature = near_mean(feature, position, mass)
    fragments = min(max(FRAGMENTS, settings.parts), len(feature))
    steps = fragments - 1 + (settings.parts or settings.max_parts)
    progress = Progress("parts", steps, "steps", output.parent / "logs" / "parts.metrics.jsonl")
    with threadpool_limits(1), progress:  # a thousand points: starting threads would take longer than the work
        fragment = torch.from_numpy(cluster(feature, mass, fragments, int(rng.integers(2**31))))
        few = shapes(model, latents, SHAPES, int(rng.integers(2**31)))
        levels, losses = rigid.merge(few, fragment, lambda: progress.advance(1, "fragments joined"))
        chosen = min(settings.parts or suggest(losses, settings.max_parts), max(levels))
        progress.total = len(levels) - 1 + chosen
        labels = rng.integers(chosen, size=len(mass)) if settings.random else levels[chosen].numpy()
        labels = by_mass(labels, mass)
        path = shapes(model, latents, POSES, int(rng.integers(2**31)))
        bodies = []
        for k in range(chosen):
            bodies.append(rigid.fit(path, torch.from_numpy(labels == k), thorough=True))
            progress.advance(1, "motion of a part")
        # Each part as it is where it is most: the body that its motion then carries.
        where = np.array([body.reference for body in bodies])
        centre, amplitude, scale = (t.numpy() for t in model.forward_gaussians(path.latent[where]))
        rows = np.arange(len(labels))
        position, amplitude = centre[labels, rows], amplitude[labels, rows]
        mass = np.abs(amplitude) * scale**3
        anchor, anchor_of = divide(labels, position, mass, max(settings.anchors, chosen), int(rng.integers(2**31)))

    out = stores.create(
        output,
        "parts",
        config=values,
        seed=config.seed,
        inputs={"discovery": discovery},
        pixel_size=model.pixel_size,
        box=model.box,
        force=force,
    )
    out.attrs["parts"] = chosen
    put = stores.put
    put(out, "part", labels, ("gaussian",), "part of each coarse Gaussian, largest first")
    put(out, "anchor", anchor_of, ("gaussian",), "anchor of each coarse Gaussian")
    put(out, "feature", feature, ("gaussian", "feature"), "learned feature, averaged over neighbours in space")
    put(out, "position", position.astype(np.float32), ("gaussian", "xyz"), "centre at the reference shape of its part", "Å")
    put(out, "amplitude", amplitude.astype(np.float32), ("gaussian",), "peak density at the reference shape of its part", "image unit / Å")
    put(out, "motion/latent", path.latent.numpy(), ("shape", "latent"), "latents of shapes along which parts were followed")
    put(out, "motion/share", path.share.numpy(), ("shape",), "share of the particles")
    for name, dims, words, unit in (
        ("rotation", ("part", "shape", "row", "column"), "rotation about the origin from the reference shape of the part", ""),
        ("translation", ("part", "shape", "xyz"), "translation after it", "Å"),
        ("present", ("part", "shape"), "whether the part is there", ""),
    ):
        of_parts = np.stack([getattr(body, name).numpy() for body in bodies])
        put(out, f"motion/{name}", of_parts * model.pixel_size if unit else of_parts, dims, words, unit)
    middle = [torch.from_numpy(np.average(position[labels == k], 0, mass[labels == k])).float() for k in range(chosen)]
    angle, offset = zip(*(travel(b, m, model.pixel_size) for b, m in zip(bodies, middle, strict=True)), strict=True)
    put(out, "motion/angle", np.stack(angle), ("part", "shape"), "by how much the part is turned from its reference shape", "degrees")
    put(out, "motion/offset", np.stack(offset), ("part", "shape"), "how far its centre of mass is from where it is then", "Å")
    put(out, "anchors/position", position[anchor].astype(np.float32), ("anchor", "xyz"), "position of the anchor", "Å")
    put(out, "anchors/feature", feature[anchor], ("anchor", "feature"), "feature of the anchor")
    put(out, "anchors/part", labels[anchor], ("anchor",), "part of the anchor")
    counts = np.arange(2, len(losses) + 2)
    put(out, "evidence/parts", counts, ("division",), "number of parts")
    loss = np.array([losses[k] for k in counts.tolist()])
    put(out, "evidence/loss", loss, ("division",), "what one part fewer would lose, of all that changes")
    write_masks(output.with_name(f"{output.stem}_masks"), model, labels, position, amplitude)
    stores.finish(out)
    shares = ", ".join(f"{100 * mass[labels == k].sum() / mass.sum():.0f} %" for k in range(chosen))
    say(f"parts: {chosen} parts ({shares} of the mass), {len(anchor)} anchors")
    for k, body in enumerate(bodies):
        there = body.present.numpy()
        turn, way, often = angle[k][there].max(), offset[k][there].max(), path.share.numpy()[there].sum()
        say(f"parts: part {k + 1} turns by up to {turn:.0f}°, its centre moves by up to {way:.0f} Å, there in {often:.0%} of particles")
    say("parts: one part fewer would lose, of all that changes, " + _row(losses, chosen, settings.max_parts))


def central(latents: Array) -> int:
    """Row of the particle nearest to the coordinate-wise median: a real shape, not the empty middle of a ring."""
    return int(((latents - np.median(latents, 0)) ** 2).sum(1).argmin())


def near_mean(feature: Array, position: Array, mass: Array) -> Array:
    """Features (G, E) averaged, by mass, over the nearest ``NEAR`` of all Gaussians in space.

    Gaussians start with random features, and what training leaves of that is noise to the clustering; a part is a region.
    """
    _, near = cKDTree(position).query(position, max(1, round(NEAR * len(position))))
    near = near.reshape(len(position), -1)  # of one neighbour, scipy leaves that axis out
    weight = mass[near][:, :, None]
    mean: Array = (feature[near] * weight).sum(1) / weight.sum(1).clip(min=1e-12)
    return mean.astype(np.float32)


def cluster(points: Array, weight: Array, count: int, seed: int) -> Array:
    """Labels of weighted k-means++ (Arthur & Vassilvitskii 2007)."""
    labels: Array = KMeans(count, n_init=10, random_state=seed).fit(points, sample_weight=weight).labels_
    return labels.astype(np.int32)


def shapes(model: Mixture, latents: Array, count: int, seed: int) -> rigid.Shapes:
    """The molecule at the centres of k-means of the latents."""
    found = KMeans(min(count, len(latents)), n_init=2, random_state=seed).fit(latents)
    z = torch.from_numpy(found.cluster_centers_).float()
    centre, amplitude, scale = model.forward_gaussians(z)
    share = torch.from_numpy(np.bincount(found.labels_)).float()
    return rigid.Shapes.of(centre / model.pixel_size, amplitude.abs() * (scale / model.pixel_size) ** 3, share, z)


def travel(body: rigid.Body, middle: Tensor, pixel_size: float) -> tuple[Array, Array]:
    """Angles (K,) degrees by which a body is turned, and ways (K,) Å that its centre ``middle`` (3,) Å goes, from its reference shape."""
    cosine = (body.rotation.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2
    angle = torch.rad2deg(cosine.clamp(-1, 1).arccos())
    return angle.numpy(), (body.rotation @ middle + body.translation * pixel_size - middle).norm(dim=1).numpy()


def suggest(losses: dict[int, float], most: int) -> int:
    """The number of parts, at most ``most``, below which joining first loses more than ``LOSS`` of all that changes."""
    return min(most, max((k for k, loss in losses.items() if loss > LOSS), default=1))


def by_mass(labels: Array, mass: Array) -> Array:
    """Relabel so that part 0 holds the most mass (RELION multi-body asks for larger bodies first)."""
    order = np.argsort([-mass[labels == k].sum() for k in range(labels.max() + 1)])
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    return rank[labels]


def divide(labels: Array, position: Array, mass: Array, anchors: int, seed: int) -> tuple[Array, Array]:
    """Anchors over parts: one each, the rest to the parts with the most mass an anchor; then k-means++ in space.

    Returns the Gaussian (A,) nearest to each anchor's centroid, and each Gaussian's anchor (G,).
    """
    share = np.array([mass[labels == k].sum() for k in range(labels.max() + 1)])
    count = np.ones(len(share), int)
    while count.sum() < anchors:
        count[np.argmax(share / count)] += 1
    nearest: list[Any] = []
    anchor_of = np.empty(len(labels), np.int32)
    for k, n in enumerate(count):
        members = np.flatnonzero(labels == k)
        fitted = KMeans(min(n, len(members)), n_init=10, random_state=seed).fit(position[members], sample_weight=mass[members])
        anchor_of[members] = len(nearest) + fitted.labels_
        nearest += [members[((position[members] - c) ** 2).sum(1).argmin()] for c in fitted.cluster_centers_]
    return np.array(nearest), anchor_of


def write_masks(folder: Path, model: Mixture, labels: Array, position: Array, amplitude: Array) -> None:
    """``part_1.mrc`` ...: 1 where the part's own density is, with a cosine edge of four pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("part_*.mrc"):
        old.unlink()
    centre, scale, peak = torch.from_numpy(position), model.scale, torch.from_numpy(np.abs(amplitude))
    whole = render_volume(centre, peak, scale, model.box, model.pixel_size)
    level = 0.05 * float(torch.quantile(whole[whole > 0.01 * whole.max()], 0.99))
    for k in range(int(labels.max()) + 1):
        mine = torch.from_numpy(labels == k)
        part = render_volume(centre[mine], peak[mine], scale[mine], model.box, model.pixel_size).numpy()
        distance = ndimage.distance_transform_edt(part < level)
        mask = 0.5 + 0.5 * np.cos(np.pi * np.clip(distance / 4, 0, 1))
        mrc.write_volume(folder / f"part_{k + 1}.mrc", mask.astype(np.float32), model.pixel_size)


def _row(losses: dict[int, float], chosen: int, most: int) -> str:
    return "  ".join(f"{k}{'*' if k == chosen else ''}: {losses[k]:.1%}" for k in range(2, most + 1) if k in losses)
