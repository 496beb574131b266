"""Particles of RELION, cryoSPARC and cryoDRGN, read into one table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cryospire.conventions import InputError
from cryospire.io import metadata_cs, metadata_pkl, metadata_relion
from cryospire.io.metadata_relion import write_star
from cryospire.io.table import Optics, ParticleTable, check_stacks

__all__ = ["Optics", "ParticleTable", "check_stacks", "read", "write_star"]


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

    Raises InputError naming file, row and value.  Stacks are found but not opened: see ``check_stacks``.
    """
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
    return table if ind is None else table.take(metadata_pkl.indices(ind, len(table)))
