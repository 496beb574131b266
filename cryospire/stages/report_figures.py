"""Figures of the report: arrays in, matplotlib figures out; every axis has its unit."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from cryospire.io.chimerax import colour

Array = NDArray[Any]

LOOK: Any = {
    "font.family": "sans-serif", "font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#8795a1",
    "axes.labelcolor": "#1d2b36", "axes.titlesize": 10, "axes.titleweight": "bold", "axes.grid": True, "grid.color": "#e7edf1",
    "axes.axisbelow": True, "xtick.color": "#5b6b78", "ytick.color": "#5b6b78", "legend.frameon": False, "legend.fontsize": 8.5,
    "svg.fonttype": "none", "svg.hashsalt": "cryospire", "lines.linewidth": 1.8,
}  # fmt: skip
BLUE, ORANGE, GREY = "#0b6e8a", "#d9822b", "#8795a1"
MOST_POINTS = 20_000  # points of a cloud; more are sampled
VIEWS = ("along z", "along y", "along x")


def axes(width: float, height: float, columns: int = 1, rows: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of rows x columns axes."""
    drawn = Figure(figsize=(width, height), layout="constrained")
    made = drawn.subplots(rows, columns, squeeze=False, **options)
    return drawn, list(made.ravel())


def palette(count: int) -> list[Any]:
    """Colours of states."""
    from matplotlib import colormaps

    return [colormaps["tab20"](2 * (k % 10) + k // 10 % 2) for k in range(count)]


def _sample(n: int) -> Array:
    return np.arange(n) if n <= MOST_POINTS else np.sort(np.random.default_rng(0).choice(n, MOST_POINTS, replace=False))


def defocus(values: Array, group: Array) -> Figure:
    """Histogram of mean defocus, Å given, µm shown, one outline an optics group."""
    drawn, (ax,) = axes(4.6, 2.7)
    edges = np.histogram_bin_edges(values / 1e4, 40).tolist()
    for g in np.unique(group)[:6]:
        label = f"optics group {g + 1}" if len(np.unique(group)) > 1 else None
        ax.hist(values[group == g] / 1e4, edges, histtype="stepfilled", alpha=0.75, label=label, color=colour(int(g)))
    ax.set(xlabel="defocus, mean of U and V (µm)", ylabel="particles")
    if len(np.unique(group)) > 1:
        ax.legend()
    return drawn


def orientations(rotation: Array) -> Figure:
    """Viewing directions ``R^T z`` on an equal-area map, relative to an even spread."""
    direction = rotation[:, 2]
    longitude, height = np.arctan2(direction[:, 1], direction[:, 0]), np.clip(direction[:, 2], -1, 1)
    wide = int(np.clip(np.sqrt(len(rotation)) / 3, 6, 36)) * 2
    counts, x, y = np.histogram2d(longitude, height, [np.linspace(-np.pi, np.pi, wide + 1), np.linspace(-1, 1, wide // 2 + 1)])
    drawn, (ax,) = axes(5.2, 2.9, subplot_kw={"projection": "mollweide"})
    shown = ax.pcolormesh(x, np.arcsin(y), counts.T / counts.mean(), cmap="viridis", rasterized=True, vmin=0)
    ax.set(xticks=[], yticks=np.radians([-60, -30, 0, 30, 60]))
    ax.grid(False)
    drawn.colorbar(shown, ax=ax, shrink=0.75, label="particles / even spread")
    return drawn


def gallery(images: Array, pixel_size: float) -> Figure:
    """A row of images [particle, y, x], grey from their own 1st to 99th percentile."""
    drawn, made = axes(1.35 * len(images), 1.45, len(images))
    for ax, image in zip(made, images, strict=True):
        _grey(ax, image, pixel_size, *np.percentile(image, [1, 99]))
    return drawn


def _grey(ax: Axes, image: Array, pixel_size: float, low: float, high: float, scalebar: bool = False) -> None:
    ax.imshow(image, cmap="gray", vmin=low, vmax=high, origin="lower", interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    if scalebar:
        n = image.shape[-1]
        length = next(s for s in (500, 200, 100, 50, 20, 10, 5, 2, 1) if s <= 0.35 * n * pixel_size or s == 1)
        ax.plot([0.06 * n, 0.06 * n + length / pixel_size], [0.07 * n] * 2, color="white", lw=2.5, solid_capstyle="butt")
        ax.text(0.06 * n, 0.1 * n, f"{length} Å", color="white", fontsize=8, va="bottom")


def fsc(curve: Array, box: int, pixel_size: float, resolution: float | None) -> Figure:
    """FSC of half-maps against 1/Å, resolution on the upper axis."""
    drawn, (ax,) = axes(4.8, 3.1)
    frequency = np.arange(len(curve)) / (box * pixel_size)
    ax.axhline(0.143, color=GREY, lw=1, ls="--")
    ax.text(frequency[-1], 0.155, "0.143", color=GREY, ha="right", fontsize=8.5)
    ax.plot(frequency, curve, color=BLUE)
    if resolution:
        ax.axvline(1 / resolution, color=ORANGE, lw=1.2, ls=":")
        ax.text(1 / resolution, 1.0, f" {resolution:.1f} Å", color=ORANGE, va="top")
    ax.set(xlabel="spatial frequency (1/Å)", ylabel="Fourier shell correlation")
    ax.set(xlim=(0, frequency[-1]), ylim=(min(-0.05, float(curve.min())), 1.04))
    return drawn


def part_fscs(whole: Array, detail: Array, box: int, pixel_size: float) -> Figure:
    """FSC (P, shells) of half-maps of parts, and of what the images add to the Gaussians, dotted, against 1/Å."""
    drawn, (ax,) = axes(4.8, 3.1)
    frequency = np.arange(whole.shape[1]) / (box * pixel_size)
    ax.axhline(0.143, color=GREY, lw=1, ls="--")
    for k, paint in enumerate(palette(len(whole))):
        ax.plot(frequency, whole[k], color=paint, label=f"part {k + 1}")
        ax.plot(frequency[1:], detail[k, 1:], color=paint, ls=":")
    ax.legend(frameon=False)
    ax.set(xlabel="spatial frequency (1/Å)", ylabel="Fourier shell correlation", xlim=(0, frequency[-1]), ylim=(-0.3, 1.04))
    return drawn


def _frame(ax: Axes, title: str, width: float) -> None:
    """Axes of a picture on white: its width in Å below, no ticks."""
    ax.set(xticks=[], yticks=[], title=title, xlabel=f"{width:.0f} Å")
    ax.grid(False)
    ax.spines[:].set(visible=True, color="#dde4ea")


def three_views(volume: Array, pixel_size: float) -> Figure:
    """Central slices above, projections below, along z, y and x."""
    drawn, made = axes(6.6, 4.6, 3, 2)
    middle = volume.shape[0] // 2
    low, high = np.percentile(volume, [0.5, 99.9])
    sums = [volume.sum(k) * pixel_size for k in range(3)]
    for k, name in enumerate(VIEWS):
        _grey(made[k], np.take(volume, middle, k), pixel_size, low, high, scalebar=k == 0)
        _grey(made[3 + k], sums[k], pixel_size, *np.percentile(sums[k], [0.5, 100]))
        made[k].set_title(f"slice {name}")
        made[3 + k].set_title(f"projection {name}")
    return drawn


def histories(runs: Mapping[str, Mapping[str, Array]]) -> Figure:
    """Loss, spread of the latents and speed of each training against its epochs."""
    rows = [("loss", "loss per particle"), ("latent_sd", "sd of latents"), ("images_per_second", "images / s")]
    rows = [r for r in rows if any(r[0] in h for h in runs.values())]
    drawn, made = axes(3.3 * len(rows), 2.7 * len(runs), len(rows), len(runs))
    for r, (name, history) in enumerate(runs.items()):
        for c, (key, label) in enumerate(rows):
            ax = made[r * len(rows) + c]
            ax.plot(history["epoch"], history[key], color=(BLUE, ORANGE)[r % 2], marker="o", ms=3)
            ax.set(xlabel="epoch", ylabel=label, title=name if c == 0 else "")
            if key != "loss":
                ax.set_ylim(0, 1.1 * max(np.nanmax(history[key]), 1e-9))
            ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return drawn


def features(feature: Array, part: Array) -> Figure:
    """First two principal axes of the Gaussians' features, coloured by part."""
    _, s, vt = np.linalg.svd(centred := feature - feature.mean(0), full_matrices=False)
    plane, share = centred @ vt[:2].T, 100 * s**2 / (s**2).sum()
    drawn, (ax,) = axes(4.4, 3.5)
    rows = np.random.default_rng(0).permutation(_sample(len(plane)))  # no part drawn on top of the others
    ax.scatter(plane[rows, 0], plane[rows, 1], s=6, c=[to_rgb(colour(int(p))) for p in part[rows]], alpha=0.6, lw=0, rasterized=True)
    for p in np.unique(part):
        ax.plot([], [], "o", color=colour(int(p)), label=f"part {p + 1} ({(part == p).sum():,} Gaussians)")
    ax.set(xlabel=f"feature axis 1 ({share[0]:.0f} % of variance)", ylabel=f"feature axis 2 ({share[1]:.0f} %)")
    ax.legend(handletextpad=0.2)
    return drawn


def evidence(counts: Array, loss: Array, chosen: int) -> Figure:
    """What one part fewer would lose, against the number of parts; the chosen number is marked."""
    drawn, (ax,) = axes(3.6, 2.4, 1)
    ax.plot(counts, 100 * loss, color=BLUE, marker="o", ms=4)
    ax.axvline(chosen, color=ORANGE, lw=1.2, ls=":")
    ax.set(xlabel="number of parts", ylabel="loss of one fewer (%)")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return drawn


def coloured_projections(densities: Sequence[Array], pixel_size: float) -> Figure:
    """Three projections of the parts' densities [z, y, x], each in its colour, over white."""
    drawn, made = axes(8.4, 2.9, 3)
    for axis, (ax, name) in enumerate(zip(made, VIEWS, strict=True)):
        sums = [np.clip(d, 0, None).sum(axis) for d in densities]
        top = np.percentile(sum(sums), 99.8) or 1.0
        # Ink on paper: a part takes away what its colour lacks.
        ink = sum((s / top)[..., None] * (1 - np.array(to_rgb(colour(k)))) for k, s in enumerate(sums))
        ax.imshow(np.clip(1 - np.asarray(ink), 0, 1), origin="lower", interpolation="bilinear")
        _frame(ax, name, densities[0].shape[0] * pixel_size)
    return drawn


def latent_plane(
    coordinates: Array, density: Array, states: Array, lines: Sequence[tuple[str, Array]], variance: Array, pair: tuple[int, int] = (0, 1)
) -> Figure:
    """Particles in two principal components coloured by density; states are numbered, trajectories drawn."""
    a, b = pair
    drawn, (ax,) = axes(5.4, 4.3)
    rows = _sample(len(coordinates))
    rows = rows[np.argsort(density[rows])]
    level = density[rows] / density.max()
    shown = ax.scatter(coordinates[rows, a], coordinates[rows, b], s=4, c=level, cmap="viridis", lw=0, alpha=0.7, rasterized=True)
    drawn.colorbar(shown, ax=ax, label="density / its maximum", shrink=0.85)
    for k, (name, line) in enumerate(lines):
        ax.plot(*line[:, [a, b]].T, color=("#d1495b", "#edae49", "#6d597a")[k % 3], marker="o", ms=3, lw=1.5, label=name)
    number_states(ax, states[:, [a, b]])
    share = 100 * variance / variance.sum()
    ax.set(xlabel=f"PC {a + 1} ({share[a]:.0f} % of variance)", ylabel=f"PC {b + 1} ({share[b]:.0f} %)")
    if lines:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncol=2)
    return drawn


def number_states(ax: Axes, places: Array) -> None:
    for k, (x, y) in enumerate(places):
        style = {"boxstyle": "circle,pad=0.18", "fc": "white", "ec": "#1d2b36", "lw": 0.8}
        ax.annotate(str(k), (x, y), ha="center", va="center", fontsize=8, bbox=style)


def umap_plane(plane: Array, label: Array) -> Figure:
    """UMAP coloured by state, each state's number at its middle."""
    drawn, (ax,) = axes(4.7, 4.1)
    rows, shades = np.random.default_rng(0).permutation(_sample(len(plane))), np.array(palette(int(label.max()) + 1))
    ax.scatter(plane[rows, 0], plane[rows, 1], s=4, c=shades[label[rows]], lw=0, alpha=0.6, rasterized=True)
    number_states(ax, np.array([np.median(plane[label == s], 0) for s in range(int(label.max()) + 1)]))
    ax.set(xlabel="UMAP 1 (arbitrary)", ylabel="UMAP 2 (arbitrary)", xticks=[], yticks=[])
    return drawn


def populations(weight: Array) -> Figure:
    drawn, (ax,) = axes(5.0, 2.3)
    ax.bar(range(len(weight)), 100 * weight, color=palette(len(weight)))
    ax.set(xlabel="state", ylabel="particles (%)", xticks=range(len(weight)))
    ax.grid(False, axis="x")
    return drawn


def occupancies(values: Array) -> Figure:
    """Histograms of the mean occupancy (N, P) of each part over particles."""
    parts = values.shape[1]
    columns = min(parts, 4)
    drawn, made = axes(2.7 * columns, 2.2 * -(-parts // columns), columns, -(-parts // columns), sharex=True)
    for k, ax in enumerate(made):
        if k >= parts:
            ax.set_visible(False)
            continue
        ax.hist(values[:, k], np.linspace(0, 1, 41).tolist(), color=colour(k))
        ax.set(title=f"part {k + 1}", xlabel="occupancy (of the most)", ylabel="particles")
    return drawn


def state_grid(volumes: Sequence[Array], pixel_size: float, names: Sequence[str]) -> Figure:
    """A column for each volume: projection along z, slice at the middle, on one grey scale."""
    n = len(volumes)
    drawn, made = axes(max(1.35 * n, 3), 3.1, n, 2)
    sums = [v.sum(0) * pixel_size for v in volumes]
    slices = [v[v.shape[0] // 2] for v in volumes]
    high = max(s.max() for s in sums), max(np.percentile(s, 99.9) for s in slices)
    for k in range(n):
        _grey(made[k], sums[k], pixel_size, 0, high[0], scalebar=k == 0)
        _grey(made[n + k], slices[k], pixel_size, 0, high[1])
        made[k].set_title(names[k], fontsize=9)
    made[0].set_ylabel("projection")
    made[n].set_ylabel("slice")
    return drawn


def change(first: Array, last: Array, pixel_size: float) -> Figure:
    """What appears (blue) and disappears (red) from the first to the last step, in three projections over the first."""
    drawn, made = axes(8.4, 2.9, 3)
    for axis, (ax, name) in enumerate(zip(made, VIEWS, strict=True)):
        before, after = first.sum(axis) * pixel_size, last.sum(axis) * pixel_size
        top = max(before.max(), after.max())
        gained, lost, common = (np.clip(d, 0, None) / top for d in (after - before, before - after, np.minimum(before, after)))
        ink = common[..., None] * 0.45 + 1.6 * gained[..., None] * (1 - np.array(to_rgb("#0072b2")))
        ink = ink + 1.6 * lost[..., None] * (1 - np.array(to_rgb("#d1495b")))
        ax.imshow(np.clip(1 - ink, 0, 1), origin="lower", interpolation="bilinear")
        _frame(ax, name, first.shape[0] * pixel_size)
    return drawn


def film(volumes: Sequence[Array]) -> bytes:
    """PNG of all frames, one below the other; a frame is the projections along z, y and x, each direction on its own grey scale."""
    from matplotlib.image import imsave
    from scipy.ndimage import zoom

    views = np.stack([[v.sum(k)[::-1] for k in range(3)] for v in volumes])  # (step, direction, row, column)
    views = views / np.maximum(views.max((0, 2, 3), keepdims=True), 1e-30)
    grow = max(1, round(280 / volumes[0].shape[0]))
    frames = [zoom(np.concatenate(list(v), 1), grow, order=1, grid_mode=True, mode="nearest") for v in views]
    buffer = io.BytesIO()
    imsave(buffer, np.concatenate(frames), cmap="gray", vmin=0, vmax=1, format="png")
    return buffer.getvalue()


def durations(names: Sequence[str], seconds: Sequence[float], memory: Sequence[float]) -> Figure:
    """Wall time and peak memory of each stage."""
    drawn, (left, right) = axes(8.2, 0.32 * len(names) + 0.9, 2, sharey=True)
    minutes = np.array(seconds) / 60
    for ax, values, label, shade in ((left, minutes, "wall time (min)", BLUE), (right, np.array(memory), "peak memory (GB)", ORANGE)):
        ax.barh(range(len(names)), values, color=shade, height=0.65)
        ax.set(xlabel=label, yticks=range(len(names)), yticklabels=names)
        ax.grid(False, axis="y")
        for k, v in enumerate(values):
            ax.text(v, k, f" {v:.2g}", va="center", fontsize=8, color="#5b6b78")
    left.invert_yaxis()
    return drawn
