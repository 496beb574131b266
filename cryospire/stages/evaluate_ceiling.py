"""The ceiling of a mixture: Gaussians fitted to one noise-free volume itself, with no latent, no network and no image between them.

What is missing to a perfect FSC then is what so many isotropic Gaussians of such widths cannot express (and what the fit has not found).
A trained mixture has to share its scales and networks among all states, so it lies below.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cryospire.maths.fourier import half_plane_weight, shells
from cryospire.stages.discover import seed_density
from cryospire.training.model import OCCUPANCY_BIAS

REACH = 5  # voxels to each side of a Gaussian's own
SCALES = (0.35, REACH / 3)  # voxels: the mixture's lower bound, and what the reach holds
RATE = 0.05  # Adam, on centres in voxels, log scales and relative amplitudes


def fit(target: Tensor, mask: Tensor, gaussians: int, pixel_size: float, seed: int, steps: int = 200) -> Tensor:
    """The mixture's volume [z, y, x] nearest to ``target``, both multiplied by ``mask``.

    Least squares in which every shell of the transform weighs the same, as it does in the area under the FSC.
    """
    box = len(target)
    centre, scale, amplitude = seed_density(target.numpy(), mask.numpy(), gaussians, pixel_size, seed)
    unit = amplitude.mean() * torch.sigmoid(torch.tensor(OCCUPANCY_BIAS))
    place, log_scale = (centre / pixel_size).requires_grad_(), (scale / pixel_size).log().requires_grad_()
    relative = torch.ones(gaussians, requires_grad=True)
    index, weight = shells(box, 3), half_plane_weight(box, 3)
    wanted = torch.fft.rfftn(target * mask)
    power = torch.bincount(index.flatten(), (wanted.abs() ** 2 * weight).flatten(), box)
    loss_weight = weight / power.clamp(min=1e-12 * float(power.max()))[index] * (index <= box // 2)
    adam = torch.optim.Adam([place, log_scale, relative], lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for _ in range(steps):
        adam.zero_grad()
        volume = render(place, unit * relative, log_scale.exp().clamp(*SCALES), box)
        error = ((torch.fft.rfftn(volume * mask) - wanted).abs() ** 2 * loss_weight).sum()
        error.backward()
        adam.step()
        schedule.step()
    with torch.no_grad():
        return render(place, unit * relative, log_scale.exp().clamp(*SCALES), box)


def render(centre: Tensor, amplitude: Tensor, scale: Tensor, box: int) -> Tensor:
    """Volume [z, y, x] of Gaussians: ``centre`` (G, 3) and ``scale`` (G) in voxels; differentiable, cut off ``REACH`` voxels away."""
    middle = torch.floor(centre.detach() + 0.5)
    cell = middle[:, :, None] + torch.arange(-REACH, REACH + 1)
    profile = torch.exp(-((cell - centre[:, :, None]) ** 2) / (2 * scale[:, None, None] ** 2))
    cell = cell.long() + box // 2
    inside = (cell >= 0) & (cell < box)
    x, y, z = (profile * inside).unbind(1)
    i, j, k = cell.clamp(0, box - 1).unbind(1)
    values = torch.einsum("gz,gy,gx->gzyx", amplitude[:, None] * z, y, x)
    index = (k[:, :, None, None] * box + j[:, None, :, None]) * box + i[:, None, None, :]
    return torch.zeros(box**3).index_add(0, index.flatten(), values.flatten()).view(box, box, box)
