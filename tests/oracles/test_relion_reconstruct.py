"""Our insertion, CTF and aberrations against RELION's own ``relion_reconstruct`` on the same particles."""

import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from cryospire.config import Config
from cryospire.io import mrc, stores
from cryospire.maths.ctf import beam_tilt_phase
from cryospire.maths.metrics import fsc
from cryospire.stages import consensus, preprocess

sys.path.append(str(Path(__file__).parents[1] / "stages"))
from planted import plant


@pytest.fixture(autouse=True)
def relion():
    if not shutil.which("relion_reconstruct"):
        warnings.warn("relion_reconstruct is not installed: NOT compared with RELION", stacklevel=1)
        pytest.skip("relion_reconstruct is not installed (Debian package relion)")


def reconstruct(folder: Path) -> torch.Tensor:
    command = ["relion_reconstruct", "--i", "particles.star", "--o", "relion.mrc", "--ctf", "--angpix", "4", "--maxres", "8"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=100)
    return torch.from_numpy(mrc.read_volume(folder / "relion.mrc")[0])


@pytest.mark.parametrize("tilt", [(0.0, 0.0), (90.0, -60.0)])
def test_consensus_is_relions_map_times_the_pixel_size(tmp_path, tilt):
    planted = plant(tmp_path, n=1000, noise=0.05)
    if any(tilt):
        phase = beam_tilt_phase(32, 4.0, torch.tensor([tilt]), torch.tensor([300.0]), torch.tensor([2.7]))
        phase[:, 16] = phase[:, :, 16] = 0
        tilted = torch.fft.irfft2(torch.fft.rfft2(torch.from_numpy(planted.images)) * torch.exp(-1j * phase), s=(32, 32)).numpy()
        assert np.corrcoef(tilted.ravel(), planted.images.ravel())[0, 1] < 0.98
        mrc.write_stack(tmp_path / "particles.mrcs", tilted, 4.0)
        planted.table.optics.beam_tilt_x[0], planted.table.optics.beam_tilt_y[0] = tilt
        preprocess.metadata.write_star(planted.star, planted.table)
    theirs = reconstruct(tmp_path)
    config = Config.model_validate({"particles": planted.star, "preprocess": {"workers": 1}})
    preprocess.run(config, output=tmp_path / "particles.zarr")
    consensus.run(config, particles=tmp_path / "particles.zarr", output=tmp_path / "consensus.zarr")
    group = stores.open_store(tmp_path / "consensus.zarr", "consensus")
    ours, mask = torch.from_numpy(stores.read(group, "half_maps")).mean(0), torch.from_numpy(stores.read(group, "mask"))
    curve = fsc(ours, theirs, mask)
    assert curve[1:14].min() > 0.99  # same hand, no offset: 0.99 up to 0.85 Nyquist
    assert fsc(theirs, planted.truth, mask)[1:10].min() > 0.97
    band = ours * mask
    assert (theirs * mask * band).sum() / (band**2).sum() == pytest.approx(4.0, rel=0.1)
