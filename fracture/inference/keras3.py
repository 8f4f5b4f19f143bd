"""The twin in Keras 3 of a tf_keras network, for whoever has only the one that is current."""

import inspect
from typing import Any

import tf_keras

from fracture.errors import UsageError


def to_keras3(model: tf_keras.Model) -> Any:
    """
    Args:
        model: functional, of layers that are called once each, none of them a model itself.

    Raises:
        UsageError: a layer that Keras 3 does not have.
    """
    import keras

    twins = {}  # id of a tensor of the model -> the one that stands for it
    for layer in model.layers:
        if isinstance(layer, tf_keras.layers.InputLayer):
            twins[id(layer.output)] = keras.Input(layer.output.shape[1:], name=layer.name, dtype=layer.dtype)
            continue
        several = isinstance(layer.input, list)
        taken = [twins[id(tensor)] for tensor in (layer.input if several else [layer.input])]
        twin = _twin(layer)
        twins[id(layer.output)] = twin(taken if several else taken[0])
        twin.set_weights(layer.get_weights())
    return keras.Model(twins[id(model.input)], twins[id(model.output)], name=model.name)


def _twin(layer: tf_keras.layers.Layer) -> Any:
    import keras

    kind = type(layer).__name__
    if getattr(tf_keras.layers, kind, None) is not type(layer) or not hasattr(keras.layers, kind):
        raise UsageError(
            f"layer {layer.name!r} is a {kind}, which Keras 3 does not have: nobody could load the file without this "
            "program. Take --to savedmodel."
        )
    twin = getattr(keras.layers, kind)
    known = {"name", "dtype", *inspect.signature(twin.__init__).parameters}
    config = {key: value for key, value in layer.get_config().items() if key in known}
    if kind == "BatchNormalization":
        [config["axis"]] = layer.axis
    name = layer.name.replace("/", "-")  # DenseNet's have it, and Keras 3 does not allow it
    return twin.from_config(config | {"name": name, "dtype": layer.dtype})
