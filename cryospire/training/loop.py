"""The training loop of both stages: from a mixture and latents to their maximum a posteriori estimate."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cryospire import kernels
from cryospire.config import Train, Training, section
from cryospire.conventions import InputError
from cryospire.io import stores
from cryospire.log import Progress, memory_gb, say
from cryospire.maths.poses import corrected
from cryospire.training import checkpoint
from cryospire.training.data import Batch, Particles, batches, lane_bounds, prefetch, send, steps_in_epoch
from cryospire.training.distributed import Team
from cryospire.training.latents import POSE_SD, Latents
from cryospire.training.model import Mixture
from cryospire.training.restarts import Drawings, nodes, restarted
from cryospire.training.still import hold_still, settle

RESTARTS = (1 / 3, 2 / 3)  # of the epochs, after which latents may begin anew
AGREE_EVERY, AGREE_SECONDS = 10, 5.0  # steps, and time, at most between the ranks' agreements on stopping and on a finite loss
FORMAT = 2  # of checkpoints
NOISE = 1  # stream of random numbers
PROBE_EVERY = 8  # steps between estimates of the latents' Fisher information
M_TRIM_THRESHOLD, M_MMAP_MAX, KEPT = -1, -4, 2**30  # malloc.h; bytes of freed memory that are kept
POSES = 1 << 16  # particles whose poses are corrected at once
RESUME = 75  # exit code of a run that saved itself and wants to be started again (EX_TEMPFAIL)


class Interrupted(SystemExit):
    """A signal (SIGTERM, SIGUSR1) asked for an end; the checkpoint is written, the same command goes on from it."""

    def __init__(self) -> None:
        super().__init__(RESUME)


def optimizer(model: Mixture, config: Training) -> torch.optim.Optimizer:
    """Adam: one learning rate for networks and features, one for the density."""
    density = [model.centre, model.log_scale, model.relative_amplitude]
    others = [p for p in model.parameters() if not any(p is d for d in density)]
    return torch.optim.Adam([{"params": others, "lr": config.lr}, {"params": density, "lr": config.lr_density}], fused=True)


def decay(progress: float) -> float:
    """Learning-rate factor at a fraction of the run: a short warm-up, then half a cosine down to a twentieth."""
    return min(1.0, progress / 0.02 + 0.05) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def fit(
    stage: str,
    model: Mixture,
    z: Tensor,
    data: Particles,
    config: Training,
    seed: int,
    team: Team,
    folder: Path,
    metrics: Path,
    inputs: Mapping[str, Path],
    force: bool = False,
    prepare: Callable[[], None] = lambda: None,
    pose_sd: tuple[float, float] = POSE_SD,
    part: Tensor | None = None,
) -> tuple[Tensor | None, dict[str, list[float]]]:
    """Train ``model`` in place.  ``z``: first latents (N, D) of all particles, or latents and corrections of their poses (N, D + 5), whose
    standard deviations ``pose_sd``, of turns and shifts in pixels, are the first of their prior, or known where poses stay.  ``part``
    (G,) of each Gaussian: the part that rests is held still once latents have begun anew.

    Returns the latents of all particles on rank 0 (None elsewhere) and the history of each epoch; ``data`` there has the refined poses
    then.  Resumes from the checkpoint in ``folder`` if one of this run, with the same ``inputs``, is there; else calls ``prepare`` first.
    """
    if config.deterministic and team.device.type == "cuda":
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # without it cuBLAS may sum in another order, and torch refuses it
        torch.use_deterministic_algorithms(True)
    identity = {"format": FORMAT, "stage": stage, "config": _identity(config), "seed": seed}
    identity |= {k: stores.fingerprint(path) for k, path in inputs.items()}
    if team.rank == 0 and force:
        checkpoint.clear(folder)
    saved = team.broadcast(checkpoint.load(folder, identity) if team.rank == 0 else None)
    wish = _signals()
    if saved is None:
        prepare()
    lanes = team.lanes(config.lanes, config.batch)
    bounds = lane_bounds(len(data), config.lanes)
    start, stop = int(bounds[lanes.start]), int(bounds[lanes.stop])
    latent = model.latent
    latents = Latents.of(config, latent, z[start:stop].to(team.device), start, pose_sd)
    model.to(team.device)
    data.to(team.device)
    # Stage 1's latents are kept moving: from settled ones, nearer to the truth, stage 2 ended farther from it (mixed 0.491, not 0.492).
    settling = isinstance(config, Train)
    likelihood = team.wrap(model)
    adam = optimizer(model, config)
    base_rates = [g["lr"] for g in adam.param_groups]
    per_epoch = steps_in_epoch(len(data), config.lanes, config.batch)
    history: dict[str, list[float]] = {}
    first_epoch = first_step = 0
    running = torch.zeros((), dtype=torch.float64, device=team.device)  # there, lest every step waits for its loss
    if saved is not None:
        model.load_state_dict(saved["model"])
        adam.load_state_dict(saved["adam"])
        latents.z, mean = (saved[k][start:stop].clone().to(team.device) for k in ("latents", "mean"))
        latents.mean[:, latent:] = mean
        latents.fisher, latents.precision = (saved[k].clone().to(team.device) for k in ("fisher", "precision"))
        first_epoch, first_step, history = saved["epoch"], saved["step"], saved["history"]
        running += saved["running"] if team.rank == 0 else 0.0  # of all ranks
        say(f"{stage}: resumed at epoch {first_epoch + 1}, step {first_step} of {per_epoch}")

    def keep(epoch: int, step: int) -> None:
        columns, means = team.gather(latents.z), team.gather(latents.mean[:, latent:])
        total = team.sum(float(running))[0] if step else 0.0
        if columns is not None:
            state = {
                "model": model.state_dict(),
                "adam": adam.state_dict(),
                "latents": columns,
                "mean": means,
                "fisher": latents.fisher,
                "precision": latents.precision,
                "epoch": epoch,
                "step": step,
                "history": history,
            }
            checkpoint.save(folder, state | {"identity": identity, "running": total})

    def restart(epoch: int) -> None:
        """One pass over the images before an epoch; latents change when all have been compared: a resumed run repeats it whole."""
        if not math.isfinite(team.sum(float(latents.z.sum()))[0]):
            raise InputError(f"{stage}: latents are not finite after epoch {epoch}; lower lr or look for damaged images")
        columns = team.gather(latents.z)
        chosen = team.broadcast(nodes(columns[:, :latent], (seed, epoch)) if columns is not None else None)
        drawings = Drawings.of(model, chosen, team.device)
        new = latents.z.clone()
        source = batches(data, lanes, config.lanes, config.batch, config.memory_mib, seed, epoch)
        for step, batch in enumerate(prefetch(source, team.device)):
            if len(batch.rows):
                at = batch.rows - start
                zb, rotation, shift, *_ = seen(model, latents.z[at], batch)
                new[at, :latent] = restarted(model, drawings, zb, replace(batch, rotation=rotation, shift=shift), config.lambda_z)
            progress.advance(0, "latents compared with others")
            if (step + 1) % AGREE_EVERY == 0 and team.sum(wish())[0]:
                keep(epoch, 0)
                say(f"{stage}: stopped by a signal; saved before epoch {epoch + 1}: run the same command to go on")
                raise Interrupted
        moved = team.sum(float((new != latents.z).any(1).sum()))[0]
        latents.z.copy_(new)
        say(f"{stage}: {moved / len(data):.1%} of the latents begin anew at another shape, which explains their images better")

    kept = agreed = time.monotonic()
    pace, together = AGREE_EVERY, 0  # steps to the next agreement, and since the last
    with Progress(stage, config.epochs * len(data), metrics=metrics) as progress:
        progress.skip(first_epoch * len(data) + min(first_step * config.batch, len(data)))
        for epoch in range(first_epoch, config.epochs):
            if settling and not first_step and epoch in [round(share * config.epochs) for share in RESTARTS]:
                restart(epoch)
                if part is not None and not model.held:
                    hold_still(model, part, latents, data, team)
                    for parameter in model.sway.parameters():  # of which Adam has counted steps without a gradient
                        adam.state.pop(parameter, None)
            if settling:  # noise of all particles, on every rank: one has the same whatever the number of ranks
                noise = np.random.default_rng((seed, epoch, 0, NOISE)).standard_normal((len(data), latents.z.shape[1]), np.float32)
                white = torch.from_numpy(noise[start:stop]).to(team.device)
            began = time.monotonic()
            factor = decay((epoch * per_epoch + first_step) / (config.epochs * per_epoch))
            source = batches(data, lanes, config.lanes, config.batch, config.memory_mib, seed, epoch, first_step)
            for step, batch in enumerate(prefetch(source, team.device), first_step):
                factor = decay((epoch * per_epoch + step) / (config.epochs * per_epoch))
                for group, rate in zip(adam.param_groups, base_rates, strict=True):
                    group["lr"] = rate * factor
                zb = latents.take(batch.rows)
                if step % PROBE_EVERY == 0:
                    latents.learn(probe(model, zb, batch, config, lanes, (seed, epoch, step)), team)
                if settling:
                    zb = latents.draw(batch.rows, factor * white[batch.rows - start])
                rate = config.lr_z * (factor if settling else 1)
                running += descend(model, likelihood, latents, adam, batch, zb, config, team.size, rate)
                progress.advance(batch.total, f"epoch {epoch + 1}/{config.epochs}")
                together += 1
                if together >= pace:
                    now = time.monotonic()
                    late = now - kept > 60 * config.checkpoint_minutes
                    total, stops, overdue, took = team.sum(float(running), wish(), late, now - agreed)
                    pace = max(1, min(AGREE_EVERY, int(together * AGREE_SECONDS * team.size / took)))
                    agreed, together = now, 0
                    if not math.isfinite(total):
                        raise InputError(
                            f"{stage}: the loss is not finite in epoch {epoch + 1}, step {step + 1}; lower lr or look for damaged images"
                        )
                    if stops or overdue:
                        keep(epoch, step + 1)
                        kept = time.monotonic()
                    if stops:
                        say(f"{stage}: stopped by a signal; saved at epoch {epoch + 1}, step {step + 1}: run the same command to go on")
                        raise Interrupted
            spread = team.sum(float(latents.z[:, :latent].square().sum()))[0]
            total = team.sum(float(running))[0]
            if not math.isfinite(total):
                raise InputError(f"{stage}: the loss is not finite in epoch {epoch + 1}; lower lr or look for damaged images")
            turn_sd, shift_sd = latents.learn_poses(latent, team) if config.refine_poses else pose_sd
            numbers = {
                "epoch": epoch + 1,
                "loss": total / len(data),
                "latent_sd": math.sqrt(spread / len(data) / latent),
                "turn_sd": math.degrees(turn_sd * 4 / model.box),
                "shift_sd": shift_sd * model.pixel_size,
                "learning_rate": config.lr * factor,
                "images_per_second": len(data) * (1 - first_step / per_epoch) / (time.monotonic() - began),
                "memory_gb": memory_gb(),
            }
            for name, value in numbers.items():
                history.setdefault(name, []).append(value)
            progress.record(**numbers)
            told = f"{stage}: epoch {epoch + 1}/{config.epochs}  loss {numbers['loss']:.3f}  latent sd {numbers['latent_sd']:.3f}"
            say(told + (f"  pose sd {numbers['turn_sd']:.1f}°, {numbers['shift_sd']:.1f} Å" if config.refine_poses else ""))
            first_step = 0
            running.zero_()
            keep(epoch + 1, 0)
            kept = time.monotonic()
            if epoch + 1 < config.epochs and team.sum(wish())[0]:
                say(f"{stage}: stopped by a signal; saved after epoch {epoch + 1}: run the same command to go on")
                raise Interrupted
    if model.held:
        settle(model, latents, data, team)
    columns = team.gather(latents.z)
    model.to("cpu")
    data.to(torch.device("cpu"))
    if columns is None:
        return None, history
    if config.refine_poses:
        for few in torch.arange(len(data)).split(POSES):
            change = columns[few, latent:]
            data.rotation[few], data.shift[few] = corrected(data.rotation[few], data.shift[few], change, model.box, model.pixel_size)
    return columns[:, :latent], history


def descend(
    model: Mixture,
    likelihood: nn.Module,
    latents: Latents,
    adam: torch.optim.Optimizer,
    batch: Batch,
    z: Tensor,
    config: Training,
    ranks: int,
    rate: float,
) -> Tensor:
    """One step of the model and of the latents ``z`` of this rank's images, by ``rate``; ``likelihood`` is the model as ranks share it.

    Returns the negative log posterior of the images before the step, summed.
    """
    energy = likelihood(*seen(model, z, batch))
    weight = ranks / batch.total  # DDP averages over ranks: this makes it the mean over the global batch
    loss = energy.sum() * weight + prior(model, config)
    adam.zero_grad(set_to_none=True)
    loss.backward()
    adam.step()
    away = (latents.precision * (z.detach() - latents.mean[batch.rows - latents.start]).square()).sum() / 2
    gradient = z.grad / weight if z.grad is not None else torch.zeros_like(z)
    latents.step(batch.rows, z.detach(), gradient, rate)
    return energy.detach().sum() + away


def seen(model: Mixture, z: Tensor, batch: Batch) -> list[Tensor]:
    """What the likelihood of images asks for: latents, poses, CTFs and images; ``z`` (B, D) or, with corrections of poses, (B, D + 5)."""
    pose = batch.rotation, batch.shift
    if z.shape[1] > model.latent:
        pose = corrected(*pose, z[:, model.latent :], model.box, model.pixel_size)
    return [z[:, : model.latent], *pose, batch.transfer, batch.images]


def probe(model: Mixture, z: Tensor, batch: Batch, config: Training, lanes: range, seed: tuple[int, ...]) -> Tensor:
    """``J^T e`` of the shape of ``z`` for white noise e in the images, J the derivative of the whitened model image by it.

    The noise, +1 or -1 in every pixel (of all white noise it makes Hutchinson's estimate vary least), is drawn for the whole
    global batch, of which a rank takes its lanes: the same whatever the number of ranks.
    """
    if not len(z):  # a rank may have none in the last step of an epoch, and FFTs of nothing fail
        return torch.zeros_like(z)
    zs = z.detach().requires_grad_()
    latent, rotation, shift, transfer, images = seen(model, zs, batch)
    shape, first = (config.batch, *images.shape[1:]), lanes.start * (config.batch // config.lanes)
    drawn = np.frombuffer(np.random.default_rng(seed).bytes(math.prod(shape) // 8 + 1), np.uint8)
    bits = np.unpackbits(drawn, count=math.prod(shape)).reshape(shape)[first : first + len(z)]
    mine = 2.0 * send(torch.from_numpy(bits), images.device) - 1
    back = torch.fft.irfft2(torch.fft.rfft2(mine) * transfer, s=mine.shape[1:])
    return torch.autograd.grad((model.project(latent, rotation, shift) * back).sum(), zs)[0]


def prior(model: Mixture, config: Training) -> Tensor:
    """``lambda_f sum |df|^2`` of stage 2 (method, loss); zero in stage 1."""
    if isinstance(config, Train):
        return config.lambda_f * model.feature.square().sum()
    return model.feature.new_zeros(())


def _identity(config: Training) -> dict[str, Any]:
    """What of the config a checkpoint must share: all but how often it is written."""
    return {k: v for k, v in section(config).items() if k != "checkpoint_minutes"}


def _signals() -> Callable[[], bool]:
    """Catch SIGTERM and SIGUSR1; the returned function tells whether one has come."""
    came: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda n, frame: came.append(n))
    return lambda: bool(came)


def start_threads(threads: int) -> None:
    """CPU threads of this rank: as configured, or as the launcher says (OMP_NUM_THREADS), or every CPU this process may run on."""
    keep_memory()
    kernels.set_threads(threads or int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))


def keep_memory() -> None:
    """Let malloc keep what is freed for the next step (glibc; elsewhere nothing happens).

    By default arrays above 32 MiB, as those of a step are at box 256, go back to the system and come again page by page, all zeros.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, KEPT)
