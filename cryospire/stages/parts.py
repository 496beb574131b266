"""Part clustering: Gaussians that move or vanish together become parts, large parts get several anchors.

Features give many small fragments, alike inside. Fragments are joined to parts by physics: as long as the whole still is, at every
shape that the latents know, there as one rigid body or absent (``maths.rigid``). An arm that is drawn by other Gaussians wherever
it stands is one part then, though no two of them have near features.  Where parts are at those shapes, the images tell, and what they
look like, with which they are docked again (``docking``); and then which part every Gaussian belongs to: the one in whose frame the
images, its motion undone, show most where the Gaussian is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
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
from cryospire.maths import fourier, rigid
from cryospire.maths.poses import angle_between
from cryospire.stages import docking
from cryospire.stages.docking import Pose
from cryospire.training.data import Particles
from cryospire.training.loop import start_threads
from cryospire.training.model import Mixture, load

Array = NDArray[Any]

FRAGMENTS = 12  # into which features are clustered before they are joined
SHAPES = 16  # of the molecule, at which fragments are compared
SAMPLE = 100_000  # latents of which shapes are clustered
POSES, LEAST = 64, 32  # and along which parts are followed: at most, and particles near each
# Of the density's variance among particles, above which fragments are not joined: eight simulated sets lost 0.13 or more below the true
# number, at most 0.09 above it, but for a part that was not recognised somewhere (0.62), which the images tell.
LOSS = 0.1
# Rounds of docking, in which parts are drawn anew and learn from each other: until less than a share of the particles has a part that is
# turned otherwise, but no fewer and no more than.
AGREED, FEWEST, ROUNDS = 0.01, 2, 6
CLEARER = 1.2  # times as much density, for which a Gaussian goes to another part
LEFT = 0.02  # of the mass, below which a part may not fall by that
FAINT = 0.1  # of the mass, below which a part may be another one that was not recognised somewhere
ELSEWHERE = 10.0  # degrees from where a part was before
NEAR = 0.04  # fraction of the Gaussians over which a feature is averaged


def run(config: Config, *, particles: Path, discovery: Path, output: Path, force: bool = False) -> None:
    """particles.zarr, discovery.zarr -> parts.zarr and a soft mask (.mrc) for each part."""
    settings = config.parts
    stores.check_replaceable(output, "parts", config=configuration.section(settings), force=force)
    data, group = Particles(stores.open_store(particles, "particles")), stores.open_store(discovery, "discovery")
    stores.check_made_from(group, "particles", particles, "discover")
    data.take_poses(group)
    model, latents = load(discovery), stores.read(group, "latents")
    rows = stores.join(stores.read(group, "id"), data.id, f"{particles} against {discovery}")
    if settings.anchors < max(1, settings.parts):
        raise InputError(f"parts.anchors: {settings.anchors} anchors cannot serve {settings.parts} parts; at least one a part")
    start_threads(config.threads)
    torch.set_num_threads(1)  # sums in one order, whatever the threads
    rng = np.random.default_rng((config.seed, 3))
    position = model.forward_gaussians(torch.from_numpy(latents[central(latents)])[None])[0][0].numpy()
    full_mass = np.abs(stores.read(group, "gaussians/amplitude")) * stores.read(group, "gaussians/scale") ** 3
    feature = near_mean(stores.read(group, "gaussians/feature"), position, full_mass)
    fragments, most = min(max(FRAGMENTS, settings.parts), len(feature)), settings.parts or settings.max_parts
    progress = Progress("parts", fragments - 1 + most * (1 + FEWEST), "steps", output.parent / "logs" / "parts.metrics.jsonl")
    with progress:
        with threadpool_limits(1):  # a thousand points: starting threads would take longer than the work
            fragment = torch.from_numpy(cluster(feature, full_mass, fragments, int(rng.integers(2**31))))
            few = shapes(model, latents, SHAPES, int(rng.integers(2**31)))
            levels, losses = rigid.merge(few, fragment, lambda: progress.advance(1, "fragments joined"))
            chosen = min(settings.parts or suggest(losses, settings.max_parts), max(levels))
            progress.total = len(levels) - 1 + chosen * (1 if settings.random else 1 + FEWEST)
            path = shapes(model, latents, min(POSES, max(SHAPES, len(latents) // LEAST)), int(rng.integers(2**31)))
            mean_mass = (path.share @ path.mass).numpy()
            labels = by_mass(rng.integers(chosen, size=len(feature)) if settings.random else levels[chosen].numpy(), mean_mass)
            bodies = []
            for k in range(chosen):
                bodies.append(rigid.fit(path, torch.from_numpy(labels == k), thorough=True))
                progress.advance(1, "motion of a part")
        division = Division.of(model, path, labels, bodies)
        if not settings.random:
            views = docking.Views.of(data, rows, torch.from_numpy(latents).float(), path.latent)
            done = partial(progress.advance, 1, "part docked into the images")
            for rounds in range(1, ROUNDS + 1):
                division, turned = division.docked(views, path, not settings.parts, done)
                if rounds >= FEWEST:
                    if turned <= AGREED:
                        break
                    progress.total += len(division.poses) if rounds < ROUNDS else 0
            division = division.settled(model, views, path)
        with threadpool_limits(1):
            anchors = max(settings.anchors, len(division.poses))
            places = divide(division.label, division.position, division.mass, anchors, int(rng.integers(2**31)))
    inputs = {"particles": particles, "discovery": discovery}
    out = stores.create(
        output,
        "parts",
        config=configuration.section(settings),
        seed=config.seed,
        inputs=inputs,
        pixel_size=model.pixel_size,
        box=model.box,
        force=force,
    )
    out.attrs["parts"] = len(division.poses)
    write(out, division, path, feature, *places)
    counts = np.arange(2, len(losses) + 2)
    stores.put(out, "evidence/parts", counts, ("division",), "number of parts")
    loss = np.array([losses[k] for k in counts.tolist()])
    stores.put(out, "evidence/loss", loss, ("division",), "what one part fewer would leave unexplained, over the density's variance")
    write_masks(output.with_name(f"{output.stem}_masks"), model, division.label, division.position, division.amplitude)
    stores.finish(out)
    tell(division, path, mean_mass, len(places[0]))
    say("parts: one part fewer would leave unexplained, over the density's variance: " + _row(losses, chosen, settings.max_parts))


@dataclass(frozen=True)
class Division:
    """Coarse Gaussians in parts: ``label`` (G,), heaviest first; each drawn as it is at the reference shape of its part, at ``position``
    (G, 3), Å, with ``amplitude`` (G,) and ``scale`` (G,), Å; the ``poses`` of the parts at K shapes; and the parts as they are
    ``seen`` in the images, once they have been."""

    label: Array
    position: Array
    amplitude: Array
    scale: Array
    reference: list[int]
    poses: list[Pose]
    seen: list[docking.Part] = field(default_factory=list)

    @staticmethod
    def drawn(model: Mixture, path: rigid.Shapes, label: Array, reference: list[int]) -> Division:
        """Each part as it is at its ``reference`` shape, without poses."""
        centre, amplitude, scale = (t.numpy() for t in model.forward_gaussians(path.latent[reference]))
        rows = np.arange(len(label))
        return Division(label, centre[label, rows], amplitude[label, rows], scale, reference, [])

    @staticmethod
    def of(model: Mixture, path: rigid.Shapes, label: Array, bodies: list[rigid.Body]) -> Division:
        """Each part as it is where it is most: the body that its motion then carries."""
        drawn = Division.drawn(model, path, label, [body.reference for body in bodies])
        for k, body in enumerate(bodies):
            centre_of_mass = body.rotation @ drawn.middle(k) + body.translation * model.pixel_size
            drawn.poses.append(Pose(body.rotation, centre_of_mass, body.present.float()))
        return drawn

    @property
    def mass(self) -> Array:
        return np.abs(self.amplitude) * self.scale**3

    def middle(self, k: int) -> Tensor:
        """Centre of mass (3,), Å, of a part at its reference shape."""
        mine = self.label == k
        return torch.from_numpy(np.average(self.position[mine], 0, self.mass[mine])).float()

    def translation(self, k: int) -> Tensor:
        """Translations (K, 3), Å, of a part after its rotation about the origin."""
        return self.poses[k].centre - self.poses[k].rotation @ self.middle(k)

    def travel(self, k: int) -> tuple[Tensor, Tensor]:
        """Angles (K,), degrees, by which a part is turned from its reference shape, and ways (K,), Å, that its centre has gone."""
        return angle_between(torch.eye(3), self.poses[k].rotation), (self.poses[k].centre - self.middle(k)).norm(dim=1)

    def docked(self, views: docking.Views, path: rigid.Shapes, doubtful: bool, done: Callable[[], None]) -> tuple[Division, float]:
        """With every part where the images say that it is, and as they show it there; and the greatest share of the particles in which
        one is turned otherwise than before.  What is faint, and ``doubtful`` for that, goes to its neighbours if it is not found."""
        position, amplitude, scale = (torch.from_numpy(a).float() for a in (self.position, self.amplitude, self.scale))
        own = [self.label == k for k in range(len(self.poses))]
        parts = self.seen or [docking.Part.of(views, position[m] - self.middle(k), amplitude[m], scale[m]) for k, m in enumerate(own)]
        mean_mass = path.share @ path.mass
        light = [bool(mean_mass[torch.from_numpy(m)].sum() < FAINT * mean_mass.sum()) for m in own]
        # What the particles were aligned by is there, does not move and is not light.
        away = [float(path.share @ torch.where(p.there, self.travel(k)[1], views.field)) for k, p in enumerate(self.poses)]
        still = int(np.argmin(np.add(away, np.multiply(light, views.field))))
        faint = [few and k != still for k, few in enumerate(light)]
        poses, real = docking.dock(views, parts, self.poses, faint, doubtful, still, path.near, done)
        most = 0.0
        for k, (old, new) in enumerate(zip(self.poses, poses, strict=True)):
            if real[k]:
                there, way = old.there & new.there, (old.centre - new.centre).norm(dim=1)
                turned = float((path.share * there * (angle_between(old.rotation, new.rotation) > ELSEWHERE)).sum())
                moved = float(way[there].median()) if there.any() else 0.0
                most = max(most, turned)
                say(f"parts: by the images part {k + 1} is turned otherwise in {turned:.0%} of particles, and moved by {moved:.0f} Å")
            else:
                say(f"parts: part {k + 1} is not in the images where it was drawn, other parts are; it is none")
        kept = np.array(real)[self.label]
        nearest = cKDTree(self.position[kept]).query(self.position)[1]
        label = (np.cumsum(real) - 1).astype(np.int32)[self.label[kept][nearest]]
        chosen = [k for k, r in enumerate(real) if r]
        seen = []
        for k in chosen:
            others = [(parts[q], poses[q]) for q in chosen if q != k]
            seen.append(parts[k].drawn(docking.in_frame(views, poses[k], others)))
        new_amplitude, reference = np.where(kept, self.amplitude, 0), [self.reference[k] for k in chosen]
        drawn = replace(self, label=label, amplitude=new_amplitude, reference=reference, poses=[poses[k] for k in chosen], seen=seen)
        return drawn, most

    def settled(self, model: Mixture, views: docking.Views, path: rigid.Shapes) -> Division:
        """With every Gaussian in the part in whose frame the images show most where it is, averaged over its mass at all shapes and its
        neighbours in space; drawn anew, each part at the shape at which it is most and most as they show it, heaviest first."""
        mass, centre = path.mass * path.share[:, None], path.centre * model.pixel_size
        density, reference = [], []
        sharp = (torch.arange(views.box // 2 + 1) <= docking.DRAWN).float()
        for k, pose in enumerate(self.poses):
            place = (centre - pose.centre[:, None]) @ pose.rotation  # in the part's frame
            whole = fourier.apply_radial(docking.in_frame(views, pose), sharp, 3)
            found = docking.read(whole, place, views.field) * pose.there[:, None]
            density.append(((mass * found).sum(0) / mass.sum(0).clamp(min=1e-12)).clamp(min=0))
            reference.append(int((path.mass * found)[:, torch.from_numpy(self.label == k)].sum(1).argmax()))
        own, mean_mass = np.arange(len(self.label)), mass.sum(0).numpy()
        score = near_mean(torch.stack(density, 1).numpy(), centre[path.share.argmax()].numpy(), mean_mass)
        score[own, self.label] *= CLEARER
        label = score.argmax(1).astype(np.int32)
        drawn, before = (Division.drawn(model, path, labels, reference) for labels in (label, self.label))
        left, had = (np.bincount(d.label, d.mass, len(self.poses)) for d in (drawn, before))
        if np.any((left < LEFT * left.sum()) & (left < had)):
            say("parts: the images do not tell which part every Gaussian belongs to; they stay as stage 1 has them")
            drawn, left = before, had
        else:
            say(f"parts: by the images {mean_mass[label != self.label].sum() / mean_mass.sum():.0%} of the mass belongs to another part")
        order = np.argsort(-left, kind="stable")
        drawn = replace(drawn, label=np.argsort(order).astype(np.int32)[drawn.label], reference=[reference[k] for k in order])
        for k, old in enumerate(order):
            pose, start = self.poses[old], reference[old]
            rotation = pose.rotation @ pose.rotation[start].T
            drawn.poses.append(Pose(rotation, rotation @ (drawn.middle(k) - pose.centre[start]) + pose.centre, pose.strength))
        return drawn


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
    some = latents[np.random.default_rng(seed).permutation(len(latents))[:SAMPLE]] if len(latents) > SAMPLE else latents
    found = KMeans(min(count, len(some)), n_init=2, random_state=seed).fit(some)
    z = torch.from_numpy(found.cluster_centers_).float()
    centre, amplitude, scale = model.forward_gaussians(z)
    share = torch.from_numpy(np.bincount(found.predict(latents), minlength=len(z))).float()
    return rigid.Shapes.of(centre / model.pixel_size, amplitude.abs() * (scale / model.pixel_size) ** 3, share, z)


def write(out: Any, division: Division, path: rigid.Shapes, feature: Array, anchor: Array, anchor_of: Array) -> None:
    """Parts, their motion and their anchors."""
    put, parts = stores.put, range(len(division.poses))
    put(out, "part", division.label, ("gaussian",), "part of each coarse Gaussian, heaviest first")
    put(out, "anchor", anchor_of, ("gaussian",), "anchor of each coarse Gaussian")
    put(out, "feature", feature, ("gaussian", "feature"), "learned feature, averaged over neighbours in space")
    words = "at the reference shape of its part"
    put(out, "position", division.position.astype(np.float32), ("gaussian", "xyz"), f"centre {words}", "Å")
    put(out, "amplitude", division.amplitude.astype(np.float32), ("gaussian",), f"peak density {words}", "image unit / Å")
    put(out, "motion/latent", path.latent.numpy(), ("shape", "latent"), "latents of shapes along which parts were followed")
    put(out, "motion/share", path.share.numpy(), ("shape",), "share of the particles")
    travel = [division.travel(k) for k in parts]
    for name, values, dims, words, unit in (
        (
            "rotation",
            [p.rotation for p in division.poses],
            ("row", "column"),
            "rotation about the origin from the part's reference shape",
            "",
        ),
        ("translation", [division.translation(k) for k in parts], ("xyz",), "translation after it", "Å"),
        ("strength", [p.strength for p in division.poses], (), "strength of the part in the images, of its own", ""),
        ("present", [p.there for p in division.poses], (), "whether the part is there", ""),
        ("angle", [angle for angle, _ in travel], (), "by how much the part is turned from its reference shape", "degrees"),
        ("offset", [way for _, way in travel], (), "how far its centre of mass is from where it is then", "Å"),
    ):
        put(out, f"motion/{name}", torch.stack(values).numpy(), ("part", "shape", *dims), words, unit)
    put(out, "anchors/position", division.position[anchor].astype(np.float32), ("anchor", "xyz"), "position of the anchor", "Å")
    put(out, "anchors/feature", feature[anchor], ("anchor", "feature"), "feature of the anchor")
    put(out, "anchors/part", division.label[anchor], ("anchor",), "part of the anchor")


def tell(division: Division, path: rigid.Shapes, mass: Array, anchors: int) -> None:
    """What was found, in words; ``mass`` (G,) as it is on average."""
    shares = ", ".join(f"{100 * mass[division.label == k].sum() / mass.sum():.0f} %" for k in range(len(division.poses)))
    say(f"parts: {len(division.poses)} parts ({shares} of the mass), {anchors} anchors")
    for k, pose in enumerate(division.poses):
        share = path.share * pose.there
        turn, way = (rigid.reach(v, share) for v in division.travel(k))
        often = float(share.sum())
        say(f"parts: part {k + 1} turns by up to {turn:.0f}°, its centre moves by up to {way:.0f} Å, there in {often:.0%} of particles")


def suggest(losses: dict[int, float], most: int) -> int:
    """The number of parts, at most ``most``, below which joining first loses more than ``LOSS`` of the variance."""
    return min(most, max((k for k, loss in losses.items() if loss > LOSS), default=1))


def by_mass(labels: Array, mass: Array) -> Array:
    """Relabel so that part 0 holds the most of ``mass`` (G,) (RELION multi-body asks for larger bodies first)."""
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
