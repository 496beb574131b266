"""Against a known truth, as CryoBench defines it: per-state mean latent -> volume -> masked signed FSC -> area.

The same is done for differences from the mean volume, where one map for all states scores 0, and for single images at their own latents.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryospire import kernels
from cryospire.config import Config
from cryospire.conventions import InputError
from cryospire.io import mrc, stores
from cryospire.kernels.insertion import insert
from cryospire.log import Progress, say
from cryospire.maths import fourier, insertion, metrics, recovery
from cryospire.maths.poses import angle_between
from cryospire.stages import evaluate_figure, evaluate_model
from cryospire.stages.detail import Details, part_of_gaussians
from cryospire.stages.evaluate_model import Poses, Segmentation
from cryospire.training.data import Particles
from cryospire.training.model import Mixture, load, load_latents, trained

BATCH = 512  # images inserted at a time
MEMORY = 1 << 31  # bytes of accumulators held at once
IMAGES = 100  # whose own volumes are judged, as CryoBench does


class Grid(Protocol):
    """What volumes are put on: ``box`` voxels of ``pixel_size`` Å; particles have both."""

    @property
    def box(self) -> int: ...
    @property
    def pixel_size(self) -> float: ...


@dataclass(frozen=True)
class Truth:
    """``volumes`` (S, z, y, x) and ``mask`` (z, y, x) on the particles' grid, ``label`` (N,) and ``poses`` of every particle of the store.

    States without particles are left out.
    """

    volumes: Tensor
    mask: Tensor
    label: Tensor
    segmentation: Segmentation | None
    poses: Poses | None


def run(
    config: Config, *, model: Path, consensus: Path, particles: Path, truth: Path, output: Path, reconstruction: Path | None = None
) -> None:
    """model.zarr, what lies beside it (discovery.zarr, parts.zarr), and the detail of its parts against the truth -> evaluation.json and
    .png."""
    group = stores.open_store(particles, "particles")
    data = Particles(group)
    known = load_truth(truth, data, stores.read(group, "source/row"))
    if config.threads:
        kernels.set_threads(config.threads)
    found: dict[str, tuple[Mixture, Tensor]] = {}
    paths = {"stage 1": model.parent / "discovery.zarr", "stage 2": model}
    for name, path in paths.items():
        if name == "stage 2" or path.exists():
            found[name] = load(path), load_latents(path, data.id)
    result: dict[str, Any] = {
        "particles": len(data), "states": len(known.volumes), "box": data.box, "pixel_size": data.pixel_size, "methods": {}
    }  # fmt: skip
    say(f"evaluate: {len(data):,} particles, {len(known.volumes)} states; the area under a perfect FSC is 0.5")
    say(f"{'':<18}{'AUC (sd)':>16}{'unmasked':>10}{'difference (sd)':>18}{'per image':>12}{'difference':>12}")
    details = Details.load(reconstruction, model, found["stage 2"][0], data.box) if reconstruction else None
    count, log = 2 + len(found) + (details is not None), output.parent / "logs" / "evaluate.metrics.jsonl"
    with Progress("evaluate", count, "methods", log, every=math.inf) as progress:
        for name, volumes in methods(data, known, stores.open_store(consensus, "consensus"), found, details):
            result["methods"][name] = score(volumes, known, data.pixel_size)
            if name in found:
                result["methods"][name]["per_image"] = per_image(*found[name], known)
            say(table_row(name, result["methods"][name]))
            progress.advance(1)
            progress.record()
    result["models"] = {name: evaluate_model.judge(m, z, known.label, known.segmentation, data) for name, (m, z) in found.items()}
    apart = state_distances(known)
    for name, (_, z) in found.items():
        if known.poses is not None:
            refined = Particles(group)
            refined.take_poses(trained(paths[name]))
            now, before = Poses(refined.rotation, refined.shift), Poses(data.rotation, data.shift)
            rotation, translation = evaluate_model.frames(now, known.poses, known.label)
            mixture = found[name][0]
            means = recovery.group_means(z, known.label, len(known.volumes))
            undone = score(render_states(mixture, means, (rotation, translation)), known, data.pixel_size)
            turns = angle_between(torch.eye(3, dtype=rotation.dtype), rotation)
            result["models"][name]["poses"] = evaluate_model.judge_poses(now, before, known.poses) | {
                "frames_turn": float((turns.square().mean() / 3).sqrt()),
                "auc": undone["auc"]["mean"], "difference": undone["difference"]["mean"],
            }  # fmt: skip
        result["models"][name]["latents"] |= evaluate_model.judge_neighbours(z, known.label, apart)
    if known.segmentation is not None:
        for name, path in {"stage 1": model.parent / "parts.zarr", "stage 2": model}.items():
            if name in found and path.exists():
                parts = part_of_gaussians(path)
                result["models"][name]["parts"] = evaluate_model.judge_parts(*found[name], known.label, known.segmentation, parts)
    for name, values in result["models"].items():
        say(evaluate_model.sentence(name, values))
    output.parent.mkdir(parents=True, exist_ok=True)
    evaluate_figure.draw(result, {name: z for name, (_, z) in found.items()}, known.label, output.with_suffix(".png"))
    output.write_text(json.dumps(result, indent=1) + "\n")


def load_truth(folder: Path, data: Grid, row: NDArray[np.int64]) -> Truth:
    """Raises InputError where labels, volumes and particles do not fit together."""
    files = sorted(folder.glob("vol_*.mrc"))
    if not files or not (folder / "labels.npy").exists():
        raise InputError(f"{folder}: expected vol_000.mrc, ... and labels.npy, as `cryospire simulate` writes them")
    labels = np.load(folder / "labels.npy", allow_pickle=False)
    if labels.ndim != 1 or len(labels) <= row.max():
        raise InputError(f"{folder / 'labels.npy'}: {len(labels)} labels, but particles reach row {row.max() + 1} of their table")
    label = torch.from_numpy(labels[row]).long()
    if label.min() < 0 or int(label.max()) >= len(files):
        raise InputError(f"{folder / 'labels.npy'}: labels reach from {label.min()} to {label.max()}, but there are {len(files)} volumes")
    used, label = torch.unique(label, return_inverse=True)
    volumes = torch.stack([on_grid(files[k], data) for k in used.tolist()])
    mask = on_grid(folder / "mask.mrc", data).clamp(0, 1) if (folder / "mask.mrc").exists() else torch.ones_like(volumes[0])
    path = folder / "segmentation.npz"
    segmentation = Segmentation.load(path, used.numpy()) if path.exists() else None
    poses = Poses.load(folder / "poses.npz", row) if (folder / "poses.npz").exists() else None
    return Truth(volumes, mask, label, segmentation, poses)


def on_grid(path: Path, data: Grid) -> Tensor:
    """A volume Fourier-cropped to the particles' box."""
    values, pixel_size = mrc.read_volume(path)
    extent, expected = len(values) * pixel_size, data.box * data.pixel_size
    if abs(extent - expected) > 1e-3 * expected or len(values) < data.box:
        raise InputError(f"{path}: {len(values)} voxels of {pixel_size:g} Å; the particles have box {data.box} at {data.pixel_size:g} Å")
    return fourier.crop(torch.from_numpy(values), data.box, 3)


def methods(
    data: Particles, known: Truth, consensus: Any, found: dict[str, tuple[Mixture, Tensor]], details: Details | None
) -> Iterator[tuple[str, Tensor]]:
    """Volumes (S, z, y, x) of every method, in the order of the table."""
    halves = torch.from_numpy(stores.read(consensus, "half_maps")).float()
    yield "consensus", halves.mean(0).expand(len(known.volumes), -1, -1, -1)
    yield "known labels", back_project_states(data, known.label, len(known.volumes))
    for name, (mixture, latents) in found.items():
        means = recovery.group_means(latents, known.label, len(known.volumes))
        volumes = render_states(mixture, means)
        yield name, volumes
        if name == "stage 2" and details is not None:
            yield "stage 2 + images", volumes + torch.stack([torch.from_numpy(details.at(z)) for z in means])


def render_states(mixture: Mixture, latents: Tensor, frames: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Volumes (S, z, y, x) at latents (S, D); ``frames``: rotations (S, 3, 3) and translations (S, 3) Å of each."""
    volumes = []
    for k, z in enumerate(latents):
        centre, amplitude, scale = mixture.forward_gaussians(z[None])
        place = centre[0]
        if frames is not None:
            place = (place.double() @ frames[0][k].T + frames[1][k]).to(place)
        volumes.append(kernels.render_volume(place, amplitude[0], scale, mixture.box, mixture.pixel_size))
    return torch.stack(volumes)


def back_project_states(data: Particles, label: Tensor, states: int) -> Tensor:
    """Volumes (S, z, y, x) by Fourier insertion of each state's own images: what the same data give with the answer known."""
    pad = insertion.padding(data.box)
    fine = pad * data.box
    together = max(1, MEMORY // (12 * fine * fine * (fine // 2 + 1)))
    volumes = []
    for first in range(0, states, together):
        count = min(together, states - first)
        numerator, weight = insertion.accumulators(count, data.box, pad)
        chosen = torch.nonzero((label >= first) & (label < first + count))[:, 0].numpy()
        for rows in np.array_split(chosen, -(-len(chosen) // BATCH)):
            images = torch.from_numpy(data.read(rows)).float()
            slices, weights = insertion.weighted_slices(images, data.transfer(rows), data.shift[rows] / data.pixel_size)
            insert(numerator, weight, slices, weights, data.rotation[rows], label[rows] - first)
        volumes += [insertion.reconstruct(n, w, data.box, data.pixel_size) for n, w in zip(numerator, weight, strict=True)]
    return torch.stack(volumes)


def score(volumes: Tensor, known: Truth, pixel_size: float) -> dict[str, Any]:
    """Areas (mean, sd, median, and of every state), mean curves, and resolutions at 0.5, of volumes (S, z, y, x)."""
    differences = known.volumes - known.volumes.mean(0)
    changes = volumes - volumes.mean(0)
    # Methods that give one map for all states have no differences: rounding noise is not a correlation.
    if float(changes.abs().max()) < 1e-5 * float(volumes.abs().max()):
        changes = torch.zeros_like(changes)
    pairs = list(zip(volumes, known.volumes, changes, differences, strict=True))
    curves = {
        "auc": torch.stack([metrics.fsc(v, t, known.mask) for v, t, _, _ in pairs]),
        "unmasked": torch.stack([metrics.fsc(v, t) for v, t, _, _ in pairs]),
        "difference": torch.stack([fsc_of_differences(c, d, known.mask) for _, _, c, d in pairs]),
    }
    result: dict[str, Any] = {name: summary(metrics.auc(curve)) for name, curve in curves.items()}
    result["curves"] = {name: [round(float(x), 5) for x in curve.mean(0)] for name, curve in curves.items()}
    result["resolution"] = summary(torch.tensor([metrics.resolution(c, 0.5, pixel_size) for c in curves["auc"]]))
    return result


def fsc_of_differences(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """FSC (shell,) of two differences of volumes; shell 0, their difference of mass, is rounding where parts only move: as shell 1."""
    curve = metrics.fsc(a, b, mask)
    curve[0] = curve[1]
    return curve


def per_image(mixture: Mixture, latents: Tensor, known: Truth, images: int = IMAGES) -> dict[str, Any]:
    """Areas (mean, sd, median) of volumes at the own latents of some images, drawn by a fixed seed, against their true states.

    "difference": the same for what each differs from the mean over these images, in the mixture and in truth.
    """
    rows = torch.randperm(len(latents), generator=torch.Generator().manual_seed(0))[:images]
    z, label = latents[rows], known.label[rows]
    volumes = render_states(mixture, z)
    # Sums by state: the truth of a hundred images is not copied a hundred times.
    share = torch.bincount(label, minlength=len(known.volumes)) / len(rows)
    mean, true_mean = volumes.mean(0), torch.tensordot(share, known.volumes, 1)
    areas = []
    for volume, k in zip(volumes, label, strict=True):
        whole = metrics.fsc(volume, known.volumes[k], known.mask)
        change = fsc_of_differences(volume - mean, known.volumes[k] - true_mean, known.mask)
        areas.append(metrics.auc(torch.stack([whole, change])))
    auc, difference = (summary(a) for a in torch.stack(areas).T)
    return {"images": len(rows)} | {k: {m: v[m] for m in ("mean", "sd", "median")} for k, v in (("auc", auc), ("difference", difference))}


def state_distances(known: Truth) -> Tensor:
    """Root of summed squared density differences (S, S) between true states, inside the mask."""
    flat, weight = known.volumes.flatten(1), known.mask.flatten().square()
    product = torch.stack([flat @ (weight * v) for v in flat]).double()
    power = product.diagonal()
    distance = (power[:, None] + power - product - product.T).clamp(min=0).sqrt()
    return distance.fill_diagonal_(0)


def summary(values: Tensor) -> dict[str, Any]:
    v = values.double()
    sd = float(v.std()) if len(v) > 1 else 0.0
    return {"mean": float(v.mean()), "sd": sd, "median": float(v.median()), "states": [round(float(x), 5) for x in v]}


def table_row(name: str, values: dict[str, Any]) -> str:
    a, u, d = values["auc"], values["unmasked"], values["difference"]
    row = f"{name:<18}{a['mean']:>8.3f} ({a['sd']:.3f}){u['mean']:>10.3f}{d['mean']:>10.3f} ({d['sd']:.3f})"
    if "per_image" in values:
        row += "".join(f"{values['per_image'][k]['mean']:>12.3f}" for k in ("auc", "difference"))
    return row
