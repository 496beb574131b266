"""Small stores with planted content, written through io/stores in the layout of the real stages."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cryospire.conventions import particle_id
from cryospire.io import stores


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


@pytest.fixture
def synthetic() -> SimpleNamespace:
    return SimpleNamespace(ids=ids, write_latents=write_latents)
