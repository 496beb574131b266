"""Small stores with planted content, written through io/stores in the layout of the real stages."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from cryospire.config import Analyse, Config, Train, section
from cryospire.conventions import particle_id
from cryospire.io import mrc, stores
from cryospire.kernels import render_volume
from cryospire.stages import analyse, assemble
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
    torch.manual_seed(1)  # of which parts stay in the box
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
    history = {"epoch": epochs, "loss": 200 + 50 / epochs, "images_per_second": 900.0 + epochs, "latent_sd": epochs / 5}
    for name, values in (history | {"turn_sd": 1.5 + 1 / epochs, "shift_sd": 2.5 + 1 / epochs}).items():
        stores.put(group, f"history/{name}", values, ("epoch",), name)
    stores.finish(group)
    return path


def write_particles(path: Path, n: int) -> Path:
    """A particles.zarr of noise with even viewing directions and known defocus."""
    rng = np.random.default_rng(0)
    group = stores.create(path, "particles", config={}, seed=0, inputs={}, pixel_size=PIXEL, box=BOX)
    group.attrs["stacks"] = ["particles.mrcs"]
    put, particle = stores.put, ("particle",)
    put(group, "images", rng.normal(size=(n, BOX, BOX)).astype(np.float16), ("particle", "y", "x"), "whitened images")
    rotation = Rotation.random(n, rng=1).as_matrix().astype(np.float32)
    put(group, "pose/rotation", rotation, ("particle", "row", "column"), "x_view = R x_model")
    put(group, "pose/shift", rng.normal(0, 5, (n, 2)).astype(np.float32), ("particle", "xy"), "place of the centre", "Å")
    put(group, "ctf/defocus_u", rng.uniform(1e4, 2e4, n), particle, "defocus", "Å")
    put(group, "ctf/defocus_v", rng.uniform(1e4, 2e4, n), particle, "defocus", "Å")
    put(group, "ctf/group", np.arange(n) % 2, particle, "optics group")
    put(group, "optics/voltage", [300.0, 200.0], ("group",), "voltage", "kV")
    put(group, "id", ids(n), particle, "permanent particle id")
    put(group, "half_set", np.arange(n) % 2 + 1, particle, "half-set")
    stores.finish(group)
    return path


def write_consensus(path: Path) -> Path:
    """The two blobs of the mixture at rest, with an FSC that falls through 0.143 at shell 8."""
    volume = render(two_part_mixture())
    group = stores.create(path, "consensus", config={}, seed=0, inputs={}, pixel_size=PIXEL, box=BOX)
    group.attrs["resolution"] = BOX * PIXEL / 8
    stores.put(group, "map", volume, ("z", "y", "x"), "rigid map")
    stores.put(group, "fsc", 1 / (1 + np.exp(np.arange(BOX // 2 + 1) - 6.2)), ("shell",), "FSC of half-maps")
    stores.finish(group)
    return path


def write_parts(path: Path) -> Path:
    """The mixture's own two parts, evident in features, and their masks."""
    mixture, rng = two_part_mixture(), np.random.default_rng(1)
    centre = mixture.centre.T.numpy() * PIXEL
    part = (np.arange(len(centre)) >= len(centre) // 2).astype(np.int32)
    group = stores.create(path, "parts", config={}, seed=0, inputs={}, pixel_size=PIXEL, box=BOX)
    stores.put(group, "part", part, ("gaussian",), "part of each coarse Gaussian")
    stores.put(group, "feature", part[:, None] * 2.0 + rng.normal(0, 0.3, (len(part), 4)), ("gaussian", "feature"), "learned feature")
    stores.put(group, "position", centre, ("gaussian", "xyz"), "centre", "Å")
    stores.put(group, "amplitude", np.ones(len(part)), ("gaussian",), "peak density")
    stores.put(group, "motion/angle", np.array([[0.0, 0.0], [0.0, 40.0]]), ("part", "shape"), "turn", "degrees")
    stores.put(group, "motion/offset", np.array([[0.0, 0.0], [0.0, 12.0]]), ("part", "shape"), "way of its centre", "Å")
    stores.put(group, "motion/present", np.array([[True, True], [True, False]]), ("part", "shape"), "there")
    stores.put(group, "motion/share", np.array([0.75, 0.25]), ("shape",), "share of the particles")
    stores.put(group, "anchors/part", np.arange(2), ("anchor",), "part of the anchor")
    for name, values in {"parts": [2, 3, 4], "loss": [0.7, 0.05, 0.01]}.items():
        stores.put(group, f"evidence/{name}", values, ("division",), name)
    stores.finish(group)
    x = np.broadcast_to(np.arange(BOX), (BOX,) * 3)
    for k, side in enumerate((x < BOX // 2, x >= BOX // 2)):
        mrc.write_volume(path.with_name("parts_masks") / f"part_{k + 1}.mrc", side.astype(np.float32), PIXEL)
    return path


def write_reconstruction(path: Path, detail: np.ndarray | None = None) -> Path:
    """Of the model beside it: images that add nothing, or the given detail (2, z, y, x); half-maps agree to shell 8."""
    inputs = {"model": path.with_name("model.zarr")}
    group = stores.create(path, "reconstruction", config={}, seed=0, inputs=inputs, pixel_size=PIXEL, box=BOX)
    group.attrs.update({"resolution": [BOX * PIXEL / 8] * 2, "threshold": 0.143})
    zyx = ("part", "z", "y", "x")
    stores.put(group, "detail", np.zeros((2, BOX, BOX, BOX), np.float32) if detail is None else detail, zyx, "detail", "image unit / Å")
    mask = np.full((2, BOX, BOX, BOX), 0.5, np.float32) if detail is None else (detail > 1e-3).astype(np.float32)
    stores.put(group, "mask", mask, zyx, "mask")
    stores.put(group, "map", np.stack([render(two_part_mixture())] * 2), zyx, "map of the part", "image unit / Å")
    curve = 1 / (1 + np.exp(np.arange(BOX // 2 + 1) - 6.2))
    for name in ("fsc", "fsc_detail"):
        stores.put(group, name, np.stack([curve, curve]), ("part", "shell"), name)
    stores.finish(group)
    return path


def render(mixture: mixtures.Mixture) -> np.ndarray:
    centre, amplitude, scale = mixture.forward_gaussians(torch.zeros(1, mixture.latent))
    return render_volume(centre[0], amplitude[0], scale, BOX, PIXEL).numpy()


def write_run(folder: Path, n: int = 300) -> Path:
    """Every result of a run in one folder; analysis and volumes by the stages themselves."""
    write_particles(folder / "particles.zarr", n)
    write_consensus(folder / "consensus.zarr")
    write_parts(folder / "parts.zarr")
    write_model(folder / "model.zarr", np.random.default_rng(1).normal(size=(n, 2)) * [2, 1])
    config = Config(output=folder, analyse=Analyse(states=3, trajectories=1, steps=4, umap=False))
    analyse.run(config, model=folder / "model.zarr", output=folder / "analysis.zarr")
    inputs = {name: folder / f"{name}.zarr" for name in ("model", "analysis", "reconstruction")}
    write_reconstruction(inputs["reconstruction"])
    assemble.run(config, **inputs, output=folder / "volumes.zarr")
    (folder / "benchmarks").mkdir()
    (folder / "benchmarks" / "train.tsv").write_text("s\th:m:s\tmax_rss\n90.5\t0:01:30\t1500.0\n")
    return folder


@pytest.fixture(scope="session")
def synthetic() -> SimpleNamespace:
    return SimpleNamespace(
        ids=ids, write_latents=write_latents, two_part_mixture=two_part_mixture, write_model=write_model, write_run=write_run,
        write_particles=write_particles, write_reconstruction=write_reconstruction, box=BOX, pixel=PIXEL,
    )  # fmt: skip
