"""Small stores with planted content, written through io/stores in the layout of the real stages."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cryospire.config import Train, section
from cryospire.conventions import particle_id
from cryospire.io import stores
from cryospire.training import model as mixtures

BOX, PIXEL = 24, 5.0


def ids(n: int) -> np.ndarray:
    return np.array([particle_id(f"{i + 1:06d}@particles.mrcs") for i in range(n)], np.int64)


def write_latents(path: Path, latents: np.ndarray) -> Path:
    """A model.zarr that holds latents and nothing else."""
    group = stores.create(path, "model", config={}, seed=0, inputs={}, pixel_size=4.0, box=16)
    stores.put(group, "id", ids(len(latents)), ("particle",), "permanent particle id")
    stores.put(group, "half_set", np.arange(len(latents)) % 2 + 1, ("particle",), "half-set")
    stores.put(group, "latents", latents.astype(np.float32), ("particle", "latent"), "latent", "latent unit")
    stores.finish(group)
    return path


def two_part_mixture(gaussians: int = 120) -> mixtures.Mixture:
    """Two blobs 50 Å apart along x; networks are random and large enough that a latent moves the parts by many Å."""
    torch.manual_seed(0)
    settings = Train(gaussians=gaussians, hidden=8, layers=1, rank=4)
    mixture = mixtures.Mixture(settings, 2, 4, gaussians, BOX, PIXEL, [gaussians // 2] * 2)
    rng = np.random.default_rng(0)
    middle = np.repeat([[-25.0, 0, 0], [25.0, 5, 0]], gaussians // 2, 0)
    centre = torch.from_numpy(middle + rng.normal(0, 6, middle.shape)).float()
    mixture.place(centre, torch.full((gaussians,), 4.0), torch.from_numpy(rng.uniform(0.5, 1, gaussians)).float())
    with torch.no_grad():
        mixture.anchor_centre.copy_(torch.tensor([[-25.0, 0, 0], [25.0, 5, 0]]).T / PIXEL)
        mixture.anchor_feature.normal_()
        for parameter in mixture.anchor_motion.parameters():
            parameter.normal_(0, 0.3)
    return mixture.requires_grad_(False)


def write_model(path: Path, latents: np.ndarray) -> Path:
    """A whole model.zarr around ``two_part_mixture``."""
    mixture = two_part_mixture()
    group = stores.create(path, "model", config=section(mixture.config), seed=0, inputs={}, pixel_size=PIXEL, box=BOX)
    stores.put(group, "id", ids(len(latents)), ("particle",), "permanent particle id")
    stores.put(group, "half_set", np.arange(len(latents)) % 2 + 1, ("particle",), "half-set")
    stores.put(group, "latents", latents.astype(np.float32), ("particle", "latent"), "latent", "latent unit")
    stores.put(group, "anchors/part", np.arange(2), ("anchor",), "part of the anchor")
    mixtures.save(group, mixture)
    epochs = np.arange(1, 6)
    for name, values in {"epoch": epochs, "loss": 200 + 50 / epochs, "images_per_second": 900.0 + epochs, "latent_sd": epochs / 5}.items():
        stores.put(group, f"history/{name}", values, ("epoch",), name)
    stores.finish(group)
    return path


@pytest.fixture(scope="session")
def synthetic() -> SimpleNamespace:
    return SimpleNamespace(
        ids=ids, write_latents=write_latents, two_part_mixture=two_part_mixture, write_model=write_model, box=BOX, pixel=PIXEL
    )
