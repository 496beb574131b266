"""Stage 2, the part-aware mixture: anchors move rigidly, Gaussians flex and switch on and off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cryospire.config import Config, section
from cryospire.conventions import InputError
from cryospire.io import stores
from cryospire.log import say
from cryospire.stages import discover
from cryospire.training import checkpoint
from cryospire.training.data import Particles
from cryospire.training.distributed import seed_everything, team
from cryospire.training.latents import POSE_SD
from cryospire.training.loop import fit, start_threads
from cryospire.training.model import Mixture, load
from cryospire.training.still import held_part

WARM_STEPS, WARM_LR = 2000, 5e-3  # of fitting anchors to the motion of parts, without images
WARM_SAMPLE = 512  # Gaussians whose occupancy is fitted in a step: all of a part are alike
PRESENT = 0.95  # occupancy of what is there
WORSE = 0.1  # of what stage 1 has gained after its first epoch; less is overfitting, of which stage 1 does more
SMALLEST = 0.5  # pixels; scale of a Gaussian at the start
# One of so many takes density away from the start: a density of limited resolution is negative beside its peaks, and in training
# hardly a Gaussian changes its sign.
NEGATIVE = 5


def run(config: Config, *, particles: Path, discovery: Path, parts: Path, output: Path, half: int = 0, force: bool = False) -> None:
    """particles.zarr, discovery.zarr, parts.zarr -> model.zarr; ``half`` 1 or 2: of that half-set alone, as discovery.zarr is."""
    settings = config.train
    config = config.model_copy(update={"seed": config.seed + half})
    stores.check_replaceable(output, "model", config=section(settings), force=force)
    data = Particles(stores.open_store(particles, "particles"), half)
    found = stores.open_store(discovery, "discovery")
    division = stores.open_store(parts, "parts")
    stores.check_made_from(division, "discovery", discovery, "parts")
    rows = stores.join(data.id, stores.read(found, "id"), f"{discovery} against {particles}")
    if half and len(stores.read(found, "id")) != len(rows):
        raise InputError(f"{discovery}: holds other particles than those of half-set {half}; run discover --half {half}")
    z = torch.from_numpy(stores.read(found, "latents")[rows])
    start, pose_sd = begin(z, data, found, settings.refine_poses)
    start_threads(config.threads)
    checkpoints = output.parent / "checkpoints" / "train"
    with team() as ranks:
        seed_everything(config.seed, 4)
        coarse = load(discovery)
        say(f"train: {len(data):,} particles, box {data.box}, {settings.gaussians:,} Gaussians, head {settings.head}, {ranks.size} rank(s)")
        model, parent = inherit(config, coarse, division, data.box, data.pixel_size)
        metrics = output.parent / "logs" / "train.metrics.jsonl"
        inputs = {"particles": particles, "discovery": discovery, "parts": parts}
        part = torch.from_numpy(stores.read(division, "anchors/part")).long()[model.anchor]
        latents, history = fit(
            "train", model, start, data, settings, config.seed, ranks, checkpoints, metrics, inputs, force,
            prepare=lambda: warm_start(model, division, parent, z), pose_sd=pose_sd, part=part if settings.refine_poses else None,
        )  # fmt: skip
        if latents is not None:
            group = stores.create(
                output,
                "model",
                config=section(settings),
                seed=config.seed,
                inputs=inputs,
                pixel_size=data.pixel_size,
                box=data.box,
                force=force,
            )
            group.attrs["held_part"] = held_part(model, part) if model.held else None
            stores.put(group, "anchors/part", stores.read(division, "anchors/part"), ("anchor",), "part of the anchor")
            discover.write(group, model, latents, data, history)
            checkpoint.clear(checkpoints)
            first, before = stores.read(found, "history/loss")[[0, -1]].tolist()
            after = history["loss"][-1]
            alike = coarse.box == data.box and coarse.config.lambda_z == settings.lambda_z and len(stores.read(found, "id")) == len(rows)
            if alike and after > before + WORSE * (first - before):
                words = f"loss {after:.1f}, there {before:.1f}"
                say(f"train: WARNING: the images are explained worse than by stage 1 ({words}); try a lower train.lr")


def begin(z: Tensor, data: Particles, found: Any, refine: bool) -> tuple[Tensor, tuple[float, float]]:
    """Where stage 1 has come to: latents and, where poses are refined on, their corrections; and the corrections' prior.

    Where they are not, ``data`` gets the poses of stage 1.
    """
    given = data.rotation.clone(), data.shift.clone()
    change, learnt = data.take_poses(found)
    if not refine:
        return z, learnt
    data.rotation, data.shift = given
    return torch.cat([z, change], 1), learnt if learnt[0] else POSE_SD


def inherit(config: Config, coarse: Mixture, division: Any, box: int, pixel_size: float) -> tuple[Mixture, Tensor]:
    """The fine mixture, every part as it is at its reference shape, and the coarse parent (G,) of each of its Gaussians.

    A coarse Gaussian is replaced by children in proportion to its mass, spread so that their sum keeps its width and, on average, mass.
    """
    settings = config.train
    rng = np.random.default_rng((config.seed, 5))
    amplitude, scale = stores.read(division, "amplitude") / PRESENT, coarse.scale.numpy()
    mass = np.clip(amplitude, 0, None) * scale**3
    anchor_of = stores.read(division, "anchor")
    cumulated = np.cumsum(mass)
    drawn = np.searchsorted(cumulated, (np.arange(settings.gaussians) + rng.random()) / settings.gaussians * cumulated[-1])
    parent = drawn[np.argsort(anchor_of[drawn], kind="stable")]
    sizes = np.bincount(anchor_of[parent], minlength=int(anchor_of.max()) + 1)

    children = np.bincount(parent, minlength=len(mass))[parent]
    child_scale = np.maximum(np.where(children > 1, 0.7, 1.0) * scale[parent], SMALLEST * pixel_size)
    spread = np.sqrt(np.clip(scale[parent] ** 2 - child_scale**2, 0, None))
    centre = stores.read(division, "position")[parent] + spread[:, None] * rng.standard_normal((len(parent), 3))
    child_amplitude = amplitude[parent] * (scale[parent] / child_scale) ** 3 / children
    child_amplitude *= np.where(np.arange(len(parent)) % NEGATIVE == 0, -1, 1) / (1 - 2 / NEGATIVE)

    model = Mixture(settings, coarse.latent, coarse.feature.shape[1], settings.gaussians, box, pixel_size, sizes.tolist())
    model.place(torch.from_numpy(centre).float(), torch.from_numpy(child_scale).float(), torch.from_numpy(child_amplitude).float())
    model.anchor_centre.copy_(torch.from_numpy(stores.read(division, "anchors/position")).T / pixel_size)
    model.anchor_feature.copy_(torch.from_numpy(stores.read(division, "anchors/feature")))
    return model, torch.from_numpy(parent)


def warm_start(model: Mixture, division: Any, parent: Tensor, z: Tensor) -> None:
    """Fit anchors and occupancies to the motion of parts that part clustering has followed, at latents of the data; no image is read."""
    known = {k: torch.from_numpy(stores.read(division, f"motion/{k}")) for k in ("latent", "rotation", "translation", "present")}
    part = torch.from_numpy(stores.read(division, "part")).long()[parent]
    moving = "flex" if model.anchor_motion is None else "anchor_motion"
    heads = [p for name, p in model.named_parameters() if name.split(".")[0] in (moving, "occupancy")]
    adam = torch.optim.Adam(heads, lr=WARM_LR)
    generator = torch.Generator().manual_seed(6)
    home = model.centre.detach()
    for step in range(WARM_STEPS):
        zb = z[torch.randint(len(z), (32,), generator=generator)]
        at = torch.cdist(zb, known["latent"]).argmin(1)
        target = torch.empty(len(zb), *home.shape)
        for k in range(len(known["rotation"])):
            mine = part == k
            target[:, :, mine] = known["rotation"][k, at] @ home[:, mine] + known["translation"][k, at, :, None] / model.pixel_size
        present = known["present"][:, at].T[:, part].float() * (2 * PRESENT - 1) + (1 - PRESENT)
        centre = model.rigid(zb) if model.anchor_motion is not None else model.gaussians(zb)[0]
        error = ((centre - target).square().sum(1) * present).mean()
        few = torch.randint(len(part), (WARM_SAMPLE,), generator=generator)
        loss = error + 10 * (model.occupancies(zb, model.features[few]) - present[:, few]).square().mean()
        adam.param_groups[0]["lr"] = WARM_LR * (1 - step / WARM_STEPS)
        adam.zero_grad()
        loss.backward()
        adam.step()
    say(f"train: {moving} starts from part clustering, {float(error.detach()) ** 0.5:.2f} px from the motion of parts")
