from itertools import pairwise

import numpy as np
import pytest

from fracture.dataset.sharding import ShardedBatches

WORKERS = (1, 2, 3, 7)


def rows_by_step(rows: int, batch_size: int, workers: int, seed: int | None, epoch: int = 0) -> list[list[int]]:
    """The rows of each global batch, gathered from all workers."""
    batches = [ShardedBatches(rows, batch_size, rank, workers) for rank in range(workers)]
    tables = [slot.indices(seed, epoch) + np.where(slot.indices(seed, epoch) < 0, 0, slot.start) for slot in batches]
    assert len({table.shape[0] for table in tables}) == 1, "all workers take the same number of steps"
    return [[int(r) for table in tables for r in table[step] if r >= 0] for step in range(batches[0].steps)]


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("rows", [1, 7, 31, 32, 33, 64, 65, 100, 319])
@pytest.mark.parametrize("seed", [None, 0])
def test_each_row_exactly_once_an_epoch(rows: int, workers: int, seed: int | None):
    steps = rows_by_step(rows, 32, workers, seed)
    assert sorted(row for step in steps for row in step) == list(range(rows))


@pytest.mark.parametrize("workers", WORKERS[1:])
def test_a_global_batch_holds_the_same_rows_for_any_number_of_workers(workers: int):
    alone = rows_by_step(100, 32, 1, seed=5, epoch=2)
    shared = rows_by_step(100, 32, workers, seed=5, epoch=2)
    assert [sorted(step) for step in shared] == [sorted(step) for step in alone]


@pytest.mark.parametrize(("rows", "sizes"), [(100, [25, 25, 25, 25]), (96, [32, 32, 32]), (33, [16, 17]), (5, [5])])
def test_batches_differ_by_at_most_one_row(rows: int, sizes: list[int]):
    assert sorted(ShardedBatches(rows, 32).batch_rows()) == sizes


def test_steps_are_rows_over_batch_rounded_up():
    assert [ShardedBatches(rows, 32).steps for rows in (1, 32, 33, 7908)] == [1, 1, 2, 248]


def test_workers_own_stretches_of_rows_side_by_side():
    batches = [ShardedBatches(319, 32, rank, 7) for rank in range(7)]
    assert batches[0].start == 0
    assert all(a.stop == b.start for a, b in pairwise(batches))
    assert batches[-1].stop == 319


def test_each_epoch_and_seed_has_its_own_order_and_repeats_it():
    batches = ShardedBatches(200, 8, rank=1, workers=2)
    assert np.array_equal(batches.indices(3, epoch=4), batches.indices(3, epoch=4))
    assert not np.array_equal(batches.indices(3, epoch=4), batches.indices(3, epoch=5))
    assert not np.array_equal(batches.indices(3, epoch=4), batches.indices(4, epoch=4))
