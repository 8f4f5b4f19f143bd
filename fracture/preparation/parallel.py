"""Maps over files and pairs on Ray: the one file of this room that knows it.

Tasks, not Ray Data: what is mapped is names of files, and Ray Data takes four seconds and two processes to start.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from fracture.errors import RunError, UsageError
from fracture.preparation.duplicates.alignment import Likeness, compare_pairs
from fracture.preparation.facts import stack_views
from fracture.preparation.scan_cache import Cache, view_hashes

Progress = Callable[[str, int, int | None], None]  # what, done, of how many, where that is known


KEPT_EVERY = 300  # seconds of looking that a killed job may lose


_COMPARED_AT_ONCE = 32


def map_tasks(function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    """Results of `function(*task)`, in whatever order they are done; our own errors are raised as they are."""
    import ray

    task = ray.remote(function)
    running = [task.remote(*arguments) for arguments in tasks]
    while running:
        [done], running = ray.wait(running)
        try:
            yield ray.get(done)
        except (RunError, UsageError) as error:  # Ray's own kind of it, which holds the stacks of all processes
            raise error.cause from None  # type: ignore[attr-defined]


class Comparer:
    """Compares pairs of views on all of Ray's workers, which share one copy of them."""

    def __init__(self, facts: pa.Table, cache: Cache, progress: Progress) -> None:
        import ray

        views = stack_views(facts)
        self._hashes = view_hashes(views)
        self._known = cache.likenesses()
        self.asked: dict[bytes, Likeness] = {}
        self._cache, self._kept = cache, time.monotonic()
        self._views = ray.put(views)
        self._progress = progress
        self._done = 0
        self._task = ray.remote(_compare_pairs)

    def __call__(self, pairs: np.ndarray) -> list[Likeness]:
        import ray

        keys = [self._hashes[first] + self._hashes[second] for first, second in pairs.tolist()]
        new = np.flatnonzero([key not in self._known for key in keys])
        chunks = [new[start : start + _COMPARED_AT_ONCE] for start in range(0, len(new), _COMPARED_AT_ONCE)]
        results = [self._task.remote(self._views, pairs[chunk]) for chunk in chunks]
        for chunk, result in zip(chunks, results, strict=True):
            self._known |= zip([keys[number] for number in chunk], ray.get(result), strict=True)
            self._done += len(chunk)
            if time.monotonic() - self._kept > KEPT_EVERY:
                self._cache.keep_likenesses(self._known)
                self._kept = time.monotonic()
            self._progress("compare", self._done, None)  # how many there will be is known at the end
        likenesses = [self._known[key] for key in keys]
        self.asked |= zip(keys, likenesses, strict=True)
        return likenesses


def _compare_pairs(views: np.ndarray, pairs: np.ndarray) -> list[Likeness]:
    import cv2

    cv2.setNumThreads(1)
    return compare_pairs(views, pairs)
