"""The part that rests is held still, and all is told in its frame.

Images tell how parts move against each other, but not how the whole does, which is taken for poses; and poses of a consensus follow what
moves a little.  So that part which moves least gives the frame once networks have found their way: what they have moved it by goes into the
poses, and from then on they cannot.  A latent could tell of its image's pose otherwise.  What poses of images at like latents have wrong in
common is learnt beside them, by a small network of the whole's motion, which goes into the poses in the end.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cryospire.log import say
from cryospire.maths.poses import angle_between, carried, corrected, correction
from cryospire.maths.rigid import motion
from cryospire.training.data import Particles
from cryospire.training.distributed import Team
from cryospire.training.latents import Latents
from cryospire.training.model import CHUNK, Mixture, sample

LIGHT = 0.1  # of the mass; lighter parts tell no frame
RARE = 0.02  # of the particles, which may lack the part that is held still
RESTS = 0.2  # of the radius of gyration: how far (rms) the whole may move with a part that rests; by a turn of 11 degrees


@torch.no_grad()
def hold_still(model: Mixture, part: Tensor, latents: Latents, data: Particles, team: Team) -> None:
    """Tell all in the frame of the part (G,) that rests, if one does; corrections of poses become those that go with it."""
    part, some = part.to(latents.z.device), shared_sample(model, latents, team)
    if team.rank == 0:
        body = resting(model, part, some)
        if body is not None:
            model.hold(part == body, some)
    model.pin(*team.broadcast((model.body.cpu(), model.home.cpu())))
    if not model.held:
        say("train: no part is always there and rests: volumes are in the frame of the poses")
        return
    turned, moved = to_poses(model, model.turned, latents, data, team)
    told = f"its turns of {turned:.1f}° and its ways of {moved:.1f} Å (rms)"
    say(f"train: part {held_part(model, part) + 1} is held still from now on; poses take up {told}")


@torch.no_grad()
def settle(model: Mixture, latents: Latents, data: Particles, team: Team) -> None:
    """Poses take up, too, how the whole has moved since a part is held still; but for its mean, which is another frame of them all."""
    home, (turn, way) = model.home[:, model.pins], model.swayed(shared_sample(model, latents, team))
    frame, place = motion(home.T, (turn @ home + way[:, :, None]).mean(0).T, model.body[model.pins])
    model.pin(model.body, frame @ model.home + place[:, None])

    def about_mean(z: Tensor) -> tuple[Tensor, Tensor]:
        turn, way = model.swayed(z)
        return turn @ frame.T, way - turn @ frame.T @ place

    turned, moved = to_poses(model, about_mean, latents, data, team)
    say(f"train: poses take up turns of {turned:.1f}° and ways of {moved:.1f} Å (rms) that images of a shape have in common")
    model.settle()


def shared_sample(model: Mixture, latents: Latents, team: Team) -> Tensor:
    """Some of all ranks' latents (n, D), the same on every rank."""
    columns = team.gather(latents.z)
    some: Tensor = team.broadcast(torch.cat(sample(columns[:, : model.latent])) if columns is not None else None)
    return some.to(latents.z.device)


def to_poses(
    model: Mixture, motion: Callable[[Tensor], tuple[Tensor, Tensor]], latents: Latents, data: Particles, team: Team
) -> tuple[float, float]:
    """Corrections of poses take up the whole's ``motion`` with the latents: nothing is drawn elsewhere.

    As all images have a say in it, the prior of a particle's own correction does not draw it back.  Returns degrees and Å (rms).
    """
    device, latent = latents.z.device, model.latent
    own = slice(latents.start, latents.start + len(latents.z))
    turned = moved = 0.0
    for z, mean, *poses in zip(*(x.split(CHUNK) for x in (latents.z, latents.mean, data.rotation[own], data.shift[own])), strict=True):
        given = poses[0].to(device), poses[1].to(device)
        rotation, shift = corrected(*given, z[:, latent:], model.box, model.pixel_size)
        turn, way = motion(z[:, :latent])
        after = carried(rotation, shift, turn, way * model.pixel_size)
        change = correction(*given, *after, model.box, model.pixel_size) - z[:, latent:]
        z[:, latent:] += change
        mean[:, latent:] += change
        turned += float(angle_between(rotation.double(), after[0].double()).square().sum())
        moved += float((after[1] - shift).square().sum() / 2)
    turned, moved, count = team.sum(turned, moved, len(latents.z))
    return (turned / count) ** 0.5, (moved / count) ** 0.5


def held_part(model: Mixture, part: Tensor) -> int:
    """Which part (G,) is held."""
    return int(part.cpu()[model.pins[0].cpu()])


def resting(model: Mixture, part: Tensor, z: Tensor) -> int | None:
    """That part (G,) which is always there and, were the whole to move with it, would move it least over latents z (N, D); None where
    that is too far."""
    centre, amplitude = (torch.cat(values) for values in zip(*map(model.gaussians, z.split(CHUNK)), strict=True))
    mass = amplitude.abs() * model.scale**3
    total = mass.sum(1)
    shows = total > total.mean() / 2  # images of nothing make all faint
    home, weight = centre.mean(0), mass.mean(0)
    moves: dict[int, float] = {}
    for k in range(int(part.max()) + 1):
        mine = part == k
        share = (mass[:, mine].sum(1) / total)[shows]
        if weight[mine].sum() > LIGHT * weight.sum() and share.quantile(RARE) > share.mean() / 2:
            moves[k] = moved_with(mine, centre, mass)
    size = float(((home - (home * weight).sum(1, keepdim=True) / weight.sum()).square().sum(0) * weight).sum())
    best = min(moves, key=lambda k: moves[k], default=None)
    return best if best is not None and moves[best] < RESTS**2 * size else None


def moved_with(mine: Tensor, centre: Tensor, mass: Tensor) -> float:
    """How far the whole, centres (N, 3, G) and mass (N, G), would move with some Gaussians ``mine`` (G,): mass times square of the way."""
    home, weight = centre.mean(0), mass.mean(0)
    turn, way = motion(home.T[mine].expand(len(centre), -1, -1), centre[:, :, mine].mT, mass[:, mine])
    return float(((turn @ home + way[:, :, None] - home).square().sum(1).mean(0) * weight).sum())
