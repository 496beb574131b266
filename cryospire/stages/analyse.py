"""Latents only: principal axes, UMAP, states, density and trajectories.  Reads model.zarr, writes analysis.zarr."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import dijkstra
from scipy.spatial import cKDTree

from cryospire import config as configuration
from cryospire import log
from cryospire.config import Config
from cryospire.conventions import InputError
from cryospire.io import stores

Array = NDArray[np.float64]

UMAP_FIT = 50_000  # UMAP is fitted to at most so many particles; the rest are placed by its transform
GRAPH = 50_000  # the same for the neighbour graph of a path
NEIGHBOURS = 32  # for the density
LOCAL = 16  # neighbours whose mean stands for a point of a trajectory, and edges of the graph
PERCENTILES = (5.0, 95.0)  # ends of a trajectory along a principal component


@dataclass(frozen=True)
class Pca:
    """``coordinates = (latents - mean) @ components.T``; ``variance`` in latent units squared, falling."""

    mean: Array
    components: Array
    variance: Array
    coordinates: Array


def pca(latents: Array) -> Pca:
    """Principal components of latents (N, D); each component's largest entry is positive, so signs do not wander."""
    mean = latents.mean(0)
    variance, vectors = np.linalg.eigh(np.atleast_2d(np.cov(latents - mean, rowvar=False, bias=True)))
    components = vectors[:, ::-1].T
    sign = np.sign(components[np.arange(len(components)), np.abs(components).argmax(1)])
    components = components * sign[:, None]
    return Pca(mean, components, np.maximum(variance[::-1], 0), (latents - mean) @ components.T)


def density(points: Array, neighbours: int = NEIGHBOURS) -> Array:
    """Probability density (N,) at each of the points (N, D), from the distance r to its k-th neighbour: k / ((N - 1) v_D r^D)."""
    n, d = points.shape
    k = min(neighbours, n - 1)
    if k < 1:
        return np.ones(n)
    r = np.asarray(cKDTree(points).query(points, k + 1)[0])[:, k]
    ball = math.pi ** (d / 2) / math.gamma(d / 2 + 1)
    return k / ((n - 1) * ball * np.maximum(r, 1e-9) ** d)


@dataclass(frozen=True)
class States:
    """k-means states, the largest first.

    ``label`` (N,), ``centre`` (S, D), ``member`` (S,) the row nearest to the centre, ``weight`` (S,) share of the particles.
    """

    label: NDArray[np.int32]
    centre: Array
    member: NDArray[np.intp]
    weight: Array


def states(latents: Array, count: int, seed: int) -> States:
    """k-means++ of latents (N, D) into at most ``count`` states."""
    from sklearn.cluster import KMeans

    count = min(count, len(np.unique(latents, axis=0)))
    fit = KMeans(count, n_init=10, random_state=seed).fit(latents)
    size = np.bincount(fit.labels_, minlength=count)
    order = np.lexsort((fit.cluster_centers_[:, 0], -size))  # by size, ties by place
    label = np.argsort(order)[fit.labels_].astype(np.int32)
    centre = fit.cluster_centers_[order]
    distance = ((latents - centre[label]) ** 2).sum(1)
    member = np.array([np.flatnonzero(label == s)[distance[label == s].argmin()] for s in range(count)])
    return States(label, centre, member, size[order] / len(latents))


def into_data(points: Array, latents: Array, neighbours: int = LOCAL) -> Array:
    """Each point (P, D) moved to the mean of the neighbours of its nearest particle.

    Two steps, since the neighbours of a point in a hole may lie all around it and their mean in the hole again.
    """
    tree = cKDTree(latents)
    nearest = np.atleast_1d(tree.query(points)[1])
    around = tree.query(latents[nearest], min(neighbours, len(latents)))[1].reshape(len(points), -1)
    return latents[around].mean(1)


def along_component(axes: Pca, latents: Array, component: int, steps: int) -> Array:
    """Trajectory (steps, D) between percentiles of one component, the other coordinates at the mean, moved into the data."""
    first, last = (float(np.percentile(axes.coordinates[:, component], p)) for p in PERCENTILES)
    line = axes.mean + np.linspace(first, last, steps)[:, None] * axes.components[component]
    return into_data(line, latents)


def between(start: int, stop: int, latents: Array, steps: int, rng: np.random.Generator) -> Array:
    """Trajectory (steps, D) from particle ``start`` to ``stop`` over the neighbour graph: short hops, so through dense places.

    A straight line moved into the data where the graph falls apart.
    """
    rest = np.delete(np.arange(len(latents)), [start, stop])
    kept = rest if len(rest) <= GRAPH else np.sort(rng.choice(rest, GRAPH, replace=False))
    nodes = latents[np.concatenate([[start, stop], kept])]
    hops = min(LOCAL, len(nodes) - 1)
    length, to = map(np.asarray, cKDTree(nodes).query(nodes, hops + 1))
    rows = np.repeat(np.arange(len(nodes)), hops)
    # Squared lengths favour many short hops; a tiny floor keeps an edge between particles with the same latent.
    graph: Any = csr_matrix((length[:, 1:].ravel() ** 2 + 1e-12, (rows, to[:, 1:].ravel())), shape=(len(nodes), len(nodes)))
    total, before = dijkstra(graph, directed=False, indices=np.zeros((), int), return_predecessors=True)
    if not np.isfinite(total[1]):
        return into_data(np.linspace(latents[start], latents[stop], steps), latents)
    path = [1]
    while path[-1] != 0:
        path.append(int(before[path[-1]]))
    way = nodes[path[::-1]]
    arc = np.concatenate([[0.0], np.linalg.norm(np.diff(way, axis=0), axis=1).cumsum()])
    places = np.linspace(0, arc[-1], steps)
    line = np.stack([np.interp(places, arc, way[:, d]) for d in range(way.shape[1])], 1)
    line[1:-1] = into_data(line[1:-1], latents) if steps > 2 else line[1:-1]
    return line


def trajectories(axes: Pca, latents: Array, found: States, components: int, steps: int, seed: int) -> tuple[Array, list[str]]:
    """Latents (T, steps, D) and names: the first components, then the way between the two most distant states."""
    components = min(components, latents.shape[1])
    lines = [along_component(axes, latents, k, steps) for k in range(components)]
    names = [f"principal component {k + 1}" for k in range(components)]
    if len(found.member) > 1 and components:
        picked = latents[found.member]
        a, b = np.unravel_index(np.linalg.norm(picked[:, None] - picked[None], axis=2).argmax(), (len(picked),) * 2)
        rng = np.random.default_rng([seed, 1])
        lines.append(between(int(found.member[a]), int(found.member[b]), latents, steps, rng))
        names.append(f"state {a} to state {b}")
    return np.array(lines).reshape(len(lines), steps, latents.shape[1]), names


def embed(latents: Array, seed: int) -> Array:
    """UMAP (N, 2): fitted to at most 50,000 particles, the others placed by the fit; repeatable by its seed."""
    import warnings

    from umap import UMAP

    rng = np.random.default_rng([seed, 2])
    fitted = np.arange(len(latents)) if len(latents) <= UMAP_FIT else np.sort(rng.choice(len(latents), UMAP_FIT, replace=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # umap warns that a seed makes it serial, which is what we ask for
        init = "pca" if latents.shape[1] > 2 else "random"
        reducer = UMAP(n_neighbors=min(15, len(fitted) - 1), random_state=seed, n_jobs=1, init=init)
        plane = np.empty((len(latents), 2))
        plane[fitted] = reducer.fit_transform(latents[fitted].astype(np.float32))
        others = np.setdiff1d(np.arange(len(latents)), fitted)
        if len(others):
            plane[others] = reducer.transform(latents[others].astype(np.float32))
    return plane


def read_latents(model: Path) -> tuple[Any, Array]:
    """The open store and its latents (N, D).  Raises InputError naming the first row that is not finite."""
    group = stores.open_store(model, "model")
    latents = stores.read(group, "latents").astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(latents).all(1))
    if len(bad):
        raise InputError(f"{model}: latents: row {bad[0]} is {latents[bad[0]].tolist()}; {len(bad)} of {len(latents)} rows are not finite")
    return group, latents


def run(config: Config, model: Path, output: Path, force: bool = False) -> None:
    """Write analysis.zarr from the latents of model.zarr."""
    own = configuration.section(config.analyse)
    stores.check_replaceable(output, "analysis", config=own, force=force)
    source, z = read_latents(model)
    with log.Progress("analyse", 4, "steps", output.parent / "logs" / "analyse.metrics.jsonl") as progress:
        axes = pca(z)
        progress.advance(1, "principal components")
        if config.analyse.states > len(z):
            raise InputError(f"analyse.states: {config.analyse.states} states of {len(z):,} particles")
        found = states(z, config.analyse.states, config.seed)
        rho = density(axes.coordinates)
        progress.advance(1, f"{len(found.weight)} states, density")
        lines, names = trajectories(axes, z, found, config.analyse.trajectories, config.analyse.steps, config.seed)
        progress.advance(1, f"{len(names)} trajectories")
        plane = embed(z, config.seed) if config.analyse.umap and len(z) > 3 else None
        progress.advance(1, "UMAP" if plane is not None else "")
        progress.record(states=len(found.weight), trajectories=len(names))
    attrs = source.attrs
    group = stores.create(
        output, "analysis", config=own, seed=config.seed, inputs={"model": model},
        pixel_size=attrs["pixel_size"], box=attrs["box"], force=force,
    )  # fmt: skip
    ids = stores.read(source, "id")
    stores.put(group, "id", ids, ("particle",), "permanent particle id")
    if "half_set" in source:
        stores.put(group, "half_set", stores.read(source, "half_set"), ("particle",), "half-set, 1 or 2")
    write_axes(group, axes)
    if plane is not None:
        stores.put(group, "umap", plane.astype(np.float32), ("particle", "axis"), "UMAP of the latents", "arbitrary")
    stores.put(group, "density", rho.astype(np.float32), ("particle",), "probability density in latent space", "1 / latent unit^D")
    write_states(group, found, z, ids)
    dims = ("trajectory", "step", "latent")
    stores.put(group, "trajectories/latent", lines.astype(np.float32), dims, "latents along trajectories", "latent unit", names=names)
    stores.finish(group)
    share = ", ".join(f"{w:.0%}" for w in found.weight[:5])
    log.say(f"analyse    {len(found.weight)} states (largest: {share}); {len(names)} trajectories -> {output}")


def write_axes(group: Any, axes: Pca) -> None:
    stores.put(group, "pca/mean", axes.mean.astype(np.float32), ("latent",), "mean latent", "latent unit")
    stores.put(group, "pca/components", axes.components.astype(np.float32), ("component", "latent"), "principal axes, unit vectors in rows")
    stores.put(group, "pca/variance", axes.variance.astype(np.float32), ("component",), "variance along each axis", "latent unit^2")
    stores.put(
        group, "pca/coordinates", axes.coordinates.astype(np.float32), ("particle", "component"),
        "(latent - mean) @ components.T", "latent unit",
    )  # fmt: skip


def write_states(group: Any, found: States, latents: Array, ids: NDArray[np.int64]) -> None:
    stores.put(group, "clusters/label", found.label, ("particle",), "state of each particle, 0 is the largest")
    stores.put(group, "clusters/centre", found.centre.astype(np.float32), ("state", "latent"), "k-means centre", "latent unit")
    nearest = "latent of the particle nearest to the centre of the state"
    stores.put(group, "states/latent", latents[found.member].astype(np.float32), ("state", "latent"), nearest, "latent unit")
    stores.put(group, "states/weight", found.weight.astype(np.float32), ("state",), "share of the particles")
    stores.put(group, "states/particle", ids[found.member], ("state",), "id of that particle")
