"""Scoring a dataset with finished models: in this process, or on workers as a training has them.

Workers take parts of the dataset in turn. A part is the same rows wherever it is scored, and so are its probabilities
on devices of one kind.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fracture.config import ComputeConfig, Config
from fracture.dataset.format import Dataset
from fracture.errors import RunError
from fracture.evaluation.devices import hide_gpus, limit_devices
from fracture.evaluation.scores import GPU_BATCH_SIZE, Ensemble, score_range
from fracture.inference.bundle import Bundle
from fracture.progress import Progress
from fracture.runtime.cluster import check_capacity, count_workers_on_nodes, is_on_cluster, resources_per_worker
from fracture.runtime.failures import explain_failure

_PART_ROWS = GPU_BATCH_SIZE
_LEAST_PARTS = 2  # of a worker; fewer take less time here than its start

Rows = Mapping[str, np.ndarray]  # split -> [rows] bool
Part = tuple[str, int, int]  # split, first row, row after the last


def score_rows(
    bundles: Sequence[Bundle],
    dataset: Dataset,
    rows: Rows,
    config: Config,
    start: Callable[[], None],
    progress: Progress = lambda name, done, total: None,
    *,
    flips: bool = False,
) -> pa.Table:
    """Score rows of a dataset with the mean of the models' probabilities.

    Args:
        rows: the rows to score, of some splits.
        config: its `compute` are the workers, on a cluster or with GPUs; its `recovery` how often they may be lost.
        start: starts Ray; called where workers score.
        flips: whether each image is averaged with its mirror image.

    Returns:
        The columns of `score_range`, one row for each true in `rows`, split by split and in row order.

    Raises:
        UsageError: no worker fits on the cluster, or a bundle or a shard is damaged.
        RunError: workers are lost too often, or nothing is scored for `recovery.wait_minutes`.
    """
    parts = plan_parts(rows)
    shared = config.compute.gpu or is_on_cluster()
    if shared:
        hide_gpus()  # they are the workers'
    if shared and (workers := min(config.compute.workers, len(parts) // _LEAST_PARTS)):
        start()
        check_capacity(config.compute.model_copy(update={"workers": 1, "min_workers": None}))
        tables = score_on_workers(bundles, dataset, rows, config, workers, flips=flips)
    else:
        scorer = _PartScorer(bundles, dataset, rows, flips)
        tables = (scorer.score(*part) for part in parts)
    total, done, found = sum(int(chosen.sum()) for chosen in rows.values()), 0, []
    progress("score", done, total)
    for table in tables:
        found.append(table)
        done += len(table)
        progress("score", done, total)
    scores = pa.concat_tables(found)
    in_order = (scores.filter(pc.equal(scores["split"], split)).sort_by("row") for split in rows)
    return pa.concat_tables(in_order).combine_chunks()


def plan_parts(rows: Rows) -> list[Part]:
    """Return the parts that have a row to score, the first one in any case."""
    parts = [
        (split, start, min(start + _PART_ROWS, len(chosen)))
        for split, chosen in rows.items()
        for start in range(0, len(chosen), _PART_ROWS)
    ]
    return [part for part in parts if rows[part[0]][part[1] : part[2]].any()] or parts[:1]


def score_on_workers(
    bundles: Sequence[Bundle], dataset: Dataset, rows: Rows, config: Config, workers: int, *, flips: bool
) -> Iterator[pa.Table]:
    """Yield the scores of the parts, in any order. Ray must be running.

    A worker gets a part when it is ready for one. The part of a worker that is lost goes to another one.

    Raises:
        UsageError, RunError: see `score_rows`.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    recovery, each = config.recovery, resources_per_worker(config.compute)
    actor = ray.remote(_PartScorer).options(num_cpus=each["CPU"], num_gpus=each.get("GPU", 0))
    arguments = bundles, dataset, ray.put(rows), flips, config.compute
    parts, losses, numbers = deque(plan_parts(rows)), 0, itertools.count()
    running: dict[Any, tuple[int, Any, Part | None]] = {}  # call -> number of the worker, worker, its part

    def begin() -> None:
        worker = actor.remote(*arguments)
        running[worker.load.remote()] = next(numbers), worker, None

    for _ in range(max(1, min(workers, count_workers_on_nodes(config.compute)))):
        begin()
    try:
        while parts or any(part for _, _, part in running.values()):
            done, _ = ray.wait(list(running), timeout=60 * recovery.wait_minutes)
            if not done:
                raise RunError(
                    f"nothing was scored for {recovery.wait_minutes:g} minutes, recovery.wait_minutes: no worker could "
                    "start, or a store does not answer. Run the same command again when the cluster has room"
                )
            number, worker, part = running.pop(done[0])
            try:
                table = ray.get(done[0])
            except RayTaskError as error:
                ray.kill(worker)
                raise (explain_failure({number: error.cause}, dataset.folder).error or error) from None
            except RayError as error:
                ray.kill(worker)
                losses += 1
                if losses > recovery.max_failures:
                    reason = explain_failure({number: error}, dataset.folder).reason
                    lost = "1 worker was" if losses == 1 else f"{losses} workers were"
                    text = f"{lost} lost while scoring; of the last, {reason}"
                    raise RunError(f"{text}. Run the same command again") from None
                parts.extendleft([part] if part else [])
                begin()
                continue
            if part:
                yield table
            if parts:
                part = parts.popleft()
                running[worker.score.remote(*part)] = number, worker, part
            else:
                ray.kill(worker)  # whoever waits for its GPU gets it
    finally:
        for _, worker, _ in running.values():
            ray.kill(worker)


class _PartScorer:
    """Scores parts of a dataset.

    Args:
        compute: what this process is given, if it is a worker.
    """

    def __init__(
        self, bundles: Sequence[Bundle], dataset: Dataset, rows: Rows, flips: bool, compute: ComputeConfig | None = None
    ) -> None:
        self._bundles, self._dataset, self._rows, self._flips, self._compute = bundles, dataset, rows, flips, compute

    @cached_property
    def _model(self) -> Any:
        if self._compute:
            limit_devices(self._compute.cpus_per_worker, gpu=self._compute.gpu)
        return Ensemble([bundle.build_measured_network() for bundle in self._bundles], self._flips)

    def load(self) -> None:
        """Build the model; not in the constructor, whose errors Ray gives another form."""
        _ = self._model

    def score(self, split: str, start: int, stop: int) -> pa.Table:
        return score_range(self._model, self._dataset, split, start, stop, self._rows[split])
