"""The metrics of an epoch, from sums over its images that the workers add up once.

Sums can be added over steps, workers and the parts of an interrupted epoch, and each image counts once in each.
"""

import numpy as np
import tensorflow as tf

# Of the AUC, as of keras.metrics.AUC: 0, 1/199, ..., 1. A positive is counted at each threshold below its probability.
_BINS = 199
_LOSSES = 3  # sum of the cross-entropy; of the cross-entropy times the weight; of the weight
SIZE = _LOSSES + 4 + 2 * _BINS  # losses, confusion matrix at 0.5, and a histogram of the probabilities of each class


def cross_entropy(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """Return the binary cross-entropy of each image, [N] float32, from labels in [0, 1] and logits, [N] each."""
    return tf.nn.sigmoid_cross_entropy_with_logits(labels=labels, logits=logits)


def sum_batch(labels: tf.Tensor, logits: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """Return the sums over a batch, [SIZE] float64.

    Args:
        labels: [N] float32, 0 or 1.
        logits: [N] float32.
        weights: [N] float32, of the weighted loss.
    """
    losses, probabilities = cross_entropy(labels, logits), tf.sigmoid(logits)
    losses = tf.stack([tf.reduce_sum(losses), tf.reduce_sum(weights * losses), tf.reduce_sum(weights)])
    is_fracture = tf.cast(labels, tf.int32)
    called = tf.cast(probabilities > 0.5, tf.int32)
    bins = tf.clip_by_value(tf.cast(tf.math.ceil(probabilities * _BINS), tf.int32) - 1, 0, _BINS - 1)
    counts = [_count(2 * is_fracture + called, 4), _count(_BINS * is_fracture + bins, 2 * _BINS)]
    return tf.cast(tf.concat([losses, *counts], axis=0), tf.float64)


def _count(numbers: tf.Tensor, kinds: int) -> tf.Tensor:
    """Return how often each of 0, 1, ..., kinds - 1 occurs, [kinds] float32."""
    return tf.math.unsorted_segment_sum(tf.ones_like(numbers, tf.float32), numbers, kinds)


def compute_metrics(sums: np.ndarray) -> dict[str, float]:
    """Return loss, weighted_loss, accuracy, precision, recall and AUC from sums over all images, [SIZE].

    The loss is not finite where a logit was not. Without a single image of what it is a share of, a metric is 0.
    """
    loss, weighted_loss, weight = sums[:_LOSSES]
    (true_negatives, false_positives), (false_negatives, true_positives) = sums[_LOSSES : _LOSSES + 4].reshape(2, 2)
    count = sums[_LOSSES : _LOSSES + 4].sum()
    return {
        "loss": _divide(loss, count),
        "weighted_loss": _divide(weighted_loss, weight),
        "accuracy": _divide(true_negatives + true_positives, count),
        "precision": _divide(true_positives, true_positives + false_positives),
        "recall": _divide(true_positives, true_positives + false_negatives),
        "auc": _area(sums[_LOSSES + 4 :].reshape(2, _BINS)),
    }


def _area(histograms: np.ndarray) -> float:
    """Return the area under the ROC curve by the trapezoidal rule, from histograms of normals and fractures."""
    # Counts of both classes above each threshold, from 1 down to 0; all are whole numbers, so the area is exact.
    normals, fractures = np.cumsum(np.pad(histograms, ((0, 0), (0, 1)))[:, ::-1], axis=1)
    area = (np.diff(normals) * (fractures[1:] + fractures[:-1])).sum() / 2
    return _divide(area, normals[-1] * fractures[-1])


def _divide(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0
