"""Do two distances between the same points agree on who is near to whom?

Neighbourhood similarity (CryoBench: Jeon et al., NeurIPS 2024, arXiv 2408.05526, after Boggust et al. 2022) and information
imbalance (Glielmo et al., PNAS Nexus 1, pgac039, 2022).  Both need no common scale, dimension or orientation of the two spaces.

Here one distance is between latents and the other between true states, where all particles of a state are at distance 0 from each
other.  Such ties count whole in the first measure and with their mean rank in the second.
"""

from __future__ import annotations

import torch
from torch import Tensor


def others(distance: Tensor) -> Tensor:
    """Distances (N, N - 1) of every point to the other ones, from all of them (N, N)."""
    n = len(distance)
    return distance.flatten()[1:].view(n - 1, n + 1)[:, :-1].reshape(n, n - 1)


def similarity(a: Tensor, b: Tensor, k: int) -> tuple[float, float]:
    """Share of a point's ``k`` nearest by ``a`` that are among its ``k`` nearest by ``b``, and the same for neighbours taken at random.

    Distances (N, N - 1) from ``others``.  Whoever is as near by ``b`` as the k-th is among the nearest too: without ties this is the
    overlap of two sets of ``k``, with them the share of neighbours of the right states, 1 where the order of ``a`` follows that of ``b``.
    """
    near = torch.topk(a, k, 1, largest=False).indices
    right = b <= torch.kthvalue(b, k, 1, keepdim=True).values
    return float(right.gather(1, near).double().mean()), float(right.double().mean())


def information_imbalance(a: Tensor, b: Tensor, seed: int = 0) -> float:
    """``Delta(a -> b)``: 2 / N times the mean rank by ``b`` of each point's nearest by ``a``; 0 if ``a`` tells all of ``b``, 1 if nothing.

    Distances (N, N - 1) from ``others``.  Of several nearest by ``a`` one is drawn; points equally far by ``b`` share their mean rank,
    so that chance still gives 1.  What a perfect answer gives is then ``information_imbalance(b, b)``: 1 / S for S equal states.
    """
    draw = torch.rand(a.shape, generator=torch.Generator().manual_seed(seed))
    nearest = torch.where(a == a.min(1, keepdim=True).values, draw, -1.0).argmax(1)
    far = b.gather(1, nearest[:, None])
    rank = (b < far).sum(1) + ((b == far).sum(1) + 1) / 2
    return float(2 / len(a) * rank.double().mean())
