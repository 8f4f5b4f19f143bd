"""Transfer learning: a backbone of keras.applications, pretrained, under a head for fractures."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import tensorflow as tf

from fracture.config import Config
from fracture.models.cnn import FEATURES, dropout, image_input, probability
from fracture.models.convnext import convnext
from fracture.models.quantum import circuit

layers = keras.layers

_IMAGENET_SIDE = 224  # pixels, of the images that the weights were trained on
_MINUS_ONE_TO_ONE = (1 / 127.5, [-1.0] * 3)
_CAFFE = (1.0, [-103.939, -116.779, -123.68])  # ImageNet's mean of blue, green, red, which are equal in a grey image
# Of https://doi.org/10.1148/ryai.210315: in its code, Keras' `ImageDataGenerator` subtracts the mean and then rescales.
_RADIMAGENET = (1 / 255, [mean / 255 for mean in _CAFFE[1]])
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
    "efficientnetv2s": (
        partial(keras.applications.EfficientNetV2S, include_preprocessing=False),
        (1 / 128, [-1.0] * 3),
    ),
    "convnexttiny": (
        partial(convnext, keras.applications.ConvNeXtTiny, "convnext_tiny", (3, 3, 9, 3), (96, 192, 384, 768)),
        _STANDARDISED,
    ),
    "convnextbase": (
        partial(convnext, keras.applications.ConvNeXtBase, "convnext_base", (3, 3, 27, 3), (128, 256, 512, 1024)),
        _STANDARDISED,
    ),
}


def build(config: Config, pixel_mean: float, pixel_std: float, step: Callable[[], tf.Tensor] | None) -> keras.Model:
    """Build the network; see `build_model`. Pixels are scaled as for the backbone, not by the mean of these images."""
    base = build_backbone(config)
    return keras.Model(base.input, _head(base.output, config, step), name=config.model.name)


def build_backbone(config: Config, weights: str | None = None) -> keras.Model:
    """Build the network from images [N, S, S, 1] in [0, 255] to features [N, F]: the last channels, pooled.

    Each of `transfer.reductions` adds the number of channels to F, or twice it where `transfer.pooling` is `both`,
    first the means and then the maxima. With `transfer.inverted` the features are the mean of the image's and its
    negative's. One backbone, with one set of weights, sees all of them.

    Args:
        weights: `imagenet`, which Keras downloads unless its cache, ~/.keras, has them; a file of this disk, as
            keras.applications writes them; None: random ones.
    """
    constructor, (scale, offset) = _BACKBONES[config.backbone]
    if config.transfer.pixel_scaling == "radimagenet":
        scale, offset = _RADIMAGENET
    images = image_input(config)
    x = layers.Concatenate(name="three_channels")([images] * 3)
    seen = {"": x}
    if config.transfer.inverted:
        seen["_inverted"] = layers.Rescaling(-1.0, 255.0, name="invert")(x)
    scaled = {suffix: layers.Rescaling(scale, offset, name=f"scale{suffix}")(each) for suffix, each in seen.items()}
    views = [
        _reduce(each, reduction, config.data.image_size, suffix)
        for suffix, each in scaled.items()
        for reduction in config.transfer.reductions
    ]
    first, *others = views
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MobileNetV2 warns of sizes that it was not trained on, but takes any
        base = constructor(include_top=False, weights=weights, input_tensor=first)
    for layer in base.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = config.model.batch_norm_momentum
        elif isinstance(layer, layers.Dropout):
            layer.rate = 0.0  # EfficientNet's, whose random numbers would not repeat when a run is resumed
    # `call` is applied to a symbolic tensor, so that the graph stays flat and the layers are shared. A layer's `output`
    # is that of its first use, the image at the least reduction: Grad-CAM shows that one.
    channels = [base.output, *(keras.Model(first, base.output).call(other) for other in others)]
    return keras.Model(images, _pool(channels, config), name=config.backbone)


def _reduce(images: tf.Tensor, reduction: int, size: int, suffix: str) -> tf.Tensor:
    """Reduce images of side `size` by the mean over squares, and enlarge them again to what is left of 224 pixels."""
    if reduction == 1:
        return images
    reduced = layers.AveragePooling2D(reduction, name=f"reduce_{reduction}{suffix}")(images)
    enlargement = reduction // max(1, size // _IMAGENET_SIDE)
    if enlargement <= 1:
        return reduced
    return layers.UpSampling2D(enlargement, interpolation="bilinear", name=f"enlarge_{reduction}{suffix}")(reduced)


def _pool(channels: list[tf.Tensor], config: Config) -> tf.Tensor:
    """Pool each [N, H, W, C] over positions, and join them; the names of all layers begin with `FEATURES`.

    Args:
        channels: of each reduction, and then of each again of the inverted image if it is seen.
    """
    poolings = {"average": layers.GlobalAveragePooling2D, "maximum": layers.GlobalMaxPooling2D}
    names = [*poolings] if config.transfer.pooling == "both" else [config.transfer.pooling]
    if len(names) == len(channels) == 1:
        return poolings[names[0]](name=FEATURES)(channels[0])
    pooled = [
        poolings[name](name=f"{FEATURES}_{name}{f'_{number}' if number else ''}")(each)
        for number, each in enumerate(channels)
        for name in names
    ]
    if not config.transfer.inverted:
        return layers.Concatenate(name=FEATURES)(pooled)
    half = len(pooled) // 2
    joined = [
        layers.Concatenate(name=f"{FEATURES}_{name}")(each) if half > 1 else each[0]
        for name, each in (("stored", pooled[:half]), ("inverted", pooled[half:]))
    ]
    return layers.Average(name=FEATURES)(joined)


def build_head(config: Config, width: int, step: Callable[[], tf.Tensor]) -> keras.Model:
    """Build the head: features [N, width] float32 to probabilities [N, 1]. Its weights are the model's last."""
    features = layers.Input((width,), name=FEATURES, dtype="float32")
    return keras.Model(features, _head(features, config, step), name="head")


def _head(features: tf.Tensor, config: Config, step: Callable[[], tf.Tensor] | None) -> tf.Tensor:
    # Its mean and variance are those of the training images' features: set before training, and frozen.
    x = layers.BatchNormalization(center=False, scale=False, trainable=False, name="standardise")(features)
    x = dropout(x, config, step)
    return probability(circuit(x, config) if config.model.name == "qnn_transfer" else x)
