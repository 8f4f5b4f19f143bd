"""Grad-CAM: which places of an image speak for what a network decided (https://arxiv.org/abs/1610.02391)."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from fracture.errors import UsageError
from fracture.evaluation.scores import AT_ONCE


def maps(model: Any, images: np.ndarray, fracture: np.ndarray) -> np.ndarray:
    """[N, S, S] float32 in [0, 1]: how much each place speaks for what was decided; 0 where nothing does.

    Each map has a scale of its own, from 0 to the most: how bright two are does not compare. Where no place speaks for
    the decision, only the bias does, and the map is 0 everywhere.

    Args:
        model: flat functional, with a layer called `logit`; whether calibration is within changes nothing.
        images: [N, S, S, 1] uint8.
        fracture: [N] bool, what was decided.

    Raises:
        UsageError: the network has no layer of shape [N, H, W, C].
    """
    import tensorflow as tf

    found = tf.nn.relu(evidence(model, images, fracture))[..., None]
    found = tf.image.resize(found, images.shape[1:3], "bilinear").numpy()[..., 0]
    most = found.max((1, 2), keepdims=True)
    return np.divide(found, most, out=np.zeros_like(found), where=most > 0)


def evidence(model: Any, images: np.ndarray, fracture: np.ndarray) -> np.ndarray:
    """[N, H, W] float32, in the places of the last convolution: what speaks for the decision, and below 0 against it.

    That layer's channels are weighed by the mean gradient of the logit; of an image that was called normal, by that of
    minus the logit, which is the logit of "normal". With the logit itself its map would show what spoke for a fracture
    and did not prevail.

    Args and errors as of `maps`.
    """
    import tensorflow as tf
    import tf_keras as keras

    places = keras.Model(model.inputs, [_last_with_places(model).output, model.get_layer("logit").output])
    parts = []
    for at in range(0, len(images), AT_ONCE):
        inputs = tf.cast(images[at : at + AT_ONCE], tf.float32)
        signs = np.where(fracture[at : at + AT_ONCE], 1, -1).astype(np.float32)
        with tf.GradientTape() as tape:
            tape.watch(inputs)  # a tape follows what is watched and trainable, and a backbone may be frozen
            channels, logits = places(inputs, training=False)
            summed = tf.reduce_sum(logits[:, 0] * signs)  # no image changes another's
        weights = tf.reduce_mean(tape.gradient(summed, channels), axis=(1, 2), keepdims=True)
        parts.append(tf.reduce_sum(weights * channels, axis=-1).numpy())
    return np.concatenate(parts)


def _last_with_places(model: Any) -> Any:
    layers = [layer for layer in model.layers[1:] if len(layer.output_shape) == 4]  # the first is the input
    if not layers:
        raise UsageError(
            f"the network {model.name!r} has no layer of shape [N, H, W, C], in which Grad-CAM could find places. "
            "Use one with convolutions"
        )
    return layers[-1]


def likeness_to_random(model: Any, images: np.ndarray, fracture: np.ndarray, networks: int) -> Iterator[float]:
    """For each of some copies of the network with random weights, how like the model's its maps are, in [0, 1].

    The sanity check of https://arxiv.org/abs/1810.03292: maps that stay when all weights are drawn anew show the image
    and not what the model has learned. Likeness is the mean over the images of the size of Spearman's rank correlation
    of the evidence in all places: its size, since a drawn network is as likely to be that logit as minus that logit.
    Draws from Keras' own generators, which it seeds.

    Args as of `maps`.
    """
    import tf_keras as keras

    own = evidence(model, images, fracture)
    for seed in range(networks):
        keras.utils.set_random_seed(seed)
        drawn = keras.models.clone_model(model)  # its layers begin as new ones do, those of a backbone too
        yield float(np.abs(rank_correlation(own, evidence(drawn, images, fracture))).mean())


def rank_correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Spearman's, of two maps each: [N, H, W] twice -> [N] in [-1, 1]; 0 where one has the same value everywhere."""
    from scipy.stats import rankdata

    ranks = [rankdata(each.reshape(len(each), -1), axis=1) for each in (first, second)]
    x, y = (each - each.mean(axis=1, keepdims=True) for each in ranks)
    norm = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return np.divide((x * y).sum(axis=1), norm, out=np.zeros(len(x)), where=norm > 0)
