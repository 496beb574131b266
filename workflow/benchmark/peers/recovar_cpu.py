"""RECOVAR's own commands without a GPU: one error put right, and what is slow on CPUs replaced:  python recovar_cpu.py pipeline ...

RECOVAR 1.0.5 inserts Fourier slices into a grid of twice the box for its mean and its state volumes.  Its CUDA code and its cubic
interpolation multiply an image's frequencies by that factor; its interpolation for CPUs (recovar.core.relion_interp) does not, so that maps
come out magnified twice.  Here its rotations are scaled by the factor, which does the same.  All images are inserted into one volume,
where the original makes one for each image and adds them up: same sums, a fraction of the time.

The rest does the same sums as the original in an order that suits a CPU.  Differences from it on images of the benchmark, relative and root
mean square, in single precision:
  what an image sees of the mask (`tight_mask`)                                      the same pixels, soft edges to 4e-7; noise to 2e-6
  covariance columns (`covariance_columns`)                                          2e-7
  their regularisation (`regularise`)                                                2e-5; its 20 rounds amplify the rounding of sums
  projected covariance (`projected_covariance`)                                      1e-6
  latents (`batch_coordinates`)                                                      2e-6
  sums for the residual noise (`residual_square`)                                    1e-7
  a state's maps from images near it (`kernel_estimates`)                            2e-5
  choosing, joining and filtering them (`choose`, `recombine`, `local_filter`)       the same choices, maps to 3e-7
Whatever they do not cover (tilt series, most options that the benchmark does not use) goes to the original.  On a GPU nothing is changed.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numba
import numpy as np
from recovar import command_line, core, utils
from recovar.core import cubic_interpolation, fourier_transform_utils, linalg, mask, relion_interp
from recovar.core import forward as core_forward
from recovar.core.configs import CovColumnOpts, ForwardModelConfig, ModelState
from recovar.core.ctf import compute_antialiased_ctf_squared
from recovar.heterogeneity import (
    adaptive_kernel_discretization,
    covariance_core,
    covariance_estimation,
    embedding,
    heterogeneity_volume,
    locres,
)
from recovar.reconstruction import noise as noise_estimation
from recovar.reconstruction import regularization, relion_functions
from scipy import fft
from scipy.linalg import blas

project = relion_interp.project
compute_H_B_for_halfset = covariance_estimation.compute_H_B_for_halfset
compute_batch_coords = embedding.compute_batch_coords
compute_batch_coords_p1 = embedding._compute_batch_coords_p1
compute_projected_covariance = covariance_estimation.compute_projected_covariance
get_per_image_tight_mask = covariance_core.get_per_image_tight_mask
average_residual_square = noise_estimation.average_residual_square
choice_most_likely_split = heterogeneity_volume.choice_most_likely_split
even_less_naive_heterogeneity_scheme_relion_style = adaptive_kernel_discretization.even_less_naive_heterogeneity_scheme_relion_style
local_resolution = locres.local_resolution
recombine_estimates = locres.recombine_estimates
prior_iteration_relion_style_batch = regularization.prior_iteration_relion_style_batch


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


class Corners:
    """Voxels and weights of trilinear interpolation at the pixels of an image's central slice, within the sphere RECOVAR uses."""

    def __init__(self, frequency: Any, volume_shape: tuple[int, int, int]) -> None:
        self.frequency = np.asarray(frequency, np.float32)
        self.pixels = np.flatnonzero((self.frequency**2).sum(-1) <= (volume_shape[0] // 2 - 1) ** 2)
        self.volume_shape = volume_shape

    def __call__(self, rotation: Any) -> tuple[Any, Any]:
        plane = self.frequency[self.pixels] @ np.asarray(rotation, np.float32)[:2]
        return corners(plane + np.float32(self.volume_shape[0] // 2), self.volume_shape[0])


@numba.njit
def corners(points: Any, n: int) -> tuple[Any, Any]:
    """Grid points (P, 3) of a cube of n voxels a side -> the eight voxels around each (P, 8), and their weights; none outside."""
    index = np.empty((len(points), 8), np.int32)
    weight = np.empty((len(points), 8), np.float32)
    one = np.float32(1)
    for p in range(len(points)):
        x, y, z = points[p]
        i, j, k = int(np.floor(x)), int(np.floor(y)), int(np.floor(z))
        x, y, z = x - np.float32(i), y - np.float32(j), z - np.float32(k)
        inside = min(i, j, k) >= 0 and max(i, j, k) < n - 1
        for c in range(8):
            a, b, d = c >> 2, (c >> 1) & 1, c & 1
            w = (x if a else one - x) * (y if b else one - y) * (z if d else one - z)
            if inside or (min(i + a, j + b, k + d) >= 0 and max(i + a, j + b, k + d) < n):
                index[p, c], weight[p, c] = ((i + a) * n + j + b) * n + k + d, w
            else:
                index[p, c], weight[p, c] = 0, 0
    return index, weight


@functools.lru_cache(maxsize=2)
def padded_transform(volume: bytes, n: int) -> Any:
    """Fourier transform of a volume of n voxels a side in a box twice as large, flat, centred like RECOVAR's; of single precision."""
    padded = np.pad(np.frombuffer(volume, np.float32).reshape(n, n, n), n // 2)
    return np.fft.fftshift(fft.fftn(np.fft.fftshift(padded))).ravel()


@numba.njit
def slice_volume(volume: Any, index: Any, weight: Any, out: Any) -> None:
    for q in range(len(index)):
        value = np.complex64(0)
        for c in range(8):
            value += weight[q, c] * volume[index[q, c]]
        out[q] = value


def project_mask(volume: Any, rotations: Any) -> Any:
    """Projections (B, n, n) of the mask `volume`; of the slices, half the pixels say all."""
    rotations = np.asarray(rotations)
    n = round(np.asarray(volume).size ** (1 / 3))
    transform = padded_transform(np.asarray(volume, np.float32).tobytes(), n)
    slices = mask_slices(2 * n)
    values = np.empty(len(slices.pixels), np.complex64)
    images = np.zeros((len(rotations), 2 * n * (n + 1)), np.complex64)
    for i, rotation in enumerate(rotations):
        slice_volume(transform, *slices(rotation), values)
        images[i, slices.pixels] = values
    real = fft.irfft2(np.fft.ifftshift(images.reshape(-1, 2 * n, n + 1), axes=1), s=(2 * n, 2 * n))
    return np.ascontiguousarray(np.fft.ifftshift(real, axes=(1, 2))[:, n // 2 : 3 * n // 2, n // 2 : 3 * n // 2])


@functools.lru_cache(maxsize=2)
def mask_slices(n: int) -> Corners:
    y, x = np.meshgrid(np.arange(-(n // 2), n // 2), np.arange(n // 2 + 1), indexing="ij")
    return Corners(np.stack([x.ravel(), y.ravel()], -1), (n, n, n))


def tight_mask(
    volume_mask: Any,
    rotation_matrices: Any,
    image_mask: Any,
    mask_threshold: float,
    image_shape: tuple[int, int],
    volume_shape: tuple[int, int, int],
    grid_size: int,
    padding: int,
    disc_type: str,
    binary: bool = True,
    soften: int = -1,
) -> Any:
    """Where an image sees the mask, from the mask or, in compiled functions, from its projections as `projections` gives them.

    The original transforms the padded mask for every batch and takes all pixels of complex slices.
    """
    if isinstance(volume_mask, jax.core.Tracer) and volume_mask.ndim < 4:
        options = (mask_threshold, image_shape, volume_shape, grid_size, padding, disc_type, binary, soften)
        return get_per_image_tight_mask(volume_mask, rotation_matrices, image_mask, *options)
    if padding or not binary:
        raise NotImplementedError("padded images and masks that are not binary")
    masks = jnp.asarray(projections(volume_mask, rotation_matrices))[..., 0]
    return soften_masks((masks > mask_threshold) * (1 if image_mask is None else image_mask[None]), image_shape, soften)


@functools.partial(jax.jit, static_argnums=(1, 2))
def soften_masks(masks: Any, image_shape: tuple[int, int], soften: int) -> Any:
    if soften <= 0:
        return masks
    kernel = fourier_transform_utils.get_dft2_real(mask.make_soft_edged_kernel(soften, image_shape).astype(jnp.float32))
    masks = fourier_transform_utils.get_dft2_real(masks.astype(jnp.float32)) * kernel[None]
    return fourier_transform_utils.get_idft2_real(masks, image_shape=image_shape)


def projections(volume_mask: Any, rotations: Any) -> Any:
    """The mask's projections (B, n, n, 1); the fourth axis tells them from a volume."""
    return volume_mask if volume_mask is None or volume_mask.ndim == 4 else project_mask(volume_mask, rotations)[..., None]


def projecting(function: Any, place: int) -> Any:
    """A function of images, their rotations and, as argument number `place`, the volume's mask, given the mask's projections instead."""

    @functools.wraps(function)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        rotations = named["rotation_matrices"] if "rotation_matrices" in named else arguments[place + 1]
        given = list(arguments)
        if isinstance(given[place], ModelState):
            given[place] = dataclasses.replace(given[place], volume_mask=projections(given[place].volume_mask, rotations))
        else:
            given[place] = projections(given[place], rotations)
        return function(*given, **named)

    return wrapped


@numba.njit
def columns_near(coordinates: Any, rotation: Any, picked: Any, width: float, side: int, out: Any) -> Any:
    """Kernel of every picked frequency (C, 3) on an image's pixels (P, 3), written to out (C, P) for those columns that touch the slice.

    Pixels are in the order of an FFT.  Returns which columns they are; out needs to be zero, and only their rows are written.
    """
    active = np.empty(len(picked), np.int64)
    count = 0
    middle = coordinates[0]  # pixel of frequency zero
    reach = np.empty(3)
    for axis in range(3):
        reach[axis] = width * (abs(rotation[axis, 0]) + abs(rotation[axis, 1]) + abs(rotation[axis, 2])) + 1e-3
    place = np.empty(3)
    for c in range(len(picked)):
        for axis in range(3):
            place[axis] = 0
            for i in range(3):
                place[axis] += (picked[c, i] - middle[i]) * rotation[axis, i]
        if abs(place[2]) >= reach[2]:
            continue
        found = False
        for y in range(max(-(side // 2), int(np.ceil(place[1] - reach[1]))), min(side // 2 - 1, int(np.floor(place[1] + reach[1]))) + 1):
            for x in range(
                max(-(side // 2), int(np.ceil(place[0] - reach[0]))), min(side // 2 - 1, int(np.floor(place[0] + reach[0]))) + 1
            ):
                p = (y % side) * side + x % side
                value = np.float32(1)
                for i in range(3):
                    away = abs(coordinates[p, i] - picked[c, i])
                    value *= np.float32(1) - away / np.float32(width) if away < width else np.float32(0)
                if value > 0:
                    out[count, p] = value
                    found = True
        if found:
            active[count] = c
            count += 1
    return active[:count]


@numba.njit
def insert_columns(active: Any, products: Any, image: Any, ctf: Any, noise: Any, pixels: Any, index: Any, weight: Any, out: Any) -> None:
    """Adds the slices image * product - ctf * noise (one for each active column) to the volumes `out` (C, voxels)."""
    values = np.empty(len(pixels), out.dtype)
    for k in range(len(active)):
        volume = out[active[k]]
        for q in range(len(pixels)):
            p = pixels[q]
            values[q] = image[p] * products[k] - ctf[p] * noise[k, p]
        for q in range(len(pixels)):
            for c in range(8):
                volume[index[q, c]] += weight[q, c] * values[q]


@numba.njit
def insert_squares(active: Any, products: Any, squares: Any, pixels: Any, index: Any, weight: Any, single: Any, out: Any) -> None:
    """Adds the slice `squares` times each active column's product to the volumes out (C, voxels); single (voxels) is zero between calls."""
    touched = np.empty(index.size, np.int64)
    count = 0
    for q in range(len(pixels)):
        for c in range(8):
            v, value = index[q, c], weight[q, c] * squares[pixels[q]]
            if value > 0 and single[v] == 0:
                touched[count] = v
                count += 1
            single[v] += value
    for k in range(len(active)):
        volume, product = out[active[k]], products[k]
        for v in touched[:count]:
            volume[v] += product * single[v]
    for v in touched[:count]:
        single[v] = 0


def covariance_columns(
    cryo: Any, mean_estimate: Any, volume_mask: Any, picked_frequencies: Any, gpu_memory: float, options: Any, **others: Any
) -> tuple[Any, Any]:
    """H and B of one half-set, voxels x columns.

    A column's kernel is zero on most slices; there the original inserts zeros, and transforms them to and fro.  Here such pairs of
    image and column are left out, the others' transforms go in one batch for each image, and H needs one insertion for each image.
    """
    plain = options["right_kernel"] == options["left_kernel"] == "triangular" and options["mask_images_in_H_B"]
    if not plain or others or cryo.tilt_series_flag or cryo.premultiplied_ctf:
        return compute_H_B_for_halfset(cryo, mean_estimate, volume_mask, picked_frequencies, gpu_memory, options, **others)
    config = ForwardModelConfig.from_dataset(cryo, disc_type="cubic" if options["disc_type"] == "cubic" else "linear_interp")
    opts = CovColumnOpts(right_kernel_width=options["right_kernel_width"], mask_images=True, soften_mask=3)
    side, width = config.image_shape[0], float(options["right_kernel_width"])
    size, n = config.volume_size, len(picked_frequencies)
    picked = np.stack(np.unravel_index(np.asarray(picked_frequencies), config.volume_shape), -1).astype(np.float32)
    order = np.fft.ifftshift(np.arange(side * side).reshape(side, side)).ravel()  # of pixels as an FFT has them
    slices = Corners(np.asarray(relion_interp._pixel_frequencies(config.image_shape))[order], config.volume_shape)
    H, B = np.zeros((n, size), np.float32), np.zeros((n, size), np.complex64)
    kernels, single = np.zeros((n, side * side), np.float32), np.zeros(size, np.float32)
    batch = utils.safe_batch_size(utils.get_image_batch_size(cryo.grid_size, gpu_memory))
    for images, rotations, translations, ctf_params, noise, particles, _ in cryo.iter_batches(
        batch, noise_model=cryo.noise, noise_half=False, noise_by_particle=True
    ):
        images, ctf, coordinates, masks, _ = covariance_estimation.preprocess_covariance_batch(
            config,
            cryo.process_images(images),
            rotations,
            translations,
            ctf_params,
            particles,
            jnp.asarray(mean_estimate),
            volume_mask,
            cryo.image_mask,
            opts,
        )
        ctf = np.take(np.asarray(ctf), order, 1)
        images = np.take(np.asarray(images), order, 1) * ctf
        coordinates = np.take(np.asarray(coordinates, np.float32), order, 1)
        noise = np.broadcast_to(np.take(np.asarray(noise).reshape(-1, side * side), order, 1), images.shape)
        masks = np.take(np.asarray(masks).reshape(len(images), -1), order, 1)
        for i, rotation in enumerate(np.asarray(rotations, np.float32)):
            active = columns_near(coordinates[i], rotation, picked, width, side, kernels)
            if not len(active):
                continue
            near, squares = kernels[: len(active)], ctf[i] ** 2
            product, power = (near @ images[i].view(np.float32).reshape(-1, 2)).view(np.complex64)[:, 0], near @ squares
            masked = (near * ctf[i]).astype(np.complex64).reshape(-1, side, side)
            near[:] = 0
            mask = masks[i].reshape(side, side)
            masked = fft.fft2(fft.ifft2(masked, overwrite_x=True) * mask, overwrite_x=True) * noise[i].reshape(side, side)
            masked = fft.fft2(fft.ifft2(masked, overwrite_x=True) * mask, overwrite_x=True).reshape(-1, side * side)
            index, weight = slices(rotation)
            insert_columns(active, product.conj(), images[i], ctf[i], masked, slices.pixels, index, weight, B)
            insert_squares(active, power, squares, slices.pixels, index, weight, single, H)
    return H.T.astype(cryo.dtype), B.T


@numba.njit
def filters(H: Any, shell: Any, prior: Any, sums: Any, out: Any) -> None:
    """Denominators of a column's Wiener filter for one half-set, with the floor that RELION has: a thousandth of the shell's mean."""
    sums[:] = 0
    for v in range(len(H)):
        tau = prior[min(shell[v], len(prior) - 1)]
        if tau >= 1e-20:
            inverse = np.float32(1) / tau
        else:
            inverse = np.float32(1000) / H[v] if H[v] > 1e-20 else np.float32(0)
        out[v] = H[v] + inverse
        if shell[v] < len(prior):
            sums[shell[v], 0] += out[v]
            sums[shell[v], 1] += 1
    for v in range(len(H)):
        s = min(shell[v], len(prior) - 1)
        out[v] = max(out[v], np.float32(sums[s, 0] / sums[s, 1] / 1000), np.float32(1e-16))


@numba.njit
def shell_sums(one: Any, other: Any, weight: Any, shell: Any, prior: Any, sums: Any) -> None:
    """Sums over shells for the FSC and for the prior."""
    sums[:] = 0
    for v in range(len(shell)):
        s = shell[v]
        if s < len(prior):
            a, b, w = one[v], other[v], np.float64(weight[v])
            w = w if w > 0 else 0.0
            denominator = (w + 1 / (np.float64(prior[s]) if prior[s] > 0 else 1e-3)) ** 2
            sums[s, 0] += a.real * b.real + a.imag * b.imag
            sums[s, 1] += a.real**2 + a.imag**2
            sums[s, 2] += b.real**2 + b.imag**2
            sums[s, 3] += w * w / denominator
            sums[s, 4] += w / denominator


def regularise(
    H0: Any,
    H1: Any,
    B0: Any,
    B1: Any,
    shift: Any,
    start: Any,
    subtract: bool,
    shape: Any,
    kernel: str,
    sphere: bool,
    correct: bool,
    volume_mask: Any,
    iterations: int,
    downsample: bool,
) -> tuple[Any, Any, Any]:
    """A batch of covariance columns (C, voxels) from both half-sets' sums, with the prior from their FSC.

    As the original, but column by column, in the order that an FFT has, with all sums over shells taken at once.
    """
    n = shape[0]
    grid = np.fft.fftfreq(n, 1 / n).astype(np.float32)
    radius = np.sqrt(grid[:, None, None] ** 2 + grid[None, :, None] ** 2 + grid[None, None, :] ** 2)
    edge = np.fft.ifftshift(np.asarray(volume_mask).reshape(shape)) if volume_mask is not None else None
    plain = kernel == "triangular" and sphere and correct and not (np.any(shift) or subtract or downsample)
    if not plain or iterations < 1 or edge is None or edge[radius > n // 2].any():
        return prior_iteration_relion_style_batch(
            H0, H1, B0, B1, shift, start, subtract, shape, kernel, sphere, correct, volume_mask, iterations, downsample
        )
    count = n // 2 - 1
    shell = np.round(radius).astype(np.int32).ravel()
    valid = radius.ravel() < count + 1e-7
    # The mask, zero beyond the sphere, so that what the original fills in there is lost; and the correction for trilinear insertion.
    kernel1d = np.sinc(grid / n) ** 2
    multiplier = (edge / kernel1d[:, None, None] / kernel1d[:, None] / kernel1d).astype(np.float32)
    order = np.fft.ifftshift(np.arange(n**3).reshape(shape)).ravel()
    back = np.fft.fftshift(np.arange(n**3).reshape(shape)).ravel()
    inside = np.minimum(shell, count - 1)
    members = np.bincount(shell)[:count]
    sums, pair, denominator = np.empty((count, 5)), np.empty((count, 2)), np.empty(n**3, np.float32)

    def volume(H: Any, B: Any, prior: Any) -> Any:
        filters(H, shell, prior, pair, denominator)
        values = fft.ifftn((B / denominator).reshape(shape), overwrite_x=True)
        values *= multiplier
        return fft.fftn(values, overwrite_x=True).ravel()

    columns, priors, fscs = [], [], []
    for c in range(len(H0)):
        half = [np.asarray(H[c]).real[order].astype(np.float32) for H in (H0, H1)]
        data = [np.asarray(B[c])[order] * valid for B in (B0, B1)]
        weight = (half[0] + half[1]) / 2 * 8
        initial = np.asarray(start[c]).real[order]  # like every prior a function of the shell
        prior = (np.bincount(inside[shell < count], initial[shell < count], count) / members).astype(np.float32)
        for step in range(iterations + 1):
            one, other = (volume(H, B, prior) for H, B in zip(half, data, strict=True))
            shell_sums(one, other, weight, shell, prior, sums)
            means = sums / members[:, None]
            with np.errstate(divide="ignore", invalid="ignore"):
                fsc = means[:, 0] / np.sqrt(means[:, 1] * means[:, 2])
            fsc = np.where(np.isfinite(fsc), fsc, 0).astype(np.float32)
            fsc[0] = fsc[1]
            if step < iterations:
                snr = np.clip(fsc, 1e-3, 1 - 1e-3)
                snr = snr / (1 - snr)
                prior = np.where(means[:, 3] > 0, snr * means[:, 4] / means[:, 3], 1e-16).astype(np.float32)
        columns.append(volume(half[0] + half[1], data[0] + data[1], prior)[back])
        priors.append(prior[inside][back])
        fscs.append(fsc)
    return np.stack(columns), np.stack(priors), np.stack(fscs)


@eqx.filter_jit
def residuals(config: Any, images: Any, rotations: Any, translations: Any, ctf_params: Any, mean: Any) -> tuple[Any, Any]:
    """Half images less the projected mean, and their CTF."""
    images = fourier_transform_utils.full_image_to_half_image(config.process_fn(images), config.image_shape)
    images = core.translate_images(images, translations, config.image_shape, half_image=True)
    projected = core_forward.forward_model(config, mean, ctf_params, rotations, half_image=True)
    return images - projected, config.compute_ctf(ctf_params, half_image=True)


@numba.njit
def slice_basis(table: Any, index: Any, weight: Any, scale: Any, out: Any) -> None:
    """Slices (pixels, K) of the volumes table (voxels, K), each pixel scaled."""
    for q in range(len(index)):
        a, w = index[q], weight[q] * scale[q]
        for k in range(table.shape[1]):
            out[q, k] = (
                (w[0] * table[a[0], k] + w[1] * table[a[1], k])
                + (w[2] * table[a[2], k] + w[3] * table[a[3], k])
                + (w[4] * table[a[4], k] + w[5] * table[a[5], k])
                + (w[6] * table[a[6], k] + w[7] * table[a[7], k])
            )


@numba.njit
def symmetric_products(gram: Any, n: int) -> Any:
    """From gram, the sum over images of products of entries of symmetric matrices A (of the upper triangle, by rows; its own upper
    triangle is read), to the sum of A[i, k] A[j, l] + A[i, l] A[j, k] between orthonormal coordinates of symmetric matrices."""
    size = n * (n + 1) // 2
    packed = np.empty((size, size), np.float32)
    entry = np.empty((n, n), np.int64)
    p = 0
    for i in range(n):
        for j in range(i, n):
            entry[i, j] = entry[j, i] = p
            p += 1
    root = np.float32(np.sqrt(2.0))
    for i in range(n):
        for j in range(i, n):
            for k in range(n):
                for m in range(k, n):
                    a, b = entry[i, k], entry[j, m]
                    value = gram[min(a, b), max(a, b)]
                    if k != m:
                        a, b = entry[i, m], entry[j, k]
                        value = (value + gram[min(a, b), max(a, b)]) / root
                    packed[entry[i, j], entry[k, m]] = value * root if i != j else value
    return packed


def projected_covariance(
    dataset: Any,
    mean_estimate: Any,
    basis: Any,
    volume_mask: Any,
    batch_size: int,
    disc_type: str,
    disc_type_u: str,
    do_mask_images: bool = True,
) -> Any:
    """Covariance in the basis (voxels, K), by least squares.

    The original sums A[i, k] A[j, l] over images as one product for each pair (i, j), and batches of a few images; it is the product of
    the matrix of their A's entries with itself, of which a symmetric A has about half as many.
    """
    odd = isinstance(dataset, (list, tuple)) or dataset.halfset_indices is None or dataset.tilt_series_flag or dataset.premultiplied_ctf
    if odd or do_mask_images or disc_type != "cubic" or disc_type_u != "linear_interp":
        return compute_projected_covariance(dataset, mean_estimate, basis, volume_mask, batch_size, disc_type, disc_type_u, do_mask_images)
    config = ForwardModelConfig.from_dataset(dataset, disc_type=disc_type, process_fn=dataset.process_images)
    mean = jnp.asarray(mean_estimate, dataset.dtype).reshape(config.volume_shape)
    mean = cubic_interpolation.calculate_spline_coefficients(mean)
    gram, rhs = projected_sums(dataset, config, mean, np.asarray(basis, np.complex64))
    lhs = symmetric_products(gram, basis.shape[1])
    del gram
    return covariance_estimation._solve_projected_covariance_system(jnp.asarray(lhs), jnp.asarray(rhs))


def projected_sums(dataset: Any, config: Any, mean: Any, basis: Any, batch: int = 256) -> tuple[Any, Any]:
    """Sums over images of the products of A's entries (upper triangle), and of x x' - M."""
    n = basis.shape[1]
    table = np.concatenate([basis.real, basis.imag], 1).astype(np.float32)
    slices = Corners(relion_interp._pixel_frequencies(config.image_shape, half_image=True), config.volume_shape)
    pixels = slices.pixels
    whole = np.asarray(linalg.rfft2_hermitian_weights(config.image_shape))[pixels]
    upper = np.ravel_multi_index(np.triu_indices(n), (n, n))
    gram = np.zeros((len(upper), len(upper)), np.float32, order="F")
    rhs = np.zeros((n, n))
    projected = np.empty((len(pixels), 2 * n), np.float32)
    for half in range(2):
        for images, rotations, translations, ctf_params, noise, _, _ in dataset.iter_batches(
            batch, noise_model=dataset.noise, noise_half=False, halfset_id=half
        ):
            left, ctf = residuals(config, images, rotations, translations, ctf_params, mean)
            left, ctf = (np.take(np.asarray(values), pixels, 1) * whole for values in (left, ctf))
            noise = fourier_transform_utils.full_image_to_half_image(jnp.asarray(noise), config.image_shape)
            noise = np.broadcast_to(np.sqrt(np.take(np.asarray(noise), pixels, 1)), left.shape)
            entries = np.empty((len(left), len(upper)), np.float32)
            for i, rotation in enumerate(np.asarray(rotations)):
                slice_basis(table, *slices(rotation), ctf[i], projected)
                A = projected.reshape(-1, n)  # real and imaginary part of each pixel, one after the other
                entries[i] = (A.T @ A).ravel()[upper]
                x = left[i].view(np.float32) @ A
                noisy = (projected * noise[i][:, None]).reshape(-1, n)
                rhs += np.outer(x, x) - noisy.T @ noisy
            gram = blas.ssyrk(1, entries.T, beta=1, c=gram, lower=1, overwrite_c=1)
    return gram.T, rhs.astype(np.float32)


@numba.njit
def slice_cubic(table: Any, points: Any, n: int, out: Any) -> None:
    """Cubic B-splines, periodic, with coefficients table (voxels, K), at points (P, 3) of the grid, to out (P, K)."""
    weight = np.empty((3, 4), np.float32)
    place = np.empty((3, 4), np.int64)
    for p in range(len(points)):
        for axis in range(3):
            low = np.floor(points[p, axis])
            t = points[p, axis] - np.float32(low)
            weight[axis, 0] = (1 - t) ** 3
            weight[axis, 1] = 4 - 6 * t**2 + 3 * t**3
            weight[axis, 2] = 4 - 6 * (1 - t) ** 2 + 3 * (1 - t) ** 3
            weight[axis, 3] = t**3
            for i in range(4):
                place[axis, i] = (int(low) - 1 + i) % n
        out[p] = 0
        for i in range(4):
            for j in range(4):
                w = weight[0, i] * weight[1, j]
                start = (place[0, i] * n + place[1, j]) * n
                for k in range(4):
                    row, share = start + place[2, k], w * weight[2, k]
                    for c in range(table.shape[1]):
                        out[p, c] += share * table[row, c]


class Splines:
    """Slices of volumes given by their spline coefficients (K, voxels), at an image's pixels."""

    def __init__(self, coefficients: Any, frequency: Any, n: int) -> None:
        coefficients = np.asarray(coefficients).reshape(len(coefficients), -1).T
        self.table = np.stack([coefficients.real, coefficients.imag], 1).reshape(len(coefficients), -1).astype(np.float32)
        self.frequency, self.n = np.asarray(frequency, np.float32), n
        self.out = np.empty((len(self.frequency), self.table.shape[1]), np.float32)

    def __call__(self, rotation: Any) -> Any:
        """(pixels, 2, K): real and imaginary part."""
        slice_cubic(self.table, self.frequency @ rotation[:2] + np.float32(self.n // 2), self.n, self.out)
        return self.out.reshape(len(self.out), 2, -1)


@functools.lru_cache(maxsize=1)
def model_splines(mean: Any, basis: Any, config: Any) -> Splines:
    """Of the mean and the basis, from half volumes of coefficients; held by the keys' identity."""
    shape = config.volume_shape
    half = jnp.concatenate([mean.array.reshape(1, -1), basis.array.reshape(len(basis.array), -1)])
    full = (
        half
        if half.shape[1] == config.volume_size
        else jax.vmap(fourier_transform_utils.half_volume_to_full_volume, (0, None))(half, shape)
    )
    return Splines(full, relion_interp._pixel_frequencies(config.image_shape, half_image=True), shape[0])


class Same:
    """An array, equal only to itself."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.array is other.array

    def __hash__(self) -> int:
        return id(self.array)


@eqx.filter_jit
def half_images(config: Any, images: Any, translations: Any, ctf_params: Any) -> tuple[Any, Any]:
    images = fourier_transform_utils.full_image_to_half_image(config.process_fn(images).reshape(len(images), -1), config.image_shape)
    return core.translate_images(images, translations, config.image_shape, half_image=True), config.compute_ctf(ctf_params, half_image=True)


def inner_products(
    config: Any, images: Any, model: Any, weights: Any, rotations: Any, translations: Any, ctf_params: Any, noise: Any
) -> Any:
    """Inner products of images, projected mean and projected basis, as the original's first part gives them."""
    splines = model_splines(Same(model.mean_estimate), Same(model.basis), config)
    images, ctf = half_images(config, images, translations, ctf_params)
    scale = np.asarray(weights) / np.sqrt(np.asarray(noise).reshape(-1, images.shape[1]))
    images = np.asarray(images) * scale
    scale = np.broadcast_to(np.asarray(ctf) * scale, images.shape)
    results = []
    for image, factor, rotation in zip(images, scale, np.asarray(rotations, np.float32), strict=True):
        projected = (splines(rotation) * factor[:, None, None]).reshape(2 * len(image), -1)
        flat = image.view(np.float32)
        gram, right = projected.T @ projected, projected.T @ flat
        results.append((right[1:], gram[1:, 0], gram[1:, 1:], flat @ flat, right[0], gram[0, 0]))
    return tuple(jnp.asarray(np.stack(part)) for part in zip(*results, strict=True))


def batch_coordinates(
    config: Any,
    images: Any,
    model: Any,
    opts: Any,
    image_mask: Any,
    contrast_grid: Any,
    contrast_mean: float = 1.0,
    contrast_variance: float = np.inf,
    hermitian_weights: Any = None,
    **data: Any,
) -> Any:
    """Latents of a batch; the splines' weights are the same for the mean and all components, which the original computes for each."""
    others = (opts, image_mask, contrast_grid, contrast_mean, contrast_variance, hermitian_weights)
    if (
        opts.shared_label
        or hermitian_weights is None
        or config.premultiplied_ctf
        or config.disc_type != "cubic"
        or data["noise_variance"] is None
    ):
        return compute_batch_coords(config, images, model, *others, **data)
    where = (data["rotation_matrices"], data["translations"], data["ctf_params"])
    products = inner_products(config, images, model, hermitian_weights, *where, data["noise_variance"])
    return compute_batch_coords(config, products, model, *others, **data)


def given_products(config: Any, images: Any, *arguments: Any, **named: Any) -> Any:
    """The original's first part, or its results where they are given instead of images."""
    return images if isinstance(images, tuple) else compute_batch_coords_p1(config, images, *arguments, **named)


@eqx.filter_jit
def noise_fractions(config: Any, images: Any, translations: Any, ctf_params: Any, projected: Any, masks: Any) -> Any:
    images = core.translate_images(config.process_fn(images), translations, config.image_shape)
    return noise_estimation.get_masked_image_noise_fractions(images - projected * config.compute_ctf(ctf_params), masks, config.image_shape)


@functools.lru_cache(maxsize=1)
def residual_splines(mean: Any, basis: Any, config: Any) -> Splines:
    every = jnp.concatenate([mean.array.reshape(1, -1), basis.array.reshape(config.volume_size, -1).T])
    return Splines(every, relion_interp._pixel_frequencies(config.image_shape), config.volume_shape[0])


def residual_square(
    config: Any,
    images: Any,
    model: Any,
    image_mask: Any,
    contrasts: Any,
    basis_coordinates: Any,
    rotation_matrices: Any,
    translations: Any,
    ctf_params: Any,
) -> Any:
    """Power of what images do not share with their model; the original makes a volume for each image."""
    if config.disc_type != "cubic" or model.volume_mask is None or config.premultiplied_ctf or config.process_fn is None:
        return average_residual_square(
            config,
            images,
            model,
            image_mask,
            contrasts,
            basis_coordinates,
            rotation_matrices=rotation_matrices,
            translations=translations,
            ctf_params=ctf_params,
        )
    splines = residual_splines(Same(model.mean_estimate), Same(model.basis), config)
    weights = np.concatenate([np.ones((len(images), 1), np.float32), np.asarray(basis_coordinates, np.float32)], 1)
    weights = weights * np.asarray(contrasts, np.float32)[:, None]
    projected = [
        np.ascontiguousarray(splines(r) @ w).view(np.complex64)[:, 0]
        for r, w in zip(np.asarray(rotation_matrices, np.float32), weights, strict=True)
    ]
    options = (config.volume_mask_threshold, config.image_shape, config.volume_shape, config.grid_size, config.padding, config.disc_type)
    masks = tight_mask(model.volume_mask, rotation_matrices, image_mask, *options, soften=5)
    return noise_fractions(config, images, translations, ctf_params, np.stack(projected), masks)


@eqx.filter_jit
def weigh(config: Any, images: Any, translations: Any, ctf_params: Any, noise: Any) -> tuple[Any, Any]:
    """What is inserted of half images for a state's volume, and its weights."""
    images = core.translate_images(images, translations, config.image_shape, half_image=True)
    noise = noise_estimation.to_batched_half_pixel_noise(noise, config.image_shape)
    squares = compute_antialiased_ctf_squared(config.ctf, ctf_params, config.image_shape, config.voxel_size, half_image=True)
    return images / noise * config.compute_ctf_half(ctf_params), squares / noise


@functools.lru_cache(maxsize=2)
def weighed(dataset: Any) -> tuple[Any, Any, Any]:
    """All images of a half-set as they are inserted, their weights and rotations; every state needs them."""
    config = ForwardModelConfig.from_dataset(dataset, disc_type="linear_interp", upsampling_factor=1)
    parts = []
    for images, rotations, translations, ctf_params, noise, _, _ in dataset.iter_batches(
        256, noise_model=dataset.noise, noise_half=False, indices=np.arange(dataset.n_images)
    ):
        half = adaptive_kernel_discretization._process_images_half_fast(images, dataset)
        values, weights = weigh(config, half, translations, ctf_params, noise)
        parts.append((np.asarray(values, np.complex64), np.asarray(weights, np.float32), np.asarray(rotations, np.float32)))
    values, weights, rotations = (np.concatenate(part) for part in zip(*parts, strict=True))
    return values, weights, rotations


@numba.njit
def insert_half(
    image: Any, weight: Any, points: Any, mirrored: Any, single: Any, rotation: Any, factor: int, n: int, F: Any, W: Any
) -> None:
    """Adds a half image and its weights to half volumes (n, n, n / 2 + 1) by trilinear insertion, the other half by Friedel's law."""
    middle, depth = n // 2, n // 2 + 1
    one = np.float32(1)
    for p in range(len(image)):
        for side in range(1 if single[p] else 2):
            k = mirrored[p] if side else points[p]
            x = (k[0] * rotation[0, 0] + k[1] * rotation[1, 0]) * factor + middle
            y = (k[0] * rotation[0, 1] + k[1] * rotation[1, 1]) * factor + middle
            z = (k[0] * rotation[0, 2] + k[1] * rotation[1, 2]) * factor + middle
            i, j, m = int(np.floor(x)), int(np.floor(y)), int(np.floor(z))
            x, y, z = np.float32(x - i), np.float32(y - j), np.float32(z - m)
            value = image[p].conjugate() if side else image[p]
            for c in range(8):
                a, b, d = i + (c >> 2), j + ((c >> 1) & 1), m + (c & 1)
                if a < 0 or b < 0 or d < 0 or a >= n or b >= n or d >= n:
                    continue
                w = (x if c >> 2 else one - x) * (y if (c >> 1) & 1 else one - y) * (z if c & 1 else one - z)
                d = middle if d == 0 else d - middle
                if d < 0:
                    v = (((n - a) % n) * n + (n - b) % n) * depth - d
                    F[v] += w * value.conjugate()
                else:
                    v = (a * n + b) * depth + d
                    F[v] += w * value
                W[v] += w * weight[p]


@functools.lru_cache(maxsize=4)
def half_shells(n: int) -> tuple[Any, Any]:
    """Rounded and exact radius of the voxels of a half volume, centred but for the last axis."""
    axis = np.arange(n, dtype=np.float32) - n // 2
    radius = np.sqrt(axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + np.arange(n // 2 + 1, dtype=np.float32) ** 2)
    return np.round(radius).astype(np.int32), radius < n // 2 - 1 + 1e-7


@numba.njit
def quotient(F: Any, W: Any, shell: Any, valid: Any, out: Any) -> None:
    """F over W, with the floor that RELION has, in the order of an FFT."""
    n, _, depth = shell.shape
    count = n // 2 - 1
    sums, members = np.zeros(count), np.zeros(count)
    for i in range(n):
        for j in range(n):
            for k in range(depth):
                s = shell[i, j, k]
                if s < count:
                    share = 1 if k == 0 else 2
                    sums[s] += share * W[i, j, k]
                    members[s] += share
    floor = (sums / members / 1000).astype(np.float32)
    for i in range(n):
        for j in range(n):
            for k in range(depth):
                value = np.complex64(0)
                if valid[i, j, k]:
                    value = F[i, j, k] / max(W[i, j, k], floor[min(shell[i, j, k], count - 1)], np.float32(1e-16))
                out[(i + n // 2) % n, (j + n // 2) % n, k] = value


@functools.lru_cache(maxsize=4)
def finishing(n: int, factor: int) -> tuple[Any, Any]:
    """The soft sphere, and the correction for trilinear insertion."""
    ones = jnp.ones((n, n, n), jnp.float32)
    return np.asarray(mask.soft_mask_outside_map(ones, cosine_width=3)[1]), np.asarray(
        relion_functions.griddingCorrect_square(ones, n, factor, order=1)[1]
    )


def real_map(F: Any, W: Any, n: int, factor: int, sphere: bool, correct: bool) -> Any:
    """Map of n voxels a side from what was inserted into half volumes of n * factor."""
    padded = n * factor
    shape = (padded, padded, padded // 2 + 1)
    values = np.empty(shape, np.complex64)
    quotient(F.reshape(shape), W.reshape(shape), *half_shells(padded), values)
    inner = (np.arange(n) - n // 2) % padded
    values = fft.ifft(values, axis=0, overwrite_x=True)[inner]
    values = fft.ifft(values, axis=1, overwrite_x=True)[:, inner]
    result = fft.irfft(values, padded, axis=2)[:, :, inner]
    soft, kernel = finishing(n, factor)
    if sphere:
        edge = (soft > 0) & (soft < 1)
        background = (result * soft)[edge].sum() / soft[edge].sum()
        result = soft * result + (1 - soft) * background
    return (result / kernel if correct else result).astype(np.float32)


def kernel_estimates(
    dataset: Any,
    signal_variance: Any,
    distances: Any,
    bins: Any,
    batch_size: Any = None,
    tau: Any = None,
    compute_lhs_rhs: bool = False,
    grid_correct: bool = True,
    disc_type: str = "linear_interp",
    use_spherical_mask: bool = True,
    return_lhs_rhs: bool = False,
    heterogeneity_kernel: str = "parabola",
    upsampling_factor: Any = None,
    return_real_space: bool = False,
    use_fast_rfft: bool = False,
) -> Any:
    """Maps of a half-set from images within growing distances of a point in latent space."""
    odd = dataset.tilt_series_flag or dataset.premultiplied_ctf or tau is not None or compute_lhs_rhs or disc_type != "linear_interp"
    if odd or heterogeneity_kernel != "parabola" or not (return_real_space and use_fast_rfft and upsampling_factor):
        return even_less_naive_heterogeneity_scheme_relion_style(
            dataset,
            signal_variance,
            distances,
            bins,
            batch_size,
            tau,
            compute_lhs_rhs,
            grid_correct,
            disc_type,
            use_spherical_mask,
            return_lhs_rhs,
            heterogeneity_kernel,
            upsampling_factor,
            return_real_space,
            use_fast_rfft,
        )
    n = dataset.grid_size
    padded = n * upsampling_factor
    values, weights, rotations = weighed(dataset)
    points, mirrored, single = mirrored_frequencies((n, n))
    size = padded * padded * (padded // 2 + 1)
    F, W = np.zeros((len(bins), size), np.complex64), np.zeros((len(bins), size), np.float32)
    for i, which in enumerate(np.digitize(distances, bins, right=True)):
        if which < len(bins):
            insert_half(values[i], weights[i], points, mirrored, single, rotations[i], upsampling_factor, padded, F[which], W[which])
    # the weight of bin b in the estimate with bandwidth h: 3 / 4 (1 - b / 2h), Epanechnikov's; the first takes its own bin alone
    share = np.maximum(0.75 * (1 - bins[:, None] / (2 * bins[None, :])), 0)
    share[:, 0] = np.arange(len(bins)) == 0
    share = np.ascontiguousarray(share.T, np.float32)
    F, W = (share @ F.view(np.float32)).view(np.complex64), share @ W
    maps = np.stack([real_map(f, w, n, upsampling_factor, use_spherical_mask, grid_correct) for f, w in zip(F, W, strict=True)])
    maps = maps.reshape(len(bins), -1)
    return (maps, W, F) if return_lhs_rhs else maps


@functools.lru_cache(maxsize=2)
def mirrored_frequencies(image_shape: tuple[int, int]) -> tuple[Any, Any, Any]:
    """Frequencies of a half image's pixels, those of their Friedel mates, and which pixels a half image holds twice or alone."""
    height, width = image_shape
    points = np.asarray(relion_interp._pixel_frequencies(image_shape, half_image=True), np.float32)
    rows, columns = np.divmod(np.arange(height * (width // 2 + 1)), width // 2 + 1)
    nyquist = (rows == 0) & (height % 2 == 0)
    return points, np.where(nyquist[:, None], points * np.float32([-1, 1]), -points), (columns == 0) | (2 * columns == width)


def patches(maps: Any, centres: Any, ball: Any) -> Any:
    """Voxels of maps (..., n, n, n) at centres (P, 3) + ball (V, 3), as (..., P, V); zero outside."""
    n, rim = maps.shape[-1], int(np.abs(ball).max())
    padded = np.pad(maps, [(0, 0)] * (maps.ndim - 3) + [(rim, rim)] * 3)
    where = (centres[:, None] + ball[None]) + n // 2 + rim
    flat = np.ravel_multi_index(tuple(np.moveaxis(where, -1, 0)), padded.shape[-3:])
    return padded.reshape(*maps.shape[:-3], -1)[..., flat]


def sphere_of(radius: float) -> Any:
    """Integer points within less than radius of zero (V, 3)."""
    axis = np.arange(-int(np.ceil(radius)), int(np.ceil(radius)) + 1)
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    return grid[(grid**2).sum(-1) < radius**2]


def shell_labels(n: int) -> Any:
    axis = np.fft.fftfreq(n, 1 / n)
    return np.round(np.sqrt(axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis**2)).astype(int)


def toeplitz(values: Any, left: Any, right: Any) -> Any:
    """values (n, n, n), periodic, at left (L, 3) - right (R, 3)."""
    return values[tuple(np.moveaxis((left[:, None] - right[None]) % len(values), -1, 0))]


def choose(
    estimates0: Any,
    estimates1: Any,
    target0: Any,
    target1: Any,
    noise0: Any,
    noise1: Any,
    voxel_size: float,
    locres_sampling: float,
    locres_maskrad: float,
    locres_edgwidth: float,
    smooth_error: bool = False,
) -> tuple[Any, Any]:
    """Which estimate is nearest to the other half-set's target, by shells of small windows; power of a window is a quadratic form."""
    if smooth_error or locres_edgwidth:
        return choice_most_likely_split(
            estimates0,
            estimates1,
            target0,
            target1,
            noise0,
            noise1,
            voxel_size,
            locres_sampling,
            locres_maskrad,
            locres_edgwidth,
            smooth_error,
        )
    radius = int(np.round(locres_maskrad / voxel_size))
    side, ball = 6 * radius, sphere_of(radius)
    points = np.asarray(locres.get_sampling_points(len(target0), locres_sampling, locres_maskrad, voxel_size))
    labels, count = shell_labels(side), side // 2 - 1
    errors = np.zeros((len(estimates0), len(points), count))
    for noise, target, estimates in ((noise0, target0, estimates1), (noise1, target1, estimates0)):
        noise = np.asarray(noise).reshape(target.shape)
        small = locres.subsample_array(fourier_transform_utils.get_idft3(jnp.asarray(noise)), len(target) // 2 + 1, 3 * radius)
        power = np.fft.ifftshift(np.abs(np.asarray(fourier_transform_utils.get_dft3(small)))) * noise.size / small.size
        forms = [toeplitz(np.fft.fftn(power * (labels == s)).real, ball, ball) for s in range(count)]
        aim = patches(np.asarray(target, np.float64), points, ball)
        for e, estimate in enumerate(estimates):
            away = aim - patches(np.asarray(estimate, np.float64), points, ball)
            errors[e] += np.stack([np.einsum("pv,pv->p", away @ form, away) for form in forms], -1)
    return np.argmin(errors, axis=0), errors


@numba.njit
def add_windows(windows: Any, corner: Any, out: Any) -> None:
    """Adds windows (P, s, s, s) with their first voxels at corner (P, 3) to out; what sticks out is lost."""
    n, side = out.shape[0], windows.shape[1]
    for p in range(len(windows)):
        for i in range(max(0, -corner[p, 0]), min(side, n - corner[p, 0])):
            for j in range(max(0, -corner[p, 1]), min(side, n - corner[p, 1])):
                for k in range(max(0, -corner[p, 2]), min(side, n - corner[p, 2])):
                    out[corner[p, 0] + i, corner[p, 1] + j, corner[p, 2] + k] += windows[p, i, j, k]


def recombine(
    estimators: Any, choice: Any, voxel_size: float, locres_sampling: float = 25, locres_maskrad: Any = None, locres_edgwidth: Any = None
) -> Any:
    """Joins windows of the estimates, each shell from the one that was chosen; its filter on the few voxels of a window is a matrix."""
    if locres_maskrad is None or locres_edgwidth:
        return recombine_estimates(estimators, choice, voxel_size, locres_sampling, locres_maskrad, locres_edgwidth)
    radius = int(np.round(locres_maskrad / voxel_size))
    side, ball = 6 * radius, sphere_of(radius)
    n = estimators.shape[1]
    points = np.asarray(locres.get_sampling_points(n, locres_sampling, locres_maskrad, voxel_size))
    count = choice.shape[1]
    labels = np.minimum(shell_labels(side), count - 1)
    axis = np.arange(side) - side // 2
    window = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    bands = [toeplitz(np.fft.ifftn(labels == s).real, ball, window).astype(np.float32) for s in range(count)]
    result = np.zeros((n, n, n))
    for start in range(0, len(points), 512):
        some = slice(start, start + 512)
        voxels = patches(np.asarray(estimators, np.float32), points[some], ball)
        rows = np.arange(voxels.shape[1])
        windows = sum(voxels[choice[some, s], rows] @ band for s, band in enumerate(bands))
        add_windows(windows.reshape(-1, side, side, side), points[some].astype(np.int64) + n // 2 - side // 2, result)
    full = mask.raised_cosine_mask((n, n, n), radius, radius, -1)
    return locres.make_i_fil_map(jnp.asarray(points), jnp.asarray(result.astype(np.float32)), full)


@functools.lru_cache(maxsize=1)
def shell_forms(n: int, radius: int) -> Any:
    ball, labels = sphere_of(radius), shell_labels(n)
    return [toeplitz(np.fft.fftn(labels == s).real, ball, ball) for s in range(n // 2 - 1)]


@numba.njit
def add_filtered(bands: Any, filters: Any, where: Any, edge: Any, out: Any) -> None:
    """Adds to out (voxels) at `where` (P, V) the bands (voxels, L) weighted by each point's filter (P, L) and the window's edge (V)."""
    for p in range(len(where)):
        for v in range(len(edge)):
            value = np.float32(0)
            for s in range(bands.shape[1]):
                value += bands[where[p, v], s] * filters[p, s]
            out[where[p, v]] += value * edge[v]


def local_filter(
    map1: Any,
    map2: Any,
    B_factor: float,
    voxel_size: float,
    locres_sampling: float = 25,
    locres_maskrad: Any = None,
    locres_edgwidth: Any = None,
    locres_minres: float = 50,
    use_filter: bool = True,
    fsc_threshold: float = 1 / 7,
    use_v2: bool = True,
    filter_edgewidth: int = 2,
    filter_map1: bool = False,
) -> Any:
    """Local resolution, and the map filtered by it.

    The original transforms the whole box for every window.  Here a window's FSC comes from quadratic forms on its few voxels, and the
    filter, a function of the shell, from the map's bands.
    """
    if B_factor or use_v2 or not use_filter or filter_map1 or np.iscomplexobj(map1):
        return local_resolution(
            map1,
            map2,
            B_factor,
            voxel_size,
            locres_sampling,
            locres_maskrad,
            locres_edgwidth,
            locres_minres,
            use_filter,
            fsc_threshold,
            use_v2,
            filter_edgewidth,
            filter_map1,
        )
    maskrad, edgewidth = locres._resolve_locres_window(locres_sampling, locres_maskrad, locres_edgwidth)
    radius, width = int(np.round(maskrad / voxel_size)), int(np.round(edgewidth / voxel_size))
    map1, map2 = np.asarray(map1, np.float32), np.asarray(map2, np.float32)
    n, ball = len(map1), sphere_of(radius + width)
    points = np.asarray(locres.get_sampling_points(n, locres_sampling, maskrad, voxel_size))
    distance = np.sqrt((ball**2).sum(-1))
    edge = np.where(distance < radius, 1, 0.5 - 0.5 * np.cos(np.pi * (radius + width - distance) / max(width, 1)))
    one, other = (patches(m.astype(np.float64), points, ball) * edge for m in (map1, map2))
    top, left, right = [], [], []
    for form in shell_forms(n, radius + width):
        product = one @ form
        top.append(np.einsum("pv,pv->p", product, other))
        left.append(np.einsum("pv,pv->p", product, one))
        right.append(np.einsum("pv,pv->p", other @ form, other))
    with np.errstate(divide="ignore", invalid="ignore"):
        fscs = np.stack(top, -1) / np.sqrt(np.stack(left, -1) * np.stack(right, -1))
    fscs = np.where(np.isfinite(fscs), fscs, 0)
    fscs[:, 0] = fscs[:, 1]
    above = fscs >= fsc_threshold
    last = np.where(above.all(-1), fscs.shape[1] - 1, np.argmin(above, -1))
    resolution = np.where(last > 0, n * voxel_size / np.maximum(last, 1), 999)
    resolution = np.minimum(resolution, locres_minres)
    shell = np.arange(n // 2)
    good = np.logical_and.accumulate(fscs >= 1e-4, -1)
    sharp = np.sqrt(np.where(good, 2 * fscs / (1 + fscs), 0))[:, np.minimum(shell, fscs.shape[1] - 1)]
    middle = np.round(n * voxel_size / resolution)[:, None]
    low, high = np.maximum(0, middle - filter_edgewidth // 2), middle + filter_edgewidth // 2
    fall = np.where(shell <= low, 1, 0.0)
    fall = np.where((shell >= low) & (shell < high), 0.5 + 0.5 * np.cos(np.pi * (shell - low) / (high - low)), fall)
    transform, labels = fft.rfftn((map1 + map2) / 2), shell_labels(n)[:, :, : n // 2 + 1]
    bands = np.stack([fft.irfftn(transform * (labels == s), s=map1.shape) for s in shell], -1)
    rim = radius + width
    bands = np.pad(bands, [(rim, rim)] * 3 + [(0, 0)]).reshape(-1, len(shell))
    where = np.ravel_multi_index(tuple(np.moveaxis(points[:, None] + ball[None] + n // 2 + rim, -1, 0)), 3 * (n + 2 * rim,))
    filtered = np.zeros(3 * (n + 2 * rim,), np.float64)
    add_filtered(bands, (sharp * fall).astype(np.float32), where, edge, filtered.reshape(-1))
    filtered = filtered[rim:-rim, rim:-rim, rim:-rim]
    full = mask.raised_cosine_mask(map1.shape, radius, radius + width, -1)
    centres = jnp.asarray(points)
    areas = locres.integral_fscs(jnp.asarray(fscs), 1 / (n * voxel_size))
    return (
        locres.make_i_fil_map(centres, jnp.asarray(filtered, jnp.float32), full),
        locres.make_local_resol_map(centres, jnp.asarray(1 / resolution), full),
        locres.make_auc_map(centres, areas, full),
        fscs,
        resolution,
    )


def install() -> None:
    if jax.default_backend() != "cpu":
        return
    relion_interp.project = project_on_padded
    noise_estimation.average_residual_square = residual_square
    embedding._compute_batch_coords_p1 = given_products
    embedding.compute_batch_coords = batch_coordinates
    relion_interp.backproject = backproject
    covariance_core.get_per_image_tight_mask = tight_mask
    for module, name, place in (
        (covariance_estimation, "variance_relion_kernel_trilinear", 3),
        (noise_estimation, "estimate_noise_variance_from_outside_mask_inner", 1),
        (noise_estimation, "estimate_noise_variance_from_outside_mask_inner_v2", 1),
        (noise_estimation, "average_residual_square", 2),
    ):
        setattr(module, name, projecting(getattr(module, name), place))
    covariance_estimation.compute_H_B_for_halfset = covariance_columns
    regularization.prior_iteration_relion_style_batch = regularise
    covariance_estimation.compute_projected_covariance = projected_covariance
    adaptive_kernel_discretization.even_less_naive_heterogeneity_scheme_relion_style = kernel_estimates
    heterogeneity_volume.choice_most_likely_split = choose
    locres.recombine_estimates = recombine
    locres.local_resolution = local_filter


if __name__ == "__main__":
    install()
    command_line.main_commands()
