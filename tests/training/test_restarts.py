"""Latents that are stuck at a shape which their images do not show: found by drawings, and moved."""

import pytest
import torch
from torch import Tensor

from cryospire.config import Discover
from cryospire.maths.ctf import ctf
from cryospire.maths.poses import random_rotations
from cryospire.training.data import Batch
from cryospire.training.model import Mixture
from cryospire.training.restarts import Drawings, nodes, restarted

BOX, PIXEL, GAUSSIANS, COUNT = 32, 6.0, 40, 240
SHAPES = 1.5 * torch.tensor([[1.0, 0], [-0.5, 0.8], [-0.5, -0.8]])


def mixture() -> Mixture:
    """Blobs that latents push about by tens of Å."""
    torch.manual_seed(0)
    model = Mixture(Discover(gaussians=GAUSSIANS, features=4, latent=2), 2, 4, GAUSSIANS, BOX, PIXEL)
    model.place(20 * torch.randn(GAUSSIANS, 3), torch.full((GAUSSIANS,), 1.5 * PIXEL), torch.full((GAUSSIANS,), 0.06))
    torch.nn.init.normal_(model.feature)
    for name, weights in model.named_parameters():
        if name.startswith("flex.rest"):
            torch.nn.init.normal_(weights, std=0.4)
    return model.requires_grad_(False)


def seen(model: Mixture, z: Tensor) -> Batch:
    """Images of shapes ``z`` (n, 2), with shifts, CTFs and unit noise."""
    g = torch.Generator().manual_seed(1)
    n = len(z)
    rotation, shift = random_rotations(n, g).float(), 8 * torch.randn(n, 2, generator=g)
    defocus = 15_000 + 10_000 * torch.rand(n, generator=g)
    transfer = ctf(BOX, PIXEL, defocus, defocus, torch.zeros(n), *(torch.full((n,), v) for v in (300.0, 2.7, 0.1)))
    clean = torch.fft.irfft2(torch.fft.rfft2(model.project(z, rotation, shift)) * transfer, s=(BOX, BOX))
    return Batch(torch.arange(n), clean + torch.randn(n, BOX, BOX, generator=g), rotation, shift, transfer, n)


@pytest.mark.parametrize("sd", [0.0, 0.2])
def test_drawings_are_as_likely_as_the_mixture(sd: float) -> None:
    """Of one image, up to a constant: what the lattice loses is small beside what tells shapes from each other."""
    model = mixture()
    model.strength_sd = sd
    batch = seen(model, SHAPES.repeat(8, 1))
    drawn = Drawings.of(model, SHAPES, torch.device("cpu")).likelihood(batch, PIXEL, sd)
    on = batch.rotation, batch.shift, batch.transfer, batch.images
    exact = -torch.stack([model(z.expand(24, -1), *on) for z in SHAPES], 1)
    drawn, exact = drawn - drawn.mean(1, keepdim=True), exact - exact.mean(1, keepdim=True)
    assert float(exact.std()) > 10
    assert float((drawn - exact).std()) < 0.05 * float(exact.std())


def test_stuck_latents_are_moved_and_no_others() -> None:
    model = mixture()
    state = torch.arange(COUNT) % 3
    stuck = torch.arange(COUNT) < COUNT // 4
    g = torch.Generator().manual_seed(2)
    z = SHAPES[torch.where(stuck, (state + 1) % 3, state)] + 0.05 * torch.randn(COUNT, 2, generator=g)
    batch = seen(model, SHAPES[state])
    drawings = Drawings.of(model, nodes(z, (0, 1)), torch.device("cpu"))
    new = restarted(model, drawings, z, batch, precision=1.0)
    found = torch.cdist(new, SHAPES).argmin(1)
    assert torch.equal(found, state)
    assert float((new != z).any(1)[~stuck].float().mean()) < 0.5, "a latent that is right may only change for one beside it"
    on = batch.rotation, batch.shift, batch.transfer, batch.images
    worth = [-model(latent, *on) - latent.square().sum(1) / 2 for latent in (z, new)]
    assert bool((worth[1] >= worth[0]).all()), "no image is explained worse than before"


def test_nodes_lie_among_latents() -> None:
    z = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0))
    found = nodes(z, (1, 2))
    assert found.shape == (64, 3) and torch.equal(found, nodes(z, (1, 2)))
    assert float(torch.cdist(found, z).min(1).values.max()) < 1
    assert len(nodes(z[:5], (0, 0))) == 5
