"""Flips, rotations and zooms of a batch as one affine transform: the image is resampled once, as uint8."""

import numpy as np
import tensorflow as tf

from fracture.config import AugmentConfig


def draw_transforms(generator: np.random.Generator, count: int, config: AugmentConfig, size: int) -> np.ndarray:
    """[count, 8] float32: random transforms about the image's centre, one for each image.

    A row (a0, a1, a2, b0, b1, b2, 0, 0) says that output pixel (x, y) shows input (a0·x + a1·y + a2, b0·x + b1·y + b2).
    """
    angle = np.radians(generator.uniform(-config.rotation_degrees, config.rotation_degrees, count))
    scale = generator.uniform(1 - config.zoom, 1 + config.zoom, count)
    flips = generator.random((2, count)) < 0.5
    mirror_x = np.where(flips[0] & config.horizontal_flip, -1.0, 1.0)
    mirror_y = np.where(flips[1] & config.vertical_flip, -1.0, 1.0)
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    matrix = np.stack([mirror_x * cos, -mirror_x * sin, mirror_y * sin, mirror_y * cos], axis=1)  # [count, 4]
    centre = (size - 1) / 2
    shift_x = centre * (1 - matrix[:, 0] - matrix[:, 1])
    shift_y = centre * (1 - matrix[:, 2] - matrix[:, 3])
    zeros = np.zeros(count)
    columns = [matrix[:, 0], matrix[:, 1], shift_x, matrix[:, 2], matrix[:, 3], shift_y, zeros, zeros]
    return np.stack(columns, axis=1).astype(np.float32)


def transform(images: tf.Tensor, transforms: tf.Tensor) -> tf.Tensor:
    """Applies one transform to each image; what comes from outside is black, as around a film.

    Args:
        images: [N, H, W, 1] uint8.
        transforms: [N, 8] float32.

    Returns:
        [N, H, W, 1] uint8.
    """
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=images,
        transforms=transforms,
        output_shape=tf.shape(images)[1:3],
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode="CONSTANT",
    )
