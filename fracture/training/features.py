"""Features of a frozen backbone, computed once for each image."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import tensorflow as tf

from fracture.dataset.pipeline import WorkerRows
from fracture.evaluation.scores import batch_size

_AT_ONCE = 32  # images, at least
_BLOCK = 1024
EPSILON = 1e-3  # of Keras' BatchNormalization, by which the network standardises

Moments = tuple[np.ndarray, np.ndarray]  # mean and variance, [F] each


def compute_features(
    backbone: Any, rows: WorkerRows, mirrored: bool, each_part: Callable[[int, int], None]
) -> WorkerRows:
    """Return the rows with features [N, 1 or 2, F] float32 in place of images; the second are of the mirror images.

    Args:
        backbone: Keras model of images [N, S, S, 1] in [0, 255] to features [N, F], outside of any strategy.
        each_part: is called with the number of images that are done, and of all images.
    """
    forward = tf.function(
        lambda images: backbone(images, training=False),
        input_signature=[tf.TensorSpec((None, *rows.images.shape[1:]), tf.uint8)],
        autograph=False,
    )
    count = len(rows.images)
    features = np.empty((count, 1 + mirrored, backbone.output_shape[-1]), np.float32)
    at_once = max(_AT_ONCE, batch_size(rows.images.shape[1]))
    for at in range(0, count, at_once):
        images = rows.images[at : at + at_once]
        features[at : at + at_once, 0] = forward(images)
        if mirrored:
            features[at : at + at_once, 1] = forward(images[:, :, ::-1])
        each_part(min(at + at_once, count), count)
    return replace(rows, images=features)


def mean_and_variance(
    rows: WorkerRows, add: Callable[[list[float]], list[float]], chosen: np.ndarray | None = None
) -> Moments:
    """Return the mean and the variance, [F] each, of the features sampled in the first epoch, over all workers.

    Args:
        add: sums F numbers over all workers; every worker calls it.
        chosen: [rows of the split] bool, the rows that count, of which one is sampled; None for all.
    """
    sampled = rows.sampler.rows(0)
    own = sampled[rows.batches.start : rows.batches.stop]
    if chosen is not None:
        sampled, own = sampled[chosen[sampled]], own[chosen[own]]
    views = rows.images.shape[1]
    times = np.bincount(own - rows.first, minlength=len(rows.images)) / (
        len(sampled) * views
    )  # how often each row is sampled, as a fraction of all

    def total(of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Return the sum over all workers, [F]; in blocks, since float64 takes twice the memory of the features."""
        starts = range(0, len(times), _BLOCK)
        sums = (np.einsum("n,nkf->f", times[at : at + _BLOCK], of(rows.images[at : at + _BLOCK])) for at in starts)
        return np.array(add(np.sum(list(sums), axis=0).tolist()))

    mean = total(lambda features: features.astype(np.float64))
    return mean, total(lambda features: (features - mean) ** 2)


def measure_sources(
    rows: WorkerRows, sources: np.ndarray, add: Callable[[list[float]], list[float]]
) -> dict[str, Moments]:
    """Return the moments of each source that the first epoch samples; there may be one of few images that it does not.

    Args:
        sources: [rows of the split] str.
        add: sums F numbers over all workers; every worker calls it.
    """
    sampled = np.unique(sources[rows.sampler.rows(0)]).tolist()
    return {name: mean_and_variance(rows, add, sources == name) for name in sampled}


def match_sources(rows: WorkerRows, sources: np.ndarray, moments: Mapping[str, Moments], common: Moments) -> WorkerRows:
    """Return the rows with the features [N, K, F] of every source brought to the same mean and variance.

    Args:
        sources: [rows of the split] str.
        moments: source -> mean and variance; the features of other sources stay as they are.
        common: the mean and variance that all get.
    """
    features, own = rows.images.copy(), sources[rows.first : rows.first + len(rows.images)]
    for name, (mean, variance) in moments.items():
        ratio = np.sqrt((common[1] + EPSILON) / (variance + EPSILON))
        features[own == name] = (features[own == name] - mean) * ratio + common[0]
    return replace(rows, images=features)


def average_cases(
    rows: WorkerRows, cases: np.ndarray, add: Callable[[list[float]], list[float]], at_once: int
) -> np.ndarray:
    """Return the mean features of each case over its rows and views, over all workers: [cases, F] float32.

    Args:
        cases: [rows of the split] int, the case of each row, from 0; -1 for none.
        add: sums `at_once` · F numbers over all workers; every worker calls it.
    """
    own = slice(rows.batches.start, rows.batches.stop)  # every row of the split is one worker's own
    features, case_of = rows.images[own.start - rows.first : own.stop - rows.first], cases[own]
    counts, width = np.bincount(cases[cases >= 0]), rows.images.shape[-1]
    averages = np.empty((len(counts), width), np.float32)
    for at in range(0, len(counts), at_once):
        sums = np.zeros((at_once, width))
        chosen = (case_of >= at) & (case_of < at + at_once)
        np.add.at(sums, case_of[chosen] - at, features[chosen].mean(axis=1))
        block = averages[at : at + at_once]
        block[:] = np.reshape(add(sums.ravel().tolist()), sums.shape)[: len(block)]
        block /= counts[at : at + at_once, np.newaxis]
    return averages
