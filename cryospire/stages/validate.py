"""Two trainings that share no image: how far volumes, what differs between states, parts and their motions agree.

Each half-set has had its own stage 1, parts and stage 2, from its own half-map.  The states are those of the whole run; each half shows
one at the mean of its own latents of its own particles that lie nearest to it.  What the halves have in common beyond that is in the data.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from cryospire import kernels
from cryospire.config import Config
from cryospire.conventions import InputError
from cryospire.io import mrc, stores
from cryospire.log import Progress, say
from cryospire.maths import fourier, masks, metrics, rigid
from cryospire.maths.poses import angle_between
from cryospire.stages import validate_figure
from cryospire.stages.detail import frames, part_of_gaussians
from cryospire.stages.evaluate import fsc_of_differences, render_states, summary
from cryospire.stages.evaluate_model import LIGHT, assign
from cryospire.training.model import Mixture, load, load_latents
from cryospire.training.still import moved_with

NEAREST = 100  # particles of a half-set, at most half of a state's, whose mean latent shows it
THRESHOLD = 0.143  # FSC of independent halves at the resolution (Rosenthal & Henderson 2003)
FEW = 4  # Gaussians below which a part is missing from a half
THERE = 0.5  # occupancy, of the most that a part reaches, above which its motion is compared
SMOOTH = 5  # pixels; resolution at which the mask is drawn


@dataclass(frozen=True)
class Seen:
    """The states (S, D) as a mixture knows them, and the part (G,) of each of its Gaussians."""

    mixture: Mixture
    part: Tensor
    latent: Tensor

    @staticmethod
    def load(model: Path, latent: Tensor) -> Seen:
        return Seen(load(model), part_of_gaussians(model), latent)

    @property
    def parts(self) -> int:
        return int(self.part.max()) + 1

    def shown(self, state: int) -> tuple[Tensor, Tensor]:
        """Centres (G, 3) Å and mass (G,) of the Gaussians in a state."""
        centre, amplitude, scale = self.mixture.forward_gaussians(self.latent[state][None])
        return centre[0], amplitude[0].abs() * scale**3

    def atoms(self, state: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Centres (A, 3) Å and parts (A,) of the Gaussians that are there."""
        centre, mass = self.shown(state)
        here = mass > LIGHT * mass.median()
        return centre[here].numpy(), self.part[here].numpy()

    def held_by(self, mine: Tensor) -> tuple[Tensor, Tensor]:
        """Tell all in the frame of some Gaussians (G,; boolean).  Returns where they are held, (1, n, 3) pixels, and their mass (1, n)."""
        self.mixture.hold(mine, self.latent)
        mass = self.mixture.relative_amplitude.abs() * self.mixture.scale**3
        return self.mixture.home.T[mine][None], mass[mine][None]

    def middle(self, part: int, state: int) -> Tensor:
        """Centre of mass (3,) Å of a part in a state."""
        centre, mass = (x[self.part == part] for x in self.shown(state))
        return mass @ centre / mass.sum()

    def parts_by(self, other: Seen) -> Tensor:
        """Part (G,) of every Gaussian by the other's parts; -1 where none of the other's is near."""
        found = assign(self.mixture, self.latent, other)
        return torch.where(found.counts, found.part, -1)


def run(config: Config, *, model: Path, analysis: Path, half1: Path, half2: Path, output: Path) -> None:
    """model.zarr, analysis.zarr and the model.zarr of either half-set -> validation.json, a .png, and a folder of half-maps of states."""
    found = stores.open_store(analysis, "analysis")
    stores.check_made_from(found, "model", model, "analyse")
    states, weight = (torch.from_numpy(stores.read(found, f"states/{name}")) for name in ("latent", "weight"))
    if config.threads:
        kernels.set_threads(config.threads)
    whole = Seen.load(model, states)
    say(f"validate: {len(states)} states in two models, each of one half-set alone")
    with Progress("validate", 4, "steps", output.parent / "logs" / "validate.metrics.jsonl", every=math.inf) as progress:
        halves = [Seen.load(path, shown_at(path, model, states, weight, k + 1)) for k, path in enumerate((half1, half2))]
        held = hold_in_common(whole, halves, stores.open_store(model, "model").attrs.get("held_part"))
        volumes = torch.stack([render_states(half.mixture, half.latent) for half in halves])
        progress.advance(1, "volumes")
        box, pixel_size = whole.mixture.box, whole.mixture.pixel_size
        mask = masks.soft_mask(fourier.lowpass(volumes.mean(0).amax(0), pixel_size, SMOOTH * pixel_size), 0.0, 3.0)
        result: dict[str, Any] = {"states": len(states), "held_part": held, "box": box, "pixel_size": pixel_size, "threshold": THRESHOLD}
        result |= agreement(volumes, mask, pixel_size)
        progress.advance(1, "FSC")
        result["parts"] = agreement_of_parts(*halves)
        progress.advance(1, "parts")
        result["motion"] = agreement_of_motion(whole, halves)
        progress.advance(1, "motion")
        progress.record()
    for line in sentences(result):
        say(f"validate: {line}")
    write_volumes(output.with_suffix(""), volumes, mask, pixel_size)
    validate_figure.draw(result, output.with_suffix(".png"))
    output.write_text(json.dumps(result, indent=1) + "\n")


def hold_in_common(whole: Seen, halves: list[Seen], held: Any) -> int | None:
    """Tell all three in the frame of one part, put in one place; each training has held what rested there, which may be another.

    It is the whole model's ``held`` part, or where a half lacks that the one which moves least.  Returns which; None where no part of the
    whole is in both halves, which stay as they are.
    """
    found = [half.parts_by(whole) for half in halves]
    common = [k for k in range(whole.parts) if all(int((part == k).sum()) >= FEW for part in found)]
    if not common:
        return None
    centre, amplitude = whole.mixture.gaussians(whole.latent)
    mass = amplitude.abs() * whole.mixture.scale**3
    chosen = held if held in common else min(common, key=lambda k: moved_with(whole.part == k, centre, mass))
    x, w = whole.held_by(whole.part == chosen)
    for half, part in zip(halves, found, strict=True):
        y, v = half.held_by(part == chosen)
        turn, way = rigid.register(x, w, y, v, torch.eye(3)[None], torch.zeros(1, 3), rigid.FINE)
        half.mixture.pin(half.mixture.body, turn[0] @ half.mixture.home + way[0, :, None])
    return chosen


def shown_at(path: Path, model: Path, states: Tensor, weight: Tensor, half: int) -> Tensor:
    """Latents (S, D) at which a half's model shows the states: means over its particles nearest to each in the whole model.

    ``weight`` (S,): share of the particles that is in each state; few are taken of a rare one, lest its neighbours be mixed in.
    """
    group = stores.open_store(path, "model")
    if set(np.unique(stores.read(group, "half_set")).tolist()) != {half}:
        raise InputError(f"{path}: not trained on half-set {half} alone; run its stages with --half {half}")
    own = torch.from_numpy(stores.read(group, "latents"))
    there = load_latents(model, stores.read(group, "id"))
    near = torch.cdist(states, there).topk(min(NEAREST, len(there)), largest=False).indices
    taken = (weight * len(there) / 2).round().long().clamp(1, near.shape[1])
    return torch.stack([own[rows[:n]].mean(0) for rows, n in zip(near, taken, strict=True)])


def agreement(volumes: Tensor, mask: Tensor, pixel_size: float) -> dict[str, Any]:
    """FSC between the halves of volumes (2, S, z, y, x), and of what each differs from the mean of its half."""
    first, second = volumes
    change1, change2 = first - first.mean(0), second - second.mean(0)
    curves = {
        "volumes": torch.stack([metrics.fsc(a, b, mask) for a, b in zip(first, second, strict=True)]),
        "differences": torch.stack([fsc_of_differences(a, b, mask) for a, b in zip(change1, change2, strict=True)]),
    }
    return {
        name: {
            "resolution": summary(torch.tensor([metrics.resolution(c, THRESHOLD, pixel_size) for c in curve])),
            "area": summary(metrics.auc(curve)),
            "curves": [[round(float(x), 4) for x in c] for c in curve],
        }
        for name, curve in curves.items()
    }


def agreement_of_parts(first: Seen, second: Seen) -> dict[str, Any]:
    """Numbers of parts, the adjusted Rand index between one half's parts and those of the other's Gaussians in the same places, and
    the share of Gaussians that are ``counted``, for the other has some there."""
    index, counted = [], []
    for a, b in ((first, second), (second, first)):
        other = a.parts_by(b)
        near = other >= 0
        index.append(adjusted_rand_score(a.part[near].numpy(), other[near].numpy()) if near.any() else 0.0)
        counted.append(float(near.float().mean()))
    return {"found": [first.parts, second.parts], "adjusted_rand_index": float(np.mean(index)), "counted": float(np.mean(counted))}


def agreement_of_motion(whole: Seen, halves: list[Seen]) -> list[dict[str, Any]]:
    """Of every part of the whole model: occupancy, turn (degrees) and way (Å) in either half, and how far these are apart.

    Motion is from the state where both halves show most of the part, over the states in which both show it present; the way is that of
    one point, the middle of the whole model's part there.  ``missing``: the halves of which hardly a Gaussian lies there.
    """
    parts = [half.parts_by(whole) for half in halves]
    result: list[dict[str, Any]] = []
    for k in range(whole.parts):
        missing = [h + 1 for h, part in enumerate(parts) if int((part == k).sum()) < FEW]
        if missing:
            result.append({"part": k + 1, "missing": missing})
            continue
        turned, moved, present = zip(*(motion(half, part == k) for half, part in zip(halves, parts, strict=True)), strict=True)
        least = torch.minimum(*present)
        home = int(least.argmax())
        states = [s for s in torch.nonzero(least > THERE)[:, 0].tolist() if s != home]
        turns = [[r[s] @ r[home].T for s in states] for r in turned]
        middle = whole.middle(k, home)
        ways = [[r[s] @ r[home].T @ (middle - x[home]) + x[s] - middle for s in states] for r, x in zip(turned, moved, strict=True)]
        result.append(
            {
                "part": k + 1, "home": home, "states": states,
                "occupancy": [o.tolist() for o in present], "occupancy_apart": float((present[0] - present[1]).abs().mean()),
                "angle": [[float(angle_between(torch.eye(3), r)) for r in own] for own in turns],
                "angle_apart": [float(angle_between(a, b)) for a, b in zip(*turns, strict=True)],
                "way": [[float(w.norm()) for w in own] for own in ways],
                "way_apart": [float((a - b).norm()) for a, b in zip(*ways, strict=True)],
            }
        )  # fmt: skip
    return result


def motion(half: Seen, mine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rotations (S, 3, 3) and translations (S, 3) Å of the Gaussians ``mine`` (G,) in every state; occupancy (S,), of the most."""
    rotation, translation, present = (x[:, 0] for x in frames(half.mixture, torch.where(mine, 0, -1), half.latent))
    return rotation, translation, present / present.max()


def sentences(result: dict[str, Any]) -> list[str]:
    """What was found, for the terminal and the report."""
    volumes, differences, parts = result["volumes"], result["differences"], result["parts"]
    held = result["held_part"]
    frame = "no part is in both half-sets: each is told in a frame of its own"
    if held is not None:
        frame = f"both half-sets are told in the frame of part {held + 1}"
    lines = [
        frame,
        f"volumes of the two half-sets agree in the median to {volumes['resolution']['median']:.1f} Å, what differs between states to "
        f"{differences['resolution']['median']:.1f} Å (FSC {result['threshold']}; area under it {volumes['area']['mean']:.3f} and "
        f"{differences['area']['mean']:.3f}, at most 0.5)",
        f"{parts['found'][0]} and {parts['found'][1]} parts, adjusted Rand index {parts['adjusted_rand_index']:.2f} between the half-sets "
        f"over the {parts['counted']:.0%} of Gaussians that lie in the same places",
    ]
    for m in result["motion"]:
        if "missing" in m:
            lines.append(f"part {m['part']} is not found where it is in the whole model in half-set {' and '.join(map(str, m['missing']))}")
            continue
        line = f"part {m['part']}: occupancies {m['occupancy_apart']:.2f} apart on average"
        if m["states"]:
            angle, way = ([max(own) for own in m[name]] for name in ("angle", "way"))
            line += f"; turned by up to {angle[0]:.0f}° and {angle[1]:.0f}°, {np.mean(m['angle_apart']):.0f}° apart on average"
            line += f"; moved by up to {way[0]:.0f} Å and {way[1]:.0f} Å, {np.mean(m['way_apart']):.1f} Å apart"
        lines.append(line)
    return lines


def write_volumes(folder: Path, volumes: Tensor, mask: Tensor, pixel_size: float) -> None:
    """``state_000_half1.mrc``, ``state_000_half2.mrc``, ... and ``mask.mrc``."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.mrc"):
        old.unlink()
    mrc.write_volume(folder / "mask.mrc", mask.numpy(), pixel_size)
    for h, of_half in enumerate(volumes):
        for s, volume in enumerate(of_half):
            mrc.write_volume(folder / f"state_{s:03d}_half{h + 1}.mrc", volume.numpy(), pixel_size)
