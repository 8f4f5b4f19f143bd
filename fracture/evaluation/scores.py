"""Scoring: the probability of every row of a split, each exactly once, on any number of workers."""

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from math import ceil, log2
from typing import Any

import numpy as np
import pyarrow as pa

from fracture.dataset.format import Dataset, images_of
from fracture.errors import RunError
from fracture.evaluation.operating_point import OperatingPoint
from fracture.labels import SPLITS
from fracture.storage import StoragePath

# Blocks and batches are fixed on a kind of device. So a row is always in a batch with the same others, and gets the
# same probability to the last bit on any number of workers.
BLOCK_ROWS = 64
CPU_BATCH_SIZE = 16  # in float32; a larger batch would need more memory than training
GPU_BATCH_SIZE = 256  # of 224×224 pixels; fewer of larger ones

_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64()),  # within the split
        pa.field("split", pa.string()),
        pa.field("source", pa.string()),
        pa.field("origin", pa.string()),
        pa.field("radiograph_id", pa.int64()),
        pa.field("group_id", pa.int64()),
        pa.field("study_id", pa.int64()),  # null where studies are not known
        pa.field("label", pa.uint8()),
        pa.field("probability", pa.float32()),  # of a fracture
        pa.field("distance", pa.float32()),  # from the training images, 1 at the limit; null where not measured
    ]
)


class Ensemble:
    """The mean probability of several models; with `flips`, the mean over each image and its mirror image."""

    def __init__(self, models: Sequence[Any], flips: bool = False) -> None:
        self._models, self._flips = models, flips

    def predict_on_batch(self, images: np.ndarray) -> np.ndarray:
        """Return the mean of what the models give for images [N, H, W, 1]: [N, 1], or [N, 2] with distances."""
        views = [images, images[:, :, ::-1]] if self._flips else [images]
        return np.mean([model.predict_on_batch(view) for model in self._models for view in views], axis=0)


def batch_size(side: int) -> int:
    """Return how many images of side×side pixels are scored at once on the device of this process."""
    import tensorflow as tf

    if not tf.config.get_visible_devices("GPU"):
        return CPU_BATCH_SIZE
    halvings = max(0, ceil(log2(side**2 / 224**2)))
    return max(CPU_BATCH_SIZE, GPU_BATCH_SIZE >> halvings)


def describe_device() -> str:
    """Return what scores in this process: the GPU's name, or the number of CPUs."""
    import tensorflow as tf

    if gpus := tf.config.get_visible_devices("GPU"):
        return str(tf.config.experimental.get_device_details(gpus[0]).get("device_name", "1 GPU"))
    return f"{os.cpu_count()} CPUs ({platform.machine()})"


def block_rows(side: int) -> int:
    """Return how many rows a worker takes at once: whole batches."""
    return max(BLOCK_ROWS, batch_size(side))


def score(model: Any, images: np.ndarray) -> np.ndarray:
    """Return the probabilities, [N] float32, of images [N, H, W, 1] uint8."""
    return run_in_batches(model, images)[:, 0].astype(np.float32)


def run_in_batches(model: Any, images: np.ndarray) -> np.ndarray:
    """Return what a model makes of images [N, H, W, 1]: [N, ...]."""
    count, size = len(images), batch_size(images.shape[1])
    # Every batch is full, since TensorFlow would compile the model again for another size.
    full = np.concatenate([images, np.zeros_like(images, shape=(-count % size, *images.shape[1:]))])
    parts = [model.predict_on_batch(full[i : i + size]) for i in range(0, len(full), size)]
    return np.concatenate(parts)[:count]


def read_blocks(dataset: Dataset, split: str, numbers: np.ndarray) -> Iterator[tuple[pa.Table, np.ndarray]]:
    """Yield chosen rows of a split, `block_rows` of its rows at most at once, and their numbers.

    Args:
        numbers: [N] int64, ascending.
    """
    step = block_rows(dataset.image_size)
    for start in range(0, dataset.rows(split), step):
        some = numbers[(numbers >= start) & (numbers < start + step)]
        if len(some):
            yield dataset.read(split, int(some[0]), int(some[-1]) + 1).take(some - some[0]), some


def score_blocks(
    model: Any,
    dataset: Dataset,
    split: str,
    rank: int,
    workers: int,
    each_block: Callable[[], None] = lambda: None,
    only: np.ndarray | None = None,
) -> pa.Table:
    """Score every `workers`-th block of a split, starting at block `rank`.

    Args:
        each_block: called after each block.
        only: [rows] bool, the rows to score; blocks without any are not read.

    Returns:
        See `score_range`, of whose arguments the others are.
    """
    rows, step = dataset.rows(split), block_rows(dataset.image_size)
    tables = [_SCHEMA.empty_table()]
    for start in range(rank * step, rows, workers * step):
        tables.append(score_range(model, dataset, split, start, min(start + step, rows), only))
        each_block()
    return pa.concat_tables(tables)


def score_range(
    model: Any, dataset: Dataset, split: str, start: int, stop: int, only: np.ndarray | None = None
) -> pa.Table:
    """Score the rows [start, stop) of a split.

    Args:
        model: Keras model from images [N, H, W, 1] uint8 to probabilities [N, 1], or to [N, 2] with distances.
        only: [rows] bool, of all rows of the split, the ones to score.

    Returns:
        A table of row, split, source, origin, radiograph_id, group_id, study_id, label, probability and distance, in
        row order.
    """
    numbers = np.arange(start, stop) if only is None else start + np.flatnonzero(only[start:stop])
    if not len(numbers):
        return _SCHEMA.empty_table()
    block = dataset.read(split, start, stop)
    block = block if only is None else block.take(numbers - start)
    return tabulate_scores(block, split, numbers, run_in_batches(model, images_of(block, dataset.image_size)))


def tabulate_scores(block: pa.Table, split: str, numbers: np.ndarray, values: np.ndarray) -> pa.Table:
    """Return the table that `score_range` describes.

    Args:
        block: rows of a dataset.
        numbers: [N], of the rows within the split.
        values: [N, 1] probabilities, or [N, 2] with distances.
    """
    distances = values[:, 1] if values.shape[1] > 1 else np.full(len(values), np.nan)
    columns = [
        pa.array(numbers),
        pa.array([split] * len(numbers)),
        block["source"].combine_chunks(),
        block["origin"].combine_chunks(),
        block["radiograph_id"].combine_chunks(),
        block["group_id"].combine_chunks(),
        block["study_id"].combine_chunks(),
        block["label"].combine_chunks(),
        pa.array(values[:, 0], pa.float32()),
        pa.array(distances, pa.float32(), from_pandas=True),  # not a number becomes null
    ]
    return pa.Table.from_arrays(columns, schema=_SCHEMA)


def write_scores(run: StoragePath, scores: pa.Table, split: str, rank: int, workers: int) -> None:
    _scores_file(run, split, rank, workers).write_parquet(scores)


def read_scores(run: StoragePath, dataset: Dataset, split: str, workers: int) -> pa.Table:
    """Read all workers' scores of a split as one table in row order; they are not calibrated yet.

    Raises:
        RunError: a row is missing, or was scored twice.
    """
    parts = [_scores_file(run, split, rank, workers).read_parquet() for rank in range(workers)]
    scores = pa.concat_tables(parts).sort_by("row").combine_chunks()
    if not np.array_equal(scores["row"], np.arange(dataset.rows(split))):
        raise RunError(f"{split}: {scores.num_rows} scores for {dataset.rows(split)} images; run the job again")
    return scores


def gather_scores(run: StoragePath, dataset: Dataset, workers: int, operating_point: OperatingPoint) -> pa.Table:
    """Calibrate the scores of validation and test, and write them as `predictions.parquet` in row order."""
    gathered = pa.concat_tables([read_scores(run, dataset, split, workers) for split in SPLITS[1:]])
    gathered = calibrate_scores(gathered, operating_point)
    write_predictions(run, gathered)
    (run / "scores").delete()
    return gathered


def calibrate_scores(scores: pa.Table, operating_point: OperatingPoint) -> pa.Table:
    """Return the same rows with calibrated probabilities."""
    calibrated = pa.array(operating_point.calibrate(scores["probability"].to_numpy()), pa.float32())
    field = _SCHEMA.field("probability")
    return scores.set_column(scores.schema.get_field_index(field.name), field, calibrated)


def write_predictions(folder: StoragePath, scores: pa.Table) -> None:
    """Write `predictions.parquet`, from which every figure of a report can be computed again."""
    (folder / "predictions.parquet").write_parquet(scores)


def _scores_file(run: StoragePath, split: str, rank: int, workers: int) -> StoragePath:
    return run / "scores" / f"{split}-{rank:05d}-of-{workers:05d}.parquet"
