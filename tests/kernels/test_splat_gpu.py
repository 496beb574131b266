"""The Triton splat against the plain twin in float64: on the GPU where there is one, else under Triton's interpreter on CPU."""

import importlib.util
import math
import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor

from cryospire.maths import projection

if importlib.util.find_spec("triton") is None:
    warnings.warn("the GPU splat is NOT tested here: no triton (pip install triton runs it under the interpreter)", stacklevel=1)
    pytest.skip("triton is not installed: the GPU splat is not tested", allow_module_level=True)

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"

from cryospire.kernels import splat_gpu  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"


def scene(images: int, gaussians: int, box: int, scales: tuple[float, float], seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centres that reach well over the border, weights of both signs, scales in a range; and a gradient for the images."""
    g = torch.Generator().manual_seed(seed)
    xy = torch.randn(images, 2, gaussians, generator=g) * box / 2
    weight = torch.randn(images, gaussians, generator=g)
    scale = scales[0] + (scales[1] - scales[0]) * torch.rand(gaussians, generator=g)
    return xy, weight, scale, torch.randn(images, box, box, generator=g)


def check(xy: Tensor, weight: Tensor, scale: Tensor, grad: Tensor, cutoff: float = 3.0) -> None:
    box = grad.shape[-1]
    fast = [t.to(DEVICE).clone().requires_grad_() for t in (xy, weight, scale)]
    image = splat_gpu.Splat.apply(*fast, box, cutoff)
    image.backward(grad.to(DEVICE))
    plain = [t.double().requires_grad_() for t in (xy, weight, scale)]
    expected = projection.splat(*plain, box, cutoff)
    expected.backward(grad.double())
    pairs = [(image, expected), *((a.grad, b.grad) for a, b in zip(fast, plain, strict=True))]
    for name, (a, b) in zip(("image", "d_xy", "d_weight", "d_scale"), pairs, strict=True):
        assert a.shape == b.shape
        error = (a.detach().cpu().double() - b.detach()).norm() / b.norm().clamp(min=1e-12)
        assert error < 2e-5, (name, float(error))


@pytest.fixture(autouse=True)
def every_new_tensor_is_nan():  # type: ignore[no-untyped-def]
    """An output that a kernel does not write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("box", "scales"), [(8, (2.0, 9.0)), (22, (0.35, 0.6)), (65, (0.8, 1.5)), (50, (2.0, 6.0))])
def test_twins_agree(box: int, scales: tuple[float, float]) -> None:
    check(*scene(2, 27, box, scales, seed=box))


@pytest.mark.parametrize(("images", "gaussians"), [(0, 5), (2, 0), (3, 1), (1, 16), (1, 257)])
def test_any_number_of_images_and_gaussians(images: int, gaussians: int) -> None:
    check(*scene(images, gaussians, 34, (0.5, 1.0)))


@pytest.mark.parametrize("cutoff", [2.0, 4.5, math.inf])
def test_any_cutoff(cutoff: float) -> None:
    check(*scene(1, 16, 18, (0.5, 3.0)), cutoff=cutoff)


def test_gaussians_outside_leave_no_trace() -> None:
    xy = torch.tensor([[[400.0, -30.0, 3e7, 0.0], [0.0, 90.0, -3e7, 1e9]]])
    leaves = [t.to(DEVICE).requires_grad_() for t in (xy, torch.ones(1, 4), torch.full((4,), 1.5))]
    image = splat_gpu.Splat.apply(*leaves, 32, 3.0)
    image.backward(torch.ones_like(image))
    assert not image.any()
    assert all(not leaf.grad.any() for leaf in leaves)


def test_the_same_bits_twice() -> None:
    xy, weight, scale, grad = (t.to(DEVICE) for t in scene(2, 40, 40, (0.5, 2.0)))
    runs = [[splat_gpu.forward(xy, weight, scale, 48, 3.0), *splat_gpu.backward(grad, xy, weight, scale, 3.0)] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.skipif(not GPU, reason="no CUDA device")
def test_dispatched_for_cuda_tensors() -> None:
    from cryospire import kernels

    xy, weight, scale, _ = (t.to(DEVICE) for t in scene(2, 30, 32, (0.5, 3.0)))
    assert "Splat" in type(kernels.splat(xy.requires_grad_(), weight, scale, 32).grad_fn).__name__


COMPILE = """
import triton
from cryospire.kernels import splat_gpu as g
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
f, i, n = "*fp32", "*i32", "i32"
for kernel, types, sizes in (
    (g._list_kernel, [f, f, i, i, n, n, "fp32", n], dict(TILE=g.TILE, SCAN=g.SCAN)),
    (g._forward_kernel, [f, f, f, i, i, f, n, n, "fp32", n], dict(TILE=g.TILE, CHUNK=g.CHUNK)),
    (g._backward_kernel, [f] * 7 + [n, n, "fp32"], dict(OWNED=g.OWNED, COLUMNS=g.COLUMNS)),
):
    signature = dict(zip(kernel.arg_names, types + ["constexpr"] * len(sizes), strict=True))
    constants = {(kernel.arg_names.index(k),): v for k, v in sizes.items()}
    assert triton.compile(ASTSource(kernel, signature, constants), GPUTarget("cuda", 90, 32)).asm["cubin"]
"""


def test_compiles_for_a_gpu_that_is_not_here() -> None:
    """The interpreter lets pass what the compiler refuses (types that change in a loop, say); this one needs no GPU."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", COMPILE], env=env, check=True)
