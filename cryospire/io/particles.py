"""The schema of ``particles.zarr``: one row a particle in the order of its source, images in shards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryospire.io import stores
from cryospire.io.table import ParticleTable

CHUNK = 2 << 20  # bytes
Array = NDArray[Any]


def create(
    output: Path,
    t: ParticleTable,
    *,
    box: int,
    pixel_size: float,
    power: Array,
    whitening: Array,
    config: Mapping[str, Any],
    seed: int,
    inputs: Mapping[str, Path],
    force: bool = False,
) -> Any:
    """The store with everything but its images, which are to be filled shard by shard.

    ``power`` and ``whitening`` (group, box // 2 + 1); ``config`` tells ``dtype`` and ``shard_mib``.
    """
    o = t.optics
    group = stores.create(output, "particles", config=config, seed=seed, inputs=inputs, pixel_size=pixel_size, box=box, force=force)
    image_bytes = box**2 * np.dtype(config["dtype"]).itemsize
    chunk = max(1, min(CHUNK // image_bytes, len(t)))
    whole = -(-len(t) // chunk)
    shard = chunk * max(1, min((config["shard_mib"] << 20) // (chunk * image_bytes), whole))
    images = group.create_array(
        "images", shape=(len(t), box, box), dtype=config["dtype"], chunks=(chunk, box, box), shards=(shard, box, box), compressors=None,
        dimension_names=("particle", "y", "x"),
    )  # fmt: skip
    images.attrs.update({"long_name": "whitened image, protein positive", "units": "noise standard deviation"})
    rows: list[tuple[str, Array, str, str]] = [
        ("id", t.id, "permanent particle id", ""),
        ("half_set", half_sets(t.half_set, seed), "half-set of the particle, 1 or 2", ""),
        ("pose/rotation", t.rotation.astype(np.float32), "R, x_view = R x_model, acting on (x, y, z)", ""),
        ("pose/shift", t.shift.astype(np.float32), "position (x, y) of the particle's centre; RELION's origin is minus it", "Å"),
        ("ctf/defocus_u", t.defocus_u.astype(np.float32), "larger defocus, underfocus positive", "Å"),
        ("ctf/defocus_v", t.defocus_v.astype(np.float32), "smaller defocus, underfocus positive", "Å"),
        ("ctf/defocus_angle", t.defocus_angle.astype(np.float32), "direction of defocus_u from +x towards +y", "degree"),
        ("ctf/phase_shift", t.phase_shift.astype(np.float32), "phase plate", "degree"),
        ("ctf/scale", t.ctf_scale.astype(np.float32), "scale of the CTF", ""),
        ("ctf/group", t.group, "optics group, a row of optics/*", ""),
        ("source/path", t.stack, "stack, an entry of the root attribute stacks", ""),
        ("source/index", t.index, "image in the stack, from 0", ""),
        ("source/row", t.row, "row of the particle table, from 0", ""),
    ]
    dims = {"pose/rotation": ("particle", "view", "model"), "pose/shift": ("particle", "xy")}
    for name, values, long_name, units in rows:
        stores.put(group, name, values, dims.get(name, ("particle",)), long_name, units)
    for name, values, units in (
        ("voltage", o.voltage, "kV"), ("cs", o.cs, "mm"), ("amplitude_contrast", o.amplitude_contrast, ""),
        ("pixel_size", o.pixel_size, "Å"), ("beam_tilt_x", o.beam_tilt_x, "mrad"), ("beam_tilt_y", o.beam_tilt_y, "mrad"),
    ):  # fmt: skip
        undone = " of the input; undone in the images" if "tilt" in name else " of the input" if name == "pixel_size" else ""
        stores.put(group, f"optics/{name}", values, ("group",), name.replace("_", " ") + undone, units)
    shell = ("group", "shell")
    stores.put(group, "noise/whitening", whitening, shell, "radial filter multiplied into the images' transforms", "1 / image unit")
    stores.put(group, "noise/power", power, shell, "noise variance per Fourier coefficient and pixel", "image unit^2")
    for name, lists, what in (("odd", o.odd_zernike, "undone in the images"), ("even", o.even_zernike, "part of the CTF")):
        if any(any(values) for values in lists):
            table = np.zeros((len(lists), max(map(len, lists))))
            for g, coefficients in enumerate(lists):
                table[g, : len(coefficients)] = coefficients
            stores.put(group, f"optics/{name}_zernike", table, ("group", "coefficient"), f"{name} aberrations (RELION); {what}", "Å^n")
    if o.magnification is not None:
        words = "anisotropic magnification of the input, as rlnMagMat; undone in the images"
        stores.put(group, "optics/magnification", o.magnification, ("group", "row", "column"), words, "")
    group.attrs.update({"stacks": [str(p) for p in t.stacks], "optics_groups": o.name, "source": str(t.source)})
    return group


def half_sets(known: NDArray[np.int8], seed: int) -> NDArray[np.int8]:
    """Half-sets as given; the rest in random halves."""
    out = known.copy()
    rows = np.random.default_rng((seed, 1)).permutation(np.flatnonzero(known == 0))
    out[rows] = 1 + np.arange(len(rows)) % 2
    return out
