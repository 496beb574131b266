"""Docking: where the images themselves say that each part is, at every shape along which part clustering has followed it.

Stage 1 draws a far turn by Gaussians that fade here and come there, and its blurred shapes tell a part hardly from the part turned
half round.  Images near a shape do.  Less what the other parts show of them, they are added up as Fourier slices about the part's
centre; their log-likelihood of the part, drawn as it is at its reference shape, is then a sum over one lattice for any pose of it:
``2 Re <N, F> - <W, |F|^2>``, N the slices times their CTFs, W the CTFs squared, and ``<N, F>^2 / <W, |F|^2>`` at the best strength.
It is searched over all turns and ways, and climbed from the best of them.  Then every part is drawn anew, as all images show it
in its own frame, and docked again: stage 1's blurred drawing of it hardly tells it from itself turned half round, the images do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from cryospire.kernels import insertion as kernel
from cryospire.kernels import render_volume
from cryospire.maths import fourier, insertion
from cryospire.maths.poses import angle_between, even_rotations, exp_so3
from cryospire.training.data import Particles, Rows

BOX = 48  # pixels to which images are cropped
IMAGES = 512  # near each shape
BATCH = 256  # images at once
FINER = 2  # lattice of a part's transform
DRAWN = 16  # shells of the maps in the frames of parts, by which Gaussians are divided
AROUND, EDGE = 2.0, 0.05  # pixels by which a part is blurred, and the fraction of its peak where the mask about it ends
TURNS = 576  # from which a pose is searched
COARSE, MIDDLE = 8, 12  # shells of the search, and of the first climb
TAKEN, APART = 5, 60.0  # poses of the search that are climbed, and degrees between them
STEPS, RATE = 20, 0.5  # of a climb; pixels of the box
REACH = 6  # of them by which a turn of one radian moves a part
FAR = 1 / 4  # of the box, beyond which a part is not searched: noise is stronger where spreading over the lattice has faded the density
GAIN = 15.0  # in log-likelihood, for which a part is moved: the search finds 6 to 13 in noise alone
THERE = 0.4  # of the strength that a part has at its best, but at most of what it is drawn with
NEIGHBOURS = 2**16  # latents at once that are compared with the shapes
SHOWN = 0.5  # of what a part is said to be, without which it is none


@dataclass(frozen=True)
class Views:
    """n images near K shapes as Fourier slices at ``points`` (m, 2), kx and ky: ``slices`` (n, m), transforms about the particle's origin
    times ``transfer`` (n, m), with noise of variance 1 before that; ``rotation`` (n, 3, 3); ``shape`` (n,)."""

    slices: Tensor
    transfer: Tensor
    rotation: Tensor
    shape: Tensor
    points: Tensor
    box: int
    field: float  # side of the images, Å
    unit: float  # density integrated (image unit Å²) that is a coefficient of 1

    @staticmethod
    def of(data: Particles, rows: Rows, latents: Tensor, shapes: Tensor) -> Views:
        """Of at most ``IMAGES`` particles that are nearest to each shape (K, D); ``latents`` (N, D) are those of ``rows`` (N,)."""
        box = min(BOX, data.box)
        nearest = [torch.cdist(some, shapes).min(1) for some in latents.split(NEIGHBOURS)]
        distance, shape = (torch.cat(few) for few in zip(*nearest, strict=True))
        members = [torch.nonzero(shape == s)[:, 0] for s in range(len(shapes))]
        taken = torch.cat([k[distance[k].argsort()[:IMAGES]] for k in members]).sort().values
        chosen = rows[taken.numpy()]
        points = _slice(box)
        ky, kx = points[:, 1], points[:, 0]
        slices, transfers = [], []
        for few in np.split(chosen, range(BATCH, len(chosen), BATCH)):
            transfer = data.transfer(few)
            phase = fourier.shift_phase(data.box, -data.shift[few] / data.pixel_size)
            transform = fourier.rfft(torch.from_numpy(data.read(few)).float()) * phase / data.box
            transfers.append(transfer[:, ky, kx])
            slices.append(transform[:, ky, kx] * transfers[-1])
        at = data.rotation[chosen], shape[taken]
        field, unit = data.box * data.pixel_size, data.box * data.pixel_size**2
        return Views(torch.cat(slices), torch.cat(transfers), *at, points, box, field, unit)

    def places(self, rows: slice) -> Tensor:
        """Frequencies (b, m, 3) of the slices in the frame of the particle: ``R^T (kx, ky, 0)``."""
        return self.points.float() @ self.rotation[rows, :2]


def _slice(box: int) -> Tensor:
    """Points (m, 2), kx and ky, of a slice inside the last shell of the box; of each pair k, -k one."""
    y, x = torch.nonzero(insertion.slice_points(box) & (fourier.shells(box) < box // 2), as_tuple=True)
    return torch.stack([x, torch.where(y < box // 2, y, y - box)], 1)


@dataclass(frozen=True)
class Part:
    """A part in its own frame, about its centre of mass: its ``transform`` (2, n, n, n), real and imaginary, as [kz, ky, kx], and
    ``where`` it lies, a soft mask (box, box, box) from 0 to 1 as [z, y, x]."""

    transform: Tensor
    where: Tensor
    box: int

    @staticmethod
    def of(views: Views, offset: Tensor, amplitude: Tensor, scale: Tensor) -> Part:
        """Of Gaussians ``offset`` (G, 3), Å, from the centre, with ``amplitude`` (G,) and ``scale`` (G,), Å: the projection of each is a
        Gaussian in Fourier space, written down as it is, less what reading between the lattice's points takes from it."""
        x, s = offset.double() / views.field, scale.double() / views.field
        k = torch.arange(-FINER * (views.box // 2), FINER * (views.box // 2) + 1) / FINER
        axes = torch.exp(-2 * (math.pi * s[:, None, None] * k) ** 2 - 2j * math.pi * x[:, :, None] * k)
        axes = (axes / torch.sinc(x / FINER)[:, :, None] ** 2).to(torch.complex64)
        weight = amplitude.double() * (math.sqrt(2 * math.pi) * scale.double()) ** 3 / views.unit
        planes = axes[:, 1, :, None] * axes[:, 0, None, :] * weight[:, None, None]
        transform = torch.einsum("gz,gyx->zyx", axes[:, 2], planes.to(torch.complex64))
        pixel = views.field / views.box
        wide = (scale**2 + (AROUND * pixel) ** 2).sqrt()
        blurred = render_volume(offset, amplitude * (scale / wide) ** 3, wide, views.box, pixel)
        where = (2 * blurred / (EDGE * blurred.max().clamp(min=1e-12)) - 1).clamp(0, 1)
        return Part(torch.stack([transform.real, transform.imag]), where, views.box)

    def drawn(self, volume: Tensor) -> Part:
        """The same part as a map (box, box, box), [z, y, x], in its frame shows it, in the units of ``in_frame``."""
        fine = FINER * self.box
        around = [(fine - self.box) // 2] * 6
        padded = torch.nn.functional.pad(volume * self.where / insertion.gridding(self.box, fine, volume.dtype), around)
        transform = torch.fft.fftshift(torch.fft.fftn(torch.fft.ifftshift(padded)))
        both = torch.stack([transform.real, transform.imag])
        return replace(self, transform=torch.nn.functional.pad(both, [0, 1] * 3))  # frequency box / 2 is beyond the last shell

    def at(self, k: Tensor) -> Tensor:
        """Its transform (...) at frequencies k (..., 3)."""
        grid = (k * (2 / self.box)).reshape(1, 1, 1, -1, 3)
        values = torch.nn.functional.grid_sample(self.transform[None], grid, align_corners=True)
        return torch.complex(*values.view(2, *k.shape[:-1]))


@dataclass(frozen=True)
class Pose:
    """Of a part at K shapes: ``rotation`` (K, 3, 3) from its reference shape, ``centre`` (K, 3) of mass, Å, and ``strength`` (K,)."""

    rotation: Tensor
    centre: Tensor
    strength: Tensor

    @property
    def there(self) -> Tensor:
        """At which shapes (K,; boolean) the part is there."""
        return self.strength > THERE * self.strength.clamp(max=1).max()


def predicted(views: Views, rows: slice, part: Part, pose: Pose) -> Tensor:
    """What the slices (b, m) show of a part, before the CTF."""
    k, shape = views.places(rows), views.shape[rows]
    phase = (k @ pose.centre[shape, :, None])[..., 0] * (-2 * math.pi / views.field)
    return part.at(k @ pose.rotation[shape]) * torch.polar(pose.strength[shape, None].expand_as(phase).contiguous(), phase)


def add(
    views: Views,
    rows: slice,
    slices: Tensor,
    weights: Tensor,
    origin: Tensor,
    rotation: Tensor,
    which: Tensor,
    numerator: Tensor,
    weight: Tensor,
) -> None:
    """Insert ``slices`` (b, m) of images, counted from ``origin`` (b, 3), Å, in the particle's frame, into accumulators ``which`` (b,)."""
    x, y = views.points.T
    phase = (views.places(rows) @ origin[:, :, None])[..., 0] * (2 * math.pi / views.field)
    grid = torch.zeros(2, len(slices), views.box, views.box // 2 + 1, dtype=torch.complex64)
    grid[0, :, y, x], grid[1, :, y, x] = slices * torch.polar(torch.ones_like(phase), phase), weights.to(torch.complex64)
    kernel.insert(numerator, weight, grid[0], grid[1].real, rotation, which)


def remainders(views: Views, others: Sequence[tuple[Part, Pose]]) -> Iterator[tuple[slice, Tensor]]:
    """Rows, ``BATCH`` at a time, and their slices (b, m) less what ``others`` show of them."""
    for start in range(0, len(views.shape), BATCH):
        rows = slice(start, start + BATCH)
        left = views.slices[rows]
        for part, pose in others:
            left = left - views.transfer[rows] ** 2 * predicted(views, rows, part, pose)
        yield rows, left


def in_frame(views: Views, pose: Pose, others: Sequence[tuple[Part, Pose]] = ()) -> Tensor:
    """Map (box, box, box), [z, y, x], of all images where a part is there, in its frame: its motion undone and its centre in the middle;
    its transform is in the units of the slices.  What does not move with it is smeared, or taken away with ``others``.

    Least squares, each coefficient held to 0 as much as one image without CTF would hold it: where no image looks, nothing is made up.
    """
    numerator, weight = insertion.accumulators(1, views.box, 1)
    for rows, left in remainders(views, others):
        shape = views.shape[rows]
        there, turned, one = pose.there[shape, None], views.rotation[rows] @ pose.rotation[shape], torch.zeros_like(shape)
        add(views, rows, left * there, views.transfer[rows] ** 2 * there, pose.centre[shape], turned, one, numerator, weight)
    numerator, weight = insertion.complete(numerator, weight)
    return fourier.irfft(numerator[0] / (weight[0] + 1), 3) / insertion.gridding(views.box, views.box, torch.float32)


def read(volume: Tensor, place: Tensor, field: float) -> Tensor:
    """Values (...) of a map (n, n, n) of side ``field``, Å, at places (..., 3) from its origin; 0 outside."""
    n = len(volume)
    grid = ((place / field + 0.5) * n + 0.5) * (2 / n) - 1  # of voxel centres; the origin is voxel n // 2
    values = torch.nn.functional.grid_sample(volume[None, None], grid.reshape(1, 1, 1, -1, 3), align_corners=False)
    return values.view(place.shape[:-1])


@dataclass(frozen=True)
class Sums:
    """What images near K shapes say of one part about an ``origin`` (K, 3), Å: ``numerator`` (K, L), ``weight`` (K, L) at
    frequencies ``k`` (L, 3) of a half space."""

    numerator: Tensor
    weight: Tensor
    k: Tensor
    origin: Tensor
    field: float  # Å

    @staticmethod
    def of(views: Views, shapes: int, origin: Tensor, others: list[tuple[Part, Pose]]) -> Sums:
        box = views.box
        numerator, weight = insertion.accumulators(shapes, box, 1)
        for rows, left in remainders(views, others):
            shape = views.shape[rows]
            add(views, rows, left, views.transfer[rows] ** 2, origin[shape], views.rotation[rows], shape, numerator, weight)
        numerator, weight = insertion.complete(numerator, weight)
        # Spreading over the lattice has faded the density away from the origin.
        numerator = fourier.rfft(fourier.irfft(numerator, 3) / insertion.gridding(box, box, torch.float32), 3)
        inside = fourier.shells(box, 3) < box // 2
        z, y, x = torch.nonzero(inside, as_tuple=True)
        k = torch.stack([x, torch.where(y < box // 2, y, y - box), torch.where(z < box // 2, z, z - box)], 1).float()
        once = torch.where(x > 0, 1.0, 0.5)  # of the plane kx = 0 both k and -k are here
        return Sums(numerator[:, inside] * once, weight[:, inside] * once, k, origin, views.field)

    def within(self, shell: int) -> Sums:
        """The same up to a shell."""
        kept = self.k.square().sum(1) < (shell + 0.5) ** 2
        return replace(self, numerator=self.numerator[:, kept], weight=self.weight[:, kept], k=self.k[kept])

    def compare(self, part: Part, rotation: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """``<N, F>`` and ``<W, |F|^2>`` (..., K) of a part turned by ``rotation`` (..., K, 3, 3), ``offset`` (..., K, 3) off the origin."""
        value = part.at(self.k @ rotation)
        phase = (self.k @ offset[..., None])[..., 0] * (2 * math.pi / self.field)
        turned = self.numerator * torch.polar(torch.ones_like(phase), phase)
        cross = (turned.real * value.real + turned.imag * value.imag).sum(-1)
        return cross, (self.weight * (value.real**2 + value.imag**2)).sum(-1)


def gain(cross: Tensor, norm: Tensor) -> Tensor:
    """Log-likelihood that the part adds at its best strength."""
    return cross.clamp(min=0) ** 2 / norm.clamp(min=1e-12)


def search(sums: Sums, part: Part, turns: Tensor) -> tuple[Tensor, Tensor]:
    """The ``TAKEN`` best of ``turns`` (T, 3, 3), ``APART`` from each other, each at the offset that suits it best, for each shape:
    (TAKEN, K, 3, 3), (TAKEN, K, 3)."""
    low = sums.within(COARSE)
    side = 3 * COARSE  # points of the search along an axis
    value = part.at(low.k @ turns)  # (T, L)
    norm = low.weight @ (value.real**2 + value.imag**2).T  # (K, T)
    x, y, z = low.k.long().T
    both = torch.where(x > 0, 1.0, 2.0)
    rotations, offsets = [], []
    alike = angle_between(turns[:, None], turns) < APART
    far = torch.fft.ifftshift(fourier.radius(side, 3)) > FAR * side
    for n, w in zip(low.numerator, norm, strict=True):
        spectrum = torch.zeros(len(turns), side, side, side // 2 + 1, dtype=torch.complex64)
        spectrum[:, z, y, x] = n * both * value.conj()
        found = torch.fft.irfftn(spectrum, (side,) * 3, norm="forward") / 2
        cross, at = found.masked_fill(far, -torch.inf).flatten(1).max(1)
        left, best = gain(cross, w), []
        for _ in range(TAKEN):
            best.append(int(left.argmax()))
            left = left.masked_fill(alike[best[-1]], -torch.inf)
        place = torch.stack(torch.unravel_index(at[best], (side,) * 3)[::-1], 1)
        rotations.append(turns[best])
        offsets.append(((place + side // 2) % side - side // 2) * (sums.field / side))
    return torch.stack(rotations, 1), torch.stack(offsets, 1)


def climb(sums: Sums, part: Part, rotation: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Poses (C, K, 3, 3), (C, K, 3) after steps that raise their log-likelihood (Adam)."""
    move = torch.zeros(*offset.shape[:-1], 6, requires_grad=True)
    adam = torch.optim.Adam([move], RATE, (0.8, 0.9))  # few steps: a short memory

    def pose() -> tuple[Tensor, Tensor]:
        return exp_so3(move[..., :3] / REACH) @ rotation, offset + move[..., 3:] * (sums.field / part.box)

    for step in range(STEPS):
        adam.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        adam.zero_grad()
        (-gain(*sums.compare(part, *pose())).sum()).backward()
        adam.step()
    with torch.no_grad():
        return pose()


def look(sums: Sums, part: Part, pose: Pose, near: Tensor, turns: Tensor | None) -> Pose:
    """The pose of a part at every shape that images prefer: its own, unless another explains them better by more than ``GAIN``.

    ``near`` (K, 2): for each shape two whose poses are tried as well, and those of a search over ``turns`` (T, 3, 3).
    """
    own = pose.rotation, pose.centre - sums.origin
    rotation = torch.cat([pose.rotation[None], pose.rotation[near].transpose(0, 1)])
    offset = torch.cat([pose.centre[None], pose.centre[near].transpose(0, 1)]) - sums.origin
    if turns is not None:
        found, way = search(sums, part, turns)
        rotation, offset = torch.cat([rotation, found]), torch.cat([offset, way])
    rotation, offset = climb(sums.within(MIDDLE), part, rotation, offset)
    with torch.no_grad():
        worth = torch.stack([gain(*sums.compare(part, r, o)) for r, o in zip(rotation, offset, strict=True)])
    worth[0] += GAIN
    best, shapes = worth.argmax(0), torch.arange(len(near))
    (rotation,), (offset,) = climb(sums, part, rotation[None, best, shapes], offset[None, best, shapes])
    with torch.no_grad():
        better = gain(*sums.compare(part, rotation, offset)) > gain(*sums.compare(part, *own)) + GAIN
        rotation, offset = torch.where(better[:, None, None], rotation, own[0]), torch.where(better[:, None], offset, own[1])
        cross, norm = sums.compare(part, rotation, offset)
    return Pose(rotation, offset + sums.origin, (cross / norm.clamp(min=1e-12)).clamp(min=0))


def dock(
    views: Views,
    parts: list[Part],
    poses: list[Pose],
    faint: list[bool],
    doubtful: bool,
    still: int,
    near: Tensor,
    done: Callable[[], None] = lambda: None,
) -> tuple[list[Pose], list[bool]]:
    """Poses of parts, each judged without what the others show of the images, in the order given; and which parts are one.
    The one that is ``still`` is near where it was found: it is what the particles were aligned by; the others are searched everywhere,
    but not what is ``faint``, which would be found in whatever the others leave of the images.

    ``doubtful``: what is faint may be another part that was not recognised where it stands; it is left out until all others have been
    docked, and is no part if the images then do not show it where it was.  ``near`` (K, K): the shapes in the order of their distance
    from each.  ``done`` is called after each part, for progress.
    """
    poses, turns, real = list(poses), even_rotations(TURNS), [not (f and doubtful) for f in faint]
    for p in sorted(range(len(parts)), key=lambda p: faint[p]):
        others = [(parts[q], poses[q]) for q in range(len(parts)) if q != p and real[q]]
        sums = Sums.of(views, len(near), poses[p].centre, others)
        if faint[p] and doubtful:
            real[p] = shown(sums, parts[p], poses[p])
        if real[p]:
            poses[p] = look(sums, parts[p], poses[p], near[:, 1:3], None if p == still or faint[p] else turns)
        done()
    return poses, real


def shown(sums: Sums, part: Part, pose: Pose) -> bool:
    """Whether the images show a part at its poses, with the strength that is expected of it."""
    cross, norm = sums.compare(part, pose.rotation, pose.centre - sums.origin)
    return float((pose.strength * cross).sum()) > SHOWN * float((pose.strength**2 * norm).sum())
