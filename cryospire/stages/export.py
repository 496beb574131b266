"""A selection of particles back into the program they came from.

The source's rows are copied, never written anew: a star file keeps every block, column and byte of a row (and so
``rlnRandomSubset``), a .cs file its rows bit for bit (and so ``alignments3D/split``), but for poses where refined ones are asked for.
Rows keep the order of the source.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cryospire import log
from cryospire.config import Config
from cryospire.conventions import InputError, particle_id
from cryospire.io import metadata, stores
from cryospire.io.names import key
from cryospire.io.table import ParticleTable
from cryospire.stages import distortions
from cryospire.training.model import trained

Ids = NDArray[np.int64]


def read_ids(path: Path) -> Ids:
    """Ids of a text file with one particle a line: its permanent id, or its image name (``000012@stack.mrcs``)."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or 'not a text file'}") from None
    ids: list[int] = []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if text.isdecimal() and int(text) < 1 << 63:
            ids.append(int(text))
        elif "@" in text and text.partition("@")[0].isdecimal():
            ids.append(particle_id(key(text)))
        elif text:
            raise InputError(f"{path}: line {number}: {text[:60]!r} is neither a particle id nor NUMBER@STACK")
    if len(set(ids)) < len(ids):
        raise InputError(f"{path}: {len(ids) - len(set(ids))} particles are listed twice")
    return np.array(ids, np.int64)


def parse_box(text: str) -> list[tuple[int, float, float]]:
    """``0:-1.5:2,1::0`` as (component, low, high); an empty bound is open."""
    sides = []
    for part in text.split(","):
        try:
            component, low, high = part.split(":")
            sides.append((int(component), float(low or "-inf"), float(high or "inf")))
        except ValueError:
            raise InputError(f"--box: {part!r}: expected COMPONENT:LOW:HIGH, as in 0:-1.5:2") from None
    return sides


def select(analysis: Path, states: Sequence[int], box: str | None) -> Ids:
    """Ids of the particles in any of the states and inside the box of principal coordinates.  Raises InputError."""
    group = stores.open_store(analysis, "analysis")
    ids = stores.read(group, "id")
    kept = np.ones(len(ids), bool)
    if states:
        label = stores.read(group, "clusters/label")
        unknown = sorted(set(states) - set(range(int(label.max()) + 1)))
        if unknown:
            raise InputError(f"{analysis}: there is no state {unknown[0]}; states are 0 to {label.max()}")
        kept &= np.isin(label, states)
    for component, low, high in parse_box(box) if box else []:
        coordinates = stores.read(group, "pca/coordinates")
        if not 0 <= component < coordinates.shape[1]:
            raise InputError(f"{analysis}: --box: there is no component {component}; components are 0 to {coordinates.shape[1] - 1}")
        kept &= (coordinates[:, component] >= low) & (coordinates[:, component] <= high)
    return ids[kept]


def run(
    config: Config,
    output: Path,
    *,
    particles: Path | None = None,
    analysis: Path | None = None,
    states: Sequence[int] = (),
    box: str | None = None,
    ids: Path | None = None,
    poses: Path | None = None,
    force: bool = False,
) -> None:
    """Write the selection to ``output``: .star or .cs like the source, .pkl (cryoDRGN's ind.pkl) or .txt (0-based rows)."""
    source = particles or config.particles
    if (states or box) and analysis is None:
        raise InputError("--state and --box need --analysis, the analysis.zarr that holds them")
    if output.exists() and not force:
        raise InputError(f"{output}: exists; pass --force to replace it")
    if output.exists() and output.samefile(source):
        raise InputError(f"{output}: is the source itself; choose another output")
    if output.suffix not in (source.suffix, ".star", ".pkl", ".txt") or output.suffix in (".mrcs", ".mrc"):
        raise InputError(f"{output}: a selection of a {source.suffix} file can be written as .star, .pkl, .txt or in its own format")
    names = metadata.image_names(source, passthrough=config.passthrough, datadir=config.datadir)
    own = metadata.images(source, "image", names).id
    wanted = own if config.ind is None else own[metadata.indices(config.ind, len(own))]
    if poses is not None:
        if output.suffix not in (".star", ".cs"):
            raise InputError(f"{output}: rows have no poses; with --poses a selection is written as .star or .cs")
        wanted = np.intersect1d(wanted, stores.read(trained(poses), "id"))
    if analysis is not None:
        wanted = select(analysis, states, box)
    if ids is not None:
        listed = read_ids(ids)
        wanted = listed if analysis is None and config.ind is None else np.intersect1d(listed, wanted)
    if not len(wanted):
        raise InputError("the selection is empty: no particle meets every condition")
    rows = np.sort(stores.join(wanted, own, str(source))).astype(np.int64)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{os.getpid()}.{output.name}")
    write(config, source, rows, temporary, refined(config, source, rows, poses) if poses else None)
    temporary.replace(output)
    log.say(f"export     {len(rows):,} of {len(own):,} particles, in the order of {source} -> {output}")
    home = source.resolve().parent
    if output.suffix in (".star", ".cs") and output.resolve().parent != home:
        log.say(f"export     its image paths are those of {source}: read it from there, or with datadir (--datadir) {home}")


def refined(config: Config, source: Path, rows: Ids, poses: Path) -> ParticleTable:
    """The source's table of these rows, with the poses that a training has refined."""
    table, group = metadata.read(source, **config.reading() | {"ind": None}).take(rows), trained(poses)
    there = stores.join(table.id, stores.read(group, "id"), f"{source} against {poses}")
    rotation, shift = (stores.read(group, f"pose/{name}")[there].astype(float) for name in ("rotation", "shift"))
    return distortions.distorted(replace(table, rotation=rotation, shift=shift))


def write(config: Config, source: Path, rows: Ids, output: Path, posed: ParticleTable | None = None) -> None:
    """Write rows of the source in the format that the output's suffix names, with the poses of ``posed``, if given."""
    if output.suffix == ".pkl":
        output.write_bytes(pickle.dumps(rows, protocol=4))
    elif output.suffix == ".txt":
        output.write_text("".join(f"{row}\n" for row in rows))
    elif output.suffix == source.suffix:
        metadata.copy_rows(source, rows, output, posed)
    else:
        metadata.write_star(output, posed or metadata.read(source, **config.reading() | {"ind": None}).take(rows))
