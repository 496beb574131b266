"""The fused head against its plain twin, forward and backward."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cryospire import kernels


def both_ways(head: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in leaves]
    out = head(*leaves)
    out.backward(grad)
    return [out.detach(), *[t.grad for t in leaves if t.grad is not None]]


def random_leaves(images: int, gaussians: int, hidden: int, outputs: int) -> tuple[list[Tensor], Tensor]:
    g = torch.Generator().manual_seed(images + gaussians)
    shapes = [(images, hidden), (gaussians, hidden), (outputs, hidden), (outputs,)]
    return [torch.randn(s, generator=g) for s in shapes], torch.randn(images, outputs, gaussians, generator=g)


@pytest.mark.parametrize("images", [0, 1, 5])
@pytest.mark.parametrize(("gaussians", "hidden", "outputs"), [(1, 1, 1), (255, 32, 3), (256, 7, 1), (700, 33, 4)])
def test_twins_agree(images: int, gaussians: int, hidden: int, outputs: int) -> None:
    leaves, grad = random_leaves(images, gaussians, hidden, outputs)
    fast = both_ways(kernels.pair_head, leaves, grad)
    plain = both_ways(kernels.pair_head_plain, [t.double() for t in leaves], grad.double())
    assert len(fast) == len(plain) == 5
    for a, b in zip(fast, plain, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5 * max(1.0, float(b.abs().max()) if b.numel() else 1.0))


def test_does_not_depend_on_threads() -> None:
    """All but the gradient of the bias, which is a sum by torch."""
    leaves, grad = random_leaves(9, 900, 32, 3)
    before = torch.get_num_threads()
    try:
        kernels.set_threads(1)
        one = both_ways(kernels.pair_head, leaves, grad)
        kernels.set_threads(2)
        many = both_ways(kernels.pair_head, leaves, grad)
    finally:
        kernels.set_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one[:-1], many[:-1], strict=True))


def test_threads_are_as_told() -> None:
    """numba's pool sets OpenMP, and so torch, to all CPUs when it starts; a rank with one thread must keep to it."""
    torch_first = "import torch; torch.ones(9).sum(); torch.get_num_threads()"
    words = f"{torch_first}; from cryospire import kernels; kernels.set_threads(1); print(torch.get_num_threads())"
    two = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, env=two, timeout=120)
    assert done.stdout.strip() == "1", done.stderr


def test_not_a_number_is_not_hidden() -> None:
    leaves, _ = random_leaves(2, 40, 8, 3)
    leaves[0][1, 3] = torch.nan
    out = kernels.pair_head(*leaves)
    assert out[1].isnan().all() and not out[0].isnan().any()
