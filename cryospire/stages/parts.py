"""Part clustering: Gaussians that move or vanish together become parts, large parts get several anchors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, silhouette_score
from threadpoolctl import threadpool_limits

from cryospire import config as configuration
from cryospire.config import Config
from cryospire.conventions import InputError
from cryospire.io import mrc, stores
from cryospire.kernels import render_volume
from cryospire.log import say
from cryospire.training.model import Mixture, load

Array = NDArray[Any]

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
    with threadpool_limits(1):  # a thousand points: starting threads would take longer than the work
        evidence = weigh(feature, mass, settings.max_parts, settings.seeds, rng)
        chosen = settings.parts or suggest(evidence)
        labels = rng.integers(chosen, size=len(mass)) if settings.random else cluster(feature, mass, chosen, int(rng.integers(2**31)))
        labels = by_mass(labels, mass)
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
    put(out, "position", position.astype(np.float32), ("gaussian", "xyz"), "centre at the reference latent", "Å")
    put(out, "reference", reference[0].numpy(), ("latent",), "latent of the particle nearest to the median")
    put(out, "anchors/position", position[anchor].astype(np.float32), ("anchor", "xyz"), "position of the anchor", "Å")
    put(out, "anchors/feature", feature[anchor], ("anchor", "feature"), "feature of the anchor")
    put(out, "anchors/part", labels[anchor], ("anchor",), "part of the anchor")
    for name, (column, meaning) in evidence.items():
        put(out, f"evidence/{name}", column, ("division",), meaning)
    write_masks(output.with_name(f"{output.stem}_masks"), model, labels, position)
    stores.finish(out)
    shares = ", ".join(f"{100 * mass[labels == k].sum() / mass.sum():.0f} %" for k in range(chosen))
    say(f"parts: {chosen} parts ({shares} of the mass), {len(anchor)} anchors; silhouette " + _row(evidence, "silhouette", chosen))


def central(latents: Array) -> int:
    """Row of the particle nearest to the coordinate-wise median: a real shape, not the empty middle of a ring."""
    return int(((latents - np.median(latents, 0)) ** 2).sum(1).argmin())


def near_mean(feature: Array, position: Array, mass: Array) -> Array:
    """Features (G, E) averaged, by mass, over the nearest ``NEAR`` of all Gaussians in space.

    Gaussians start with random features, and what training leaves of that is noise to the clustering; a part is a region.
    """
    _, near = cKDTree(position).query(position, max(1, round(NEAR * len(position))))
    weight = mass[near][:, :, None]
    mean: Array = (feature[near] * weight).sum(1) / weight.sum(1).clip(min=1e-12)
    return mean.astype(np.float32)


def cluster(points: Array, weight: Array, count: int, seed: int) -> Array:
    """Labels of weighted k-means++ (Arthur & Vassilvitskii 2007)."""
    labels: Array = KMeans(count, n_init=10, random_state=seed).fit(points, sample_weight=weight).labels_
    return labels.astype(np.int32)


def weigh(feature: Array, mass: Array, most: int, seeds: int, rng: np.random.Generator) -> dict[str, tuple[Array, str]]:
    """Evidence for 2..most parts: silhouette, gap statistic (Tibshirani 2001) and agreement of halves (adjusted Rand index).

    Stability: two k-means fitted on different random halves of the Gaussians label all of them; their agreement is averaged.
    """
    counts = np.arange(2, most + 1)
    span = feature.min(0), feature.max(0)
    flat = [rng.uniform(*span, feature.shape) for _ in range(3)]
    silhouette, gap, stability = [], [], []
    for k in counts:
        seed = int(rng.integers(2**31))
        fitted = KMeans(k, n_init=10, random_state=seed).fit(feature, sample_weight=mass)
        silhouette.append(silhouette_score(feature, fitted.labels_, sample_size=2048, random_state=seed))
        dispersion = [np.log(KMeans(k, n_init=3, random_state=seed).fit(f).inertia_) for f in flat]
        gap.append(np.mean(dispersion) - np.log(KMeans(k, n_init=10, random_state=seed).fit(feature).inertia_))
        agree = []
        for _ in range(seeds):
            order = rng.permutation(len(feature))
            halves = order[: len(order) // 2], order[len(order) // 2 :]
            votes = [KMeans(k, n_init=5, random_state=seed).fit(feature[h], sample_weight=mass[h]).predict(feature) for h in halves]
            agree.append(adjusted_rand_score(*votes))
        stability.append(np.mean(agree))
    return {
        "parts": (counts, "number of parts"),
        "silhouette": (np.array(silhouette), "mean silhouette of features"),
        "gap": (np.array(gap), "gap statistic: log dispersion of flat features minus that of the learned"),
        "stability": (np.array(stability), "agreement of clusterings from disjoint halves (adjusted Rand index)"),
    }


def suggest(evidence: dict[str, tuple[Array, str]]) -> int:
    """The smallest number within a tenth of the best silhouette, among those whose halves agree more than they differ."""
    counts, silhouette, stability = (evidence[k][0] for k in ("parts", "silhouette", "stability"))
    steady = stability >= min(0.5, stability.max())
    return int(counts[steady & (silhouette >= 0.9 * silhouette[steady].max())][0])


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


def write_masks(folder: Path, model: Mixture, labels: Array, position: Array) -> None:
    """``part_1.mrc`` ...: 1 where the part's own density is, with a cosine edge of four pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("part_*.mrc"):
        old.unlink()
    centre, scale = torch.from_numpy(position), model.scale
    amplitude = (model.relative_amplitude * model.amplitude_unit).abs()
    whole = render_volume(centre, amplitude, scale, model.box, model.pixel_size)
    level = 0.05 * float(torch.quantile(whole[whole > 0.01 * whole.max()], 0.99))
    for k in range(int(labels.max()) + 1):
        mine = torch.from_numpy(labels == k)
        part = render_volume(centre[mine], amplitude[mine], scale[mine], model.box, model.pixel_size).numpy()
        distance = ndimage.distance_transform_edt(part < level)
        mask = 0.5 + 0.5 * np.cos(np.pi * np.clip(distance / 4, 0, 1))
        mrc.write_volume(folder / f"part_{k + 1}.mrc", mask.astype(np.float32), model.pixel_size)


def _row(evidence: dict[str, tuple[Array, str]], name: str, chosen: int) -> str:
    return "  ".join(f"{k}{'*' if k == chosen else ''}: {v:.2f}" for k, v in zip(evidence["parts"][0], evidence[name][0], strict=True))
