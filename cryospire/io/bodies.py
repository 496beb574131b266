"""Parts for other programs: RELION's table of bodies, and a label map for 3DFlex."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Body:
    """A RELION body: its mask, the 1-based body it turns against, and priors on its motion (degrees, Å)."""

    mask: str
    relative_to: int
    sigma_angles: float
    sigma_offset: float


def write_relion(path: Path, bodies: Sequence[Body]) -> None:
    """Table for ``relion_refine --multibody_masks``; bodies come largest first, as RELION wants them."""
    columns = ("BodyMaskName", "BodyRotateRelativeTo", "BodySigmaAngles", "BodySigmaOffsetAngst")
    head = ["data_", "", "loop_", *(f"_rln{name} #{k}" for k, name in enumerate(columns, 1))]
    rows = [f"{b.mask} {b.relative_to} {b.sigma_angles:.2f} {b.sigma_offset:.2f}" for b in bodies]
    path.write_text("\n".join(["", *head, *rows, ""]) + "\n")


def segment(masks: NDArray[np.float32]) -> NDArray[np.float32]:
    """Label map [z, y, x] of masks (P, z, y, x): 0 outside, k + 1 where mask k is the largest and above one half."""
    best = masks.argmax(0)
    return np.where(masks.max(0) > 0.5, best + 1, 0).astype(np.float32)


def tree(centres: NDArray[np.floating]) -> str:
    """Fuse tree ``0>1,0>2`` of segments (0-based): each joined to the nearest that is already in, beginning with the largest (0)."""
    joined, pairs = [0], []
    rest = list(range(1, len(centres)))
    while rest:
        distance = np.linalg.norm(centres[rest][:, None] - centres[joined][None], axis=2)
        i, j = np.unravel_index(distance.argmin(), distance.shape)
        pairs.append(f"{joined[j]}>{rest[i]}")
        joined.append(rest.pop(int(i)))
    return ",".join(pairs)
