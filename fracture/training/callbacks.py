"""What happens between two steps of `fit`."""

import time
from collections.abc import Callable

import numpy as np
import tf_keras as keras


class StepProgress(keras.callbacks.Callback):
    """Tells how far the epoch is, at most once a second."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        super().__init__()
        self._tell, self._told = tell, 0.0

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        if (now := time.monotonic()) - self._told >= 1:
            self._told = now
            self._tell(batch + 1)


class StopOnDivergence(keras.callbacks.Callback):
    """Stops the fit, on all workers at the same step, when the weights are no longer finite.

    Looks at the last layer's bias, whose gradient is the mean of (probability - label): a loss that is not finite
    makes it so at once. Weights are alike on all workers, and a loss is not: were one worker to stop on its own
    loss, the others would wait for it for ever.
    """

    def __init__(self) -> None:
        super().__init__()
        self.step: int | None = None  # where it happened, counted from 1

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        bias = self.model.get_layer("logit").bias.numpy()
        if not np.isfinite(bias).all():
            self.step = batch + 1
            self.model.stop_training = True
