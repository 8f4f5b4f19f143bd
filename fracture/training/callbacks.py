"""What happens between two steps of `fit` and `evaluate`."""

import time
from collections.abc import Callable

import numpy as np
import tf_keras as keras

from fracture.runtime.channel import Tell
from fracture.runtime.watchdog import Watchdog

_BETWEEN = 1.0  # seconds between two agreements, and between two steps that are told


class StopOnDivergence(keras.callbacks.Callback):
    """Stops the fit, on all workers at the same step, when the weights are no longer finite.

    Looks at the last layer's bias, whose gradient is the mean of (probability - label): a loss that is not finite
    makes it so at once. Weights are alike on all workers, and a loss is not: were one worker to stop on its own
    loss, the others would wait for it for ever.
    """

    def __init__(self) -> None:
        super().__init__()
        self.step: int | None = None  # of this fit, where it happened, counted from 1

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        bias = self.model.get_layer("logit").bias.numpy()
        if not np.isfinite(bias).all():
            self.step = batch + 1
            self.model.stop_training = True


class Left(Exception):
    """All workers leave, by agreement."""


class Progress(keras.callbacks.Callback):
    """Tells watchdog and driver how far it is, and agrees with the other workers whether to save, or to leave.

    Saving and leaving take all workers, after the same step; but only rank 0 hears that the job is to end, and clocks
    differ. So about once a second they add up what each has to say. How many steps that is, rank 0 says too.
    """

    def __init__(
        self,
        tell: Tell | None,
        watchdog: Watchdog,
        agree: Callable[[list[float]], list[float]],
        warned: Callable[[], bool],
        save_every: float,
    ) -> None:
        """
        Args:
            tell: on rank 0.
            agree: adds up three numbers over all workers.
            warned: a machine is about to be taken away; is called on all workers alike.
            save_every: seconds.
        """
        super().__init__()
        self._tell, self._watchdog, self._agree, self._warned = tell, watchdog, agree, warned
        self._save_every, self._saved, self._told = save_every, time.monotonic(), 0.0
        self._stop = self._heeded = False
        self._batches, self._due = 0, 1
        self._agreed_at = (0, time.monotonic())  # batches, and when
        self.epoch = self.step = self._first = self._steps = 0

    def begin(self, epoch: int, first: int, steps: int, save: Callable[[int], None]) -> None:
        """Before `fit` and `evaluate`.

        Args:
            epoch: counted from 1.
            first: steps of the epoch that are done.
            save: is called, on all workers, with the steps that are done.
        """
        self.epoch, self.step, self._first, self._steps, self._save = epoch, first, first, steps, save
        self._watchdog.busy(f"on its way to the next step, after step {first} of epoch {epoch}")

    def saved(self) -> None:
        self._saved = time.monotonic()

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self.step = self._first + batch + 1
        self._watchdog.step(f"training, after step {self.step} of epoch {self.epoch}")
        if self.model.stop_training:  # it diverged
            return
        self._say("step")
        self._heed()

    def on_test_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self._watchdog.step(f"validating, after batch {batch + 1} of epoch {self.epoch}")
        self._say("validating")
        self._heed()

    def between_epochs(self) -> None:
        """Leaves, if that is asked; the epoch is saved already."""
        self._due = self._batches
        self._say("between epochs")
        if self._agreed()[0]:
            raise Left

    def _heed(self) -> None:
        leave, save = self._agreed()
        if leave or save:
            self._save(self.step)
        if leave:
            raise Left

    def _say(self, what: str) -> None:
        if self._tell is not None and (now := time.monotonic()) - self._told >= _BETWEEN:
            self._told = now
            self._stop = self._tell(event=what, epoch=self.epoch, step=self.step, steps=self._steps)

    def _agreed(self) -> tuple[bool, bool]:
        """Whether to leave, and whether to save."""
        self._batches += 1
        if self._batches < self._due:
            return False, False
        (batches, when), now = self._agreed_at, time.monotonic()
        self._agreed_at = (self._batches, now)
        warned = self._warned() and not self._heeded
        self._heeded |= warned
        says = [float(self._stop), float(warned), 0.0]
        if self._tell is not None:
            says[1] += now - self._saved >= self._save_every
            says[2] = _BETWEEN / max((now - when) / (self._batches - batches), 1e-3)
        leave, save, pace = self._agree(says)
        self._due = self._batches + max(1, int(pace))
        return leave > 0, save > 0
