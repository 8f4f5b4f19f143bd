"""Steps of one replica, on a CPU, without Ray."""

import tempfile
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from fracture.config import AugmentConfig, Config
from fracture.dataset.augment import augment
from fracture.dataset.format import Dataset
from fracture.dataset.pipeline import WorkerRows, evaluation_batches, load_worker_rows, training_batches
from fracture.dataset.sampler import BalancedSampler
from fracture.dataset.sharding import ShardedBatches
from fracture.models import build_model
from fracture.training.step import Replica


@pytest.fixture
def rows(shard_folder) -> WorkerRows:
    folder, manifest = shard_folder(train=60)
    sampler = BalancedSampler(np.arange(60), np.arange(60) % 2, "image", seed=0)
    batches = ShardedBatches(60, 8)
    return load_worker_rows(Dataset(folder, manifest), "train", batches, sampler, epochs=1, memory=10**9)


@pytest.fixture
def replica(tiny_config) -> Callable[..., Replica]:
    """Makes a replica of the tiny network that trains on the rows."""

    def build(rows: WorkerRows, *assignments: str) -> Replica:
        config: Config = tiny_config(*assignments)
        keras.utils.set_random_seed(0)
        strategy = tf.distribute.MirroredStrategy(["CPU:0"])
        keras.config.set_dtype_policy(config.training.precision)
        with strategy.scope():
            adam = keras.optimizers.Adam(1e-3)
            scaled = config.training.precision == "mixed_float16"
            optimizer: Any = keras.optimizers.LossScaleOptimizer(adam) if scaled else adam
            network = build_model(config, 127.0, 60.0, step=lambda: adam.iterations.value)
            optimizer.build(network.trainable_variables)
        keras.config.set_dtype_policy("float32")
        return Replica(
            strategy,
            network,
            optimizer,
            lambda batch, *augmentation: augment(rows.take(batch), *augmentation),
            rows.take,
            config.training.label_smoothing,
            config.uses_xla,
        )

    return build


def train(replica: Replica, rows: WorkerRows, *groups: int) -> list[np.ndarray]:
    """Train so many steps in each group; return the weights and the sums."""
    batches = iter(training_batches(rows, 0, 0, AugmentConfig()))
    assert [replica.train_steps(batches, steps) for steps in groups] == [(steps, True) for steps in groups]
    assert replica.steps_done() == sum(groups)
    return [*replica.weights(), replica.total_sums()]


def test_steps_in_a_group_are_the_steps_alone(replica, rows):
    alone, in_groups = (train(replica(rows), rows, *groups) for groups in ([1] * 8, [1, 4, 3]))
    assert all(map(np.array_equal, alone, in_groups))


def test_nothing_is_written_into_the_temporary_folder(replica, rows, tmp_path, monkeypatch):
    """Where a worker is killed, the files of what AutoGraph converts would stay."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    trained = replica(rows)
    train(trained, rows, 2)
    trained.validate_steps(iter(evaluation_batches(rows, np.ones(60, np.float32))), 2)
    assert not list(tmp_path.glob("*.py"))


@pytest.mark.parametrize("groups", [(8,), (2, 6), (3, 5), (1,) * 8])
def test_the_first_step_after_which_the_network_is_not_finite_is_counted(groups: tuple[int, ...], replica, rows):
    """The third batch has a weight that is not a number."""

    def break_the_third(step: Any, batch: Any) -> Any:
        inputs, labels, weights = batch
        return inputs, labels, tf.where(step == 2, np.nan, 1.0) * weights

    batches = iter(training_batches(rows, 0, 0, AugmentConfig()).enumerate().map(break_the_third))
    trained, done = replica(rows), 0
    for steps in groups:
        counted, finite = trained.train_steps(batches, steps)
        done += counted
        assert counted == steps or not finite
        if not finite:
            break
    assert (done, finite) == (3, False)


def test_images_on_the_device_train_the_same_network(replica, rows):
    on_device = rows.copy_to_device()
    here, there = train(replica(rows), rows, 8), train(replica(on_device), on_device, 8)
    assert all(map(np.array_equal, here, there))


def test_float16_trains_the_same_network_but_for_rounding(replica, rows):
    plain, half = (
        train(replica(rows, "model.dropout=0.0", f"training.precision={precision}"), rows, 8)
        for precision in ("float32", "mixed_float16")
    )
    for a, b in zip(plain[:-1], half[:-1], strict=True):
        np.testing.assert_allclose(a, b, atol=0.02, rtol=0.02)


def test_float16_skips_a_step_whose_gradients_are_not_finite_and_halves_the_scale(replica, rows):
    """The second batch has a weight of the loss beyond what float16 holds."""

    def enlarge(step: Any, batch: Any) -> Any:
        inputs, labels, weights = batch
        return inputs, labels, tf.where(step == 1, 1e30, 1.0) * weights

    trained = replica(rows, "training.precision=mixed_float16")
    batches = iter(training_batches(rows, 0, 0, AugmentConfig()).enumerate().map(enlarge))
    assert trained.train_steps(batches, 1) == (1, True)
    before, state = trained.weights(), trained.optimizer_state()
    assert trained.train_steps(batches, 1) == (1, True)
    assert np.array_equal(trained.weights()[0], before[0]), "no step was done"
    pairs = zip(state, trained.optimizer_state(), strict=True)
    assert (32768.0, 16384.0) in [(float(old), float(new)) for old, new in pairs if old.shape == ()]
    assert trained.train_steps(batches, 2) == (2, True)
    assert not np.array_equal(trained.weights()[0], before[0])


def test_xla_trains_the_same_network(replica, rows):
    plain, compiled = (
        train(replica(rows, "model.dropout=0.0", f"training.xla={xla}"), rows, 8) for xla in ("never", "always")
    )
    for a, b in zip(plain, compiled, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("xla", ["never", "always"])
def test_dropout_is_repeated_and_drops(xla: str, replica, rows):
    first, again, without = (
        train(replica(rows, f"model.dropout={rate}", f"training.xla={xla}"), rows, 3) for rate in (0.5, 0.5, 0.0)
    )
    assert all(map(np.array_equal, first, again))
    assert not np.array_equal(first[0], without[0])
