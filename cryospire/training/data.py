"""Particles for training: a pure plan of every epoch, and a loader that streams it from Zarr shards.

The particles are divided once into ``lanes``, contiguous ranges of rows; a rank owns whole lanes.  A global batch takes the
same number of rows from every lane, so it holds the same particles whatever the number of ranks.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cryospire.conventions import InputError
from cryospire.io import stores
from cryospire.maths.ctf import ctf, zernike_phase
from cryospire.maths.fourier import shells
from cryospire.maths.poses import correction

Rows = NDArray[np.int64]
CPU = torch.device("cpu")


def lane_bounds(particles: int, lanes: int) -> Rows:
    """Row bounds (lanes + 1,) of nearly equal lanes."""
    return np.arange(lanes + 1, dtype=np.int64) * particles // lanes


def lane_order(start: int, stop: int, block: int, held: int, seed: tuple[int, ...]) -> list[Rows]:
    """Order of a lane's rows in one epoch, as groups that are read together.

    Blocks of ``block`` consecutive rows are shuffled, taken ``held`` rows at a time, and rows shuffled in each group: reads
    stay contiguous while a batch mixes rows from all over the lane.
    """
    rng = np.random.default_rng(seed)
    blocks = [np.arange(i, min(i + block, stop), dtype=np.int64) for i in range(start - start % block, stop, block)]
    blocks = [rows[rows >= start] for rows in blocks]
    per_group = max(1, held // block)
    order = rng.permutation(len(blocks))
    groups = [np.concatenate([blocks[k] for k in order[i : i + per_group]]) for i in range(0, len(order), per_group)]
    return [rng.permutation(group) for group in groups]


def steps_in_epoch(particles: int, lanes: int, batch: int) -> int:
    """Global steps: the longest lane's rows over its share of a batch, rounded up."""
    longest = int(np.diff(lane_bounds(particles, lanes)).max())
    return -(-longest // (batch // lanes))


@dataclass(frozen=True)
class Batch:
    rows: Tensor  # (B,) of the particles
    images: Tensor  # (B, box, box), whitened, in the store's precision
    rotation: Tensor  # (B, 3, 3)
    shift: Tensor  # (B, 2) Å
    transfer: Tensor  # (B, box, box // 2 + 1): CTF times whitening
    total: int  # images of the global step, over all ranks

    def to(self, device: torch.device) -> Batch:
        """On the device, images in single precision (torch converts it six times as fast as numpy)."""
        parts = (self.rows, self.images, self.rotation, self.shift, self.transfer)
        rows, images, rotation, shift, transfer = (send(t, device) for t in parts)
        return Batch(rows, images.float(), rotation, shift, transfer, self.total)


def send(values: Tensor, device: torch.device) -> Tensor:
    """On the device.  From pinned memory a GPU fetches in the order of its work, and nobody waits for it."""
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


class Particles:
    """The store's small columns in memory, its images on disk; ``half`` 1 or 2: of that half-set alone.

    Raises InputError where a half-set is empty.
    """

    def __init__(self, group: Any, half: int = 0) -> None:
        half_set = stores.read(group, "half_set")
        self.row = np.flatnonzero(half_set == half) if half else np.arange(len(half_set))  # in the store
        if half and not len(self.row):
            raise InputError(f"{stores.where(group)}: half-set {half} holds no particles")
        self.half_set = half_set[self.row]
        self.id, rotation, shift = (stores.read(group, name)[self.row] for name in ("id", "pose/rotation", "pose/shift"))
        self.rotation, self.shift = torch.from_numpy(rotation).float(), torch.from_numpy(shift).float()
        self.ctf = {
            k: torch.from_numpy(stores.read(group, f"ctf/{k}")[self.row])
            for k in ("defocus_u", "defocus_v", "defocus_angle", "phase_shift", "scale")
        }
        self.group = torch.from_numpy(stores.read(group, "ctf/group")[self.row]).long()
        self.optics = {k: torch.from_numpy(stores.read(group, f"optics/{k}")) for k in ("voltage", "cs", "amplitude_contrast")}
        self.images = group["images"]
        self.box, self.pixel_size = int(group.attrs["box"]), float(group.attrs["pixel_size"])
        self.even = even_phase(group, self.box, self.pixel_size)
        self.block = self.images.chunks[0]
        whitening = torch.from_numpy(stores.read(group, "noise/whitening")).float()
        self.filters = whitening[:, shells(self.box).clamp(max=whitening.shape[1] - 1)]  # (group, box, box // 2 + 1)

    def __len__(self) -> int:
        return len(self.id)

    def to(self, device: torch.device) -> Particles:
        """Move what CTFs are made of, in place: on a GPU they are made faster there than a CPU could make and send them."""
        self.ctf, self.optics = ({k: v.to(device) for k, v in columns.items()} for columns in (self.ctf, self.optics))
        self.group, self.filters = self.group.to(device), self.filters.to(device)
        self.even = None if self.even is None else self.even.to(device)
        return self

    def take_poses(self, group: Any) -> tuple[Tensor, tuple[float, float]]:
        """Poses of the particles that a training, ``discovery.zarr`` or ``model.zarr``, has seen, as it has refined them.

        Returns how they differ from those before (N, 5), and what it has learnt of the spread of that, turns and shifts, in pixels
        (``maths.poses.corrected``); 0 where it has refined nothing.
        """
        given = self.rotation.clone(), self.shift.clone()
        _, at, there = np.intersect1d(self.id, stores.read(group, "id"), return_indices=True)
        self.rotation[at] = torch.from_numpy(stores.read(group, "pose/rotation")[there])
        self.shift[at] = torch.from_numpy(stores.read(group, "pose/shift")[there])
        turn, shift = (float(stores.read(group, f"history/{name}")[-1]) for name in ("turn_sd", "shift_sd"))
        change = correction(*given, self.rotation, self.shift, self.box, self.pixel_size)
        return change, (math.radians(turn) * self.box / 4, shift / self.pixel_size)

    def transfer(self, rows: Rows) -> Tensor:
        """CTF times whitening (B, box, box // 2 + 1) of the given rows, on the device of these particles."""
        index = send(torch.from_numpy(rows), self.group.device)
        group = self.group[index]
        c = {k: v[index].float() for k, v in self.ctf.items()}
        o = {k: v[group].float() for k, v in self.optics.items()}
        values = ctf(
            self.box,
            self.pixel_size,
            c["defocus_u"],
            c["defocus_v"],
            c["defocus_angle"],
            o["voltage"],
            o["cs"],
            o["amplitude_contrast"],
            c["phase_shift"],
            even=None if self.even is None else self.even[group],
        )
        return values.mul_(c["scale"][:, None, None]).mul_(self.filters[group])

    def read(self, rows: Rows) -> NDArray[Any]:
        """Images of rows, block by block as they lie on disk."""
        out = np.empty((len(rows), self.box, self.box), self.images.dtype)
        at = self.row[rows]
        of_block = at // self.block
        for b in np.unique(of_block):
            here = np.flatnonzero(of_block == b)
            out[here] = self.images[b * self.block : (b + 1) * self.block][at[here] - b * self.block]
        return out


def even_phase(store: Any, box: int, pixel_size: float) -> Tensor | None:
    """Phases (group, box, box // 2 + 1) of even aberrations; None where there are none."""
    if "even_zernike" not in store["optics"]:
        return None
    return torch.stack([zernike_phase(box, pixel_size, c, 0) for c in stores.read(store, "optics/even_zernike").tolist()]).float()


def batches(
    data: Particles, lanes: range, all_lanes: int, batch: int, memory_mib: int, seed: int, epoch: int, first: int = 0
) -> Iterator[Batch]:
    """Batches of one epoch for the rank that owns ``lanes``, from global step ``first`` on."""
    bounds = lane_bounds(len(data), all_lanes)
    per_lane = batch // all_lanes
    image_bytes = data.box**2 * data.images.dtype.itemsize
    # Of each lane a group in use and the one read ahead.  A group is what is shuffled, so it must not depend on the number of ranks.
    held = max(per_lane, memory_mib * 2**20 // (2 * all_lanes * image_bytes))
    sizes = np.diff(bounds)
    readers = [_lane_reader(data, int(bounds[k]), int(bounds[k + 1]), held, (seed, epoch, k), per_lane, first) for k in lanes]
    for step in range(first, steps_in_epoch(len(data), all_lanes, batch)):
        parts = [next(reader, None) for reader in readers]
        found = [p for p in parts if p is not None]
        total = int(np.clip(sizes - step * per_lane, 0, per_lane).sum())
        rows = np.concatenate([p[0] for p in found]) if found else np.empty(0, np.int64)
        images = np.concatenate([p[1] for p in found]) if found else np.empty((0, data.box, data.box), np.float32)
        index = torch.from_numpy(rows)
        yield Batch(
            index,
            torch.from_numpy(images),
            data.rotation[index],
            data.shift[index],
            data.transfer(rows),
            total,
        )


def _lane_reader(
    data: Particles, start: int, stop: int, held: int, seed: tuple[int, ...], per_step: int, first: int
) -> Iterator[tuple[Rows, NDArray[Any]]]:
    """``per_step`` rows of a lane and their images for each step; groups wholly before ``first`` are not read."""
    skip = first * per_step
    rows, images = np.empty(0, np.int64), np.empty((0, data.box, data.box), data.images.dtype)
    for group in lane_order(start, stop, data.block, held, seed):
        if skip >= len(group):
            skip -= len(group)
            continue
        # The part of a group that earlier steps used is dropped before reading, so a resumed epoch goes on bit for bit.
        kept = group[skip:]
        skip = 0
        rows, images = np.concatenate([rows, kept]), np.concatenate([images, data.read(kept)])
        while len(rows) >= per_step:
            yield rows[:per_step], images[:per_step]
            rows, images = rows[per_step:], images[per_step:]
    if len(rows):
        yield rows, images


def prefetch(source: Iterator[Batch], device: torch.device = CPU, depth: int = 4) -> Iterator[Batch]:
    """Run ``source`` in a thread, ``depth`` batches ahead, and bring them to the ``device``; its exceptions come out here."""
    ready: queue.Queue[Any] = queue.Queue(depth)
    stop = threading.Event()

    def work() -> None:
        if device.type == "cpu":
            torch.set_num_threads(1)  # of this thread: a team beside the step's on the same cores halves the rate of both
        try:
            for item in source:
                if stop.is_set():
                    return
                ready.put(item.to(device))
            ready.put(None)
        except BaseException as error:
            ready.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        while thread.is_alive():
            try:
                ready.get_nowait()
            except queue.Empty:
                thread.join(0.01)
