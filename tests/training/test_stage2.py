"""Stage 2 where it starts at the truth: it must stay."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import zarr
from torch.nn.functional import one_hot

from cryospire import kernels
from cryospire.config import Config, Discover, Parts, Train
from cryospire.io import stores
from cryospire.maths.poses import random_rotations
from cryospire.stages import discover, parts, train
from cryospire.stages.train import warm_start
from cryospire.training.data import Particles
from cryospire.training.distributed import seed_everything, team
from cryospire.training.loop import fit
from cryospire.training.model import Mixture, load

BOX, PIXEL, COUNT, GAUSSIANS, PARTS = 24, 6.0, 1200, 128, 4
ENERGY = 160.0  # of an image; its noise has variance 1 in every pixel


@pytest.mark.parametrize("stuck", [0, COUNT // 5])
def test_parts_that_come_and_go_are_not_lost(tmp_path: Path, plant: Callable[..., Path], stuck: int) -> None:
    """Networks of the default width at the default rates: at 1e-2 occupancies run away, and the loss ends 4 above the truth.

    ``stuck``: so many latents start at the state that has what theirs lacks.
    """
    seed_everything(3)
    g = torch.Generator().manual_seed(0)
    part = torch.arange(PARTS).repeat_interleave(GAUSSIANS // PARTS)
    corner = 20.0 * torch.tensor([[1.0, 1, 1], [-1, -1, 1], [-1, 1, -1], [1, -1, -1]])
    centre = corner[part] + 8 * torch.randn(GAUSSIANS, 3, generator=g)
    there = torch.tensor([[k >> j & 1 for j in range(PARTS)] for k in range(2**PARTS)])  # of every state, which parts
    state = torch.randint(len(there), (COUNT,), generator=g)
    z = 1.6 * there[state] - 0.8 + 0.3 * torch.randn(COUNT, PARTS, generator=g)

    rotation = random_rotations(COUNT, g).float()
    present = (there[state] @ one_hot(part, PARTS).T).float()
    clean = kernels.splat(rotation[:, :2] @ centre.T / PIXEL, present, torch.ones(GAUSSIANS), BOX)
    factor = (ENERGY / clean.square().sum((1, 2)).mean()).sqrt()
    images = factor * clean + torch.randn(clean.shape, generator=g)
    data = Particles(stores.open_store(plant(tmp_path / "particles.zarr", images, rotation, PIXEL), "particles"))

    config = Train(gaussians=GAUSSIANS, epochs=6)
    model = Mixture(config, PARTS, 8, GAUSSIANS, BOX, PIXEL, [GAUSSIANS // PARTS] * PARTS)
    peak = factor / (0.95 * (2 * torch.pi) ** 0.5 * PIXEL)
    model.place(centre, torch.full((GAUSSIANS,), PIXEL), peak.expand(GAUSSIANS))
    model.anchor_centre.copy_(corner.T / PIXEL)
    model.anchor_feature.normal_(generator=g)
    known = {
        "part": torch.arange(PARTS),
        "motion/latent": 1.6 * there - 0.8,
        "motion/rotation": torch.eye(3).expand(PARTS, len(there), 3, 3),
        "motion/translation": torch.zeros(PARTS, len(there), 3),
        "motion/present": there.T.bool(),
    }
    division = zarr.open_group(zarr.storage.MemoryStore(), mode="w")
    for name, values in known.items():
        division.create_array(name, data=values.contiguous().numpy())
    warm_start(model, division, part, z)
    z[:stuck] *= -1
    with team() as alone:
        latents, history = fit("train", model, z, data, config, 1, alone, tmp_path / "checkpoints", tmp_path / "metrics.jsonl", {})
    truth = BOX**2 / 2 + float(z.square().sum(1).mean()) / 2
    assert history["loss"][-1] < truth + 2
    assert latents is not None
    with torch.no_grad():
        occupancy = model.occupancies(latents, model.features)
    assert occupancy[present.bool()].mean() > 0.9 and occupancy[~present.bool()].mean() < 0.1
    of_part = torch.stack([occupancy[:, part == k].mean(1) for k in range(PARTS)], 1)
    assert float(((of_part > 0.5) == there[state].bool()).all(1).float().mean()) > 0.97


@pytest.mark.parametrize(("lr", "warned"), [(3e-3, False), (0.3, True)])
def test_a_training_that_undoes_stage_1_says_so(
    particles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], lr: float, warned: bool
) -> None:
    data = Particles(stores.open_store(particles, "particles"))
    grid = {"pixel_size": data.pixel_size, "box": data.box}
    consensus = stores.create(tmp_path / "consensus.zarr", "consensus", config={}, seed=0, inputs={}, **grid)
    centre, scale = torch.tensor([[-10.0, 0, 0], [8, 6, 0], [6, -8, 5]]), torch.full((3,), 4.8)  # as in the images, at rest
    volume = kernels.render_volume(centre, torch.full((3,), 2 / (2 * torch.pi) ** 0.5 / 4.8), scale, data.box, data.pixel_size)
    values = {"map": volume, "half_maps": torch.stack([volume, volume]), "mask": (volume > 0.01).float(), "fsc": torch.ones(9)}
    for name, value in values.items():
        stores.put(consensus, name, value.numpy(), tuple(f"d{k}" for k in range(value.ndim)), name)
    stores.finish(consensus)
    config = Config(
        threads=1, discover=Discover(gaussians=64, epochs=6, features=4), parts=Parts(parts=2, anchors=2),
        train=Train(gaussians=128, epochs=4, hidden=32, rank=8, batch=32, lr=lr, lr_density=max(0.02, lr)),
    )  # fmt: skip
    found, division = tmp_path / "discovery.zarr", tmp_path / "parts.zarr"
    discover.run(config, particles=particles, consensus=tmp_path / "consensus.zarr", output=found)
    parts.run(config, particles=particles, discovery=found, output=division)
    train.run(config, particles=particles, discovery=found, parts=division, output=tmp_path / "model.zarr")
    told = capsys.readouterr().err
    assert ("WARNING: the images are explained worse than by stage 1" in told) == warned
    held = stores.open_store(tmp_path / "model.zarr", "model").attrs["held_part"]
    assert load(tmp_path / "model.zarr").held == (held is not None) == ("is held still" in told)
