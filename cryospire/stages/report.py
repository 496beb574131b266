"""One HTML page of a run: whatever is there is shown, whatever is not is named."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from numpy.typing import NDArray

from cryospire import __version__, log
from cryospire.config import Config
from cryospire.conventions import InputError
from cryospire.io import stores
from cryospire.stages import report_figures as figures
from cryospire.stages import report_page as page
from cryospire.stages import report_sections as more
from cryospire.stages import report_usage, status
from cryospire.stages.report_results import Missing, Results, array

Array = NDArray[Any]

HISTORY = ("epoch", "loss", "latent_sd", "images_per_second", "turn_sd", "shift_sd")
OPTICS = (("voltage", "voltage", "kV"), ("cs", "spherical aberration", "mm"), ("amplitude_contrast", "amplitude contrast", ""))
PACKAGES = ("torch", "numpy", "numba", "scipy", "scikit-learn", "umap-learn", "zarr", "dask", "mpi4py", "mrcfile", "starfile", "snakemake")


def data(results: Results) -> str:
    """Particles, box, optics, defocus and viewing directions."""
    group = results.store("particles")
    n, box, pixel = group["images"].shape[0], group.attrs["box"], group.attrs["pixel_size"]
    u, v, kind = (array(group, f"ctf/{k}") for k in ("defocus_u", "defocus_v", "group"))
    rows: list[tuple[str, Any]] = [("particles", n), ("box", f"{box} px ({box * pixel:.0f} Å)"), ("pixel size", f"{pixel:.3f} Å")]
    for key, name, unit in OPTICS:
        if f"optics/{key}" in group:
            values = np.unique(stores.read(group, f"optics/{key}"))
            rows.append((name, ", ".join(f"{x:g}" for x in values) + f" {unit}"))
    halves = np.bincount(array(group, "half_set"), minlength=3)
    astigmatism = np.abs(u - v)
    rows += [
        ("optics groups", len(np.unique(kind))), ("half-sets", f"{halves[1]:,} and {halves[2]:,}"),
        ("defocus", f"{(u + v).mean() / 2e4:.2f} µm, {(u + v).min() / 2e4:.2f} to {(u + v).max() / 2e4:.2f}"),
        ("astigmatism", f"{np.median(astigmatism):.0f} Å (median)"), ("stacks", len(group.attrs.get("stacks", [])) or None),
    ]  # fmt: skip
    sample = np.asarray(group["images"][: min(4, n)], np.float32)
    spread = "Viewing directions; an even spread would be 1 everywhere. Empty regions limit the resolution of the map along them."
    first = "The first images as the trainings see them: cropped, whitened, protein bright."
    return page.row(page.table(rows), page.curve(figures.defocus((u + v) / 2, kind), "Defocus of the particles.")) + page.row(
        page.image(figures.orientations(array(group, "pose/rotation")), spread), page.image(figures.gallery(sample, pixel), first)
    )


def preflight(results: Results) -> str:
    """What was decided about conventions, with the evidence."""
    found = results.json("preflight.json")
    rows = [("✓" if v["ok"] else "✗", v["check"], v["found"], v["evidence"]) for v in found["verdict"]]
    good = sum(v["ok"] for v in found["verdict"])
    said = f"{good} of {len(rows)} checks agree with the table and the settings, on a sample of {found['sample']:,} particles."
    estimate = [(stage, e.get("mem_mb"), e.get("runtime"), e.get("disk_mb")) for stage, e in found.get("estimate", {}).items()]
    proposed = "".join(page.text(f"Proposed: set {k} to {v}.") for k, v in found.get("proposal", {}).items())
    notes = "".join(page.text(note) for note in found.get("notes", []))
    drawn = results.root / "preflight.png"
    shown = page.image_file(drawn.read_bytes(), "png", "Evidence under competing conventions.") if drawn.exists() else ""
    return (
        page.text(said) + proposed + page.table(rows, ("", "check", "found", "evidence")) + notes + shown
        + page.details("estimate of time, memory and disk", page.table(estimate, ("stage", "memory (MB)", "time (min)", "disk (MB)")))
    )  # fmt: skip


def consensus(results: Results) -> str:
    """FSC of the half-maps and what the map looks like."""
    group = results.store("consensus")
    box, pixel, resolution = (group.attrs.get(k) for k in ("box", "pixel_size", "resolution"))
    said = f"The half-maps agree to {resolution:.1f} Å (FSC 0.143); the box ends at {2 * pixel:.1f} Å." if resolution else ""
    blur = "Central slices and projections of the rigid map: blur marks what moves."
    views = page.image(figures.three_views(array(group, "map"), pixel), blur)
    if "fsc" not in group:
        return page.text(said) + views
    curve = page.curve(figures.fsc(array(group, "fsc"), box, pixel, resolution), "FSC of the two half-maps inside the soft mask.")
    return page.text(said) + page.row(curve, views)


def training(results: Results) -> str:
    """Loss, latents and speed of both trainings, finished or not."""
    runs = {stage: h for stage, name in (("discover", "discovery"), ("train", "model")) if (h := history(results, stage, name))}
    if not runs:
        raise Missing("no training has finished an epoch")
    last = "; ".join(f"{k}: {len(h['epoch'])} epochs, loss {h['loss'][0]:.2f} to {h['loss'][-1]:.2f}" for k, h in runs.items())
    caption = (
        "discover finds parts with a coarse mixture, train refines with parts that move rigidly. The loss contains the noise of every "
        "pixel, so its fall is small beside its value. Latents that spread away from zero carry information."
    )
    *_, newest = runs.values()
    wrong = ""
    if newest.get("turn_sd", [0])[-1] > 0:
        turn, shift = (newest[k][-1] for k in ("turn_sd", "shift_sd"))
        wrong = (
            f"The given poses are wrong by about {turn:.1f}° about an axis and {shift:.1f} Å along one (standard deviations), as the "
            "images tell; every particle's is corrected along with its latent."
        )
    return page.text(last + ".", wrong) + page.curve(figures.histories(runs), caption)


def history(results: Results, stage: str, name: str) -> dict[str, Array]:
    """Columns of a training's history: from its store, or while it runs from its metrics."""
    try:
        group = results.store(name)
        return {k: stores.read(group, f"history/{k}") for k in HISTORY if f"history/{k}" in group}
    except Missing:
        records = status.read_metrics(results.root / "logs" / f"{stage}.metrics.jsonl")
        kept = [r for r in records if "epoch" in r and "loss" in r]
        return {k: np.array([r.get(k, np.nan) for r in kept]) for k in HISTORY} if kept else {}


def costs(results: Results) -> str:
    """Time and memory of each stage from Snakemake's benchmarks, else from the metrics."""
    rows = [r for r in (cost(results.root, s) for s in status.STAGES) if r]
    for half in status.halves(results.root):
        rows += [(f"{r[0]} {half.name}", *r[1:]) for r in (cost(half, s) for s in status.STAGES) if r]
    if not rows:
        raise Missing("no stage has left a benchmark or metrics")
    names, seconds, memory = (list(c) for c in zip(*((r[0], r[1], r[2]) for r in rows), strict=True))
    out = page.text(f"{log.duration(sum(seconds))} of all stages together; the largest process took {max(memory):.2f} GB.")
    used = report_usage.of_run(results.root, dict(zip(names, seconds, strict=True)))
    if used is not None:
        energy = f" and {used.joule / 3.6e6:.2f} kWh" if used.joule else ""
        out += page.text(f"{used.gpu_hours:.2f} GPU-hours{energy}, from {used.source}.")
    shown = [(n, log.duration(s), f"{m:.2f}", host, job) for n, s, m, host, job in rows]
    head = ("stage", "time", "memory (GB)", "node", "job")
    out += page.curve(figures.durations(names, seconds, memory), "Wall time and peak memory.")
    return out + page.details("as a table", page.table(shown, head))


def cost(root: Path, stage: str) -> tuple[str, float, float, str, str] | None:
    """(stage, seconds, GB, node, job); Snakemake's table has s and max_rss in MB."""
    records = status.read_metrics(root / "logs" / f"{stage}.metrics.jsonl")
    last = records[-1] if records else {}
    place = str(last.get("host", "")), str(last.get("job", ""))
    path = root / "benchmarks" / f"{stage}.tsv"
    lines = [line.split("\t") for line in path.read_text().splitlines()] if path.exists() else []
    if len(lines) > 1:
        row = dict(zip(lines[0], lines[-1], strict=False))
        seen = float(row["max_rss"]) * 1.048576e-3 if row.get("max_rss", "-") not in ("-", "NA") else 0.0
        # Of ranks that srun has started, Snakemake sees nothing: they tell themselves.
        return stage, float(row["s"]), max(seen, float(last.get("memory_gb", 0))), *place
    if len(records) > 1:
        return stage, records[-1]["time"] - records[0]["time"], float(last.get("memory_gb", 0)), *place
    return None


def provenance(results: Results) -> str:
    """Programs, and what each store says of its making."""
    rows: list[tuple[str, str]] = [("cryospire", __version__), ("Python", platform.python_version())]
    for name in PACKAGES:
        try:
            rows.append((name, version(name)))
        except PackageNotFoundError:
            continue
    out = page.details("programs", page.table(rows))
    for path in sorted(results.root.glob("*.zarr")):
        try:
            attrs = dict(stores.open_partial(path).attrs)
        except InputError:
            continue
        out += page.details(path.name, page.story(attrs))
    return out


def tiles(results: Results) -> list[tuple[str, str]]:
    """The numbers people ask for first; those that are not there are left out."""
    asked: list[tuple[str, Callable[[], str]]] = [
        ("particles", lambda: f"{results.store('particles')['images'].shape[0]:,}"),
        ("box", lambda: f"{(a := results.store('particles').attrs)['box']} px × {a['pixel_size']:.2f} Å"),
        ("consensus resolution", lambda: f"{results.store('consensus').attrs['resolution']:.1f} Å"),
        ("parts", lambda: str(more.part_count(results))),
        ("states", lambda: str(len(array(results.store("analysis"), "states/weight")))),
    ]
    found = []
    for name, ask in asked:
        try:
            found.append((ask(), name))
        except (Missing, InputError, KeyError, TypeError):
            continue
    return found + more.scores(results)


def build(results: Results, title: str) -> str:
    """The page; a section whose input is missing says what is missing."""
    sections: list[tuple[str, Callable[[Results], str]]] = [
        ("Data", data), ("Preflight", preflight), ("Consensus", consensus), ("Training", training), ("Parts", more.parts),
        ("Maps of parts", more.part_maps), ("Latent space", more.latents), ("States", more.states), ("Trajectories", more.trajectories),
        ("Occupancy", more.occupancy), ("Half-sets apart", more.validation), ("Evaluation", more.evaluation), ("Time and memory", costs),
        ("Provenance", provenance),
    ]  # fmt: skip
    shown = []
    with rc_context(figures.LOOK):
        for name, make in sections:
            try:
                content = make(results)
            except Missing as why:
                content = page.absent(f"Not in this run: {why}.")
            except InputError as why:  # stores that do not fit each other, from different runs
                content = page.absent(f"Cannot be shown: {why}.")
            except KeyError as why:  # a .json of another version
                content = page.absent(f"Cannot be shown: no {why} in it; run its stage again.")
            shown.append((name, content))
    return page.page(title, f"cryospire {__version__} · {results.root}", tiles(results), shown)


def run(config: Config, results: Path, output: Path) -> None:
    """Write the report of the folder ``results``; the file appears whole."""
    if not results.is_dir():
        raise InputError(f"{results}: no such folder of results")
    html = build(Results(results), f"Heterogeneity of {config.particles.stem}")
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.tmp")
    temporary.write_text(html)
    os.replace(temporary, output)
    log.say(f"report     {len(html) / 1e6:.1f} MB -> {output}")
