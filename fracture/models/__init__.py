"""One network for each `model.name`, behind one function."""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fracture.config import MODELS, Config
from fracture.runtime.quiet import silence_stderr

if TYPE_CHECKING:
    import tf_keras as keras


with silence_stderr():  # TensorFlow's C++ side writes there as it loads
    import tensorflow as tf
    from tensorflow.python.ops.resource_variable_ops import UninitializedVariable

    tf.config.list_physical_devices()  # complains where there is no GPU


def build_model(
    config: Config, pixel_mean: float, pixel_std: float, step: "Callable[[], tf.Tensor] | None" = None
) -> "keras.Model":
    """The network for images [N, S, S, 1], uint8 or float in [0, 255], to fracture probabilities [N, 1] float32.

    Its graph is flat, normalisation is within, and its last layers are `logit` and `probability`.

    Args:
        pixel_mean, pixel_std: of the training images, in [0, 255].
        step: the training step, which keys dropout. None builds the network to hand over, whose weights are the same
            list.
    """
    return import_module(f"fracture.models.{MODELS[config.model.name]}").build(config, pixel_mean, pixel_std, step)


def weight_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of each weight in the order of the model's, without any memory set aside for them."""
    with tf.variable_creator_scope(_without_memory):
        return {weight.name: tuple(weight.shape) for weight in build_model(config, 0.0, 1.0).weights}


def _without_memory(_: Any, name: str, shape: Any, dtype: Any, **others: Any) -> tf.Variable:
    """A variable that has no value, which takes a class private to TensorFlow 2.21; a graph of its own would do, but
    to build Keras models in one breaks those that were built before.
    """
    return UninitializedVariable(name=name, shape=shape, dtype=dtype, trainable=others.get("trainable"))
