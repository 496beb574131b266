"""A tiny particle store whose images are projections of Gaussians that move, with noise: made through the real store functions."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cryospire import kernels
from cryospire.io import stores
from cryospire.maths.poses import random_rotations

BOX, PIXEL, COUNT = 16, 4.0, 200


def make_store(path: Path) -> Path:
    g = torch.Generator().manual_seed(0)
    rotation = random_rotations(COUNT, g).float()
    centre = torch.tensor([[-10.0, 0, 0], [8, 6, 0], [6, -8, 5]])
    moving = torch.linspace(-8, 8, COUNT)
    points = centre.expand(COUNT, 3, 3).clone()
    points[:, 2, 2] += moving
    xy = (rotation[:, :2] @ points.transpose(1, 2)) / PIXEL
    images = kernels.splat(xy, torch.full((COUNT, 3), 2.0), torch.full((3,), 1.2), BOX) + torch.randn(COUNT, BOX, BOX, generator=g)
    return write_store(path, images, rotation, PIXEL)


def write_store(path: Path, images: torch.Tensor, rotation: torch.Tensor, pixel_size: float) -> Path:
    """particles.zarr of images (n, box, box) that no CTF has changed, at rotations (n, 3, 3) without shift."""
    n, box = images.shape[:2]
    group = stores.create(path, "particles", config={}, seed=0, inputs={}, pixel_size=pixel_size, box=box)
    array = group.create_array("images", shape=images.shape, dtype="f4", chunks=(16, box, box), shards=(64, box, box))
    array[...] = images.numpy()
    zeros = np.zeros(n, np.float32)
    columns = {
        "id": np.arange(n) * 7 + 1,
        "half_set": (np.arange(n) % 2 + 1).astype(np.int8),
        "pose/rotation": rotation.numpy(),
        "pose/shift": np.zeros((n, 2), np.float32),
        "noise/whitening": np.ones((1, box // 2 + 1), np.float32),
        "ctf/defocus_u": zeros,
        "ctf/defocus_v": zeros,
        "ctf/defocus_angle": zeros,
        "ctf/phase_shift": zeros + 90,
        "ctf/scale": zeros + 1,
        "ctf/group": np.zeros(n, np.int32),
        "optics/voltage": np.array([300.0]),
        "optics/cs": np.array([0.0]),
        "optics/amplitude_contrast": np.array([0.0]),
    }
    for name, data in columns.items():
        stores.put(group, name, data, tuple(f"dim_{k}" for k in range(data.ndim)), name)
    stores.finish(group)
    return path


@pytest.fixture(scope="session")
def particles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("store") / "particles.zarr")


@pytest.fixture(scope="session")
def plant() -> Callable[[Path, torch.Tensor, torch.Tensor, float], Path]:
    return write_store
