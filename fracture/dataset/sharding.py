"""The division of rows among batches and workers: plain arithmetic, the same on every worker.

A split's rows are cut into as many *slots* as the global batch has rows. A step takes one row from each slot, and a
worker owns whole slots that lie side by side. So every worker reads one stretch of rows, and the global batch of a
step holds the same rows whether 1 worker computes it or 7.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ShardedBatches:
    """The batches of one worker from one split.

    Slots differ in length by at most one row. Each shorter one is idle in one step, and these steps are spread evenly,
    so that batches differ by at most one row too, and no epoch ends with a batch of a few.
    """

    rows: int  # of the split, over all workers
    batch_size: int  # global
    rank: int = 0
    workers: int = 1

    @property
    def steps(self) -> int:
        """Return the number of steps in an epoch, the same on every worker."""
        return -(-self.rows // self.batch_size)

    @property
    def start(self) -> int:
        """Return this worker's first row."""
        return int(self._bounds()[self._first_slot(self.rank)])

    @property
    def stop(self) -> int:
        """Return one past this worker's last row."""
        return int(self._bounds()[self._first_slot(self.rank + 1)])

    def indices(self, seed: int | None, epoch: int = 0) -> np.ndarray:
        """Return row numbers within `[start, stop)`, counted from `start`, for each step; -1 where a slot is idle.

        Args:
            seed: shuffles each slot differently in each epoch; None keeps the rows' order.

        Returns:
            [steps, own slots] int64.
        """
        bounds = self._bounds()
        lengths = np.diff(bounds)
        short = lengths < self.steps
        idle_at = np.where(short, (np.cumsum(short) - 1) % max(self.steps, 1), self.steps)
        first, last = self._first_slot(self.rank), self._first_slot(self.rank + 1)
        table = np.full((self.steps, last - first), -1, np.int64)
        for column, slot in enumerate(range(first, last)):
            order = np.arange(lengths[slot])
            if seed is not None:
                order = np.random.default_rng([seed, epoch, slot]).permutation(order)
            table[np.arange(self.steps) != idle_at[slot], column] = order + bounds[slot] - self.start
        return table

    def batch_rows(self) -> np.ndarray:
        """Return the number of rows in each global batch, [steps] int64."""
        all_slots = ShardedBatches(self.rows, self.batch_size)
        return (all_slots.indices(seed=None) >= 0).sum(axis=1)

    def _bounds(self) -> np.ndarray:
        return np.arange(self.batch_size + 1) * self.rows // self.batch_size

    def _first_slot(self, rank: int) -> int:
        return rank * self.batch_size // self.workers
