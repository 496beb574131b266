from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cryospire.io import stores
from cryospire.training.data import Particles, batches, lane_order, prefetch, steps_in_epoch


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 500), st.integers(1, 300), st.integers(1, 40), st.integers(1, 200))
def test_a_lane_visits_every_row_once(start: int, length: int, block: int, held: int) -> None:
    rows = np.concatenate(lane_order(start, start + length, block, held, (0, 1, 2)))
    assert np.array_equal(np.sort(rows), np.arange(start, start + length))


@pytest.fixture(scope="module")
def data(particles: Path) -> Particles:
    return Particles(stores.open_store(particles, "particles"))


def epoch(data: Particles, lanes: range, first: int = 0, memory_mib: int = 16) -> list[np.ndarray]:
    return [b.rows.numpy() for b in batches(data, lanes, 4, 12, memory_mib, seed=3, epoch=1, first=first)]


@pytest.mark.parametrize("ranks", [2, 4])
def test_global_batches_do_not_depend_on_ranks(data: Particles, ranks: int) -> None:
    alone = epoch(data, range(4))
    each = 4 // ranks
    together = zip(*[epoch(data, range(r * each, (r + 1) * each)) for r in range(ranks)], strict=True)
    assert len(alone) == steps_in_epoch(len(data), 4, 12)
    for one, parts in zip(alone, together, strict=True):
        assert np.array_equal(np.sort(one), np.sort(np.concatenate(parts)))
    assert np.array_equal(np.sort(np.concatenate(alone)), np.arange(len(data)))


@pytest.mark.parametrize("ranks", [2, 4])
def test_nor_do_they_where_only_a_part_is_held_in_memory(tmp_path: Path, plant: Callable[..., Path], ranks: int) -> None:
    """400 images in each of four lanes, of which 256 are held at once."""
    images = torch.randn(1600, 16, 16, generator=torch.Generator().manual_seed(0))
    data = Particles(stores.open_store(plant(tmp_path / "particles.zarr", images, torch.eye(3).expand(1600, 3, 3), 4.0), "particles"))
    each = 4 // ranks
    alone, *together = (epoch(data, lanes, memory_mib=1) for lanes in (range(4), *(range(r, r + each) for r in range(0, 4, each))))
    for one, parts in zip(alone, zip(*together, strict=True), strict=True):
        assert np.array_equal(np.sort(one), np.sort(np.concatenate(parts)))


@pytest.mark.parametrize("first", [1, 5, 9, 16])
def test_a_resumed_epoch_goes_on_with_the_same_batches(data: Particles, first: int) -> None:
    for whole, rest in zip(epoch(data, range(4))[first:], epoch(data, range(4), first), strict=True):
        assert np.array_equal(whole, rest)


def test_images_belong_to_their_rows(data: Particles) -> None:
    stored = data.images[...]
    for batch in prefetch(batches(data, range(4), 4, 12, 16, seed=0, epoch=0)):
        assert np.array_equal(batch.images.numpy(), stored[batch.rows.numpy()])
        assert batch.transfer.shape == (len(batch.rows), 16, 9)


def test_every_rank_knows_how_many_images_a_step_has(data: Particles) -> None:
    ranks = [list(batches(data, lanes, 4, 12, 16, 0, 0)) for lanes in (range(2), range(2, 4))]
    for first, second in zip(*ranks, strict=True):
        assert first.total == second.total == len(first.rows) + len(second.rows)


def test_an_error_while_reading_reaches_the_loop() -> None:
    def broken():  # type: ignore[no-untyped-def]
        raise OSError("disk went away")
        yield

    with pytest.raises(OSError, match="disk went away"):
        list(prefetch(broken()))


@pytest.mark.parametrize("half", [1, 2])
def test_a_half_set_alone(particles: Path, data: Particles, half: int) -> None:
    """Every particle of the half once an epoch, with its own image and pose; nothing of the other half."""
    alone = Particles(stores.open_store(particles, "particles"), half)
    where = np.flatnonzero(data.half_set == half)
    assert np.array_equal(alone.id, data.id[where]) and set(alone.half_set) == {half}
    seen = []
    for batch in batches(alone, range(4), 4, 12, 16, seed=0, epoch=0):
        of_all = where[batch.rows.numpy()]
        assert np.array_equal(batch.images.numpy(), data.images[...][of_all])
        assert np.array_equal(batch.rotation.numpy(), data.rotation[of_all].numpy())
        seen.append(of_all)
    assert np.array_equal(np.sort(np.concatenate(seen)), where)
