"""Parts as rigid bodies: a set of Gaussians is a part when, at every shape of the molecule, it is there as one body or is not there.

Densities are sums of blobs of one width at the centres of Gaussians, in pixels, weighted by mass; their inner product is
``<a, b> = sum_ij w_i v_j exp(-|x_i - y_j|^2 / 4 sigma^2)`` up to a constant (kernel correlation, Tsin & Kanade 2004).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from cryospire.maths.poses import axial, nearest_rotation

WIDTHS = (4.0, 2.0)  # pixels; sigma of the blobs, from the search to the answer
FINE = (4.0, 2.0, 1.0)  # and where a turn must be told from its mirror image
STEPS = 6  # of the search at each width
SWEEPS = 4  # over which a shape learns from its neighbours' motion
HEAVIEST = 64  # Gaussians of a set whose motion is searched
STILL = 0.03  # misfit, of the set's own energy, below which no motion is searched
RESTS = 0.002  # misfit, of all there is to explain, below which a set rests
WORTH = 0.02  # and by which a motion must lower it
FEW = 0.02  # of the particles, whose motion is not told
EVEN, FAINT = 1e-6, 1e-20  # keep what has no extent about an axis, or none at all, from a division by zero


@dataclass(frozen=True)
class Shapes:
    """K shapes of a molecule of G Gaussians: ``centre`` (K, G, 3) pixels, ``mass`` (K, G), ``share`` (K,) of the particles, ``latent``
    (K, D), and ``near`` (K, K): the shapes in the order of their distance from each."""

    centre: Tensor
    mass: Tensor
    share: Tensor
    latent: Tensor
    near: Tensor

    @staticmethod
    def of(centre: Tensor, mass: Tensor, share: Tensor, latent: Tensor) -> Shapes:
        return Shapes(centre, mass, share / share.sum(), latent, torch.cdist(latent, latent).argsort(1))


@dataclass(frozen=True)
class Body:
    """A set's motion from its ``reference`` shape: ``rotation`` (K, 3, 3), ``translation`` (K, 3) pixels, ``present`` (K,), and
    ``misfit`` (K,): energy of what the moved reference does not explain."""

    reference: int
    rotation: Tensor
    translation: Tensor
    present: Tensor
    misfit: Tensor

    @property
    def rests(self) -> bool:
        """Always there, and never found to move."""
        return bool(self.present.all()) and not bool(self.translation.any())


def kernel(x: Tensor, y: Tensor, sigma: float) -> Tensor:
    """``exp(-|x - y|^2 / 4 sigma^2)`` (..., n, m) between points (..., n, 3) and (..., m, 3)."""
    return torch.exp(torch.cdist(x, y).square() / (-4 * sigma**2))


def overlap(x: Tensor, w: Tensor, y: Tensor, v: Tensor, sigma: float = WIDTHS[-1]) -> Tensor:
    """Inner products (B,) of densities of blobs at x (B, n, 3), mass w (B, n), and at y (B, m, 3), mass v (B, m); B may be left out."""
    if x.dim() == 2:
        return w @ kernel(x, y, sigma) @ v
    y, v = y.expand(len(x), *y.shape[-2:]), v.expand(len(x), v.shape[-1])
    return torch.stack([overlap(*one, sigma) for one in zip(x, w, y, v, strict=True)])  # one at a time: all would be gigabytes


def motion(source: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rotations (..., 3, 3) and translations (..., 3) that take ``source`` (..., n, 3) to ``target`` with least squares weighted by
    ``weight`` (..., n) (Kabsch 1976); their gradient is exact, also of bodies with equal axes."""
    w = (weight / weight.sum(-1, keepdim=True))[..., None]
    a, b = (w * source).sum(-2), (w * target).sum(-2)
    moment = (target - b[..., None, :]).mT @ (w * (source - a[..., None, :]))
    rotation = nearest_rotation(moment.detach())
    # At the optimum ``moment R^T`` is symmetric; Newton's step to there has the gradient of R, and here no value.
    seen = moment @ rotation.mT
    trace = seen.detach().diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    metric = (trace * (1 + EVEN) + FAINT) * torch.eye(3, dtype=seen.dtype, device=seen.device) - seen.detach()
    turn = torch.linalg.solve_ex(metric, axial(seen - seen.detach())[..., None]).result
    rotation = rotation + torch.linalg.cross(turn.expand_as(rotation), rotation, dim=-2)
    return rotation, b - (rotation @ a[..., None])[..., 0]


def register(
    x: Tensor, w: Tensor, y: Tensor, v: Tensor, rotation: Tensor, translation: Tensor, widths: tuple[float, ...] = WIDTHS
) -> tuple[Tensor, Tensor]:
    """Motions (B, 3, 3), (B, 3) of density y (B, m, 3), v (B, m) that raise its overlap with x (B, n, 3), w (B, n).

    Each step is the weighted least-squares motion (Kabsch) between all pairs of blobs, weighted by their overlap: the overlap
    never falls, because ``exp(-d)`` lies above its tangent.
    """
    for sigma in widths:
        for _ in range(STEPS):
            moved = y @ rotation.transpose(1, 2) + translation[:, None]
            pair = w[:, :, None] * kernel(x, moved, sigma) * v[:, None]
            total = pair.sum((1, 2)).clamp(min=1e-20)[:, None]
            a, b = (pair.sum(2)[:, None] @ x)[:, 0] / total, (pair.sum(1)[:, None] @ y)[:, 0] / total
            rotation = nearest_rotation((x - a[:, None]).transpose(1, 2) @ pair @ (y - b[:, None]))
            translation = a - (rotation @ b[:, :, None])[:, :, 0]
    return rotation, translation


def fit(shapes: Shapes, members: Tensor, thorough: bool = False) -> Body:
    """How the set ``members`` (G,; boolean) moves, as one body that may be absent, from the shape where it is most.

    ``thorough``: from every turn of a cube, down to blobs of a pixel: for turns too large to be found from rest.
    """
    widths, worth = (FINE, 0.0) if thorough else (WIDTHS, WORTH)
    x, w = shapes.centre[:, members], shapes.mass[:, members]
    energy = overlap(x, w, x, w, widths[-1])
    reference = int(energy.argmax())
    y, v = x[reference], w[reference]
    rotation, translation = torch.eye(3).repeat(len(x), 1, 1), torch.zeros(len(x), 3)
    misfit = energy + energy[reference] - 2 * overlap(x, w, y, v, widths[-1])
    k = torch.nonzero(torch.minimum(misfit, energy) > STILL * energy[reference])[:, 0]
    heavy, chosen = w.topk(min(HEAVIEST, w.shape[1]), 1)
    few = x.gather(1, chosen[:, :, None].expand(-1, -1, 3))
    middle = (w[:, :, None] * x).sum(1) / w.sum(1).clamp(min=1e-20)[:, None]
    turns = torch.from_numpy(Rotation.create_group("O").as_matrix()).float() if thorough else torch.eye(3)[None]
    starts = [(r.expand(len(x), 3, 3), middle - r @ middle[reference]) for r in turns]
    for _ in range(SWEEPS if len(k) else 0):
        for r, t in starts:
            r, t = register(
                few[k], heavy[k], few[reference].expand(len(k), -1, -1), heavy[reference].expand(len(k), -1), r[k], t[k], widths
            )
            moved = y @ r.transpose(1, 2) + t[:, None]
            new = energy[k] + energy[reference] - 2 * overlap(x[k], w[k], moved, v, widths[-1])
            better = new < misfit[k] - worth * energy[reference]
            at = k[better]
            rotation[at], translation[at], misfit[at] = r[better], t[better], new[better]
        starts = [(rotation[near], translation[near]) for near in shapes.near[:, 1:3].T]
    misfit = misfit.clamp(min=0)
    return Body(reference, rotation, translation, misfit < energy, torch.minimum(misfit, energy))


def reach(values: Tensor, share: Tensor) -> float:
    """What ``values`` (K,) come to in all but ``FEW`` of the particles whose ``share`` (K,) counts: a lone shape may be docked wrongly."""
    if not share.any():
        return 0.0
    order = values.argsort()
    counted = share[order].double().cumsum(0)
    return float(values[order][int((counted < (1 - FEW) * counted[-1]).sum())])


def cost(shapes: Shapes, body: Body) -> float:
    """Misfit of a body, averaged over particles."""
    return float((shapes.share * body.misfit).sum())


def variation(shapes: Shapes) -> float:
    """Energy of the density's deviation from its mean over particles: what there is to explain."""
    c, m = shapes.centre, shapes.mass
    gram = torch.zeros(len(c), len(c))
    for k in range(len(c)):
        gram[k, k:] = gram[k:, k] = overlap(c[k:], m[k:], c[k], m[k])
    return float((shapes.share * gram.diagonal()).sum() - shapes.share @ gram @ shapes.share)


def merge(shapes: Shapes, label: Tensor, joined: Callable[[], None] = lambda: None) -> tuple[dict[int, Tensor], dict[int, float]]:
    """Join sets of ``label`` (G,) until one is left, always the two that lose least; what rests is joined first.

    Returns the labels (G,) at every number of sets, and for each what one set fewer would lose, of all there is to explain.
    ``joined`` is called at every join, for progress.
    """
    whole = variation(shapes)
    sets = {k: label == name for k, name in enumerate(torch.unique(label))}
    bodies = {k: fit(shapes, m) for k, m in sets.items()}
    alone = {k: cost(shapes, body) for k, body in bodies.items()}
    resting = [k for k, body in bodies.items() if body.rests and alone[k] < RESTS * whole]
    joint: dict[tuple[int, int], float] = {}
    levels, losses = {len(sets): _labels(sets)}, {}
    while len(sets) > 1:
        # The order in which what rests is joined would be chance, and a fragment of mixed content could take a piece along.
        pairs = [(resting[0], resting[1])] if len(resting) > 1 else [(a, b) for a in sets for b in sets if a < b]
        for a, b in pairs:
            if (a, b) not in joint:
                joint[a, b] = cost(shapes, fit(shapes, sets[a] | sets[b]))
        loss, a, b = min((joint[a, b] - alone[a] - alone[b], a, b) for a, b in pairs)
        losses[len(sets)] = loss / whole if whole > 0 else 0.0
        new = max(sets) + 1
        sets[new], alone[new] = sets.pop(a) | sets.pop(b), joint[a, b]
        if len(resting) > 1:
            resting = [new, *resting[2:]]
        levels[len(sets)] = _labels(sets)
        joined()
    return levels, losses


def _labels(sets: dict[int, Tensor]) -> Tensor:
    return torch.stack(list(sets.values())).long().argmax(0)
