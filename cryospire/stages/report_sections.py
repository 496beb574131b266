"""Sections of the report about heterogeneity: parts, latents, volumes, occupancy, evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from cryospire.io import stores
from cryospire.maths import rigid
from cryospire.stages import evaluate_model, validate
from cryospire.stages import report_figures as figures
from cryospire.stages import report_page as page
from cryospire.stages.report_results import Missing, Results, array
from cryospire.training.model import load

Array = NDArray[Any]

SHOWN_STATES = 12
SAMPLE = 1000  # particles whose occupancies are computed
PER_PART = 64  # Gaussians of a part whose occupancies are averaged


def part_count(results: Results) -> int:
    return int(array(results.store("parts"), "anchors/part").max()) + 1


def parts(results: Results) -> str:
    """Features, evidence, and where the parts lie."""
    group = results.store("parts")
    part, count = array(group, "part"), part_count(results)
    cloud = page.image(
        figures.features(array(group, "feature"), part),
        "Learned features of the coarse Gaussians: those that move or vanish together lie together.",
    )  # fmt: skip
    proof = page.curve(
        figures.evidence(array(group, "evidence/parts"), array(group, "evidence/loss"), count),
        "Evidence for the number of parts (dotted: chosen): what one part fewer would leave unexplained, when a part is there as "
        "one rigid body or is absent, over the variance of the density among particles; of one body for all it can be more than that.",
    )
    anchors = np.bincount(array(group, "anchors/part"), minlength=count)
    angle, offset = (torch.from_numpy(array(group, f"motion/{name}")) for name in ("angle", "offset"))
    share = torch.from_numpy(array(group, "motion/share") * array(group, "motion/present"))  # of the particles, where the part is there
    rows = [
        (
            f"part {k + 1}",
            int((part == k).sum()),
            int(anchors[k]),
            f"{rigid.reach(angle[k], share[k]):.0f}°",
            f"{rigid.reach(offset[k], share[k]):.0f} Å",
            f"{share[k].sum():.0%}",
        )
        for k in range(count)
    ]
    return (
        page.row(cloud, proof + page.table(rows, ("", "coarse Gaussians", "anchors", "turns up to", "centre moves up to", "present")))
        + page.heading("Where the parts are")
        + page.image(coloured(results, group, part, count), "Projections of the parts, each in its colour.")
    )


def coloured(results: Results, group: Any, part: Array, count: int) -> Any:
    """Density of each part from its own coarse Gaussians, by mass where discovery.zarr tells it; soft masks would overlap."""
    from scipy.ndimage import gaussian_filter

    pixel, box = float(group.attrs["pixel_size"]), int(group.attrs["box"])
    try:
        found = results.store("discovery")
        mass = np.abs(array(group, "amplitude")) * array(found, "gaussians/scale") ** 3
    except Missing:
        mass = np.ones(len(part))
    edges = [(np.arange(box + 1) - box // 2 - 0.5) * pixel] * 3
    zyx = array(group, "position")[:, ::-1]
    counts = [np.histogramdd(zyx[part == k], edges, weights=mass[part == k])[0] for k in range(count)]
    return figures.coloured_projections([gaussian_filter(c, 1.0) for c in counts], pixel)


def latents(results: Results) -> str:
    """Density, states and trajectories in principal components; UMAP; and whether latents repeat pose or defocus."""
    group = results.store("analysis")
    axes, mean = array(group, "pca/components"), array(group, "pca/mean")
    coordinates, variance = array(group, "pca/coordinates"), array(group, "pca/variance")
    places = (array(group, "states/latent") - mean) @ axes.T
    names = list(group["trajectories/latent"].attrs["names"])
    lines = [(n, (line - mean) @ axes.T) for n, line in zip(names, array(group, "trajectories/latent"), strict=True)]
    blocks = []
    if len(variance) > 1:
        density = array(group, "density")
        caption = "Particles in the plane of the {} principal components, coloured by density; numbers are states, lines trajectories."
        drawn = figures.latent_plane(coordinates, density, places, lines, variance)
        blocks.append(page.image(drawn, caption.format("first two")))
        if len(variance) > 2:
            drawn = figures.latent_plane(coordinates, density, places, lines, variance, (1, 2))
            blocks.append(page.image(drawn, caption.format("second and third")))
    if "umap" in group:
        drawn = figures.umap_plane(stores.read(group, "umap"), array(group, "clusters/label"))
        caption = "UMAP of all latent dimensions, coloured by state. It can tear a smooth cloud into islands: trust the density."
        blocks.append(page.image(drawn, caption))
    return "".join(page.row(*blocks[k : k + 2]) for k in range(0, len(blocks), 2)) + leakage(results, group, coordinates)


def leakage(results: Results, group: Any, coordinates: Array) -> str:
    """Share of each component's variance that pose or defocus predict linearly; structure should predict neither."""
    try:
        particles = results.store("particles")
        rows = stores.join(array(group, "id"), array(particles, "id"), "analysis.zarr against particles.zarr")
        view = array(particles, "pose/rotation")[rows, 2].astype(float)
        focus = array(particles, "ctf/defocus_u")[rows].astype(float)
        shift = array(particles, "pose/shift")[rows].astype(float)
    except Missing:
        return ""
    x, y, z = view.T
    causes = {
        "viewing direction": np.stack([x, y, z, x * y, y * z, z * x, x * x - y * y, 3 * z * z - 1], 1),
        "defocus": np.stack([focus, focus**2], 1), "shift": np.concatenate([shift, shift**2], 1),
    }  # fmt: skip
    shown = min(3, coordinates.shape[1])
    table = [(name, *(f"{100 * explained(c, coordinates[:, k]):.1f} %" for k in range(shown))) for name, c in causes.items()]
    return (
        page.heading("Do latents repeat pose or defocus?")
        + page.text("Share of a component's variance that each predicts (linear fit, corrected for chance). Near zero is right; a high "
                    "share means that the latent describes the image and not the molecule.")
        + page.table(table, ("", *(f"PC {k + 1}" for k in range(shown))))
    )  # fmt: skip


def explained(causes: Array, values: Array) -> float:
    """Adjusted R² of a linear fit of ``values`` (N,) by ``causes`` (N, K), not below 0."""
    scaled = (causes - causes.mean(0)) / np.maximum(causes.std(0), 1e-12)
    design = np.concatenate([np.ones((len(values), 1)), scaled], 1)
    fit, *_ = np.linalg.lstsq(design, values, rcond=None)
    unexplained = ((values - design @ fit) ** 2).sum() / max(((values - values.mean()) ** 2).sum(), 1e-30)
    n, k = causes.shape
    return float(max(0.0, 1 - unexplained * (n - 1) / max(n - k - 1, 1)))


def part_maps(results: Results) -> str:
    """What the images add to the Gaussians: a map of every part, its motion undone, with the FSC of its half-maps."""
    group = results.store("reconstruction")
    box, pixel, resolution = (group.attrs[k] for k in ("box", "pixel_size", "resolution"))
    names = [f"part {k + 1}: {r:.1f} Å" for k, r in enumerate(resolution)]
    curves = page.curve(
        figures.part_fscs(array(group, "fsc"), array(group, "fsc_detail"), box, pixel),
        "FSC of half-maps of each part in its mask; dotted, of what its images hold beyond the Gaussians. "
        "Motion, poses and latents come from all particles.",
    )
    middle = [np.rint(ndimage.center_of_mass(mask)).astype(int) for mask in array(group, "mask")]
    centred = [np.roll(v, box // 2 - m, (0, 1, 2)) for v, m in zip(array(group, "map"), middle, strict=True)]
    views = figures.state_grid(centred, pixel, names)
    grid = page.image(views, "Parts at rest, each in the middle: projections along z (above) and central slices (below).")
    edge = f"(FSC 0.143, motion from all particles); the box ends at {2 * pixel:.1f} Å."
    said = f"Images without the other parts, each part's motion undone. {'; '.join(names)} {edge}"
    return page.text(said, "Maps, half-maps and masks for post-processing are in reconstruction/.") + page.row(curves, grid)


def states(results: Results) -> str:
    """Population and picture of each state."""
    group = results.store("volumes")
    weight, pixel = array(group, "weight"), float(group.attrs["pixel_size"])
    count = min(SHOWN_STATES, len(weight))
    volumes = [np.asarray(group["states"][k]) for k in range(count)]
    names = [f"{k}: {weight[k]:.0%}" for k in range(count)]
    more = f" The {count} largest are shown." if len(weight) > count else ""
    held = group.attrs.get("held_part")
    frame = "They are in the frame of the poses." if held is None else f"Part {held + 1}, which moves least, is held still in all."
    said = f"State 0 is the largest; each volume is that of the particle nearest to the middle of its state.{more} {frame}"
    grid = page.image(figures.state_grid(volumes, pixel, names), "Projections along z (above) and central slices (below), one grey scale.")
    bars = page.curve(figures.populations(weight), "Share of the particles in each state (k-means on latents).")
    return page.text(said, "Volumes are in volumes/; open volumes/open.cxc in ChimeraX.") + grid + bars


def trajectories(results: Results) -> str:
    """Film, frames and net change of each trajectory."""
    group = results.store("volumes")
    if "trajectories" not in group:
        raise Missing("volumes.zarr has no trajectories")
    lines, pixel = group["trajectories"], float(group.attrs["pixel_size"])
    out = page.text("Each trajectory runs through places where particles are. Drag the slider to run through the steps.")
    for t, name in enumerate(lines.attrs["names"]):
        volumes = [np.asarray(lines[t, k]) for k in range(lines.shape[1])]
        out += page.heading(str(name).capitalize())
        out += page.flipbook(f"film{t}", figures.film(volumes), len(volumes), "Projections along z, y and x.")
        steps = [f"step {k}" for k in range(len(volumes))]
        out += page.image(figures.state_grid(volumes, pixel, steps), "Projections along z (above) and central slices (below).")
        caption = "From first to last step: what appears (blue), what disappears (red), what stays (grey)."
        out += page.image(figures.change(volumes[0], volumes[-1], pixel), caption)
    return out


def occupancy(results: Results) -> str:
    """How often each part is there: mean occupancy over a sample of its Gaussians, of the most, for a sample of particles."""
    group = results.store("model")
    part = array(group, "anchors/part")[array(group, "gaussians/anchor")]
    z = array(group, "latents")
    rng = np.random.default_rng(0)
    z = z[np.sort(rng.choice(len(z), min(SAMPLE, len(z)), replace=False))]
    mixture = load(results.root / "model.zarr")
    mass = np.abs(array(group, "gaussians/amplitude")).astype(float) * array(group, "gaussians/scale").astype(float) ** 3
    columns = []
    for k in range(int(part.max()) + 1):
        members = np.flatnonzero((part == k) & (mass > 0))
        if not len(members):
            raise Missing(f"model.zarr: part {k + 1} has no Gaussians")
        # Drawn by mass, so that the plain mean over the sample is the mass-weighted mean over the part.
        picked = torch.from_numpy(rng.choice(members, PER_PART, p=mass[members] / mass[members].sum()))
        feature = mixture.features[picked]
        batches = [mixture.occupancies(b, feature).mean(1) for b in torch.from_numpy(z).split(64)]
        columns.append(torch.cat(batches).numpy())
    values = np.stack(columns, 1)
    values /= values.max(0)
    return page.text(
        "Two humps mean that a part is absent from some particles; one hump near the top, that it is always there. What counts as whole is"
        " the most that one of these particles shows of the part: images do not tell half the occupancy from half the density."
    ) + page.curve(figures.occupancies(values), f"Mean occupancy of each part in {len(z):,} particles.")


def evaluation(results: Results) -> str:
    """Scores against the truth, where it is known, beside what the same images give without heterogeneity and with known labels."""
    found = results.json("evaluation.json")
    rows = []
    for name, m in found["methods"].items():
        auc, change = m["auc"], m["difference"]
        spread = f"{auc['mean']:.3f} ({auc['sd']:.3f})", f"{change['mean']:.3f} ({change['sd']:.3f})"
        own = [f"{m['per_image'][k]['mean']:.3f}" if "per_image" in m else "" for k in ("auc", "difference")]
        rows.append((name, spread[0], f"{m['unmasked']['mean']:.3f}", spread[1], *own, f"{m['resolution']['mean']:.1f}"))
    areas = ("AUC, mean (sd)", "AUC without mask", "AUC of differences", "AUC per image", "of differences per image")
    head = ("method", *areas, "resolution at 0.5 (Å)")
    said = page.text(
        f"Each of {found['states']} true states against the volume at the mean latent of its particles: area under the FSC, at most 0.5.",
        "Differences are from the mean volume, where one map for all states scores 0. Per image: volumes at the latents of single images.",
    )
    more = "".join(page.text(f"{evaluate_model.sentence(name, values)}.") for name, values in found.get("models", {}).items())
    drawn = results.root / "evaluation.png"
    shown = page.image_file(drawn.read_bytes(), "png", "FSC with the truth, and latents coloured by true state.") if drawn.exists() else ""
    return said + page.table(rows, head) + more + shown


def validation(results: Results) -> str:
    """How far two trainings that share no image agree."""
    found = results.json("validation.json")
    rows = []
    for name, m in (("volumes", found["volumes"]), ("differences from the mean volume", found["differences"])):
        resolution = m["resolution"]
        rows.append((name, f"{resolution['median']:.1f} ({max(resolution['states']):.1f})", f"{m['area']['mean']:.3f}"))
    head = (f"of {found['states']} states", f"resolution at {found['threshold']}, Å: median (worst state)", "area under FSC, at most 0.5")
    said = page.text(
        "Stage 1, parts and stage 2 ran again on each half-set alone: what both show of a state is in the data, not made by a model.",
        "The FSC of volumes tells how well the molecule is known, that of the differences how well its changes are.",
    )
    more = "".join(page.text(f"{line}.") for line in validate.sentences(found))
    drawn = results.root / "validation.png"
    caption = "FSC between the half-sets; turn and occupancy of parts in each."
    shown = page.image_file(drawn.read_bytes(), "png", caption) if drawn.exists() else ""
    return said + page.table(rows, head) + more + shown + page.text("Half-maps of every state are in validation/.")


def scores(results: Results) -> list[tuple[str, str]]:
    """(value, name) of the evaluation's mean areas, if there is one."""
    try:
        methods = results.json("evaluation.json")["methods"]
    except Missing:
        return []
    return [(f"{methods[name]['auc']['mean']:.3f}", f"AUC {name}") for name in ("consensus", "stage 2") if name in methods]
