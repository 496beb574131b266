import torch

from cryospire.maths.losses import residual_energy, residual_energy_plain, strength

SD = 0.2


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
        energy = function(projection, transfer, images, SD)
        (grad,) = torch.autograd.grad((energy * weight).sum(), projection)
        results.append((energy.detach(), grad))
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain)
    assert torch.autograd.gradcheck(lambda p: residual_energy(p, transfer, images, SD), projection)


def test_pure_noise_has_half_a_unit_for_each_pixel() -> None:
    noise = torch.randn(64, 32, 32, generator=torch.Generator().manual_seed(2))
    energy = residual_energy(torch.zeros(64, 32, 32), torch.ones(64, 32, 17), noise, 0.0)
    assert abs(float(energy.mean()) / (32 * 32 / 2) - 1) < 0.01


def test_strengths_of_images_are_found() -> None:
    """As well as noise and prior allow: the error of the posterior mean has variance 1 / (|model|^2 + SD^-2)."""
    g = torch.Generator().manual_seed(3)
    model, energy = torch.randn(1, 16, 16, generator=g), 100.0
    model *= (energy / model.square().sum()).sqrt()
    s = 1 + SD * torch.randn(4000, generator=g)
    images = s[:, None, None] * model + torch.randn(4000, 16, 16, generator=g)
    found = strength(torch.fft.rfft2(model.expand_as(images)), torch.fft.rfft2(images), SD)
    assert abs(float((found - s).square().mean()) * (energy + SD**-2) - 1) < 0.07


def test_no_other_strength_explains_an_image_better() -> None:
    g = torch.Generator().manual_seed(4)
    projection, images = 3 * torch.randn(2, 8, 8, generator=g), torch.randn(2, 8, 8, generator=g)
    tried = torch.linspace(-1, 2, 3001)[:, None]
    distance = (tried[..., None, None] * projection - images).square().sum((-2, -1)) + ((tried - 1) / SD) ** 2
    energy = residual_energy(projection, torch.ones(2, 8, 5), images, SD)
    torch.testing.assert_close(energy, distance.min(0).values / 2, rtol=1e-5, atol=0)


def test_without_spread_every_image_is_as_strong_as_the_model() -> None:
    g = torch.Generator().manual_seed(5)
    projection, images = torch.randn(2, 2, 8, 8, generator=g)
    energy = residual_energy(projection, torch.ones(2, 8, 5), images, 0.0)
    torch.testing.assert_close(energy, (projection - images).square().sum((-2, -1)) / 2)
