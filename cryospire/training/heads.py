"""Heads: what a latent does to a Gaussian with a given feature.  ``head(z (B, D), f (G, E)) -> (B, out, G)``."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from cryospire import kernels


def mlp(inputs: int, hidden: int, layers: int, outputs: int) -> nn.Sequential:
    """Hidden layers with ReLU, then a linear output whose weights start near zero and whose bias is zero."""
    blocks: list[nn.Module] = []
    for i in range(layers):
        blocks += [nn.Linear(inputs if i == 0 else hidden, hidden), nn.ReLU()]
    last = nn.Linear(hidden, outputs)
    nn.init.normal_(last.weight, std=1e-2 / hidden**0.5)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*blocks, last)


class PairHead(nn.Module):
    """The paper's head: one network evaluation for every pair of a latent and a feature.

    The first layer is linear in ``[z, f]``, so its two halves are computed once for each latent and each feature and added.
    """

    def __init__(self, latent: int, features: int, hidden: int, layers: int, outputs: int) -> None:
        super().__init__()
        net = list(mlp(latent + features, hidden, layers, outputs))
        self.first, self.rest, self.latent = nn.Linear(latent + features, hidden), nn.Sequential(*net[1:]), latent

    def forward(self, z: Tensor, f: Tensor) -> Tensor:
        weight = self.first.weight
        from_z = functional.linear(z, weight[:, : self.latent], self.first.bias)
        from_f = functional.linear(f, weight[:, self.latent :])
        last = self.rest[-1]
        if len(self.rest) == 2 and isinstance(last, nn.Linear):
            return kernels.pair_head(from_z, from_f, last.weight, last.bias)
        out: Tensor = self.rest(from_z[:, None] + from_f[None])
        return out.transpose(1, 2)


class FactorizedHead(nn.Module):
    """``trunk(z)`` in R^rank times ``branch(f)`` in R^(rank x out): one small product for every pair."""

    def __init__(self, latent: int, features: int, hidden: int, layers: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.trunk = mlp(latent, hidden, layers, rank)
        last = self.trunk[-1]
        assert isinstance(last, nn.Linear)
        last.reset_parameters()  # a product of two small factors would never start
        self.branch = mlp(features, hidden, layers, rank * outputs)
        self.rank, self.outputs = rank, outputs

    def forward(self, z: Tensor, f: Tensor) -> Tensor:
        branch = self.branch(f).view(len(f), self.rank, self.outputs).permute(1, 2, 0).reshape(self.rank, -1)
        return (self.trunk(z) @ branch).view(len(z), self.outputs, len(f))


def head(kind: str, latent: int, features: int, hidden: int, layers: int, outputs: int, rank: int) -> nn.Module:
    if kind == "mlp":
        return PairHead(latent, features, hidden, layers, outputs)
    return FactorizedHead(latent, features, hidden, layers, outputs, rank)
