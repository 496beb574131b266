"""Volumes of states and trajectories over any number of MPI ranks, and the files that other programs open.

A rank renders every size-th volume and writes it as one whole chunk of volumes.zarr and one .mrc; nothing is reduced, so maps
do not depend on the number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cryospire import config as configuration
from cryospire import kernels, log
from cryospire.config import Config
from cryospire.conventions import InputError
from cryospire.io import bodies, chimerax, mrc, stores
from cryospire.maths import rigid
from cryospire.stages.detail import Details
from cryospire.stages.ranks import over_ranks
from cryospire.training.model import Mixture, load

Array = NDArray[np.float32]

ARROWS = 400  # Gaussians that carry an arrow, drawn by mass
PRESENT = 0.3  # occupancy at both ends of a trajectory below which a Gaussian has no arrow
LEAST_ANGLE, LEAST_OFFSET = 5.0, 2.0  # floors of a body's priors, degrees and Å: a prior of zero would freeze it


@dataclass(frozen=True)
class Job:
    """One volume: where it goes in the store, its .mrc, its latent (D,)."""

    array: str
    index: tuple[int, ...]
    file: str
    latent: Array


def run(config: Config, model: Path, analysis: Path, reconstruction: Path, output: Path, force: bool = False) -> None:
    """model.zarr, analysis.zarr, reconstruction.zarr -> volumes.zarr and a folder beside it; alone or under mpiexec or srun."""
    over_ranks(lambda comm: assemble(comm, config, model, analysis, reconstruction, output, force))


def assemble(comm: Any, config: Config, model: Path, analysis: Path, reconstruction: Path, output: Path, force: bool) -> None:
    """What ``run`` does, over the ranks of ``comm``."""
    own = configuration.section(config.assemble)
    mixture = load(model)
    found = stores.open_store(analysis, "analysis")
    stores.check_made_from(found, "model", model, "analyse")
    states, lines = stores.read(found, "states/latent"), stores.read(found, "trajectories/latent")
    box = config.assemble.box or mixture.box
    if box % 2:
        raise InputError(f"assemble.box: {box} is odd; boxes are even")
    pixel_size = mixture.pixel_size * mixture.box / box
    details = Details.load(reconstruction, model, mixture, box)
    folder = output.with_suffix("")
    if comm.rank == 0:
        inputs = {"model": model, "analysis": analysis, "reconstruction": reconstruction}
        begun = stores.create(output, "volumes", config=own, seed=config.seed, inputs=inputs, pixel_size=pixel_size, box=box, force=force)
        declare(begun, states, lines, found, box)
        folder.mkdir(parents=True, exist_ok=True)
        for old in [*folder.glob("state_*.mrc"), *folder.glob("trajectory_*")]:
            old.unlink()
    comm.Barrier()
    group: Any = stores.writable(output)
    mine = jobs(states, lines)[comm.rank :: comm.size]
    with log.Progress("assemble", len(mine), "volumes", output.parent / "logs" / "assemble.metrics.jsonl") as progress:
        for job in mine:
            volume = render(details, job.latent)
            with stores.writing(output):
                group[job.array][job.index] = volume
            mrc.write_volume(folder / job.file, volume, pixel_size)
            progress.advance(1, f"of rank 0, {comm.size} rank(s)")
        progress.record(volumes=len(mine), ranks=comm.size)
    comm.Barrier()
    if comm.rank == 0:
        trained = stores.open_partial(model)
        group.attrs["held_part"] = trained.attrs.get("held_part")
        write_scene(folder, mixture, trained, model, found, group, config.seed)
        stores.finish(group)
        log.say(f"assemble   {len(states)} states, {len(lines)} trajectories of {lines.shape[1]} volumes -> {folder}")
    comm.Barrier()


def write_scene(folder: Path, mixture: Mixture, store: Any, model: Path, found: Any, volumes: Any, seed: int) -> None:
    """Gaussians, arrows, bodies of RELION and 3DFlex, and the script that opens them in ChimeraX."""
    anchor = stores.read(store, "gaussians/anchor")
    part = stores.read(store, "anchors/part")[anchor]
    scene = Scene(folder, mixture, part, anchor)
    states, lines = stores.read(found, "states/latent"), stores.read(found, "trajectories/latent")
    masks = sorted(mask_folder(store, model).glob("part_*.mrc"), key=lambda p: int(p.stem.split("_")[1]))
    write_gaussians(scene, states[0], lines, seed)
    write_bodies(scene, states, stores.read(found, "states/weight"), masks)
    level = chimerax.contour(np.asarray(volumes["states"][0]))
    relative = [f"../{p.parent.name}/{p.name}" for p in masks]
    names = list(found["trajectories/latent"].attrs["names"])
    chimerax.write_script(folder / "open.cxc", level, names, int(part.max()) + 1, relative)


def declare(group: Any, states: Array, lines: Array, found: Any, box: int) -> None:
    """Empty arrays, one chunk a volume, and what the volumes are."""
    arrays: list[tuple[str, tuple[int, ...], tuple[str, ...]]] = [("states", (len(states),), ("state",))]
    if len(lines):
        arrays.append(("trajectories", lines.shape[:2], ("trajectory", "step")))
    for name, lead, dims in arrays:
        stores.empty(group, name, lead, box, dims, f"volumes of {name}; the origin is voxel n // 2", "image unit / Å")
    if len(lines):
        group["trajectories"].attrs["names"] = found["trajectories/latent"].attrs["names"]
    stores.put(group, "latent", states, ("state", "latent"), "latent of each state")
    stores.put(group, "weight", stores.read(found, "states/weight"), ("state",), "share of the particles")


def jobs(states: Array, lines: Array) -> list[Job]:
    """All volumes: states first, then trajectories step by step."""
    return [Job("states", (s,), f"state_{s:03d}.mrc", z) for s, z in enumerate(states)] + [
        Job("trajectories", (t, k), f"trajectory_{t}_{k:03d}.mrc", z) for t, line in enumerate(lines) for k, z in enumerate(line)
    ]


def render(details: Details, latent: Array) -> Array:
    """Volume [z, y, x] at one latent (D,): the mixture, and the detail of its parts."""
    z, box = torch.as_tensor(latent), details.mask.shape[-1]
    centre, amplitude, scale = details.mixture.forward_gaussians(z[None])
    return kernels.render_volume(centre[0], amplitude[0], scale, box, details.pixel_size).numpy() + details.at(z)


def mask_folder(store: Any, model: Path) -> Path:
    """Where the parts stage left its masks: ``<stem of parts.zarr>_masks`` beside the model."""
    parts = store.attrs["inputs"].get("parts", {}).get("path", "parts.zarr")
    return model.with_name(f"{Path(parts).stem}_masks")


@dataclass(frozen=True)
class Scene:
    """The mixture as people look at it: part and anchor (G,) of each Gaussian."""

    folder: Path
    mixture: Mixture
    part: NDArray[np.integer[Any]]
    anchor: NDArray[np.integer[Any]]

    def at(self, latent: Array) -> tuple[Array, Array]:
        """Centres (G, 3) Å in the frame of the maps (voxel 0 at 0) and occupancies (G,) at one latent, signed as the density."""
        z = torch.as_tensor(latent)[None]
        occupancy = self.mixture.occupancies(z, self.mixture.features)
        centre = self.mixture.forward_gaussians(z)[0][0] + self.mixture.box // 2 * self.mixture.pixel_size
        return centre.numpy(), (occupancy[0] * self.mixture.relative_amplitude.sign()).numpy()

    @property
    def mass(self) -> NDArray[np.float64]:
        m = self.mixture
        return np.abs((m.relative_amplitude * m.scale**3).numpy()).astype(np.float64)

    def pdb(self, latent: Array) -> str:
        centre, occupancy = self.at(latent)
        return chimerax.pdb_model(centre, occupancy, self.mixture.scale.numpy(), self.part, self.anchor)


def write_gaussians(scene: Scene, state: Array, lines: Array, seed: int) -> None:
    """``gaussians.pdb`` at the largest state; for each trajectory a .pdb with one MODEL a step, and arrows from first to last."""
    remarks = [
        "A pseudo-atom for each Gaussian: chain = part, residue name = anchor, B-factor column = scale",
        "in Angstrom; one with negative occupancy takes density away",
    ]
    chimerax.write_pdb(scene.folder / "gaussians.pdb", [scene.pdb(state)], remarks)
    mass = scene.mass
    rng = np.random.default_rng([seed, 3])
    picked = np.sort(rng.choice(len(mass), min(ARROWS, int(np.count_nonzero(mass))), replace=False, p=mass / mass.sum()))
    for t, line in enumerate(lines):
        chimerax.write_pdb(scene.folder / f"trajectory_{t}.pdb", [scene.pdb(z) for z in line], remarks)
        (start, before), (stop, after) = scene.at(line[0]), scene.at(line[-1])
        shown = picked[np.minimum(before, after)[picked] > PRESENT]
        shortest = scene.mixture.pixel_size / 2
        chimerax.write_arrows(scene.folder / f"trajectory_{t}.bild", start[shown], stop[shown], scene.part[shown], shortest)


def body_motion(scene: Scene, states: Array, weight: Array) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """RMS rotation (P,) in degrees and shift (P,) in Å of each part against part 0 over the states; part 0 against part 1."""
    shapes = [scene.at(z)[0] for z in states]
    members = [np.flatnonzero(scene.part == k) for k in range(int(scene.part.max()) + 1)]
    mass = scene.mass
    angle, offset = np.zeros((2, len(states), len(members)))
    for s, shape in enumerate(shapes):
        turn = [rigid.motion(*(torch.from_numpy(x) for x in (shapes[0][m], shape[m], mass[m])))[0].numpy() for m in members]
        centre = [(np.average(shapes[0][m], axis=0, weights=mass[m]), np.average(shape[m], axis=0, weights=mass[m])) for m in members]
        for k in range(len(members)):
            other = 0 if k else 1
            angle[s, k] = np.degrees(np.arccos(np.clip((np.trace(turn[other].T @ turn[k]) - 1) / 2, -1, 1)))
            carried = turn[other] @ (centre[k][0] - centre[other][0]) + centre[other][1]
            offset[s, k] = np.linalg.norm(centre[k][1] - carried)
    return np.sqrt(weight @ angle**2 / weight.sum()), np.sqrt(weight @ offset**2 / weight.sum())


def write_bodies(scene: Scene, states: Array, weight: Array, masks: list[Path]) -> None:
    """RELION's table of bodies, and label map with fuse tree for 3DFlex, when there are masks of two parts or more."""
    parts = int(scene.part.max()) + 1
    if len(masks) < 2 or len(masks) != parts or len(np.unique(scene.part)) != parts:
        return
    angle, offset = body_motion(scene, states, weight)
    table = [
        bodies.Body(str(p.resolve()), 1 if k else 2, max(float(angle[k]), LEAST_ANGLE), max(float(offset[k]), LEAST_OFFSET))
        for k, p in enumerate(masks)
    ]
    bodies.write_relion(scene.folder / "relion_bodies.star", table)
    volumes = np.stack([mrc.read_volume(p)[0] for p in masks])
    mrc.write_volume(scene.folder / "segments.mrc", bodies.segment(volumes), scene.mixture.pixel_size)
    centre = scene.at(states[0])[0]
    middles = np.stack([np.average(centre[scene.part == k], axis=0, weights=scene.mass[scene.part == k]) for k in range(parts)])
    (scene.folder / "segments.txt").write_text(bodies.tree(middles) + "\n")
