import torch

from cryospire.maths.losses import residual_energy, residual_energy_plain


def test_written_out_adjoint_agrees_with_autograd() -> None:
    g = torch.Generator().manual_seed(0)
    projection = torch.randn(3, 10, 10, dtype=torch.float64, generator=g).requires_grad_()
    transfer = torch.randn(3, 10, 6, dtype=torch.float64, generator=g)
    images = torch.randn(3, 10, 10, dtype=torch.float64, generator=g)
    # A real image demands that the transfer be even in ky on the two self-conjugate columns, as every CTF is.
    mirror = -torch.arange(10) % 10
    for column in (0, 5):
        transfer[:, :, column] = (transfer[:, :, column] + transfer[:, mirror, column]) / 2
    weight = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    results = []
    for function in (residual_energy, residual_energy_plain):
        energy = function(projection, transfer, images)
        (grad,) = torch.autograd.grad((energy * weight).sum(), projection)
        results.append((energy.detach(), grad))
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain)
    assert torch.autograd.gradcheck(lambda p: residual_energy(p, transfer, images), projection)


def test_pure_noise_has_half_a_unit_for_each_pixel() -> None:
    noise = torch.randn(64, 32, 32, generator=torch.Generator().manual_seed(2))
    energy = residual_energy(torch.zeros(64, 32, 32), torch.ones(64, 32, 17), noise)
    assert abs(float(energy.mean()) / (32 * 32 / 2) - 1) < 0.01
