"""Files that ChimeraX opens: Gaussians as .pdb, motion as .bild arrows, and a .cxc script over all of them.

Coordinates are Å in the frame of the maps, whose header origin is zero: voxel 0 lies at 0, so the particle's centre at half the
box.  Files then fit each other, and the refinement's own map, without any script.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]

# One colour a part, the same in ChimeraX and in the report: Okabe and Ito's palette (readable to the colour-blind), cycled.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b3a300", "#7a5195")
CHAINS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"


def colour(part: int) -> str:
    return COLOURS[part % len(COLOURS)]


def chain(part: int) -> str:
    return CHAINS[part % len(CHAINS)]


def pdb_model(centre: Array, occupancy: Array, scale: Array, part: NDArray[np.integer], anchor: NDArray[np.integer]) -> str:
    """One MODEL's atoms: a residue for each Gaussian, chain = part, residue name = anchor (``A00``), B-factor column = scale in Å.

    ``centre`` (G, 3) Å; the chains follow one another.  Columns as in the PDB format, version 3.3; residues beyond 9,999 of a
    chain take insertion codes.
    """
    lines = []
    order = np.lexsort((anchor, part))
    first = np.searchsorted(part[order], part[order])  # where each one's chain begins
    for serial, i in enumerate(order):
        code, number = divmod(serial - int(first[serial]), 9999)
        x, y, z = centre[i]
        residue = f"A{int(anchor[i]) % 100:02d} {chain(int(part[i]))}{number + 1:4d}{(' ' + CHAINS)[code]}"
        lines.append(
            f"HETATM{(serial + 1) % 100_000:5d}  C   {residue}   "
            f"{x:8.3f}{y:8.3f}{z:8.3f}{occupancy[i]:6.2f}{scale[i]:6.2f}           C  "
        )
    return "\n".join(lines)


def write_pdb(path: Path, models: Sequence[str], remarks: Sequence[str]) -> None:
    """Models made by ``pdb_model``, with remarks that say what they are."""
    head = "\n".join(f"REMARK   1 {r}" for r in remarks)
    if len(models) == 1:
        body = models[0]
    else:
        body = "\n".join(f"MODEL     {k:4d}\n{m}\nENDMDL" for k, m in enumerate(models, 1))
    path.write_text(f"{head}\n{body}\nEND\n")


def write_arrows(path: Path, start: Array, stop: Array, part: NDArray[np.integer], shortest: float) -> int:
    """Arrows from ``start`` to ``stop`` (n, 3) Å in the colours of the parts, but for those under ``shortest`` Å.  Returns the number."""
    length = np.linalg.norm(stop - start, axis=1)
    drawn = np.flatnonzero(length >= shortest)
    lines = [f".comment motion of Gaussians, Angstrom; {len(drawn)} of {len(length)} move by {shortest:.1f} or more"]
    for k in np.unique(part[drawn]):
        r, g, b = (int(colour(int(k))[c : c + 2], 16) / 255 for c in (1, 3, 5))
        lines.append(f".color {r:.3f} {g:.3f} {b:.3f}")
        for i in drawn[part[drawn] == k]:
            # Radii grow with the arrow so that long ones stay readable from afar.
            shaft = 0.2 + 0.01 * length[i]
            lines.append(".arrow " + " ".join(f"{v:.3f}" for v in (*start[i], *stop[i], shaft, 3 * shaft, 0.7)))
    path.write_text("\n".join(lines) + "\n")
    return len(drawn)


def contour(volume: Array, share: float = 0.8) -> float:
    """Level above which ``share`` of the positive density lies: a contour that shows the molecule and not its noise."""
    values = np.sort(np.clip(volume, 0, None), axis=None)[::-1]
    total = np.cumsum(values, dtype=np.float64)
    return float(values[np.searchsorted(total, share * total[-1])]) if total[-1] > 0 else 1.0


def write_script(path: Path, level: float, trajectories: Sequence[str], parts: int, masks: Sequence[str]) -> None:
    """``.cxc``: the states as a map series, each trajectory as series, Gaussians and arrows, masks of parts as coloured surfaces.

    Paths are relative to the script.  Everything but the states starts hidden, so nothing covers anything.
    """
    lines = ["# open in ChimeraX; sliders run through the series, the model panel shows and hides", "set bgColor white", "lighting soft"]
    model = 1

    def series(pattern: str, name: str, shade: str) -> None:
        nonlocal model
        lines.extend([
            f'open {pattern} vseries true name "{name}"',
            f"volume #{model} level {level:.6g} color {shade}",
        ])  # fmt: skip
        model += 1

    series("state_*.mrc", "states", "#9db4c0")
    for t, name in enumerate(trajectories):
        series(f"trajectory_{t}_*.mrc", name, "#c9ada7")
        lines.append(f"hide #{model - 1} models")
        lines.append(f'open trajectory_{t}.pdb coordsets true name "Gaussians, {name}"')
        model = _paint(lines, model, parts)
        lines.append(f'open trajectory_{t}.bild name "motion, {name}"')
        lines.append(f"hide #{model} models")
        model += 1
    lines.append('open gaussians.pdb name "Gaussians by part"')
    model = _paint(lines, model, parts)
    for k, mask in enumerate(masks):
        lines.append(f'open "{mask}" name "mask of part {k + 1}"')
        lines.append(f"volume #{model} level 0.5 color {colour(k)} transparency 0.5")
        lines.append(f"hide #{model} models")
        model += 1
    lines.append("view")
    path.write_text("\n".join(lines) + "\n")


def _paint(lines: list[str], model: int, parts: int) -> int:
    """Style the pseudo-atoms just opened, one colour a chain; hidden at first.  Returns the next model's number."""
    lines.append(f"style #{model} sphere; show #{model} atoms; size #{model} atomRadius 1.5")
    lines.extend(f"color #{model}/{chain(k)} {colour(k)}" for k in range(parts))
    lines.append(f"hide #{model} models")
    return model + 1
