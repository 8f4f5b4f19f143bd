"""The reference network: blocks of convolution, batch normalisation and max pooling, then dense layers."""

from collections.abc import Callable

import tensorflow as tf
import tf_keras as keras

from fracture.config import Config

layers = keras.layers


class KeyedDropout(layers.Layer):
    """Dropout whose mask follows from (seed, step, replica) alone.

    Keras' own draws from a counter that no checkpoint holds, so a resumed run would not repeat an undisturbed one.
    Inverted dropout as in https://jmlr.org/papers/v15/srivastava14a.html: kept values are scaled by 1 / (1 - rate).
    """

    def __init__(self, rate: float, seed: int, step: Callable[[], tf.Tensor], name: str) -> None:
        super().__init__(name=name)
        self._rate, self._seed, self._step = rate, seed, step

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        if not training:
            return inputs
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        key = tf.stack(
            [tf.cast(self._seed, tf.int64), tf.cast(self._step(), tf.int64) * 65536 + tf.cast(replica, tf.int64)]
        )
        drawn = tf.random.stateless_uniform(tf.shape(inputs), key)
        kept = tf.cast(drawn >= self._rate, inputs.dtype)
        return inputs * kept / (1 - self._rate)


def build_cnn(
    config: Config, pixel_mean: float, pixel_std: float, step: Callable[[], tf.Tensor] | None = None
) -> keras.Model:
    """The network for images [N, H, W, 1], uint8 or float in [0, 255], to fracture probabilities [N, 1] float32.

    Args:
        pixel_mean: of the training images, in [0, 255]; standardising is the network's first layer.
        step: the training step, which keys dropout. None builds the network to hand over, of Keras layers alone; the
            weights of both are the same list.
    """
    model = config.model
    size = config.data.image_size
    images = layers.Input((size, size, 1), name="images", dtype="float32")
    std = max(pixel_std, 1e-3)
    x = layers.Rescaling(1 / std, offset=-pixel_mean / std, name="standardise")(images)
    for number, filters in enumerate(model.filters, start=1):
        x = _block(x, filters, number, config)
    x = layers.Flatten(name="flatten")(x) if model.head == "flatten" else layers.GlobalAveragePooling2D(name="pool")(x)
    for number, units in enumerate(model.dense, start=1):
        x = layers.Dense(units, activation="relu", name=f"dense{number}")(x)
        if model.dropout and step is not None:
            x = KeyedDropout(model.dropout, config.training.seed + number, step, name=f"dropout{number}")(x)
        elif model.dropout:
            x = layers.Dropout(model.dropout, name=f"dropout{number}")(x)
    logit = layers.Dense(1, name="logit")(x)
    # In float32 whatever the precision of the rest: bfloat16 has no probabilities between 0.996 and 1.
    probability = layers.Activation("sigmoid", dtype="float32", name="probability")(logit)
    return keras.Model(images, probability, name="cnn")


def weight_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of each weight in the order of the model's, without any memory set aside for them."""
    model = config.model
    shapes: dict[str, tuple[int, ...]] = {}
    channels, side = 1, config.data.image_size
    for number, filters in enumerate(model.filters, start=1):
        shapes[f"conv{number}/kernel:0"] = (3, 3, channels, filters)
        of_norm = ("gamma", "beta", "moving_mean", "moving_variance")
        biases = [f"norm{number}/{name}:0" for name in of_norm] if model.batch_norm else [f"conv{number}/bias:0"]
        shapes |= dict.fromkeys(biases, (filters,))
        channels, side = filters, side // 2
    units = channels * side**2 if model.head == "flatten" else channels
    names = [*(f"dense{number}" for number in range(1, len(model.dense) + 1)), "logit"]
    for name, width in zip(names, (*model.dense, 1), strict=True):
        shapes |= {f"{name}/kernel:0": (units, width), f"{name}/bias:0": (width,)}
        units = width
    return shapes


def _block(x: tf.Tensor, filters: int, number: int, config: Config) -> tf.Tensor:
    model = config.model
    # Batch normalisation subtracts the mean, so a bias before it would have no effect.
    x = layers.Conv2D(filters, 3, padding="same", use_bias=not model.batch_norm, name=f"conv{number}")(x)
    if model.block == "conv-pool-bn-relu":
        x = layers.MaxPooling2D(name=f"pool{number}")(x)
    if model.batch_norm:
        x = layers.BatchNormalization(
            momentum=model.batch_norm_momentum, synchronized=model.sync_batch_norm, name=f"norm{number}"
        )(x)
    x = layers.ReLU(name=f"relu{number}")(x)
    if model.block == "conv-bn-relu-pool":
        x = layers.MaxPooling2D(name=f"pool{number}")(x)
    return x
