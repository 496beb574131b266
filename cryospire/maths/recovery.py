"""How much of a known truth was found: latents against labels, parts and motions against the true ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def group_means(values: Tensor, label: Tensor, groups: int) -> Tensor:
    """Means (groups, D) of the rows of values (N, D) that carry each label (N,); nan where there are none."""
    total = torch.zeros(groups, values.shape[1], dtype=values.dtype).index_add_(0, label, values)
    return total / torch.bincount(label, minlength=groups)[:, None]


def separation(latents: Tensor, label: Tensor, groups: int) -> Tensor:
    """Between over within variance (groups,): squared distance of a state's mean from the mean of states, over its own scatter's trace."""
    mean = group_means(latents, label, groups)
    within = group_means((latents - mean[label]).square().sum(1, keepdim=True), label, groups)[:, 0]
    return (mean - mean.nanmean(0)).square().sum(1) / within


DEEP = 0.6  # a valley less deep than this is chance


@dataclass(frozen=True)
class Lumps:
    """One state's latents along the line on which they are most divided: ``valley`` is the density between the two modes over that of
    the lower one (1: a single mode) and ``main`` the fraction of the state on the main mode's side (1: a single mode)."""

    valley: float
    main: float


def lumps(latents: Tensor, share: float = 0.05, iterations: int = 50) -> Lumps:
    """Do latents (N, D) form one lump?  They are looked at along their principal axes and the line between the means of 2-means.

    A second mode counts when at least ``share`` of the latents lie beyond the valley and the valley is below ``DEEP``.
    """
    if len(latents) < 20:
        return Lumps(1.0, 1.0)
    x = latents - latents.mean(0)
    axes = torch.linalg.svd(x, full_matrices=False)[2]
    side = x @ axes[0] > 0
    for _ in range(iterations):
        apart = x[side].mean(0) - x[~side].mean(0)
        new = (x - (x[side].mean(0) + x[~side].mean(0)) / 2) @ apart > 0
        if torch.equal(new, side) or new.all() or not new.any():
            break
        side = new
    found = [_lumps_along(x @ axis, share) for axis in (apart / apart.norm(), *axes[:4])]
    return min(found, key=lambda f: f.valley)


def _lumps_along(t: Tensor, share: float) -> Lumps:
    """Deepest valley of a kernel density estimate of ``t`` (N,); Silverman's width, kept narrow by the quartiles."""
    quartile = torch.quantile(t, torch.tensor([0.25, 0.75], dtype=t.dtype))
    spread = torch.minimum(t.std(), (quartile[1] - quartile[0]) / 1.34) if quartile[1] > quartile[0] else t.std()
    width = 0.9 * spread * len(t) ** -0.2
    grid = torch.linspace(float(t.min()), float(t.max()), 256, dtype=t.dtype)
    density = torch.exp(-(((grid[:, None] - t) / width) ** 2) / 2).sum(1)
    left, right = torch.cummax(density, 0).values, torch.cummax(density.flip(0), 0).values.flip(0)
    below = torch.searchsorted(t.sort().values, grid).to(t.dtype) / len(t)
    allowed = (below >= share) & (below <= 1 - share)
    ratio = torch.where(allowed, density / torch.minimum(left, right), torch.ones_like(density))
    at = int(ratio.argmin())
    if float(ratio[at]) > DEEP:
        return Lumps(float(ratio[at]), 1.0)
    return Lumps(float(ratio[at]), float(torch.maximum(below[at], 1 - below[at])))


def explained(latents: Tensor, label: Tensor, cause: Tensor) -> float:
    """Leakage: share of the within-state variance of latents (N, D) that a linear function of ``cause`` (N, K) explains.

    Adjusted R^2, at least 0; columns of ``cause`` may depend on each other.
    """
    groups = int(label.max()) + 1
    y = latents - group_means(latents, label, groups)[label]
    x = torch.cat([cause - cause.mean(0), torch.ones(len(cause), 1, dtype=cause.dtype)], 1)
    residual = y - x @ (torch.linalg.pinv(x) @ y)
    free = len(y) - int(torch.linalg.matrix_rank(x))
    return max(0.0, 1 - float(residual.square().sum() / max(free, 1)) / float(y.square().sum() / max(len(y) - 1, 1)))


def ranking_auc(score: Tensor, positive: Tensor) -> float:
    """Probability that a positive has the higher score (area under the ROC curve), ties counting half; scores and positive (N,)."""
    _, inverse, count = torch.unique(score, return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    ranks = (last - (count.double() - 1) / 2)[inverse]
    p, n = int(positive.sum()), int((~positive).sum())
    return float("nan") if not p or not n else float((ranks[positive].sum() - p * (p + 1) / 2) / (p * n))
