"""Augmentation of a batch of uint8 images: one affine transform, so that it is resampled once, then the exposure."""

import numpy as np
import tensorflow as tf

from fracture.config import AugmentConfig


def augment(images: tf.Tensor, transforms: tf.Tensor, exposures: tf.Tensor) -> tf.Tensor:
    """Return a batch [N, H, W, 1] uint8 as the network is trained on it."""
    return expose(transform(images, transforms), exposures)


def draw_transforms(generator: np.random.Generator, count: int, config: AugmentConfig, size: int) -> np.ndarray:
    """Draw random transforms about the image's centre, one for each image: [count, 8] float32.

    A row (a0, a1, a2, b0, b1, b2, 0, 0) says that output pixel (x, y) shows input (a0·x + a1·y + a2, b0·x + b1·y + b2).
    """
    angle = np.radians(generator.uniform(-config.rotation_degrees, config.rotation_degrees, count))
    scale = generator.uniform(1 - config.zoom, 1 + config.zoom, count)
    flips = generator.random((2, count)) < 0.5
    aspect = np.sqrt(generator.uniform(1 - config.stretch, 1 + config.stretch, count))
    shift = generator.uniform(-config.shift, config.shift, (2, count)) * size
    scale_x = np.where(flips[0] & config.horizontal_flip, -1.0, 1.0) / (scale * aspect)
    scale_y = np.where(flips[1] & config.vertical_flip, -1.0, 1.0) * aspect / scale
    cos, sin = np.cos(angle), np.sin(angle)
    matrix = np.stack([scale_x * cos, -scale_x * sin, scale_y * sin, scale_y * cos], axis=1)  # [count, 4]
    centre = (size - 1) / 2
    shift_x = centre * (1 - matrix[:, 0] - matrix[:, 1]) + shift[0]
    shift_y = centre * (1 - matrix[:, 2] - matrix[:, 3]) + shift[1]
    zeros = np.zeros(count)
    columns = [matrix[:, 0], matrix[:, 1], shift_x, matrix[:, 2], matrix[:, 3], shift_y, zeros, zeros]
    return np.stack(columns, axis=1).astype(np.float32)


def draw_exposures(generator: np.random.Generator, count: int, config: AugmentConfig) -> np.ndarray:
    """Draw a random factor and summand of the grey values for each image: [count, 2] float32."""
    contrast = generator.uniform(1 - config.exposure, 1 + config.exposure, count)
    brightness = generator.uniform(-config.exposure / 2, config.exposure / 2, count)
    return np.stack([contrast, 127.5 * (1 - contrast) + 255 * brightness], axis=1).astype(np.float32)


def transform(images: tf.Tensor, transforms: tf.Tensor) -> tf.Tensor:
    """Apply one transform to each image. What comes from outside the image is black, as around a radiograph.

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


def expose(images: tf.Tensor, exposures: tf.Tensor) -> tf.Tensor:
    """Change brightness and contrast; values beyond [0, 255] are cut off, as in a radiograph's blacks and whites.

    Args:
        images: [N, H, W, 1] uint8.
        exposures: [N, 2] float32.

    Returns:
        [N, H, W, 1] uint8.
    """
    factor, summand = (exposures[:, i, tf.newaxis, tf.newaxis, tf.newaxis] for i in (0, 1))
    return tf.saturate_cast(tf.round(tf.cast(images, tf.float32) * factor + summand), tf.uint8)
