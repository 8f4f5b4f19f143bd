"""Grad-CAM: which positions of an image support the predicted class (https://arxiv.org/abs/1610.02391)."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from fracture.errors import UsageError
from fracture.evaluation.scores import batch_size


def compute_maps(model: Any, images: np.ndarray, fracture: np.ndarray) -> np.ndarray:
    """Compute how much each position of each image supports the predicted class.

    Each map is scaled by its own maximum, so the brightness of two maps does not compare. Where no position supports
    the class, only the bias does, and the map is 0 everywhere.

    Args:
        model: flat functional model with a layer called `logit`. Calibration inside the model changes nothing.
        images: [N, S, S, 1] uint8.
        fracture: [N] bool, true where a fracture was predicted.

    Returns:
        [N, S, S] float32 in [0, 1]; 0 where a position supports nothing or the other class.

    Raises:
        UsageError: the network has no layer of shape [N, H, W, C].
    """
    import tensorflow as tf

    maps = tf.nn.relu(compute_evidence(model, images, fracture))[..., None]
    maps = tf.image.resize(maps, images.shape[1:3], "bilinear").numpy()[..., 0]
    maximum = maps.max((1, 2), keepdims=True)
    return np.divide(maps, maximum, out=np.zeros_like(maps), where=maximum > 0)


def compute_evidence(model: Any, images: np.ndarray, fracture: np.ndarray) -> np.ndarray:
    """Compute the evidence for the predicted class at each position of the last convolution.

    The layer's channels are weighted by the mean gradient of the logit. Where "normal" was predicted it is the gradient
    of minus the logit, which is the logit of "normal": that of the logit itself would show the evidence for a fracture,
    which did not prevail. Of a network that sees the negative, too, it is the sum of both views' evidence.

    Arguments and errors as of `compute_maps`.

    Returns:
        [N, H, W] float32, of that layer's size; below 0 at positions that contradict the prediction.
    """
    import keras
    import tensorflow as tf

    outputs = [_find_last_spatial_layer(model).output, model.get_layer("logit").output]
    channels_and_logits = keras.Model(model.inputs, outputs)
    sees_negative = any(layer.name == "invert" for layer in model.layers)
    parts = []
    size = batch_size(images.shape[1])
    for start in range(0, len(images), size):
        inputs = tf.cast(images[start : start + size], tf.float32)
        signs = np.where(fracture[start : start + size], 1, -1).astype(np.float32)
        parts.append(_weigh_channels(channels_and_logits, inputs, signs))
        if sees_negative:  # it takes an image and its negative alike, so this is what its second view contributes
            parts[-1] += _weigh_channels(channels_and_logits, 255 - inputs, signs)
    return np.concatenate(parts)


def _weigh_channels(channels_and_logits: Any, inputs: Any, signs: np.ndarray) -> np.ndarray:
    """Return the evidence of a batch of images [B, S, S, 1] float32: [B, H, W]."""
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(inputs)  # by default a tape follows only trainable weights, and a backbone may be frozen
        channels, logits = channels_and_logits(inputs, training=False)
        summed = tf.reduce_sum(logits[:, 0] * signs)  # the gradients of different images stay independent
    weights = tf.reduce_mean(tape.gradient(summed, channels), axis=(1, 2), keepdims=True)
    return tf.reduce_sum(weights * channels, axis=-1).numpy()


def _find_last_spatial_layer(model: Any) -> Any:
    layers = [layer for layer in model.layers[1:] if len(layer.output.shape) == 4]  # the first is the input
    if not layers:
        raise UsageError(
            f"the network {model.name!r} has no layer of shape [N, H, W, C], so Grad-CAM cannot locate anything. "
            "Use a network with convolutions"
        )
    return layers[-1]


def measure_similarity_to_random(
    model: Any, images: np.ndarray, fracture: np.ndarray, networks: int
) -> Iterator[float]:
    """Yield the similarity of the model's maps to those of each of several copies with random weights, in [0, 1].

    This is the sanity check of https://arxiv.org/abs/1810.03292: maps that stay the same when all weights are random
    show the image and not what the model has learned. The similarity is the mean over the images of the absolute value
    of Spearman's rank correlation of the evidence at all positions; absolute, since the logit of a random network may
    just as well have the opposite sign. The function seeds Keras' own generators.

    Arguments as of `compute_maps`.
    """
    import keras

    own = compute_evidence(model, images, fracture)
    for seed in range(networks):
        keras.utils.set_random_seed(seed)
        # All layers are newly initialised, pretrained ones included. `clone_model` would not keep the order in which a
        # shared layer is used, and so not the layer's output.
        random_model = type(model).from_config(model.get_config())
        yield float(np.abs(rank_correlation(own, compute_evidence(random_model, images, fracture))).mean())


def rank_correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Compute Spearman's rank correlation of pairs of maps.

    Args:
        first: [N, H, W].
        second: [N, H, W].

    Returns:
        [N] in [-1, 1]; 0 where one map has the same value everywhere.
    """
    from scipy.stats import rankdata

    ranks = [rankdata(each.reshape(len(each), -1), axis=1) for each in (first, second)]
    x, y = (each - each.mean(axis=1, keepdims=True) for each in ranks)
    norm = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return np.divide((x * y).sum(axis=1), norm, out=np.zeros(len(x)), where=norm > 0)
