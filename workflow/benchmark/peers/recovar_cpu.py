"""RECOVAR's own commands with the insertion of images that it uses without a GPU put right:  python recovar_cpu.py pipeline ...

RECOVAR 1.0.5 inserts Fourier slices into a grid of twice the box for its mean and its state volumes.  Its CUDA code and its cubic
interpolation multiply an image's frequencies by that factor; its interpolation for CPUs (recovar.core.relion_interp) does not, so that maps
come out magnified twice.  Here its rotations are scaled by the factor, which does the same.  All images are inserted into one volume,
where the original makes one for each image and adds them up: same sums, a fraction of the time.  On a GPU nothing is changed.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from recovar import command_line
from recovar.core import relion_interp

project = relion_interp.project


def scaled(rotations: Any, image_shape: tuple[int, int], volume_shape: tuple[int, int, int]) -> Any:
    """Rotations that also carry frequencies of the image to those of the padded grid."""
    return jnp.asarray(rotations) * (volume_shape[0] // image_shape[0])


def project_on_padded(vol: Any, rotations: Any, image_shape: Any, volume_shape: Any, **options: Any) -> Any:
    return project(vol, scaled(rotations, image_shape, volume_shape), image_shape, volume_shape, **options)


@functools.partial(jax.jit, static_argnames=("image_shape", "volume_shape", "order", "half_volume", "half_image", "max_r"))
def backproject(
    imgs: Any,
    rotations: Any,
    image_shape: tuple[int, int],
    volume_shape: tuple[int, int, int],
    order: int = 1,
    half_volume: bool = False,
    half_image: bool = False,
    max_r: float | None = None,
) -> Any:
    """Images (B, pixels) at rotations (B, 3, 3) -> the flat volume, by trilinear (1) or nearest (0) insertion."""
    n0, n1, n2 = volume_shape
    height, width = image_shape
    size = n0 * n1 * (n2 // 2 + 1 if half_volume else n2)
    scatter = getattr(relion_interp, f"_scatter_{'trilinear' if order else 'nearest'}_{'half' if half_volume else 'full'}")
    frequency = relion_interp._pixel_frequencies(image_shape, half_image=half_image)
    halves = [(frequency, jnp.asarray(imgs))]
    if half_image:
        # The other half by Friedel's law.  The columns that rfft holds whole are not doubled; in the row of Nyquist only x is negated.
        rows, columns = jnp.divmod(jnp.arange(height * (width // 2 + 1)), width // 2 + 1)
        whole = (columns == 0) | (2 * columns == width)
        mirrored = jnp.where(((rows == 0) & (height % 2 == 0))[:, None], frequency * jnp.array([-1.0, 1.0]), -frequency)
        halves.append((mirrored, jnp.where(whole, 0, jnp.conj(halves[0][1]))))
    volume = jnp.zeros(size, dtype=halves[0][1].dtype)
    for k, values in halves:
        if max_r is not None:
            values = jnp.where((k**2).sum(-1) <= max_r**2, values, 0)
        plane = jnp.pad(k, ((0, 0), (0, 1)))
        points = jnp.matmul(plane, scaled(rotations, image_shape, volume_shape), precision=jax.lax.Precision.HIGHEST).reshape(-1, 3)
        volume += scatter(size, points[:, 0] + n0 // 2, points[:, 1] + n1 // 2, points[:, 2] + n2 // 2, values.ravel(), n0, n1, n2)
    return volume


if __name__ == "__main__":
    relion_interp.project = project_on_padded
    relion_interp.backproject = backproject
    command_line.main_commands()
