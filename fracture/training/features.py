"""Features of a frozen backbone, computed once for each image."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import tensorflow as tf

from fracture.dataset.pipeline import WorkerRows
from fracture.evaluation.scores import batch_size

_AT_ONCE = 32  # images, at least
_BLOCK = 1024


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


def mean_and_variance(rows: WorkerRows, add: Callable[[list[float]], list[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and the variance, [F] each, of the features sampled in the first epoch, over all workers.

    Args:
        add: sums F numbers over all workers; every worker calls it.
    """
    sampled = rows.sampler.rows(0)[rows.batches.start : rows.batches.stop] - rows.first
    views = rows.images.shape[1]
    times = np.bincount(sampled, minlength=len(rows.images)) / (
        rows.sampler.count * views
    )  # how often each row is sampled, as a fraction of all

    def total(of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Return the sum over all workers, [F]; in blocks, since float64 takes twice the memory of the features."""
        starts = range(0, len(times), _BLOCK)
        sums = (np.einsum("n,nkf->f", times[at : at + _BLOCK], of(rows.images[at : at + _BLOCK])) for at in starts)
        return np.array(add(np.sum(list(sums), axis=0).tolist()))

    mean = total(lambda features: features.astype(np.float64))
    return mean, total(lambda features: (features - mean) ** 2)
