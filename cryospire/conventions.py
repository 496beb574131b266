"""Axes, units, signs and ids: the one place where they are written down.

Arrays are ``[particle, y, x]`` and ``[z, y, x]``; vectors and matrices act on ``(x, y, z)``.
The origin is voxel (pixel) ``n // 2``; boxes are even.  Lengths and defocus are in Å (underfocus
positive), voltages in kV, spherical aberration in mm, angles in stores and tables in degrees.

Pose      ``x_view = R x_model``; a particle's image is ``I(p) = ∫ V(R^T (p - shift, z)) dz``, so ``shift``
          (Å, x then y) is where the particle's centre lies; RELION's origin is ``-shift``.
Density   images are ``∫ V dz`` with dz in Å, so a map keeps its scale whatever the pixel size.
Contrast  inside, protein is positive ("white") and the CTF starts at ``+amplitude_contrast``.
"""

from __future__ import annotations

import hashlib


class InputError(Exception):
    """Bad input from the user: one line that names file, row and value.  The command exits with code 2."""


def explained(error: BaseException) -> str:
    """An error in one line; of one from the system, the file first."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or repr(error)


def particle_id(image_name: str) -> int:
    """Permanent id of a particle: 63 bits of BLAKE2b of ``"000012@path/to/stack.mrcs"`` (1-based index)."""
    digest = hashlib.blake2b(image_name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
