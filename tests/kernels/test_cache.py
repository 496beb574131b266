"""A run that goes on loads kernels that an earlier one compiled: both must give the same bits."""

import os
import subprocess
import sys
from pathlib import Path

KERNELS = """
import hashlib, torch
from cryospire import kernels
from cryospire.kernels import atoms, insertion
from cryospire.maths.poses import random_rotations

g = torch.Generator().manual_seed(0)
random = lambda *shape: torch.randn(*shape, generator=g)

def tell(name, *tensors):
    print(name, *(hashlib.md5(t.detach().contiguous().numpy().tobytes()).hexdigest() for t in tensors))

leaves = [leaf.requires_grad_() for leaf in (20 * random(3, 2, 500), random(3, 500), 0.4 + 4 * torch.rand(500, generator=g))]
image = kernels.splat(*leaves, 64)
image.backward(random(3, 64, 64))
tell("splat", image, *(leaf.grad for leaf in leaves))
leaves = [random(*shape).requires_grad_() for shape in ((3, 33), (500, 33), (4, 33), (4,))]
out = kernels.pair_head(*leaves)
out.backward(random(*out.shape))
tell("pair_head", out, *(leaf.grad for leaf in leaves))
tell("volume", kernels.render_volume(5 * random(50, 3), random(50), 1 + torch.rand(50, generator=g), 24, 1.0))
rotation = random_rotations(6, g).float()
numerator, weight = torch.zeros(2, 16, 16, 9, dtype=torch.complex64), torch.zeros(2, 16, 16, 9)
slices = torch.complex(random(6, 16, 9), random(6, 16, 9))
insertion.insert(numerator, weight, slices, torch.rand(6, 16, 9, generator=g), rotation, torch.arange(6) % 2)
tell("insertion", numerator, weight)
position, mass = 10 * random(2, 300, 3), torch.rand(2, 300, generator=g)
tell("projections", atoms.projection_transforms(position, mass, torch.arange(6) % 2, rotation, 32, 2.0, 6.0))
tell("density", atoms.volume(position[0], mass[0], 32, 2.0, 6.0))
"""


def test_compiled_and_loaded_kernels_give_the_same_bits(tmp_path: Path) -> None:
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KERNELS]
    compiled, loaded = (subprocess.run(command, env=environment, check=True, text=True, capture_output=True).stdout for _ in range(2))
    assert list(tmp_path.rglob("*.nbc")), "nothing was cached"
    assert len(compiled.splitlines()) == 6
    assert compiled == loaded
