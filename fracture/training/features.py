"""What a backbone that stays as it is makes of the images, computed once."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import tensorflow as tf

from fracture.dataset.pipeline import Share

_AT_ONCE = 32
_BLOCK = 1024


def compute_features(backbone: Any, share: Share, mirrored: bool, each_part: Callable[[int, int], None]) -> Share:
    """The share with features [N, 1 or 2, F] float32 in place of images; the second ones are of the mirror images.

    Args:
        backbone: Keras model of images [N, S, S, 1] in [0, 255] to features [N, F], outside of any strategy.
        each_part: is called with how many of how many images are done.
    """
    forward = tf.function(
        lambda images: backbone(images, training=False),
        input_signature=[tf.TensorSpec((None, *share.images.shape[1:]), tf.uint8)],
    )
    count = len(share.images)
    features = np.empty((count, 1 + mirrored, backbone.output_shape[-1]), np.float32)
    for at in range(0, count, _AT_ONCE):
        images = share.images[at : at + _AT_ONCE]
        features[at : at + _AT_ONCE, 0] = forward(images)
        if mirrored:
            features[at : at + _AT_ONCE, 1] = forward(images[:, :, ::-1])
        each_part(min(at + _AT_ONCE, count), count)
    return replace(share, images=features)


def mean_and_variance(share: Share, add: Callable[[list[float]], list[float]]) -> tuple[np.ndarray, np.ndarray]:
    """[F] each, of the features that the first epoch draws, over all workers.

    Args:
        add: adds up F numbers over all workers, and is called by all.
    """
    rows = share.sampler.rows(0)[share.batches.start : share.batches.stop] - share.first
    views = share.images.shape[1]
    times = np.bincount(rows, minlength=len(share.images)) / (
        share.sampler.count * views
    )  # each row is drawn, as a share

    def total(of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """[F], over all workers; by blocks, since float64 is twice the features."""
        starts = range(0, len(times), _BLOCK)
        sums = (np.einsum("n,nkf->f", times[at : at + _BLOCK], of(share.images[at : at + _BLOCK])) for at in starts)
        return np.array(add(np.sum(list(sums), axis=0).tolist()))

    mean = total(lambda features: features.astype(np.float64))
    return mean, total(lambda features: (features - mean) ** 2)
