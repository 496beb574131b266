"""Particles with a known truth: conformations, compositions, CTFs, noise; CryoBench's recipe from an atomic model or the phantom."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from cryospire import config as configuration
from cryospire import kernels
from cryospire.config import Config, Simulate
from cryospire.conventions import InputError, particle_id
from cryospire.io import metadata_relion, models, mrc
from cryospire.io.table import Optics, ParticleTable
from cryospire.kernels import atoms
from cryospire.log import Progress, say
from cryospire.maths import fourier, molecules, poses
from cryospire.maths.ctf import ctf
from cryospire.maths.molecules import Molecule

VOLTAGE, CS, AMPLITUDE_CONTRAST = 300.0, 2.7, 0.1  # kV, mm, 1
DEFOCUS = (8_000.0, 25_000.0)  # Å, over the micrographs
ASTIGMATISM, DEFOCUS_SPREAD = 300.0, 100.0  # Å, standard deviations over micrographs and within one
PER_MICROGRAPH = 200
SAMPLE = 1024  # images from which the signal's variance is measured
RESOLUTION = 2.2  # pixels; resolution of the truth where none is given
LINKER_TRIES = 200
CLASH = 0.01  # fraction of the moving group's atoms that may touch the rest
# Independent streams of random numbers.
POSES, SHIFTS, DEFOCI, LABELS, NOISE, LINKERS, HALVES, STRENGTHS, ERRORS = range(9)


@dataclass(frozen=True)
class States:
    """All conformations and compositions.

    ``position`` (S, A, 3) Å, ``weight`` (S, A; 0 where absent), ``rotation`` (S, 3, 3) of the moving group, ``angle`` (S,) degrees (nan
    if random) and ``absent`` (S, K) groups.
    """

    position: Tensor
    weight: Tensor
    rotation: Tensor
    angle: Tensor
    absent: Tensor


def run(config: Config, *, output: Path, force: bool = False) -> None:
    """Write ``particles.star``, ``particles.mrcs`` and the folder ``truth`` into ``output``; the star file comes last."""
    settings = config.simulate
    if settings is None:
        raise InputError("simulate: the config has no section simulate")
    star = output / "particles.star"
    if star.exists() and not force:
        raise InputError(f"{star}: exists; pass --force to replace it or choose another output")
    check(settings)
    if config.threads:
        kernels.set_threads(config.threads)
    molecule = load(settings)
    states = make_states(molecule, settings, config.seed)
    check_fit(states, settings)
    table, labels = make_table(settings, config.seed, output)
    density = signal_scale(states, table, labels, settings)
    states = replace(states, weight=states.weight * density)
    star.unlink(missing_ok=True)
    write_truth(output / "truth", molecule, states, labels, settings, config.seed)
    np.savez(output / "truth/poses.npz", rotation=table.rotation.astype(np.float32), shift=table.shift.astype(np.float32))
    write_images(output, states, table, labels, settings, config.seed)
    metadata_relion.write_star(star, mistaken(table, settings, config.seed))
    what = f"box {settings.box} at {settings.pixel_size:g} Å, SNR {settings.snr:g}"
    say(f"simulate   {star}: {settings.particles:,} particles, {settings.states} states, {what}")


def mistaken(table: ParticleTable, settings: Simulate, seed: int) -> ParticleTable:
    """The table as a consensus refinement might leave it: with errors of poses and shifts, normal about and along every axis."""
    rng = np.random.default_rng(_stream(seed, ERRORS))
    turn = poses.exp_so3(torch.from_numpy(np.deg2rad(settings.turn_error) * rng.standard_normal((len(table), 3))))
    shift = table.shift + settings.shift_error * rng.standard_normal((len(table), 2))
    return replace(table, rotation=(turn @ torch.from_numpy(table.rotation)).numpy(), shift=shift)


def check(settings: Simulate) -> None:
    """Refuse what cannot be simulated, before any work."""
    if settings.box % 2:
        raise InputError(f"simulate.box: {settings.box} is odd; boxes are even")
    if settings.particles < settings.states:
        raise InputError(f"simulate.particles: {settings.particles} particles cannot fill {settings.states} states")
    if settings.model is None and (settings.moving or settings.absent or settings.hinge):
        raise InputError("simulate.model: groups (moving, absent, hinge) are named for a model, and none is given")
    if settings.model is not None and settings.kind != "compositional" and not (settings.moving and len(settings.hinge) == 2):
        found = f"moving is {settings.moving!r}, hinge is {settings.hinge!r}"
        raise InputError(f"simulate.hinge: kind {settings.kind!r} needs a moving group and two hinge residues, as 'B:222' 'B:238'; {found}")
    if settings.model is not None and settings.kind != "conformational" and not settings.absent:
        raise InputError(f"simulate.absent: kind {settings.kind!r} needs at least one group of chains that may be absent")


def load(settings: Simulate) -> Molecule:
    """The atomic model or the phantom, with the groups that its kind of heterogeneity uses; centre of mass at the origin."""
    compositional = settings.kind == "compositional"
    molecule = read_model(settings.model, settings) if settings.model else molecules.phantom(caps=3 if compositional else 1)
    if compositional:
        return replace(molecule, moving=torch.zeros_like(molecule.moving))
    return replace(molecule, absent=molecule.absent[:0]) if settings.kind == "conformational" else molecule


def read_model(path: Path, settings: Simulate) -> Molecule:
    model = models.read(path)
    n = len(model.weight)
    absent = [model.group(names, f"simulate.absent[{k}]") for k, names in enumerate(settings.absent)]
    hinge = [model.alpha_carbon(name, "simulate.hinge") for name in settings.hinge] or [np.zeros(3), np.array([0.0, 0.0, 1.0])]
    if len(hinge) != 2 or np.linalg.norm(hinge[1] - hinge[0]) < 1e-3:
        raise InputError(f"simulate.hinge: {settings.hinge!r} are not two different residues")
    return Molecule(
        torch.from_numpy(model.position),
        torch.from_numpy(model.weight),
        torch.from_numpy(model.group(settings.moving, "simulate.moving")),
        torch.from_numpy(np.array(absent, bool).reshape(-1, n)),
        torch.from_numpy(np.array(hinge)),
    ).centred()


def make_states(molecule: Molecule, settings: Simulate, seed: int) -> States:
    """Every state: the moving group turned about the hinge, absent groups of weight 0.  State 0 is the model as it is."""
    count = settings.states
    moves = settings.kind != "compositional"
    angle = torch.zeros(count, dtype=torch.float64)
    rotation = torch.eye(3, dtype=torch.float64).repeat(count, 1, 1)
    if moves and settings.path == "circle":
        angle = torch.arange(count, dtype=torch.float64) * (360 / count)
        rotation = torch.stack([molecules.hinge_rotation(molecule.hinge, float(a)) for a in angle])
    elif moves:
        angle = torch.full((count,), torch.nan, dtype=torch.float64)
        rotation[1:] = random_linkers(molecule, count - 1, seed)
    choices = molecules.compositions(len(molecule.absent))
    if not moves and count > len(choices):
        raise InputError(f"simulate.states: {count} states, but {len(molecule.absent)} absent groups give only {len(choices)}")
    absent = choices[torch.arange(count) % len(choices)]
    position = molecule.position.repeat(count, 1, 1)
    pivot = molecule.hinge.mean(0)
    for k in range(count):
        position[k, molecule.moving] = molecules.turn(molecule.position[molecule.moving], rotation[k], pivot)
    missing = (absent[:, :, None] & molecule.absent).any(1)
    return States(position, torch.where(missing, 0.0, molecule.weight), rotation, angle, absent)


def random_linkers(molecule: Molecule, count: int, seed: int) -> Tensor:
    """Rotations (count, 3, 3) of the moving group about the middle of the hinge, uniform among those that do not clash with the rest."""
    generator = torch.Generator().manual_seed(_stream(seed, LINKERS))
    moving, rest = molecule.position[molecule.moving][::4], molecule.position[~molecule.moving][::4]
    pivot = molecule.hinge.mean(0)
    chosen = []
    for _ in range(count):
        tried = poses.random_rotations(LINKER_TRIES, generator)
        overlap = [1.0]
        for r in tried:
            overlap.append(molecules.clash(molecules.turn(moving, r, pivot), rest))
            if overlap[-1] <= CLASH:
                break
        chosen.append(tried[int(np.argmin(overlap[1:]))])
    return torch.stack(chosen) if chosen else torch.zeros(0, 3, 3, dtype=torch.float64)


def check_fit(states: States, settings: Simulate) -> None:
    radius = float(states.position.norm(dim=2)[states.weight > 0].max())
    half = (settings.box / 2 - 2) * settings.pixel_size
    if radius > half:
        need = 2 * int(np.ceil(radius / settings.pixel_size + 2))
        size = f"{settings.box} pixels of {settings.pixel_size:g} Å"
        raise InputError(f"simulate.box: {size} cannot hold a model of radius {radius:.0f} Å; use {need} or more")


def _stream(seed: int, stream: int) -> int:
    return int(np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)[0] >> 1)


def make_table(settings: Simulate, seed: int, output: Path) -> tuple[ParticleTable, NDArray[np.int32]]:
    """Poses, shifts, CTFs, half-sets and labels (N,) of every particle."""
    n = settings.particles
    random = {k: np.random.default_rng(_stream(seed, k)) for k in (SHIFTS, DEFOCI, LABELS, HALVES)}
    counts = molecules.populations(settings.states, n, settings.uneven).numpy()
    labels = random[LABELS].permutation(np.repeat(np.arange(settings.states, dtype=np.int32), counts))
    micrographs = -(-n // PER_MICROGRAPH)
    of = np.arange(n) * micrographs // n
    rng = random[DEFOCI]
    mean = rng.uniform(*DEFOCUS, micrographs)[of] + rng.normal(0, DEFOCUS_SPREAD, n)
    half_astigmatism = np.abs(rng.normal(0, ASTIGMATISM, micrographs))[of] / 2
    names = [f"{i + 1:06d}@particles.mrcs" for i in range(n)]
    generator = torch.Generator().manual_seed(_stream(seed, POSES))
    one = np.ones(1)
    table = ParticleTable(
        source=output / "particles.star", id=np.array([particle_id(name) for name in names], np.int64), image_names=names,
        stacks=[(output / "particles.mrcs").resolve()], stack=np.zeros(n, np.int32), index=np.arange(n), row=np.arange(n),
        rotation=poses.random_rotations(n, generator).numpy(), shift=random[SHIFTS].normal(0, 1, (n, 2)) * settings.shift,
        defocus_u=mean + half_astigmatism, defocus_v=mean - half_astigmatism, defocus_angle=rng.uniform(0, 180, micrographs)[of],
        phase_shift=np.zeros(n), ctf_scale=np.ones(n), half_set=(1 + random[HALVES].permutation(n) % 2).astype(np.int8),
        group=np.zeros(n, np.int32),
        optics=Optics(
            ["simulated"], VOLTAGE * one, CS * one, AMPLITUDE_CONTRAST * one, settings.pixel_size * one,
            np.array([settings.box]), 0 * one, 0 * one, [[]], [[]],
        ),
    )  # fmt: skip
    return table, labels


def clean_images(states: States, table: ParticleTable, labels: NDArray[np.int32], rows: NDArray[np.int64], settings: Simulate) -> Tensor:
    """Images (n, box, box) without noise: projection, CTF, shift."""
    box, pixel = settings.box, settings.pixel_size
    which, rotation = torch.from_numpy(labels[rows]), torch.from_numpy(table.rotation[rows])
    transform = atoms.projection_transforms(states.position, states.weight, which, rotation, box, pixel, resolution(settings))
    c = [torch.from_numpy(x[rows]).float() for x in (table.defocus_u, table.defocus_v, table.defocus_angle)]
    microscope = [torch.full((len(rows),), x) for x in (VOLTAGE, CS, AMPLITUDE_CONTRAST)]
    shift = torch.from_numpy(table.shift[rows]).float() / pixel
    return fourier.irfft(transform * ctf(box, pixel, *c, *microscope) * fourier.shift_phase(box, shift)) / pixel**2


def resolution(settings: Simulate) -> float:
    return settings.resolution or RESOLUTION * settings.pixel_size


def blocks(n: int, box: int) -> list[NDArray[np.int64]]:
    """Rows in blocks whose fine grids take about 32 MiB."""
    size = max(16, 2**21 // box**2)
    return [np.arange(i, min(i + size, n)) for i in range(0, n, size)]


def signal_scale(states: States, table: ParticleTable, labels: NDArray[np.int32], settings: Simulate) -> float:
    """Factor that gives clean images (CTF applied) the variance ``snr`` over all pixels of the set, beside noise of variance 1."""
    sample = np.unique(np.linspace(0, len(table) - 1, SAMPLE).round().astype(np.int64))
    values = [clean_images(states, table, labels, sample[b], settings) for b in blocks(len(sample), settings.box)]
    return float((settings.snr / torch.cat(values).double().var(correction=0)).sqrt())


def write_images(output: Path, states: States, table: ParticleTable, labels: NDArray[np.int32], settings: Simulate, seed: int) -> None:
    n, box = len(table), settings.box
    stack = mrc.create_stack(output / "particles.mrcs", n, box, settings.pixel_size)
    noise = np.random.default_rng(_stream(seed, NOISE))
    strength = np.random.default_rng(_stream(seed, STRENGTHS)).normal(1, settings.strength, (n, 1, 1)).astype(np.float32)
    with Progress("simulate", n, metrics=output.parent / "logs" / "simulate.metrics.jsonl") as progress:
        for rows in blocks(n, box):
            clean = clean_images(states, table, labels, rows, settings).numpy()
            stack[rows[0] : rows[-1] + 1] = strength[rows] * clean + noise.standard_normal(clean.shape, np.float32)
            progress.advance(len(rows))
        progress.record(particles=n, box=box, states=settings.states)


def write_truth(folder: Path, molecule: Molecule, states: States, labels: NDArray[np.int32], settings: Simulate, seed: int) -> None:
    """True volumes in the images' unit, labels, soft mask around all states, and where every part is in every state."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("vol_*.mrc"):
        old.unlink()
    support = np.zeros([settings.box] * 3, bool)
    for k in range(settings.states):
        volume = atoms.volume(states.position[k], states.weight[k], settings.box, settings.pixel_size, resolution(settings)).numpy()
        mrc.write_volume(folder / f"vol_{k:03d}.mrc", volume, settings.pixel_size)
        support |= volume > 0.1 * np.quantile(volume[volume > 0.01 * volume.max()], 0.99)
    distance = np.maximum(ndimage.distance_transform_edt(~support) - 1, 0)
    mrc.write_volume(folder / "mask.mrc", 0.5 + 0.5 * np.cos(np.pi * np.clip(distance / 3, 0, 1)), settings.pixel_size)
    np.save(folder / "labels.npy", labels)
    part = molecule.part
    moved = torch.stack([molecule.moving[part == p].any() for p in range(int(part.max()) + 1)])
    rotation = torch.where(moved[None, :, None, None], states.rotation[:, None], torch.eye(3, dtype=torch.float64))
    pivot = molecule.hinge.mean(0)
    np.savez(
        folder / "segmentation.npz", position=molecule.position.numpy(), weight=molecule.weight.numpy(), part=part.numpy(),
        rotation=rotation.numpy(), translation=(pivot - rotation @ pivot).numpy(),
        present=torch.stack([(states.weight[:, part == p] > 0).any(1) for p in range(len(moved))], 1).numpy(),
    )  # fmt: skip
    counts = np.bincount(labels, minlength=settings.states)
    story = {
        "seed": seed, "simulate": configuration.section(settings), "resolution": resolution(settings),
        "parts": [{"part": p, "atoms": int((part == p).sum()), "moves": bool(moved[p])} for p in range(len(moved))],
        "states": [
            {"state": k, "particles": int(counts[k]), "angle": None if states.angle[k].isnan() else float(states.angle[k]),
             "absent_groups": torch.nonzero(states.absent[k])[:, 0].tolist()}
            for k in range(settings.states)
        ],
    }  # fmt: skip
    (folder / "states.json").write_text(json.dumps(story, indent=1) + "\n")
