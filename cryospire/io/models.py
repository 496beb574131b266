"""Atomic models: PDB and mmCIF files, plain or gzipped, and the groups a user names in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import gemmi
import numpy as np
from numpy.typing import NDArray

from cryospire.conventions import InputError

GROUP = re.compile(r"^(?P<chain>[^:\s]+)(:(?P<first>-?\d+)-(?P<last>-?\d+))?$")
RESIDUE = re.compile(r"^(?P<chain>[^:\s]+):(?P<number>-?\d+)$")


@dataclass(frozen=True)
class AtomicModel:
    """Heavy atoms, waters left out: ``position`` (A, 3) Å, ``weight`` (A,) electrons; chain, residue number, and whether it is a CA."""

    path: Path
    position: NDArray[np.float64]
    weight: NDArray[np.float64]
    chain: NDArray[np.str_]
    residue: NDArray[np.int64]
    alpha: NDArray[np.bool_]

    def group(self, names: list[str], key: str) -> NDArray[np.bool_]:
        """Atoms (A,) of ``'A'`` (a chain) or ``'A:1-110'`` (its residues, both included).  Raises InputError naming the key."""
        chosen = np.zeros(len(self.weight), bool)
        for name in names:
            match = GROUP.match(name)
            if match is None:
                raise InputError(f"{key}: {name!r} is neither a chain 'A' nor residues 'A:1-110'")
            atoms = self.chain == match["chain"]
            if match["first"] is not None:
                atoms &= (self.residue >= int(match["first"])) & (self.residue <= int(match["last"]))
            if not atoms.any():
                raise InputError(f"{key}: {name!r} selects no atom of {self.path} (chains: {', '.join(sorted(set(self.chain.tolist())))})")
            chosen |= atoms
        return chosen

    def alpha_carbon(self, name: str, key: str) -> NDArray[np.float64]:
        """Position (3,) of the CA of residue ``'A:118'``.  Raises InputError naming the key."""
        match = RESIDUE.match(name)
        if match is None:
            raise InputError(f"{key}: {name!r} is not a residue 'A:118'")
        found = np.flatnonzero(self.alpha & (self.chain == match["chain"]) & (self.residue == int(match["number"])))
        if not len(found):
            raise InputError(f"{key}: {self.path} has no CA of residue {name!r}")
        return self.position[found[0]]


def read(path: Path) -> AtomicModel:
    """First model of the file, first alternative of each atom, hydrogens and waters left out; weights count electrons and occupancy.

    Raises InputError for a file that is missing, unreadable or without atoms.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such atomic model")
    try:
        structure = gemmi.read_structure(str(path))
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(f"{path}: not a PDB or mmCIF file: {' '.join(str(error).split())}") from None
    if not len(structure):
        raise InputError(f"{path}: holds no atoms")
    structure.remove_hydrogens()
    structure.remove_waters()
    structure.remove_alternative_conformations()
    atoms = [(chain.name, residue.seqid.num, atom) for chain in structure[0] for residue in chain for atom in residue]
    if not atoms:
        raise InputError(f"{path}: holds no atoms")
    return AtomicModel(
        path,
        np.array([atom.pos.tolist() for _, _, atom in atoms]),
        np.array([atom.element.atomic_number * atom.occ for _, _, atom in atoms]),
        np.array([chain for chain, _, _ in atoms]),
        np.array([residue for _, residue, _ in atoms]),
        np.array([(atom.name, atom.element.name) == ("CA", "C") for _, _, atom in atoms]),  # a calcium ion is CA too
    )
