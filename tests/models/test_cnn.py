import logging

import keras
import numpy as np
import pytest
import tensorflow as tf

from fracture.config import load_config
from fracture.models import build_model, weight_shapes
from fracture.models.cnn import KeyedDropout


def kinds(model: keras.Model) -> list[str]:
    return [type(layer).__name__ for layer in model.layers]


def test_the_reference_network_to_the_letter():
    model = build_model(load_config("fracture/configs/seed.yaml"), 59.0, 56.0)
    block = ["Conv2D", "BatchNormalization", "ReLU", "MaxPooling2D"]
    assert kinds(model) == ["InputLayer", "Rescaling", *block * 4, "Flatten", "Dense", "Dropout", "Dense", "Activation"]
    assert [layer.filters for layer in model.layers if isinstance(layer, keras.layers.Conv2D)] == [64, 128, 256, 512]
    assert model.input_shape == (None, 224, 224, 1)
    assert model.output_shape == (None, 1)
    convolutions, norms = 9 * (64 + 64 * 128 + 128 * 256 + 256 * 512), 4 * (64 + 128 + 256 + 512)
    assert model.count_params() == convolutions + norms + (14 * 14 * 512 + 1) * 256 + 257 == 27_243_329


def test_the_default_network_pools_first_and_is_small():
    model = build_model(load_config(), 59.0, 56.0)
    assert kinds(model)[2:6] == ["Conv2D", "MaxPooling2D", "BatchNormalization", "ReLU"]
    assert model.count_params() == 1_684_289
    assert {layer.momentum for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)} == {0.9}


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("model.batch_norm=false", "model.head=flatten"),
        ("model.dense=[]", "model.filters=[3,5,7]"),
        ("model.dense=[9,6]", "model.head=flatten", "data.image_size=37", "model.block=conv-bn-relu-pool"),
        ("model.sync_batch_norm=true", "model.dropout=0"),
    ],
)
def test_shapes_told_without_building_are_those_of_the_network(tiny_config, changes: tuple[str, ...]):
    config = tiny_config(*changes)
    built = [(weight.path, tuple(weight.shape)) for weight in build_model(config, 100.0, 50.0).weights]
    assert list(weight_shapes(config).items()) == built


def test_standardising_is_part_of_the_network(tiny_config):
    model = build_model(tiny_config(), pixel_mean=100.0, pixel_std=50.0)
    standardise = keras.Model(model.input, model.get_layer("standardise").output)
    images = np.array([0, 100, 150, 255], np.uint8).reshape(4, 1, 1, 1) * np.ones((1, 32, 32, 1), np.uint8)
    assert standardise(images)[:, 0, 0, 0].numpy() == pytest.approx([-2, 0, 1, 3.1], abs=1e-5)


def test_uint8_and_float_images_give_the_same_probabilities(tiny_config):
    model = build_model(tiny_config(), 100.0, 50.0)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 1), np.uint8)
    probabilities = model(images)
    assert probabilities.dtype == tf.float32
    assert np.allclose(probabilities, model(images.astype(np.float32)), rtol=1e-6, atol=0)
    assert ((probabilities > 0) & (probabilities < 1)).numpy().all()


def test_probabilities_are_float32_in_mixed_precision(tiny_config):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = build_model(tiny_config(), 100.0, 50.0)
    finally:
        keras.config.set_dtype_policy("float32")
    assert model.get_layer("conv1").compute_dtype == "bfloat16"
    assert model.output.dtype == "float32"


def test_the_network_handed_over_takes_the_trained_weights(tiny_config):
    trained = build_model(tiny_config(), 100.0, 50.0, step=lambda: tf.constant(0))
    handed_over = build_model(tiny_config(), 100.0, 50.0)
    handed_over.set_weights(trained.get_weights())
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 1), np.uint8)
    assert np.allclose(trained(images), handed_over(images), rtol=1e-6, atol=0), "the fused kernel may round otherwise"
    assert "KeyedDropout" in kinds(trained)
    assert "KeyedDropout" not in kinds(handed_over)


def dropped(step: int, seed: int = 1, rate: float = 0.4) -> np.ndarray:
    layer = KeyedDropout(rate, seed, lambda: tf.constant(step), name="dropout")
    return layer(tf.ones((100, 100)), training=True).numpy()


def test_dropout_repeats_for_the_same_step_and_differs_for_others():
    assert np.array_equal(dropped(7), dropped(7))
    assert not np.array_equal(dropped(7), dropped(8))
    assert not np.array_equal(dropped(7), dropped(7, seed=2))


def test_dropout_drops_the_rate_and_keeps_the_mean():
    values = dropped(0)
    assert (values == 0).mean() == pytest.approx(0.4, abs=0.02)
    assert values[values > 0] == pytest.approx(1 / 0.6)
    layer = KeyedDropout(0.4, 1, lambda: tf.constant(0), name="dropout")
    assert np.array_equal(layer(tf.ones((4, 4)), training=False), np.ones((4, 4)))


def test_synchronised_batch_norm_is_asked_of_keras(tiny_config):
    model = build_model(tiny_config("model.sync_batch_norm=true"), 100.0, 50.0)
    assert model.get_layer("norm1").synchronized


def test_without_batch_norm_the_convolutions_have_a_bias(tiny_config):
    model = build_model(tiny_config("model.batch_norm=false"), 100.0, 50.0)
    assert model.get_layer("conv1").use_bias
    assert "BatchNormalization" not in kinds(model)


def test_many_networks_in_a_process_are_no_warning():
    """As a comparison has them. TensorFlow counts each one's own trace as a function that is traced anew."""
    warnings, handler, logger = [], logging.Handler(), logging.getLogger("tensorflow")
    handler.emit = lambda record: warnings.append(record.getMessage())
    logger.addHandler(handler)
    images = np.zeros((16, 32, 32, 1), np.uint8)
    for _ in range(12):
        build_model(load_config(None, ["data.image_size=32", "model.filters=[2]"]), 59.0, 56.0).predict_on_batch(images)
    logger.warning("another")
    logger.removeHandler(handler)
    assert warnings == ["another"]
