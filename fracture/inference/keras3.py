"""Conversion of a tf_keras network to Keras 3."""

import inspect
from typing import Any

import tf_keras

from fracture.errors import UsageError


def to_keras3(model: tf_keras.Model) -> Any:
    """Return a copy of the network in Keras 3.

    Args:
        model: functional model whose layers are called once each; none of them is a model itself.

    Raises:
        UsageError: Keras 3 does not have one of the layers.
    """
    import keras

    tensors = {}  # id of a tensor of the model -> the same tensor in Keras 3
    for layer in model.layers:
        if isinstance(layer, tf_keras.layers.InputLayer):
            tensors[id(layer.output)] = keras.Input(layer.output.shape[1:], name=layer.name, dtype=layer.dtype)
            continue
        several = isinstance(layer.input, list)
        inputs = [tensors[id(tensor)] for tensor in (layer.input if several else [layer.input])]
        copy = _copy_layer(layer)
        tensors[id(layer.output)] = copy(inputs if several else inputs[0])
        copy.set_weights(layer.get_weights())
    return keras.Model(tensors[id(model.input)], tensors[id(model.output)], name=model.name)


def _copy_layer(layer: tf_keras.layers.Layer) -> Any:
    import keras

    kind = type(layer).__name__
    if getattr(tf_keras.layers, kind, None) is not type(layer) or not hasattr(keras.layers, kind):
        raise UsageError(
            f"layer {layer.name!r} is a {kind}, which Keras 3 does not have: the file could not be loaded without this "
            "program. Use --to savedmodel."
        )
    keras3_class = getattr(keras.layers, kind)
    known = {"name", "dtype", *inspect.signature(keras3_class.__init__).parameters}
    config = {key: value for key, value in layer.get_config().items() if key in known}
    if kind == "BatchNormalization":
        [config["axis"]] = layer.axis
    name = layer.name.replace("/", "-")  # DenseNet's names contain a slash, which Keras 3 does not allow
    return keras3_class.from_config(config | {"name": name, "dtype": layer.dtype})
