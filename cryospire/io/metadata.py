"""Particles of RELION, cryoSPARC and cryoDRGN, read into one table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cryospire.conventions import InputError
from cryospire.io import metadata_cs, metadata_pkl, metadata_relion, metadata_star
from cryospire.io.metadata_pkl import indices
from cryospire.io.metadata_relion import write_star
from cryospire.io.names import images
from cryospire.io.table import Optics, ParticleTable, check_stacks

__all__ = ["Optics", "ParticleTable", "check_stacks", "copy_rows", "image_names", "images", "indices", "read", "write_star"]


def read(
    particles: Path,
    *,
    poses: Path | None = None,
    ctf: Path | None = None,
    ind: Path | None = None,
    passthrough: Sequence[Path] = (),
    datadir: Path | None = None,
) -> ParticleTable:
    """The particle table of a RELION .star, a cryoSPARC .cs (with passthrough files), or a stack with cryoDRGN's pickles.

    ``ind``: rows of any of these to keep, in this order.

    Raises InputError naming file, row and value.  Stacks are found but not opened: see ``check_stacks``.
    """
    for file in (particles, poses, ctf, ind, *passthrough):
        if file and not file.exists():
            seen_from = "" if file.is_absolute() else f" in {Path.cwd()}, from where paths that are not absolute are read"
            raise InputError(f"{file}: No such file{seen_from}")
    kind = particles.suffix
    if kind not in (".star", ".cs", ".mrcs", ".mrc", ".txt"):
        raise InputError(f"{particles}: unknown kind of particle file; expected .star, .cs, .mrcs, .mrc or .txt")
    if kind in (".star", ".cs") and (poses or ctf):
        raise InputError(f"{poses or ctf}: poses and CTFs come with {particles}; give pickles with a bare stack only")
    if kind != ".cs" and passthrough:
        raise InputError(f"{passthrough[0]}: passthrough files go with a .cs table, not with {particles}")
    if kind == ".star":
        table = metadata_relion.read(particles, datadir)
    elif kind == ".cs":
        table = metadata_cs.read(particles, passthrough, datadir)
    else:
        table = metadata_pkl.read(particles, poses, ctf, datadir)
    return table if ind is None else table.take(indices(ind, len(table)))


def image_names(particles: Path, *, passthrough: Sequence[Path] = (), datadir: Path | None = None) -> Sequence[str]:
    """Image name of every row of a particle file, ``000012@stack.mrcs``, from which ids are made.  Raises InputError."""
    if particles.suffix == ".star":
        return metadata_relion.image_names(particles)
    if particles.suffix == ".cs":
        return metadata_cs.image_names(particles, metadata_cs.joined(particles, passthrough))
    return metadata_pkl.image_names(particles, datadir)


def copy_rows(particles: Path, rows: NDArray[np.int64], output: Path, posed: ParticleTable | None = None) -> None:
    """Write a selection of rows (0-based, ascending) in the source's own format: every block, column and byte of a row kept, but for
    poses where ``posed``, the table of these rows, has others."""
    if particles.suffix == ".star":
        block = metadata_relion.particle_block(particles, metadata_star.scan(particles))
        changed = metadata_relion.pose_columns(particles, block.columns, posed) if posed else None
        metadata_star.copy_rows(particles, block, rows, output, changed)
    else:
        metadata_cs.write_rows(particles, rows, output, posed)
