"""Transfer learning: a backbone of keras.applications, pretrained on photographs, under a head for fractures."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import tensorflow as tf

from fracture.config import Config
from fracture.models.cnn import dropout, image_input, probability
from fracture.models.quantum import circuit

layers = keras.layers

_MINUS_ONE_TO_ONE = (1 / 127.5, [-1.0] * 3)
_CAFFE = (1.0, [-103.939, -116.779, -123.68])  # ImageNet's mean of blue, green, red, which are equal in a grey image
# The mean and deviation of ImageNet that torchvision uses, of red, green, blue in [0, 1].
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_STANDARDISED = (
    [1 / (255 * deviation) for deviation in _DEVIATION],
    [-mean / deviation for mean, deviation in zip(_MEAN, _DEVIATION, strict=True)],
)
# Constructor, and the (scale, offset) of pixels in [0, 255] that its ImageNet weights were trained with.
_BACKBONES: dict[str, tuple[Callable[..., keras.Model], tuple[Any, Any]]] = {
    "resnet50": (keras.applications.ResNet50, _CAFFE),  # https://arxiv.org/abs/1512.03385
    "densenet121": (keras.applications.DenseNet121, _STANDARDISED),  # https://arxiv.org/abs/1608.06993
    "mobilenetv2": (keras.applications.MobileNetV2, _MINUS_ONE_TO_ONE),  # https://arxiv.org/abs/1801.04381
    "efficientnetv2b0": (  # https://arxiv.org/abs/2104.00298
        partial(keras.applications.EfficientNetV2B0, include_preprocessing=False),
        _STANDARDISED,
    ),
}


def build(config: Config, pixel_mean: float, pixel_std: float, step: Callable[[], tf.Tensor] | None) -> keras.Model:
    """Build the network; see `build_model`. Pixels are scaled as for the backbone, not by the mean of these images."""
    base = build_backbone(config)
    return keras.Model(base.input, _head(base.output, config, step), name=config.model.name)


def build_backbone(config: Config, weights: str | None = None) -> keras.Model:
    """Build the network from images [N, S, S, 1] in [0, 255] to features [N, F], the mean of each last channel.

    Args:
        weights: `imagenet`, which Keras downloads unless its cache, ~/.keras, has them; None: random ones.
    """
    constructor, (scale, offset) = _BACKBONES[config.backbone]
    images = image_input(config)
    x = layers.Concatenate(name="three_channels")([images] * 3)
    x = layers.Rescaling(scale, offset, name="scale")(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MobileNetV2 warns of sizes that it was not trained on, but takes any
        base = constructor(include_top=False, weights=weights, input_tensor=x)
    for layer in base.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = config.model.batch_norm_momentum
        elif isinstance(layer, layers.Dropout):
            layer.rate = 0.0  # EfficientNet's, whose random numbers would not repeat when a run is resumed
    return keras.Model(images, layers.GlobalAveragePooling2D(name="features")(base.output), name=config.backbone)


def build_head(config: Config, width: int, step: Callable[[], tf.Tensor]) -> keras.Model:
    """Build the head: features [N, width] float32 to probabilities [N, 1]. Its weights are the model's last."""
    features = layers.Input((width,), name="features", dtype="float32")
    return keras.Model(features, _head(features, config, step), name="head")


def _head(features: tf.Tensor, config: Config, step: Callable[[], tf.Tensor] | None) -> tf.Tensor:
    # Its mean and variance are those of the training images' features: set before training, and frozen.
    x = layers.BatchNormalization(center=False, scale=False, trainable=False, name="standardise")(features)
    x = dropout(x, config, step)
    return probability(circuit(x, config) if config.model.name == "qnn_transfer" else x)
