"""The variants of the first block that `make bench ONLY=gpu` times compute the same."""

import numpy as np
import pytest
import tensorflow as tf

from tests.benchmarks.kernels import VARIANTS, Block, as_it_is


def outputs_and_gradient(block: Block, dtype: str) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    images = tf.constant(generator.normal(size=(2, 16, 16, 1)), dtype)
    kernel = tf.constant(generator.normal(size=(3, 3, 1, 8)), dtype)
    with tf.GradientTape() as tape:
        tape.watch(kernel)
        outputs = block(images, kernel)
        loss = tf.reduce_mean(tf.cast(outputs, tf.float32) ** 2)
    return [tf.cast(value, tf.float32).numpy() for value in (outputs, tape.gradient(loss, kernel))]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_gives_the_same_outputs_and_gradient_in_float32(name: str):
    for found, expected in zip(*(outputs_and_gradient(b, "float32") for b in (VARIANTS[name], as_it_is)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_gives_the_same_outputs_in_bfloat16(name: str):
    """Gradients may differ there: of equal outputs, and bfloat16 has many, some variants choose one, others all."""
    (found, _), (expected, _) = (outputs_and_gradient(block, "bfloat16") for block in (VARIANTS[name], as_it_is))
    np.testing.assert_allclose(found, expected, rtol=1e-3)
