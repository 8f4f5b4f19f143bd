"""What the loop is made of; the loop itself is in integration/."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from fracture.training.phase_model import learning_rate
from fracture.training.phases import list_phases


def test_the_learning_rate_of_a_step_is_known_without_having_done_it(tiny_config):
    config = tiny_config("training.epochs=2", "training.learning_rate=0.001")
    [phase] = list_phases(config)
    assert learning_rate(config, phase, 10, 0) == pytest.approx(1e-3)
    assert learning_rate(config, phase, 10, 10) == pytest.approx(5e-4), "half way down the cosine"
    assert learning_rate(config, phase, 10, 20) == pytest.approx(0, abs=1e-9)
    constant = tiny_config("training.schedule=constant", "training.learning_rate=0.01")
    assert learning_rate(constant, *list_phases(constant), 10, 15) == 0.01


def test_each_phase_names_the_setting_of_its_learning_rate(tiny_config):
    assert [phase.rate_setting for phase in list_phases(tiny_config())] == ["training.learning_rate"]
    both = tiny_config("model.name=mobilenetv2", "transfer.unfreeze=2", "transfer.learning_rate=0.002")
    assert [(phase.trains, phase.rate_setting, phase.learning_rate) for phase in list_phases(both)] == [
        ("head", "training.learning_rate", both.training.learning_rate),
        ("fine-tuning", "transfer.learning_rate", 0.002),
    ]


def test_the_loss_scale_of_float16_goes_on_where_it_was():
    def optimizer() -> keras.optimizers.LossScaleOptimizer:
        made = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(), dynamic_growth_steps=3)
        made.build([weight])
        return made

    def scale_and_steps(of: keras.optimizers.LossScaleOptimizer) -> tuple[float, int]:
        return of.dynamic_scale.numpy(), of.step_counter.numpy()

    weight = keras.Variable(np.ones(2))
    before = optimizer()
    for gradient in (np.ones(2), np.full(2, np.inf), np.ones(2)):  # the second halves it
        before.apply([tf.constant(gradient, tf.float32)], [weight])
    assert scale_and_steps(before) == (2**14, 1)
    after = optimizer()
    for variable, value in zip(after.variables, before.variables, strict=True):
        variable.assign(value)
    assert scale_and_steps(after) == (2**14, 1)
