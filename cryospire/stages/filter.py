"""Images that do not show the particle, by what stage 1 says of each.  Reads particles.zarr and discovery.zarr, writes the rows to keep.

The evidence of an image is the logarithm of how much more likely it is with the mixture's image in it, at its own latent, than with nothing
but noise, less the prior's cost of that latent and of its pose's correction.  A particle of any state has about half the energy of its
image; the latent of an image without one moves where the mixture is faint, and its evidence is near zero.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cryospire.config import Config
from cryospire.conventions import InputError
from cryospire.io import stores
from cryospire.log import Progress, say
from cryospire.maths.losses import product
from cryospire.stages import export
from cryospire.training.data import Particles
from cryospire.training.loop import start_threads
from cryospire.training.model import Mixture, load

BATCH = 64
SHARE = 0.25  # of the median evidence


def run(
    config: Config,
    *,
    particles: Path,
    discovery: Path,
    output: Path,
    share: float = SHARE,
    threshold: float | None = None,
    force: bool = False,
) -> None:
    """Write ``output`` (.txt or .pkl of rows of the particle table, for the key ``ind``) and a histogram beside it (.png)."""
    if output.suffix not in (".txt", ".pkl"):
        raise InputError(f"{output}: rows are written as .txt or .pkl; with them as `ind`, `cryospire export` writes .star or .cs")
    if output.exists() and not force:
        raise InputError(f"{output}: exists; pass --force to replace it")
    group = stores.open_store(particles, "particles")
    data, model = Particles(group), load(discovery)
    found = stores.open_store(discovery, "discovery")
    change, (turn, shift) = data.take_poses(found)
    rows = stores.join(data.id, stores.read(found, "id"), f"{discovery} against {particles}")
    start_threads(config.threads)
    values = evidence(model, torch.from_numpy(stores.read(found, "latents")[rows]).float(), data)
    if turn:  # the prior's cost of the pose's correction
        values -= (change / torch.tensor([turn] * 3 + [shift] * 2)).square().sum(1) / 2
    middle = float(values.median())
    if threshold is None and middle <= 0:
        raise InputError(f"{discovery}: the median image has no evidence of a particle ({middle:.1f}): nothing to judge images by")
    bound = share * middle if threshold is None else threshold
    kept = (values > bound).numpy()
    if not kept.any():
        asked = f"--share {share:g}, evidence above" if threshold is None else "--threshold"
        raise InputError(f"{asked} {bound:g}: no image has so much evidence; the largest is {float(values.max()):.1f}")
    output.parent.mkdir(parents=True, exist_ok=True)
    draw(values, bound, output.with_suffix(".png"))
    temporary = output.with_name(f".{os.getpid()}.{output.name}")
    export.write(config, config.particles, np.sort(stores.read(group, "source/row")[kept]), temporary)
    temporary.replace(output)
    say(f"filter     {kept.sum():,} of {len(data):,} images have evidence above {bound:.1f} (median {middle:.1f}) -> {output}")


@torch.no_grad()
def evidence(model: Mixture, latents: Tensor, data: Particles) -> Tensor:
    """Log-likelihood (N,) of each image with the mixture at its latent (N, D), at strength 1, over that of noise alone, less
    ``lambda_z |z|^2 / 2``."""
    values = torch.empty(len(data))
    with Progress("filter", len(data), "images") as progress:
        for rows in np.array_split(np.arange(len(data)), -(-len(data) // BATCH)):
            z, images = latents[rows], torch.from_numpy(data.read(rows)).float()
            seen = torch.fft.rfft2(model.project(z, data.rotation[rows], data.shift[rows])) * data.transfer(rows)
            gain = product(seen, torch.fft.rfft2(images)) - product(seen, seen) / 2
            values[rows] = gain - model.config.lambda_z / 2 * z.square().sum(1)
            progress.advance(len(rows))
    return values


def draw(values: Tensor, bound: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    low, high = torch.quantile(values[:: max(1, len(values) // 100_000)], torch.tensor([0.001, 0.999])).tolist()
    axis.hist(values.numpy(), bins=np.linspace(min(low, bound), max(high, bound), 120).tolist(), color="tab:blue")
    axis.axvline(bound, color="k", ls=":", label=f"kept above {bound:.1f}")
    axis.set(xlabel="evidence of a particle in the image (nats)", ylabel="images", yscale="log")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
