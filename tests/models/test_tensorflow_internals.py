"""The private interfaces of TensorFlow are those of one version, and each still does what it is used for."""

import numpy as np
import pytest
import tensorflow as tf

from fracture.models.tensorflow_internals import (
    ConverterError,
    UninitializedVariable,
    convert_variables_to_constants_v2,
)

VERSION = "2.21"


def test_the_version_is_the_one_that_they_were_read_in():
    assert tf.__version__.startswith(f"{VERSION}."), (
        f"TensorFlow is {tf.__version__}, and fracture/models/tensorflow_internals.py was written for {VERSION}: "
        "compare each private interface there with TensorFlow's source, look for a public one, then change VERSION here"
    )


def test_a_variable_without_a_value_has_a_shape_that_no_memory_holds():
    assert UninitializedVariable(name="a", shape=(2**30, 2**10), dtype=tf.float32).shape == (2**30, 2**10)


def test_weights_become_constants():
    weight = tf.Variable([2.0, 3.0])
    function = tf.function(lambda x: x * weight).get_concrete_function(tf.TensorSpec([2]))
    constant = convert_variables_to_constants_v2(function)
    assert len(function.variables) == 1
    assert len(constant.variables) == 0
    assert np.allclose(constant(tf.ones(2)), [2, 3])


def test_an_operation_that_tflite_does_not_have_raises_the_error():
    function = tf.function(tf.linalg.logdet).get_concrete_function(tf.TensorSpec([2, 2]))
    with pytest.raises(ConverterError):
        tf.lite.TFLiteConverter.from_concrete_functions([function], tf.Module()).convert()
