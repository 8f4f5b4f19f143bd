"""MultiWorkerMirroredStrategy: how a worker computes together with the others."""

import os
import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fracture.config import Config
from fracture.evaluation.devices import limit_devices
from fracture.runtime.gpus import read_driver


def make_strategy(config: Config) -> Any:
    """Set up this worker's devices, and wait for the other workers."""
    _set_up_devices(config)
    import tensorflow as tf

    kinds = tf.distribute.experimental.CommunicationImplementation
    kind = kinds.NCCL if config.compute.gpu else kinds.RING  # between GPUs; between CPUs, over gRPC
    options = tf.distribute.experimental.CommunicationOptions(implementation=kind)
    return tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)


def _set_up_devices(config: Config) -> None:
    """Limit cores and GPU memory. TensorFlow takes all of them unless they are limited before it starts."""
    if config.uses_xla and config.compute.gpu:
        with suppress(OSError, RuntimeError):  # no folder, or no home for one: then each start compiles anew
            if (driver := read_driver()) and driver.gpus:
                keep_compiled(Path.home() / ".cache/fracture/xla" / re.sub(r"\W+", "-", driver.gpus[0]), "GPU")
    cpus = config.compute.cpus_per_worker
    limit_devices(cpus, gpu=config.compute.gpu, kernels=max(2, cpus))


def keep_compiled(folder: Path, kind: str) -> None:
    """Have XLA keep what it compiles for this kind of device in a folder, and read it there; before TensorFlow loads.

    Args:
        folder: one for each kind of card and driver, since the compiled code is of that card.
        kind: `GPU`, or `CPU`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    flags = f"--tf_xla_persistent_cache_directory={folder} --tf_xla_persistent_cache_device_types={kind}"
    os.environ["TF_XLA_FLAGS"] = f"{os.environ.get('TF_XLA_FLAGS', '')} {flags}".strip()


def run_on_replica(strategy: Any, step: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Call `step` on this worker's replica, inside a `tf.function`, and return what it returns."""
    return strategy.experimental_local_results(strategy.run(step, arguments))[0]


def local_arrays(strategy: Any, variables: list[Any]) -> list[np.ndarray]:
    """Return this worker's values. Reading them through the strategy would cost a collective for each."""
    return [variable.numpy() for variable in local_variables(strategy, variables)]


def local_variables(strategy: Any, variables: list[Any]) -> list[Any]:
    """Return this worker's copies of distributed variables."""
    return [strategy.experimental_local_results(unwrap(variable))[0] for variable in variables]


def unwrap(variable: Any) -> Any:
    """Return TensorFlow's variable inside one of Keras."""
    import keras

    return variable.value if isinstance(variable, keras.Variable) else variable


def reducer(strategy: Any, how: Literal["sum", "mean"], variables: list[Any]) -> Callable[[], list[np.ndarray]]:
    """Return a function that all workers call, and that gives the variables' sum or mean over them.

    It takes one collective for all variables.
    """
    import tensorflow as tf

    def on_replica() -> list[Any]:
        return tf.distribute.get_replica_context().all_reduce(how, [unwrap(v) + 0 for v in variables])

    @partial(tf.function, autograph=False)
    def reduce() -> list[Any]:
        return strategy.run(on_replica)

    return lambda: local_arrays(strategy, reduce()) if variables else []


def adder(strategy: Any, numbers: int) -> Callable[[list[float]], list[float]]:
    """Return a function that all workers call, each with its own numbers, and that gives their sums."""
    import tensorflow as tf

    with strategy.scope():
        own = tf.Variable(
            tf.zeros(numbers),
            trainable=False,
            synchronization=tf.VariableSynchronization.ON_READ,
            aggregation=tf.VariableAggregation.SUM,
        )
    add = reducer(strategy, "sum", [own])

    def sum_over_workers(values: list[float]) -> list[float]:
        local_variables(strategy, [own])[0].assign(values)
        return add()[0].tolist()

    return sum_over_workers
