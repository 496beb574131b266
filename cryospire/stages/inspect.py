"""A store's story: what is inside, in which units, how it was made, whether it is whole; and a picture of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from cryospire.conventions import InputError
from cryospire.io import stores
from cryospire.stages import report_figures as figures

BRANCH_LINES = 12  # arrays of a group that are listed before the rest is counted


def run(store: Path, preview: Path | None = None) -> None:
    """Print the story of a store; write its picture to ``preview`` (.png) when asked."""
    group: Any = stores.open_partial(store)
    if preview is not None and preview.suffix != ".png":
        raise InputError(f"{preview}: the preview is a PNG; give a name that ends in .png")
    tell(store, group)
    if preview is not None:
        draw(group, store, preview)
        print(f"picture: {preview}")


def tell(store: Path, group: Any) -> None:
    """Provenance, then the tree of arrays."""
    from rich.console import Console
    from rich.table import Table
    from rich.tree import Tree

    attrs = dict(group.attrs)
    whole = attrs.get("complete")
    console = Console(highlight=False, width=None if Console().is_terminal else 160)
    version = f"version {attrs.get('schema_version')}, written by cryospire {attrs.get('software_version')}"
    console.print(f"[bold]{store}[/]  {attrs['schema']} {version}")
    console.print("[green]complete[/]" if whole else "[bold red]incomplete: the stage that writes it has not finished[/]")
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    facts.add_row("box", f"{attrs.get('box')} px of {attrs.get('pixel_size')} Å")
    facts.add_row("seed", str(attrs.get("seed")))
    for name, source in (attrs.get("inputs") or {}).items():
        facts.add_row("input", f"{name}: {source['path']}  {fate(source)}")
    facts.add_row("config", ", ".join(f"{k}={v}" for k, v in (attrs.get("config") or {}).items()))
    told = ("schema", "schema_version", "software_version", "config", "seed", "inputs", "pixel_size", "box", "complete")
    for key, value in attrs.items():
        if key not in told:
            facts.add_row(key, shorten(value))
    console.print(facts)
    tree = Tree(f"[bold]{store.name}[/]")
    grow(tree, group)
    console.print(tree)


def fate(source: dict[str, str]) -> str:
    """Whether an input is still what the store was made from."""
    path = Path(source["path"])
    if not path.exists():
        return "(no longer there)"
    return "(unchanged)" if stores.fingerprint(path) == source["hash"] else "[yellow](changed since)[/]"


def shorten(value: Any, most: int = 120) -> str:
    text = str(value)
    return text if len(text) <= most else text[:most] + f"... ({len(text)} characters)"


def grow(tree: Any, group: Any) -> None:
    """Arrays of a group with shape, type, units and meaning; then its groups."""
    arrays = sorted(group.arrays())
    for name, array in arrays[:BRANCH_LINES]:
        dims = array.metadata.dimension_names or [""] * array.ndim
        shape = " × ".join(f"{n:,} {d or ''}".strip() for n, d in zip(array.shape, dims, strict=True)) or "scalar"
        unit, meaning = array.attrs.get("units", ""), array.attrs.get("long_name", "")
        shards = f", shards {'×'.join(map(str, array.shards))}" if array.shards else ""
        chunks = "×".join(map(str, array.chunks))
        said = "  ".join(s for s in (f"[cyan]{name}[/]", shape, str(array.dtype), unit and f"[green]{unit}[/]", meaning) if s)
        tree.add(f"{said}  [dim]chunks {chunks}{shards}[/]" if chunks else said)
    if len(arrays) > BRANCH_LINES:
        tree.add(f"[dim]and {len(arrays) - BRANCH_LINES} more arrays[/]")
    for name, child in sorted(group.groups()):
        grow(tree.add(f"[bold]{name}/[/]"), child)


def draw(group: Any, store: Path, path: Path) -> None:
    """The picture of a store by its schema."""
    from matplotlib import rc_context

    schema = str(group.attrs["schema"]).removeprefix("cryospire.")
    try:
        with rc_context(figures.LOOK):
            drawn = PICTURES[schema](group)
    except (KeyError, InputError) as missing:
        raise InputError(f"{store}: nothing to draw yet: {missing.args[0]}") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=150)


def _images(group: Any) -> Figure:
    return figures.gallery(np.asarray(group["images"][: min(8, group["images"].shape[0])], np.float32), group.attrs["pixel_size"])


def _map(group: Any) -> Figure:
    return figures.three_views(stores.read(group, "map"), group.attrs["pixel_size"])


def _features(group: Any) -> Figure:
    return figures.features(stores.read(group, "feature"), stores.read(group, "part"))


def _latents(group: Any) -> Figure:
    """The two latent axes of greatest variance; no analysis is needed."""
    z = stores.read(group, "latents")
    order = np.argsort(-z.var(0))[:2]
    drawn, (ax,) = figures.axes(4.6, 4.0)
    a, b = order[0], order[-1]
    ax.scatter(z[:, a], z[:, b], s=3, lw=0, alpha=0.4, color=figures.BLUE, rasterized=True)
    ax.set(xlabel=f"latent {a} (latent unit)", ylabel=f"latent {b} (latent unit)", title=f"{len(z):,} particles")
    return drawn


def _analysis(group: Any) -> Figure:
    axes, mean = stores.read(group, "pca/components"), stores.read(group, "pca/mean")
    coordinates, variance = stores.read(group, "pca/coordinates"), stores.read(group, "pca/variance")
    if len(variance) < 2:
        drawn, (ax,) = figures.axes(4.6, 3.0)
        ax.hist(coordinates[:, 0], 60, color=figures.BLUE)
        ax.set(xlabel="PC 1 (latent unit)", ylabel="particles")
        return drawn
    places = (stores.read(group, "states/latent") - mean) @ axes.T
    names, lines = group["trajectories/latent"].attrs["names"], stores.read(group, "trajectories/latent")
    paths = [(n, (line - mean) @ axes.T) for n, line in zip(names, lines, strict=True)]
    return figures.latent_plane(coordinates, stores.read(group, "density"), places, paths, variance)


def _volumes(group: Any) -> Figure:
    count = min(8, group["states"].shape[0])
    names = [f"state {k}" for k in range(count)]
    return figures.state_grid([np.asarray(group["states"][k]) for k in range(count)], group.attrs["pixel_size"], names)


PICTURES: dict[str, Callable[[Any], Figure]] = {
    "particles": _images, "consensus": _map, "discovery": _latents, "parts": _features,
    "model": _latents, "analysis": _analysis, "volumes": _volumes,
}  # fmt: skip
