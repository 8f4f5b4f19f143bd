"""One network for each `model.name`, behind one function.

Importing this package loads TensorFlow, and Keras with TensorFlow as its backend, whatever the user has set for other
programs.
"""

import logging
import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

from fracture.config import MODELS, Config
from fracture.runtime.quiet import silence_stderr

os.environ["KERAS_BACKEND"] = "tensorflow"  # else ~/.keras/keras.json may name another
with silence_stderr():  # TensorFlow's C++ side writes there as it loads
    import tensorflow as tf

    tf.config.list_physical_devices()  # warns where there is no GPU

    import keras

    if (backend := keras.backend.backend()) != "tensorflow":
        raise ImportError(
            f"Keras was imported with the backend {backend} before fracture, which needs tensorflow. Set "
            "KERAS_BACKEND=tensorflow, or import fracture.models first"
        )

    # A process may hold several networks, each of which traces functions of its own once. TensorFlow takes them for one
    # function that is traced again and again, and warns.
    logging.getLogger("tensorflow").addFilter(lambda record: "function retracing" not in record.getMessage())

    # What else keras.json may hold.
    keras.config.set_floatx("float32")
    keras.config.set_epsilon(1e-7)
    keras.config.set_image_data_format("channels_last")

    from fracture.models.tensorflow_internals import UninitializedVariable


def build_model(
    config: Config, pixel_mean: float, pixel_std: float, step: Callable[[], tf.Tensor] | None = None
) -> keras.Model:
    """Build the network that maps images [N, S, S, 1], uint8 or float in [0, 255], to probabilities [N, 1] float32.

    A probability is that of a fracture. The graph is flat and begins with normalisation; its last layers are `logit`
    and `probability`.

    Args:
        pixel_mean, pixel_std: of the training images, in [0, 255].
        step: the training step, which keys dropout. None builds the network for inference; its weights are the same
            list.
    """
    return import_module(f"fracture.models.{MODELS[config.model.name]}").build(config, pixel_mean, pixel_std, step)


def add_features(model: keras.Model) -> keras.Model:
    """Return the network with two outputs: probabilities [N, 1], and its features [N, F], see `cut_at_features`."""
    return keras.Model(model.inputs, [model.outputs[0], cut_at_features(model).outputs[0]])


def cut_at_features(model: keras.Model) -> keras.Model:
    """Return the part of the network from images to features [N, F], which its head takes.

    A CNN with the head `flatten` does not pool; its features are the average of each channel.
    """
    from fracture.models.cnn import FEATURES, FLAT

    if any(layer.name == FEATURES for layer in model.layers):
        features = model.get_layer(FEATURES).output
    else:
        features = keras.layers.GlobalAveragePooling2D(name=FEATURES)(model.get_layer(FLAT).input)
    return keras.Model(model.inputs, features)


def weight_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of each weight in the model's order, without memory for their values."""
    with tf.variable_creator_scope(_create_uninitialized):
        return {weight.path: tuple(weight.shape) for weight in build_model(config, 0.0, 1.0).weights}


def _create_uninitialized(_: Any, name: str, shape: Any, dtype: Any, **others: Any) -> tf.Variable:
    return UninitializedVariable(name=name, shape=shape, dtype=dtype, trainable=others.get("trainable"))
