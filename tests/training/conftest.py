"""A tiny particle store whose images are projections of Gaussians that move, with noise: made through the real store functions."""

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
    group = stores.create(path, "particles", config={}, seed=0, inputs={}, pixel_size=PIXEL, box=BOX)
    array = group.create_array("images", shape=images.shape, dtype="f4", chunks=(16, BOX, BOX), shards=(64, BOX, BOX))
    array[...] = images.numpy()
    zeros = np.zeros(COUNT, np.float32)
    columns = {
        "id": np.arange(COUNT) * 7 + 1,
        "half_set": (np.arange(COUNT) % 2 + 1).astype(np.int8),
        "pose/rotation": rotation.numpy(),
        "pose/shift": np.zeros((COUNT, 2), np.float32),
        "noise/whitening": np.ones((1, BOX // 2 + 1), np.float32),
        "ctf/defocus_u": zeros,
        "ctf/defocus_v": zeros,
        "ctf/defocus_angle": zeros,
        "ctf/phase_shift": zeros + 90,
        "ctf/scale": zeros + 1,
        "ctf/group": np.zeros(COUNT, np.int32),
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
