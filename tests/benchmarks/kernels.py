"""Other ways to compute the first block of the network, convolution and max pooling, which may be faster on a GPU.

Each maps standardised images [N, S, S, 1] and a kernel [3, 3, 1, F] to [N, S/2, S/2, F], as `conv1` and `pool1` do.
"""

from collections.abc import Callable

import numpy as np
import tensorflow as tf

Block = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


def as_it_is(images: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    return tf.nn.max_pool2d(tf.nn.conv2d(images, kernel, 1, "SAME"), 2, 2, "VALID")


def pooled_by_reshape(images: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    """The largest of each square by a reduction. Its gradient shares out among equal ones."""
    outputs = tf.nn.conv2d(images, kernel, 1, "SAME")
    _, side, _, filters = outputs.shape
    return tf.reduce_max(tf.reshape(outputs, [-1, side // 2, 2, side // 2, 2, filters]), axis=[2, 4])


def pooled_by_maximum(images: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    """The largest of each square as the larger of two, twice."""
    outputs = tf.nn.conv2d(images, kernel, 1, "SAME")
    rows = tf.maximum(outputs[:, ::2], outputs[:, 1::2])
    return tf.maximum(rows[:, :, ::2], rows[:, :, 1::2])


def padded_to_eight_channels(images: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    """Seven channels of zeros, since tensor cores take eight at once."""
    images, kernel = tf.pad(images, [[0, 0], [0, 0], [0, 0], [0, 7]]), tf.pad(kernel, [[0, 0], [0, 0], [0, 7], [0, 0]])
    return as_it_is(images, kernel)


def space_to_depth(images: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    """Squares of 2×2 pixels as four channels.

    The outputs at the four pixels of a square are channels too, and pooling is the largest of the four.
    """
    filters = kernel.shape[-1]
    wide = tf.einsum("tijkp,tf->ijkpf", tf.constant(_places(), kernel.dtype), tf.reshape(kernel, [9, filters]))
    outputs = tf.nn.conv2d(tf.nn.space_to_depth(images, 2), tf.reshape(wide, [3, 3, 4, 4 * filters]), 1, "SAME")
    side = outputs.shape[1]
    return tf.reduce_max(tf.reshape(outputs, [-1, side, side, 4, filters]), axis=3)


def _places() -> np.ndarray:
    """Where each tap of a 3×3 kernel lies in the 3×3 kernel on squares: [9 taps, 3, 3, 4 pixels in, 4 pixels out]."""
    places = np.zeros((9, 3, 3, 4, 4), np.float32)
    for tap in range(9):
        for out in range(4):
            row, column = out // 2 + tap // 3 - 1, out % 2 + tap % 3 - 1  # of the pixel, from the square's first
            places[tap, row // 2 + 1, column // 2 + 1, 2 * (row % 2) + column % 2, out] = 1
    return places


VARIANTS: dict[str, Block] = {
    "as it is": as_it_is,
    "pooling by reshape": pooled_by_reshape,
    "pooling by maximum": pooled_by_maximum,
    "eight channels": padded_to_eight_channels,
    "space to depth": space_to_depth,
}
