"""The reference network: blocks of convolution, batch normalisation and max pooling, then dense layers."""

from collections.abc import Callable

import keras
import tensorflow as tf

from fracture.config import Config

layers = keras.layers

FLAT = "flatten"  # name of that layer in a CNN with the head `flatten`: [N, H * W * F]
FEATURES = "features"  # name of the layer between the convolutions and the head: [N, F]


class KeyedDropout(layers.Layer):
    """Dropout whose mask follows from (seed, step, replica) alone; where XLA compiles it, the mask is another one.

    Keras' own dropout counts its calls, and no checkpoint holds the count: a resumed run would not repeat an
    undisturbed one.
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
        uniform = tf.random.stateless_uniform(tf.shape(inputs), key)
        kept = tf.cast(uniform >= self._rate, inputs.dtype)
        return inputs * kept / (1 - self._rate)


class FusedBatchNormalization(layers.BatchNormalization):
    """Batch normalisation by TensorFlow's fused kernel, for training; Keras' own is 15 % of a step slower.

    Has the weights of Keras' layer, which takes its place in a network that is handed over. As in that kernel, the
    moving variance is the mean of unbiased variances.
    """

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        if self.synchronized or inputs.dtype == tf.float64:
            return super().call(inputs, training=training)
        gather = bool(training) and self.trainable
        moments = {} if gather else {"mean": self.moving_mean.value, "variance": self.moving_variance.value}
        outputs, mean, variance = tf.compat.v1.nn.fused_batch_norm(
            inputs,
            self.gamma.value,
            self.beta.value,
            epsilon=self.epsilon,
            is_training=gather,
            **moments,
        )
        if gather:
            for average, new in ((self.moving_mean, mean), (self.moving_variance, variance)):
                average.value.assign_sub((average.value - new) * (1 - self.momentum))
        return outputs


def build(config: Config, pixel_mean: float, pixel_std: float, step: Callable[[], tf.Tensor] | None) -> keras.Model:
    """Build the network; see `build_model`."""
    model = config.model
    images, x = blocks(config, pixel_mean, pixel_std, step)
    x = layers.Flatten(name=FLAT)(x) if model.head == "flatten" else layers.GlobalAveragePooling2D(name=FEATURES)(x)
    for number, units in enumerate(model.dense, start=1):
        x = layers.Dense(units, activation="relu", name=f"dense{number}")(x)
        x = dropout(x, config, step, number)
    return keras.Model(images, probability(x), name="cnn")


def blocks(
    config: Config, pixel_mean: float, pixel_std: float, step: Callable[[], tf.Tensor] | None
) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the input, images [N, S, S, 1] in [0, 255], and the output of the blocks, [N, s, s, last filters]."""
    images = image_input(config)
    std = max(pixel_std, 1e-3)
    x = layers.Rescaling(1 / std, offset=-pixel_mean / std, name="standardise")(images)
    norm = FusedBatchNormalization if step else layers.BatchNormalization
    for number, filters in enumerate(config.model.filters, start=1):
        x = _block(x, filters, number, config, norm)
    return images, x


def image_input(config: Config) -> tf.Tensor:
    """Return the input of every network: images [N, S, S, 1] float32 in [0, 255]."""
    size = config.data.image_size
    return layers.Input((size, size, 1), name="images", dtype="float32")


def dropout(x: tf.Tensor, config: Config, step: Callable[[], tf.Tensor] | None, number: int = 1) -> tf.Tensor:
    """Apply the network's `number`-th dropout, at the rate `model.dropout`."""
    rate, name = config.model.dropout, f"dropout{number}"
    if not rate:
        return x
    layer = KeyedDropout(rate, config.training.seed + number, step, name) if step else layers.Dropout(rate, name=name)
    return layer(x)


def probability(x: tf.Tensor) -> tf.Tensor:
    """Map features [N, F] to probabilities [N, 1] float32."""
    logit = layers.Dense(1, name="logit")(x)
    # In float32 whatever the precision of the rest: bfloat16 has no probabilities between 0.996 and 1.
    return layers.Activation("sigmoid", dtype="float32", name="probability")(logit)


def _block(x: tf.Tensor, filters: int, number: int, config: Config, norm: type[layers.BatchNormalization]) -> tf.Tensor:
    model = config.model
    # Batch normalisation subtracts the mean, so a bias before it would have no effect.
    x = layers.Conv2D(filters, 3, padding="same", use_bias=not model.batch_norm, name=f"conv{number}")(x)
    if model.block == "conv-pool-bn-relu":
        x = layers.MaxPooling2D(name=f"pool{number}")(x)
    if model.batch_norm:
        x = norm(momentum=model.batch_norm_momentum, synchronized=model.sync_batch_norm, name=f"norm{number}")(x)
    x = layers.ReLU(name=f"relu{number}")(x)
    if model.block == "conv-bn-relu-pool":
        x = layers.MaxPooling2D(name=f"pool{number}")(x)
    return x
