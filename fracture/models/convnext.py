"""ConvNeXt without top (https://arxiv.org/abs/2201.03545), with the weights of that of keras.applications.

Keras' own scale of a block's channels has a weight without a name, which is then numbered by all that the process has
built, and a bundle finds its weights by name; its grouped convolution compiles with XLA, and cannot become ONNX. Here
the graph is flat; layers and weights have the names and the order that they have there.
"""

from collections.abc import Callable
from functools import partial

import keras
import tensorflow as tf

layers = keras.layers

_LayerNorm = partial(layers.LayerNormalization, epsilon=1e-6)
_SCALE = 1e-6  # of the channels that a block adds, where training begins with random weights


def convnext(
    original: Callable[..., keras.Model],
    name: str,
    depths: tuple[int, ...],
    widths: tuple[int, ...],
    *,
    input_tensor: tf.Tensor,
    weights: str | None,
    include_top: bool,
) -> keras.Model:
    """Build the network from pixels [N, S, S, 3], standardised as for torchvision, to [N, S/32, S/32, last width].

    Args:
        original: the constructor of keras.applications, which reads the weights.
        name: of its network, with which the names of its layers begin.
        depths, widths: blocks and channels of each stage.
        input_tensor, weights, include_top: as of that constructor.
    """
    x = layers.Conv2D(widths[0], 4, strides=4, name=f"{name}_stem_conv")(input_tensor)
    x = _LayerNorm(name=f"{name}_stem_layernorm")(x)
    for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        if stage:
            x = _LayerNorm(name=f"{name}_downsampling_layernorm_{stage - 1}")(x)
            x = layers.Conv2D(width, 2, strides=2, name=f"{name}_downsampling_conv_{stage - 1}")(x)
        for number in range(depth):
            x = _add_block(x, width, f"{name}_stage_{stage}_block_{number}")
    x = _LayerNorm(name="layer_normalization")(x)
    network = keras.Model(keras.utils.get_source_inputs(input_tensor), x, name=name)
    if weights:
        values = original(include_top=include_top, weights=weights, input_shape=(32, 32, 3)).get_weights()
        # Kernels of the convolutions in a block are [7, 7, 1, C] there and [7, 7, C, 1] here.
        network.set_weights([value.reshape(own.shape) for value, own in zip(values, network.weights, strict=True)])
    return network


def _add_block(inputs: tf.Tensor, width: int, name: str) -> tf.Tensor:
    x = layers.DepthwiseConv2D(7, padding="same", name=f"{name}_depthwise_conv")(inputs)
    x = _LayerNorm(name=f"{name}_layernorm")(x)
    x = layers.Dense(4 * width, name=f"{name}_pointwise_conv_1")(x)
    x = layers.Activation("gelu", name=f"{name}_gelu")(x)
    x = layers.Dense(width, name=f"{name}_pointwise_conv_2")(x)
    start = keras.initializers.Constant(_SCALE)
    scale = layers.EinsumDense(
        "nhwc,c->nhwc", (None, None, width), kernel_initializer=start, name=f"{name}_layer_scale"
    )
    return layers.Add(name=f"{name}_add")([inputs, scale(x)])
