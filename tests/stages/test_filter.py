"""Evidence of a particle in an image: its arithmetic on planted images, and what it says of junk after a training."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cryospire.config import Config, Discover, Preprocess, Simulate
from cryospire.conventions import InputError
from cryospire.io import metadata_pkl, mrc, stores
from cryospire.stages import consensus, discover, filter, preprocess, simulate
from cryospire.training.data import Particles
from cryospire.training.model import load

N = 400


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """Stage 1 on a stack of which every fifth image is noise alone."""
    out = tmp_path_factory.mktemp("junk")
    what = Simulate(kind="mixed", states=4, particles=N, box=32, pixel_size=9.0, snr=0.5, shift=5.0)
    config = Config(
        simulate=what, particles=out / "sim/particles.star", preprocess=Preprocess(workers=1), output=out, threads=1,
        discover=Discover(gaussians=128, epochs=6, batch=16),
    )  # fmt: skip
    simulate.run(config, output=out / "sim")
    stack = out / "sim/particles.mrcs"
    images, pixel = np.array(mrc.open_stack(stack)), mrc.stack_shape(stack)[2]
    images[::5] = images[:, :3].std() * np.random.default_rng(0).standard_normal(images[::5].shape)
    mrc.write_stack(stack, images, pixel)
    preprocess.run(config, output=out / "particles.zarr")
    consensus.run(config, particles=out / "particles.zarr", output=out / "consensus.zarr")
    discover.run(config, particles=out / "particles.zarr", consensus=out / "consensus.zarr", output=out / "discovery.zarr")
    return config, out


def test_images_without_a_particle_are_left_out(trained: tuple[Config, Path], tmp_path: Path) -> None:
    config, out = trained
    stage = {"particles": out / "particles.zarr", "discovery": out / "discovery.zarr"}
    for name in ("kept.txt", "kept.pkl"):
        filter.run(config, **stage, output=tmp_path / name)
        kept = metadata_pkl.indices(tmp_path / name, N)
        junk = np.isin(np.arange(0, N, 5), kept).mean()
        assert junk < 0.03 and len(kept) > 0.97 * 0.8 * N
    assert (tmp_path / "kept.png").stat().st_size > 5000
    filter.run(config, **stage, output=tmp_path / "all.txt", threshold=-1e9)
    assert len(metadata_pkl.indices(tmp_path / "all.txt", N)) == N
    with pytest.raises(InputError, match="--force"):
        filter.run(config, **stage, output=tmp_path / "kept.txt")
    with pytest.raises(InputError, match="no image has so much"):
        filter.run(config, **stage, output=tmp_path / "none.txt", threshold=1e9)
    with pytest.raises(InputError, match=r"\.txt or \.pkl"):
        filter.run(config, **stage, output=tmp_path / "kept.star")


def test_evidence_is_the_likelihood_ratio(trained: tuple[Config, Path]) -> None:
    """Images replaced by the model's own: half their energy; by their negatives: minus three halves; by nothing: minus a half."""
    out = trained[1]
    data, model = Particles(stores.open_store(out / "particles.zarr", "particles")), load(out / "discovery.zarr")
    z = torch.randn(N, model.latent, generator=torch.Generator().manual_seed(0))
    rows = np.arange(60)
    with torch.no_grad():
        shown = torch.fft.irfft2(torch.fft.rfft2(model.project(z[:60], data.rotation[rows], data.shift[rows])) * data.transfer(rows))
    images = torch.zeros(N, 32, 32)
    images[:20], images[20:40] = shown[:20], -shown[20:40]
    data.read = lambda rows: images[rows].numpy()  # type: ignore[method-assign]
    found = filter.evidence(model, z, data)[:60] + z[:60].square().sum(1) / 2
    energy = shown.square().sum((1, 2)) / 2
    assert torch.allclose(found, energy * torch.tensor([1.0, -3.0, -1.0]).repeat_interleave(20), rtol=1e-3)
