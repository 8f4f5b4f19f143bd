"""MultiWorkerMirroredStrategy: how a worker computes together with the others."""

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal

import numpy as np

from fracture.config import Config


def make_strategy(config: Config) -> Any:
    """Set up this worker's devices, and wait for the other workers."""
    _set_up_devices(config)
    _disable_autotuning()
    import tensorflow as tf

    kinds = tf.distribute.experimental.CommunicationImplementation
    kind = kinds.NCCL if config.compute.gpu else kinds.RING  # between GPUs; between CPUs, over gRPC
    options = tf.distribute.experimental.CommunicationOptions(implementation=kind)
    return tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)


def _set_up_devices(config: Config) -> None:
    """Limit cores and GPU memory. TensorFlow takes all of them unless they are limited before it starts."""
    if config.training.xla:
        os.environ["TF_XLA_FLAGS"] = "--tf_xla_cpu_global_jit"  # otherwise only operations on GPUs are compiled
    import tensorflow as tf

    if config.training.xla:  # not `jit_compile`: XLA cannot compile the sums over workers
        tf.config.optimizer.set_jit("autoclustering")
    tf.config.threading.set_intra_op_parallelism_threads(config.compute.cpus_per_worker)
    tf.config.threading.set_inter_op_parallelism_threads(max(2, config.compute.cpus_per_worker))
    gpus = tf.config.list_physical_devices("GPU")
    if config.compute.gpu and not gpus:
        raise RuntimeError("compute.gpu is set, but TensorFlow sees no GPU on this worker")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)


def _disable_autotuning() -> None:
    """Disable the autotuning of the datasets that hand batches to a device, so that their iterators end at once.

    tf.data's autotuning has a thread that sleeps 10 ms, 20 ms, 40 ms, ... up to a minute, and an iterator that is
    dropped waits until the thread wakes: an epoch of 6 s took 10 s, one of 11 s took 20 s. Our own datasets disable it
    by their options. The small dataset that a distributed iterator adds on each device takes no options, so the
    function that makes it, private to TensorFlow 2.21, is wrapped.
    """
    import tensorflow as tf
    from tensorflow.python.data.ops import multi_device_iterator_ops

    make = multi_device_iterator_ops._create_device_dataset

    def make_untuned(*args: Any) -> Any:
        options = tf.data.Options()
        options.autotune.enabled = False
        return make(*args).with_options(options)

    multi_device_iterator_ops._create_device_dataset = make_untuned


def hide_gpus() -> None:
    """Keep this process off the GPUs; too late once TensorFlow has used one."""
    import fracture.models  # noqa: F401 - first: it keeps TensorFlow quiet as it loads

    import tensorflow as tf  # isort: skip

    with suppress(RuntimeError):
        tf.config.set_visible_devices([], "GPU")


def on_each_worker(strategy: Any, batches: Any) -> Any:
    """Return a dataset that `fit` takes as this worker's batches; it would split a plain one among the replicas."""
    return strategy.distribute_datasets_from_function(lambda context: batches)


def local_arrays(strategy: Any, variables: list[Any]) -> list[np.ndarray]:
    """Return this worker's values. Reading them through the strategy would cost a collective for each."""
    return [variable.numpy() for variable in local_variables(strategy, variables)]


def local_variables(strategy: Any, variables: list[Any]) -> list[Any]:
    """Return this worker's copies of distributed variables."""
    return [strategy.experimental_local_results(variable)[0] for variable in variables]


def reducer(strategy: Any, how: Literal["sum", "mean"], variables: list[Any]) -> Callable[[], list[np.ndarray]]:
    """Return a function that all workers call, and that gives the variables' sum or mean over them.

    It takes one collective for all variables.
    """
    import tensorflow as tf

    def on_replica() -> list[Any]:
        return tf.distribute.get_replica_context().all_reduce(how, [variable + 0 for variable in variables])

    @tf.function
    def reduce() -> list[Any]:
        return strategy.run(on_replica)

    return lambda: local_arrays(strategy, reduce()) if variables else []


def agreement(strategy: Any, numbers: int) -> Callable[[list[float]], list[float]]:
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

    def agree(values: list[float]) -> list[float]:
        local_variables(strategy, [own])[0].assign(values)
        return add()[0].tolist()

    return agree
