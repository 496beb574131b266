"""A trained mixture against the truth: lumps of its latents, its parts, their motion and their occupancy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from cryospire.maths import neighbours, recovery, rigid
from cryospire.maths.poses import angle_between, nearest_rotation
from cryospire.training.data import Particles
from cryospire.training.model import Mixture

NEAR = 2.0  # pixels within which a Gaussian belongs to the nearest atom
LIGHT = 0.05  # Gaussians of less than this fraction of the median mass are not counted
SAMPLE = 4096  # particles whose occupancies are looked at
POINTS = 2000  # particles whose neighbours are looked at
WHOLE = 0.5  # degrees by which whole states are turned, from which on it is told what undoing that gives
RADII = (0.01, 0.05, 0.2)  # neighbourhoods, in shares of these particles: CryoBench's range


class Labelled(Protocol):
    """Points of known part, state by state: atoms of a truth, or the Gaussians of another mixture."""

    @property
    def parts(self) -> int: ...

    def atoms(self, state: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Positions (A, 3) Å and parts (A,) of what is present in a state."""
        ...


@dataclass(frozen=True)
class Segmentation:
    """``position`` (A, 3) Å and ``part`` (A,) of the atoms.

    ``rotation`` (S, P, 3, 3), ``translation`` (S, P, 3) and ``present`` (S, P) of every part in every state.
    """

    position: NDArray[np.float64]
    part: NDArray[np.int64]
    rotation: NDArray[np.float64]
    translation: NDArray[np.float64]
    present: NDArray[np.bool_]

    @staticmethod
    def load(path: Path, states: NDArray[np.int64]) -> Segmentation:
        """The file that ``simulate`` writes, for some of its states."""
        f = np.load(path, allow_pickle=False)
        return Segmentation(f["position"], f["part"], f["rotation"][states], f["translation"][states], f["present"][states])

    @property
    def parts(self) -> int:
        return self.present.shape[1]

    def atoms(self, state: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Positions and parts of the atoms that are present in a state."""
        moved = np.einsum("aij,aj->ai", self.rotation[state][self.part], self.position) + self.translation[state][self.part]
        here = self.present[state][self.part]
        return moved[here], self.part[here]


@dataclass(frozen=True)
class Poses:
    """``rotation`` (N, 3, 3), model to view, and ``shift`` (N, 2) Å of particles."""

    rotation: Tensor
    shift: Tensor

    @staticmethod
    def load(path: Path, rows: NDArray[np.int64]) -> Poses:
        """The file that ``simulate`` writes, for some of its particles."""
        f = np.load(path, allow_pickle=False)
        return Poses(torch.from_numpy(f["rotation"][rows]), torch.from_numpy(f["shift"][rows]))


@dataclass(frozen=True)
class Assignment:
    """True part (G,) of every Gaussian, whether it counts (G,), and its mass (G,); centres (S, G, 3) Å at the states' mean latents."""

    part: Tensor
    counts: Tensor
    mass: Tensor
    centre: Tensor


def judge(mixture: Mixture, latents: Tensor, label: Tensor, truth: Segmentation | None, data: Particles) -> dict[str, Any]:
    """Latents: one lump a state? leakage of pose and defocus.  With a segmentation: motion and occupancy of the true parts."""
    states = int(label.max()) + 1
    result: dict[str, Any] = {"latents": judge_latents(latents.double(), label, states, data)}
    if truth is not None:
        assigned = assign(mixture, recovery.group_means(latents, label, states), truth)
        result["motion"] = judge_motion(assigned, truth)
        result["occupancy"] = judge_occupancy(mixture, latents, label, assigned, truth)
    return result


def judge_latents(latents: Tensor, label: Tensor, states: int, data: Particles) -> dict[str, Any]:
    ratio = recovery.separation(latents, label, states)
    lumps = [recovery.lumps(latents[label == k]) for k in range(states)]
    # Poses enter by the nine entries of R and the products of its last row: what an even function of the view direction can leak.
    view = data.rotation.double()[:, 2]
    pose = torch.cat([data.rotation.double().flatten(1), (view[:, :, None] * view[:, None]).flatten(1)[:, [0, 1, 2, 4, 5]]], 1)
    defocus = (data.ctf["defocus_u"].double() + data.ctf["defocus_v"].double())[:, None] / 2e4
    return {
        "between_over_within": {"mean": float(ratio.mean()), "states": [round(float(r), 4) for r in ratio]},
        "main_lump": {"mean": float(np.mean([x.main for x in lumps])), "states": [round(x.main, 4) for x in lumps]},
        "valley": {"mean": float(np.mean([x.valley for x in lumps])), "states": [round(x.valley, 4) for x in lumps]},
        "leakage": {
            "pose": recovery.explained(latents, label, pose),
            "defocus": recovery.explained(latents, label, torch.cat([defocus, defocus**2], 1)),
        },
    }


def judge_poses(found: Poses, given: Poses, truth: Poses) -> dict[str, float]:
    """Root mean square errors of poses found and given: ``turn`` about an axis, degrees, and ``shift`` along one, Å."""
    result = {}
    for name, poses in (("turn", found), ("given_turn", given)):
        result[name] = float((angle_between(truth.rotation.double(), poses.rotation.double()).square().mean() / 3).sqrt())
    for name, poses in (("shift", found), ("given_shift", given)):
        result[name] = float((poses.shift - truth.shift).square().mean().sqrt())
    return result


def frames(found: Poses, truth: Poses, label: Tensor) -> tuple[Tensor, Tensor]:
    """Rotations (S, 3, 3) and translations (S, 3) Å that take what is seen at the poses found into the frame of the truth, state by state.

    Poses of a consensus follow what moves: turned alike in all images of a state, they turn its volume, and no image tells of that.
    The rotation is the mean one (Moakher 2002), the translation that of least squares.
    """
    rotations, translations = [], []
    for k in range(int(label.max()) + 1):
        mine = label == k
        true, other = truth.rotation[mine].double(), found.rotation[mine].double()
        rotations.append(nearest_rotation((true.mT @ other).mean(0)))
        off = (found.shift - truth.shift)[mine].double()
        translations.append(torch.linalg.lstsq(true[:, :2].reshape(-1, 3), off.reshape(-1, 1)).solution[:, 0])
    return torch.stack(rotations), torch.stack(translations)


def judge_neighbours(latents: Tensor, label: Tensor, apart: Tensor) -> dict[str, Any]:
    """Neighbourhood similarity and information imbalance of latents (N, D) with true states, ``apart`` (S, S) from each other.

    On a sample of particles, drawn by a fixed seed.  ``neighbours``: share of the k nearest by latent that are of the states nearest in
    truth, and what chance gives; ``imbalance``: 0 if one tells all of the other, 1 if nothing; ``floor`` is what a perfect latent has,
    since nothing tells particles of one state from each other.
    """
    some = torch.randperm(len(latents), generator=torch.Generator().manual_seed(0))[:POINTS]
    z, of = latents[some].double(), label[some]
    # Direct differences: the fast way by products would blur the smallest distances, which are the ones that count.
    near = neighbours.others(torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist"))
    true = neighbours.others(apart.double()[of][:, of])
    sizes = [max(1, round(r * len(some))) for r in RADII]
    pairs = [neighbours.similarity(near, true, k) for k in sizes]
    return {
        "neighbours": {"of": len(some), "k": sizes, "similarity": [p[0] for p in pairs], "chance": [p[1] for p in pairs]},
        "imbalance": {
            "latent_to_truth": neighbours.information_imbalance(near, true),
            "truth_to_latent": neighbours.information_imbalance(true, near),
            "floor": neighbours.information_imbalance(true, true),
        },
    }


def assign(mixture: Mixture, means: Tensor, truth: Labelled) -> Assignment:
    """Every Gaussian votes, state by state, for the part of the atom nearest to it, with its occupancy there as weight."""
    centres, votes, weights = [], torch.zeros(len(mixture.scale), truth.parts), torch.zeros(len(mixture.scale))
    for state, z in enumerate(means):
        centre, amplitude, scale = mixture.forward_gaussians(z[None])
        position, part = truth.atoms(state)
        distance, nearest = cKDTree(position).query(centre[0].numpy())
        weight = amplitude[0].abs() * scale**3
        near = torch.from_numpy(distance < NEAR * mixture.pixel_size)
        votes[torch.arange(len(votes)), torch.from_numpy(part[nearest])] += weight * near
        weights += weight
        centres.append(centre[0])
    mass = weights / len(means)
    counts = (votes.sum(1) > 0.5 * weights) & (mass > LIGHT * mass.median())
    return Assignment(votes.argmax(1), counts, mass, torch.stack(centres))


def judge_parts(mixture: Mixture, latents: Tensor, label: Tensor, truth: Segmentation, found: Tensor) -> dict[str, Any]:
    """Adjusted Rand index between the parts that were found (G,) and the true ones, over Gaussians that lie on atoms."""
    assigned = assign(mixture, recovery.group_means(latents, label, int(label.max()) + 1), truth)
    kept = assigned.counts
    return {
        "adjusted_rand_index": float(adjusted_rand_score(assigned.part[kept].numpy(), found[kept].numpy())),
        "found": len(torch.unique(found)), "true": truth.present.shape[1], "gaussians": int(kept.sum()), "of": len(kept),
    }  # fmt: skip


def judge_motion(assigned: Assignment, truth: Segmentation) -> list[dict[str, Any]]:
    """For every part that moves: its motion from state 0 against the true one, by angle (degrees) and by where its centre goes (Å).

    A turn of the part about its own long axis moves little density: where resolution is low, the centre tells more than the angle.
    """
    result = []
    for part in range(truth.present.shape[1]):
        rotation = torch.from_numpy(truth.rotation[:, part])
        chosen = assigned.counts & (assigned.part == part)
        if not truth.present[0, part] or float((rotation - rotation[0]).abs().max()) < 1e-6 or int(chosen.sum()) < 4:
            continue
        states = [s for s in range(1, len(rotation)) if truth.present[s, part]]
        true = [rotation[s] @ rotation[0].T for s in states]
        centre, mass = assigned.centre[:, chosen].double(), assigned.mass[chosen].double()
        fitted = [rigid.motion(centre[0], centre[s], mass)[0] for s in states]
        error = [float(angle_between(a, b)) for a, b in zip(fitted, true, strict=True)]
        still = [float(angle_between(torch.eye(3), r)) for r in true]
        middle = torch.from_numpy(truth.position[truth.part == part].mean(0))
        path = rotation @ middle + torch.from_numpy(truth.translation[:, part])
        way = (centre * mass[:, None]).sum(1) / mass.sum()
        off = [float(((way[s] - way[0]) - (path[s] - path[0])).norm()) for s in states]
        result.append(
            {
                "part": part, "error": float(np.mean(error)), "angle": float(np.mean(still)), "states": [round(e, 2) for e in error],
                "centre_error": float(np.mean(off)), "centre_moved": float(np.mean([float((path[s] - path[0]).norm()) for s in states])),
            }
        )  # fmt: skip
    return result


def judge_occupancy(mixture: Mixture, latents: Tensor, label: Tensor, assigned: Assignment, truth: Segmentation) -> list[dict[str, Any]]:
    """For every part that is absent from some states: mean occupancy of its Gaussians in each particle, of the most that one has (images
    do not tell half the occupancy from half the density), against its true presence."""
    sample = torch.linspace(0, len(latents) - 1, min(SAMPLE, len(latents))).round().long()
    parts = [p for p in range(truth.present.shape[1]) if truth.present[:, p].any() and not truth.present[:, p].all()]
    chosen = {p: assigned.counts & (assigned.part == p) for p in parts}
    parts = [p for p in parts if chosen[p].any()]
    if not parts:
        return []
    occupancy = torch.cat([mixture.occupancies(z, mixture.features) for z in latents[sample].split(128)])
    result = []
    for p in parts:
        mass = assigned.mass[chosen[p]]
        mean = (occupancy[:, chosen[p]] * mass).sum(1)
        mean /= mean.max()
        present = torch.from_numpy(truth.present[label[sample].numpy(), p])
        lumps = recovery.lumps(mean[:, None].double())
        result.append(
            {
                "part": p, "auc": recovery.ranking_auc(mean, present), "valley": lumps.valley,
                "present": float(mean[present].mean()), "absent": float(mean[~present].mean()),
                "true_share": float(present.double().mean()),
                "histogram": {k: torch.histc(mean[m], 40, 0, 1).long().tolist() for k, m in (("present", present), ("absent", ~present))},
            }
        )  # fmt: skip
    return result


def sentence(name: str, values: dict[str, Any]) -> str:
    """What a model's entry says, in one line."""
    z = values["latents"]
    text = f"{name}: latents between/within {z['between_over_within']['mean']:.2f}, main lump {100 * z['main_lump']['mean']:.0f} %"
    if "neighbours" in z:
        n, i = z["neighbours"], z["imbalance"]
        text += f"; {100 * n['similarity'][0]:.0f} % of the {n['k'][0]} nearest latents are right (chance {100 * n['chance'][0]:.0f} %)"
        text += f", information imbalance {i['latent_to_truth']:.2f} to the truth, {i['truth_to_latent']:.2f} back (best {i['floor']:.2f})"
    if "poses" in values:
        p = values["poses"]
        text += f"; poses wrong by {p['turn']:.1f} degrees about an axis and {p['shift']:.1f} Å along one"
        text += f" (given: {p['given_turn']:.1f} and {p['given_shift']:.1f}), of which {p['frames_turn']:.1f} degrees turn whole states"
        if p["frames_turn"] > WHOLE:
            text += f"; with that undone AUC {p['auc']:.3f}, difference {p['difference']:.3f}"
    if "parts" in values:
        p = values["parts"]
        text += f"; {p['found']} parts for {p['true']}, adjusted Rand index {p['adjusted_rand_index']:.2f}"
    for m in values.get("motion", []):
        text += f"; true part {m['part'] + 1} turned within {m['error']:.0f} of {m['angle']:.0f} degrees"
        text += f", its centre moved within {m['centre_error']:.0f} of {m['centre_moved']:.0f} Å"
    for o in values.get("occupancy", []):
        text += f"; true part {o['part'] + 1} present {o['present']:.2f}, absent {o['absent']:.2f} (AUC {o['auc']:.2f})"
    return text
