import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from fracture.dataset.pipeline import WorkerRows
from fracture.dataset.sampler import BalancedSampler
from fracture.dataset.sharding import ShardedBatches
from fracture.training.features import mean_and_variance


def on_workers(workers: int, work: Callable[[int, Callable], Any]) -> list[Any]:
    """Return what `work(rank, add)` returns on each of several workers at a time; `add` sums over them."""
    barrier, said, found = threading.Barrier(workers), [None] * workers, [None] * workers

    def run(rank: int) -> None:
        def add(own: list[float]) -> list[float]:
            said[rank] = own
            barrier.wait()
            total = np.sum(said, axis=0).tolist()
            barrier.wait()
            return total

        found[rank] = work(rank, add)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("views", [1, 2])
def test_moments_are_those_of_the_samples_of_the_first_epoch_over_all_workers(views: int, workers: int):
    """By radiograph: the normal one is drawn more often than any of the four images of fractures."""
    radiograph_ids, labels = np.array([0, 0, 0, 1, 2]), np.array([1, 1, 1, 1, 0])
    sampler = BalancedSampler(radiograph_ids, labels, "radiograph", seed=0)
    features = np.random.default_rng(0).normal(3, 2, (5, views, 4)).astype(np.float32)

    def work(rank: int, add: Callable[[list[float]], list[float]]) -> tuple[np.ndarray, np.ndarray]:
        batches = ShardedBatches(sampler.count, 2, rank, workers)
        rows = WorkerRows(batches, sampler, 0, features, tf.constant(labels, tf.float32))
        return mean_and_variance(rows, add)

    found = on_workers(workers, work)
    drawn = features[sampler.rows(0)]
    for mean, variance in found:
        assert mean == pytest.approx(drawn.mean((0, 1)), abs=1e-6)
        assert variance == pytest.approx(drawn.var((0, 1)), abs=1e-6)
    assert np.abs(drawn.var((0, 1)) - features.var((0, 1))).max() > 0.01, "copies count less"
