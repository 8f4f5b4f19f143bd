"""The network's side of an adaptation: features, what reaches the last layer, and both put back."""

import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel

from fracture.dataset.format import Dataset, images_of
from fracture.dataset.sampler import choose_originals, measure_names
from fracture.errors import UsageError
from fracture.evaluation.adaptation import LastLayer, LocalCases
from fracture.evaluation.metrics import Figure, auc_within_folds
from fracture.evaluation.report import format_figure
from fracture.evaluation.scores import BLOCK_ROWS, read_blocks, run_in_batches, tabulate_scores
from fracture.inference.batch_prediction import BlockReader, Input, plan_blocks
from fracture.inference.bundle import Bundle
from fracture.inference.scoring import Rows
from fracture.progress import Progress

FEWEST_IMAGES = 100
_MOST_COMPARED = 2000  # radiographs that are scored aligned, too: each takes as long as its score did
_STANDARDISE = "standardise"


class AlignedFigures(BaseModel):
    """The AUC on one image of each radiograph, with features as they are, and standardised by those images' own."""

    radiographs: int
    plain: Figure
    aligned: Figure

    @property
    def summary(self) -> str:
        """Return the result in a line."""
        return (
            f"AUC {format_figure(self.aligned)} with features standardised by these images, and "
            f"{format_figure(self.plain)} without, on one image of each of {self.radiographs:,} radiographs: "
            "fracture adapt --align makes such a model"
        )


def check_alignable(bundle: Bundle, inputs: Sequence[Input]) -> None:
    """Raise UsageError where the network has no standardised features, or the images are too few."""
    if bundle.config.backbone is None:
        raise UsageError(
            f"--align: the network {bundle.config.model.name} has no standardised features to align. Leave it out, or "
            "train a pretrained network, such as model.name=mobilenetv2."
        )
    if (count := sum(map(len, inputs))) < FEWEST_IMAGES:
        raise UsageError(_too_few(count))


def _too_few(count: int) -> str:
    return (
        f"--align: {count:,} images that can be read are too few: the mean and variance of a feature over fewer than "
        f"{FEWEST_IMAGES} are chance. Name more local images; they need no labels."
    )


def align(model: Any, inputs: Sequence[Input], image_size: int, progress: Progress) -> int:
    """Set the moments of the layer `standardise` to those of local images.

    Returns:
        The number of images that could be read.

    Raises:
        UsageError: they are too few.
    """
    import keras

    network = keras.Model(model.input, model.get_layer(_STANDARDISE).input)
    total, parts = sum(map(len, inputs)), []
    for images, done in _read_images(inputs, image_size):
        parts.append(run_in_batches(network, images))
        progress("features", done, total)
    features = np.concatenate(parts) if parts else np.empty((0, 1), np.float32)
    if len(features) < FEWEST_IMAGES:
        raise UsageError(_too_few(len(features)))
    model.get_layer(_STANDARDISE).set_weights([features.mean(0, np.float64), features.var(0, np.float64)])
    return len(features)


def _read_images(inputs: Sequence[Input], image_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yield blocks of the images that can be read, [N, S, S, 1] uint8, and the number of images so far, read or not."""
    reader, done = BlockReader(list(inputs), image_size, uuid.uuid4().hex), 0
    for block in plan_blocks(inputs, BLOCK_ROWS):
        table = reader(block)
        done += len(table)
        readable = table.filter(table["image"].is_valid())
        if len(readable):
            yield images_of(readable, image_size), done


def compute_cases(model: Any, bundle: Bundle, dataset: Dataset, rows: Rows, progress: Progress) -> LocalCases:
    """Compute what reaches the last layer, and the probabilities, for rows of a dataset.

    Args:
        model: that of the bundle, its features aligned or not.
    """
    import keras

    network, layer = keras.Model(model.input, model.get_layer("logit").input), read_last_layer(model)
    total, done = sum(int(chosen.sum()) for chosen in rows.values()), 0
    tables, parts = [], []
    for split, chosen in rows.items():
        for block, numbers in read_blocks(dataset, split, np.flatnonzero(chosen)):
            parts.append(run_in_batches(network, images_of(block, dataset.image_size)))
            tables.append(tabulate_scores(block, split, numbers, layer.score(parts[-1])[:, np.newaxis]))
            done += len(numbers)
            progress("score", done, total)
    config = bundle.config.evaluation
    return LocalCases(pa.concat_tables(tables).combine_chunks(), np.concatenate(parts), layer, config)


def compare_aligned(model: Any, dataset: Dataset, scores: pa.Table, progress: Progress) -> AlignedFigures | None:
    """Score one image of each radiograph with features as they are, and aligned, for which no label is needed.

    Copies would count as often as they are there, see `choose_originals`.

    Args:
        model: that of a bundle, with a backbone.
        scores: of `score_rows`, of the split test.

    Returns:
        The figures; None where the radiographs are too few, or of one class.
    """
    import keras

    chosen = scores.take(_choose_images(scores))
    labels, groups = chosen["label"].to_numpy(), chosen["group_id"].to_numpy()
    if len(chosen) < FEWEST_IMAGES or len(np.unique(labels)) < 2:
        return None
    layer, parts, done = model.get_layer(_STANDARDISE), [], 0
    network, head = keras.Model(model.input, layer.input), keras.Model(layer.output, model.output)
    for block, numbers in read_blocks(dataset, "test", chosen["row"].to_numpy()):
        parts.append(run_in_batches(network, images_of(block, dataset.image_size)))
        done += len(numbers)
        progress("align", done, len(chosen))
    features = np.concatenate(parts)
    own, local = layer.get_weights(), (features.mean(0, np.float64), features.var(0, np.float64))
    plain, aligned = (
        auc_within_folds(
            labels,
            head.predict_on_batch((features - mean) / np.sqrt(variance + layer.epsilon))[:, 0],
            groups,
            np.zeros(len(labels)),
        )
        for mean, variance in (own, local)
    )
    return AlignedFigures(radiographs=len(chosen), plain=plain, aligned=aligned)


def _choose_images(scores: pa.Table) -> np.ndarray:
    """Return the row of one image of each radiograph, ascending; of many, a seed chooses `_MOST_COMPARED`."""
    radiograph_ids, labels = scores["radiograph_id"].to_numpy(), scores["label"].to_numpy()
    rows = choose_originals(radiograph_ids, labels, measure_names(scores["source"].to_pylist()))
    return np.sort(np.random.default_rng(0).permutation(rows)[:_MOST_COMPARED])


def read_last_layer(model: Any) -> LastLayer:
    """Return the weights of the layer `logit`."""
    kernel, bias = model.get_layer("logit").get_weights()
    return LastLayer(kernel[:, 0].astype(np.float64), float(bias[0]))


def set_last_layer(model: Any, layer: LastLayer) -> None:
    """Set the weights of the layer `logit`."""
    model.get_layer("logit").set_weights([layer.kernel[:, None], np.array([layer.bias])])
