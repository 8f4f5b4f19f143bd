"""Scoring a dataset with finished models: in this process, or on as many workers as a training has.

On workers, actors of Ray take parts of the dataset in turn. A probability is the same wherever it is computed, where
all devices are of one kind.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fracture.config import ComputeConfig
from fracture.dataset.format import Dataset
from fracture.errors import RunError, UsageError
from fracture.evaluation.scores import BLOCK_ROWS, Ensemble, limit_devices, score_blocks
from fracture.inference.bundle import Bundle
from fracture.runtime.cluster import check_capacity, count_workers_on_nodes, resources_per_worker

_LEAST_IMAGES = 500  # of a worker; fewer take less time here than its start
_PARTS = 16  # of each worker's share, for progress and for workers that differ in speed
_RETRIES = 3  # of a part whose worker is lost

Rows = Mapping[str, np.ndarray]  # split -> [rows] bool
Progress = Callable[[str, int, int | None], None]  # name, done, total


def score_rows(
    bundles: Sequence[Bundle],
    dataset: Dataset,
    rows: Rows,
    compute: ComputeConfig,
    start: Callable[[], None],
    progress: Progress = lambda name, done, total: None,
    *,
    flips: bool = False,
) -> pa.Table:
    """Score rows of a dataset with the mean of the models' probabilities.

    Args:
        rows: the rows to score, of some splits.
        compute: the workers; they score if they have more than this process does, see `count_scoring_workers`.
        start: starts Ray; called where workers score.
        flips: whether each image is averaged with its mirror image.

    Returns:
        The columns of `score_blocks`, one row for each true in `rows`, split by split and in row order.

    Raises:
        UsageError: the workers do not fit on the cluster, or a bundle or a shard is damaged.
        RunError: workers are lost again and again.
    """
    total = sum(int(chosen.sum()) for chosen in rows.values())
    workers = count_scoring_workers(compute, total, os.cpu_count() or 1)
    if workers:
        start()
        check_capacity(compute)
        parts = score_on_workers(bundles, dataset, rows, compute, workers, flips=flips)
    else:
        scorer = _Scorer(bundles, dataset, rows, flips)
        parts = (scorer.score(*part) for part in _plan_parts(dataset, rows, 1))
    tables: list[pa.Table] = []
    done = 0
    for table in parts:
        tables.append(table)
        done += len(table)
        progress("score", done, total)
    scores = pa.concat_tables(tables)
    in_order = (scores.filter(pc.equal(scores["split"], split)).sort_by("row") for split in rows)
    return pa.concat_tables(in_order).combine_chunks()


def count_scoring_workers(compute: ComputeConfig, images: int, cpus: int) -> int:
    """Return how many workers score so many images; 0: this process does, which has `cpus`.

    Workers score where each gets enough images to be worth its start, and if they have GPUs or more CPUs than here.
    """
    workers = min(compute.workers, images // _LEAST_IMAGES)
    return workers if compute.gpu or workers * compute.cpus_per_worker > cpus else 0


def score_on_workers(
    bundles: Sequence[Bundle], dataset: Dataset, rows: Rows, compute: ComputeConfig, workers: int, *, flips: bool
) -> Iterator[pa.Table]:
    """Yield the scores of parts of the rows, in any order. Ray must be running.

    Raises:
        UsageError, RunError: see `score_rows`.
    """
    import ray
    from ray.exceptions import RayError
    from ray.util import ActorPool

    each = resources_per_worker(compute)
    actor = ray.remote(_Scorer).options(
        num_cpus=each["CPU"], num_gpus=each.get("GPU", 0), max_restarts=_RETRIES, max_task_retries=_RETRIES
    )
    arguments = bundles, dataset, ray.put(rows), flips, compute
    # An actor that waits for a machine would keep the parts that it was given.
    count = max(1, min(workers, count_workers_on_nodes(compute)))
    pool = ActorPool([actor.remote(*arguments) for _ in range(count)])
    parts = _plan_parts(dataset, rows, count)
    try:
        yield from pool.map_unordered(lambda scorer, part: scorer.score.remote(*part), parts)
    except (RunError, UsageError) as error:  # Ray's subclass of it, whose text is the stacks of all processes
        raise error.cause from None  # type: ignore[attr-defined]
    except RayError as error:
        reason = str(error).strip().rpartition("\n")[2]
        raise RunError(f"workers that score were lost again and again: {reason}. Run the command again") from error


def _plan_parts(dataset: Dataset, rows: Rows, workers: int) -> Iterator[tuple[str, int, int]]:
    """Yield split, number of the part, and how many parts the split has; each is every so many-th block."""
    for split in rows:
        parts = max(1, min(_PARTS * workers, -(-dataset.rows(split) // BLOCK_ROWS)))
        yield from ((split, number, parts) for number in range(parts))


class _Scorer:
    """Scores parts of a dataset.

    Args:
        compute: of this process, if it is a worker's.
    """

    def __init__(
        self, bundles: Sequence[Bundle], dataset: Dataset, rows: Rows, flips: bool, compute: ComputeConfig | None = None
    ) -> None:
        self._bundles, self._dataset, self._rows, self._flips, self._compute = bundles, dataset, rows, flips, compute

    @cached_property
    def _model(self) -> Any:
        # Built with the first part and not in the constructor, whose errors Ray gives another form.
        if self._compute:
            limit_devices(self._compute.cpus_per_worker, gpu=self._compute.gpu)
        return Ensemble([bundle.build_model() for bundle in self._bundles], self._flips)

    def score(self, split: str, number: int, parts: int) -> pa.Table:
        return score_blocks(self._model, self._dataset, split, number, parts, only=self._rows[split])
