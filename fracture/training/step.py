"""A worker's replica of the network, and the steps of all replicas together."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from fracture.training.checkpoint import Arrays
from fracture.training.metric_sums import SIZE, cross_entropy, sum_batch
from fracture.training.strategy import local_arrays, local_variables, reducer, run_on_replica


class Replica:
    """This worker's copy of the network.

    All workers call `train_steps`, `validate_steps`, `total_sums` and `share_moving_averages`, or those that do wait.
    A step is one pass over a global batch: each worker computes the gradients of its part, they are added up over the
    workers, and all replicas change alike. Groups of steps are one call of TensorFlow, so that the host's part of a
    step is small.
    """

    def __init__(
        self,
        strategy: Any,
        network: keras.Model,
        optimizer: Any,
        prepare: Callable[..., tf.Tensor],
        take: Callable[[tf.Tensor], tf.Tensor],
        smoothing: float,
        xla: bool,
    ) -> None:
        """
        Args:
            network: with a layer `logit`; made in the strategy's scope, as the optimizer is.
            prepare: makes the network's input of the inputs of a training batch: images, transforms and exposures.
            take: the same of those of a validation batch: images.
            smoothing: label smoothing of the loss.
            xla: compile the part of a step that is this worker's own.
        """
        self._strategy, self._network, self._optimizer = strategy, network, optimizer
        self._prepare, self._take = prepare, take
        self._smoothing = smoothing
        self._logits = keras.Model(network.inputs, network.get_layer("logit").output)
        self._last = network.get_layer("logit").trainable_weights
        with strategy.scope():
            self._sums = tf.Variable(
                tf.zeros(SIZE, tf.float64),
                trainable=False,
                synchronization=tf.VariableSynchronization.ON_READ,
                aggregation=tf.VariableAggregation.SUM,
            )
        self._averages = _moving_averages(network)
        self._add_sums = reducer(strategy, "sum", [self._sums])
        self._mean_averages = reducer(strategy, "mean", self._averages)
        # Not the augmentation, which has an operation that XLA lacks, nor what adds up over the workers.
        compute = self._compute_gradients
        self._differentiate = tf.function(compute, jit_compile=True, autograph=False) if xla else compute
        # Without AutoGraph, which writes what it converts into temporary files that stay where a worker is killed.
        self._train = tf.function(self._train_group, autograph=False)
        self._validate = tf.function(self._validate_group, autograph=False)

    def train_steps(self, batches: tf.data.Iterator, steps: int) -> tuple[int, bool]:
        """Do so many training steps.

        Returns:
            The number of steps until the network was not finite any more, that one included, and whether it is finite
            after all of them: the same on all workers.
        """
        finite = int(self._train(batches, tf.constant(steps)))
        return min(finite + 1, steps), finite == steps

    def validate_steps(self, batches: tf.data.Iterator, steps: int) -> None:
        """Count so many batches without changing the network."""
        self._validate(batches, tf.constant(steps))

    def total_sums(self) -> np.ndarray:
        """Return the sums of what was counted since they were set, over all workers, [SIZE]."""
        return self._add_sums()[0]

    def set_sums(self, sums: Arrays, rank: int) -> None:
        """Set the sums as if rank 0 had counted it all; an empty list: nothing is counted yet."""
        local_variables(self._strategy, [self._sums])[0].assign(sums[0] if sums and rank == 0 else np.zeros(SIZE))

    def share_moving_averages(self) -> None:
        """Set each worker's moving averages of batch norm to their mean.

        Each gathers its own. Without this, workers would validate different models, none of them the one saved.
        Doing it more often changes nothing: the average of means is the mean of averages.
        """
        for variable, mean in zip(local_variables(self._strategy, self._averages), self._mean_averages(), strict=True):
            variable.assign(mean)

    def weights(self) -> Arrays:
        """Return the network's weights, in its order."""
        return local_arrays(self._strategy, self._network.weights)

    def optimizer_state(self) -> Arrays:
        """Return all that the optimizer remembers."""
        return local_arrays(self._strategy, self._optimizer.variables)

    def steps_done(self) -> int:
        """Return the number of steps of this phase."""
        return int(local_arrays(self._strategy, [self._optimizer.iterations])[0])

    def _train_group(self, batches: tf.data.Iterator, steps: tf.Tensor) -> tf.Tensor:
        """Return the number of steps before the first after which the network was not finite.

        The steps after it are done, and in vain: a loop that ended there would have to wait for each step's end before
        it began the next, and a GPU would idle meanwhile. For the same reason the number is a float, since TensorFlow
        keeps int32 on the host.
        """

        def step(done: tf.Tensor, finite: tf.Tensor, count: tf.Tensor) -> tuple[tf.Tensor, ...]:
            finite *= run_on_replica(self._strategy, self._train_step, batches.get_next())
            return done + 1, finite, count + finite

        start = (tf.constant(0), tf.constant(1.0), tf.constant(0.0))
        return tf.while_loop(lambda done, *_: done < steps, step, start)[-1]

    def _validate_group(self, batches: tf.data.Iterator, steps: tf.Tensor) -> None:
        def step(done: tf.Tensor) -> list[tf.Tensor]:
            run_on_replica(self._strategy, self._validate_step, batches.get_next())
            return [done + 1]

        # By default it would take ten batches at a time, with the memory of all, since none waits for another.
        tf.while_loop(lambda done: done < steps, step, [tf.constant(0)], parallel_iterations=1)

    def _train_step(self, inputs: Any, labels: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
        """Train on this worker's part of a batch; return 1.0 if the network is finite, else 0.0.

        A logit that is not finite makes the gradient of the last layer so, and with it the layer, in the same step. The
        layer is alike on all workers, and a loss is not: were one worker to stop on its own loss, the others would wait
        for it for ever.

        Args:
            weights: 1 / images of the global batch, so that the sum over all workers is the mean.
        """
        labels = labels[:, 0]
        gradients, logits = self._differentiate(self._prepare(*inputs), labels, weights)
        if isinstance(self._optimizer, keras.optimizers.LossScaleOptimizer):
            # It skips the step where its own gradients are not finite. All must skip the same, so they look at the sum.
            # Divided by the number of workers, since `apply_gradients` adds them up once more.
            gradients = [g / self._strategy.num_replicas_in_sync for g in _add_up(gradients)]
        variables = self._network.trainable_variables
        self._optimizer.apply_gradients(zip(gradients, variables, strict=True))  # added up over the workers
        self._sums.assign_add(sum_batch(labels, logits, weights))  # of the labels as they are, not smoothed
        finite = [tf.reduce_all(tf.math.is_finite(variable.value)) for variable in self._last]
        return tf.cast(tf.reduce_all(finite), tf.float32)

    def _compute_gradients(
        self, images: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor
    ) -> tuple[list[tf.Tensor], tf.Tensor]:
        """Return the gradients of the (scaled) loss over this worker's images, and their logits [n] float32."""
        with tf.GradientTape() as tape:
            logits = tf.cast(self._logits(images, training=True)[:, 0], tf.float32)
            smoothed = labels * (1 - self._smoothing) + self._smoothing / 2
            loss = tf.reduce_sum(weights * cross_entropy(smoothed, logits))
            scaled = self._optimizer.scale_loss(loss)
        return tape.gradient(scaled, [variable.value for variable in self._network.trainable_variables]), logits

    def _validate_step(self, images: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor) -> None:
        logits = tf.cast(self._logits(self._take(images), training=False)[:, 0], tf.float32)
        self._sums.assign_add(sum_batch(labels[:, 0], logits, weights))


def _add_up(gradients: list[tf.Tensor]) -> list[tf.Tensor]:
    return tf.distribute.get_replica_context().all_reduce("sum", gradients)


def _moving_averages(network: keras.Model) -> list[Any]:
    """Return the moving averages of the batch norms that are trained."""
    norms = [layer for layer in network.layers if isinstance(layer, keras.layers.BatchNormalization)]
    return [variable for norm in norms if norm.trainable for variable in norm.non_trainable_variables]
