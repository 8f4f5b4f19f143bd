"""The callbacks that run between two steps of `fit` and `evaluate`."""

import time
from collections.abc import Callable

import numpy as np
import tf_keras as keras

from fracture.progress.events import StepDone, TrainingEvent, Validating
from fracture.runtime.channel import EventChannel
from fracture.runtime.watchdog import Watchdog

_BETWEEN = 1.0  # seconds between two agreements, and between two events of steps


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


class StopRequested(Exception):
    """All workers agreed to end, since the driver asked for it; the checkpoint is saved."""


class Progress(keras.callbacks.Callback):
    """Reports steps to the watchdog and the driver, and agrees with the other workers whether to save or to stop.

    All workers save and stop after the same step; but only rank 0 hears that the job is to end, and clocks differ. So
    about once a second they add up what each knows. The number of steps until then is rank 0's choice too.
    """

    def __init__(
        self,
        channel: EventChannel | None,
        watchdog: Watchdog,
        agree: Callable[[list[float]], list[float]],
        warned: Callable[[], bool],
        save_every: float,
    ) -> None:
        """
        Args:
            channel: on rank 0.
            agree: adds up three numbers over all workers.
            warned: returns whether a machine is about to be taken away; is called on all workers alike.
            save_every: seconds.
        """
        super().__init__()
        self._channel, self._watchdog, self._agree, self._warned = channel, watchdog, agree, warned
        self._save_every, self._saved, self._sent = save_every, time.monotonic(), 0.0
        self._stop_requested = self._heeded = False
        self._batches, self._due = 0, 1
        self._agreed_at = (0, time.monotonic())  # batches, and when
        self.epoch = self.step = self._first = self._steps = 0

    def begin(self, epoch: int, first: int, steps: int, save: Callable[[int], None]) -> None:
        """Begin an epoch or its validation; called before `fit` and `evaluate`.

        Args:
            epoch: counted from 1.
            first: steps of the epoch that are done.
            save: is called, on all workers, with the steps that are done.
        """
        self.epoch, self.step, self._first, self._steps, self._save = epoch, first, first, steps, save
        self._watchdog.busy(f"on its way to the next step, after step {first} of epoch {epoch}")

    def saved(self) -> None:
        """Note that a checkpoint is saved now."""
        self._saved = time.monotonic()

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self.step = self._first + batch + 1
        self._watchdog.step(f"training, after step {self.step} of epoch {self.epoch}")
        if self.model.stop_training:  # it diverged
            return
        self._report(StepDone(self.epoch, self.step, self._steps))
        self._heed()

    def on_test_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self._watchdog.step(f"validating, after batch {batch + 1} of epoch {self.epoch}")
        self._report(Validating(self.epoch, self.step, self._steps))
        self._heed()

    def between_epochs(self) -> None:
        """Stop, if that is requested; the epoch is saved already."""
        self._due = self._batches
        self._report(None)
        if self._agreed()[0]:
            raise StopRequested

    def _heed(self) -> None:
        stop, save = self._agreed()
        if stop or save:
            self._save(self.step)
        if stop:
            raise StopRequested

    def _report(self, event: TrainingEvent | None) -> None:
        """Send the event, if there is one, and look whether the driver asks to stop; about once a second."""
        if self._channel is not None and (now := time.monotonic()) - self._sent >= _BETWEEN:
            self._sent = now
            if event is not None:
                self._channel.send(event)
            self._stop_requested = self._channel.stop_requested()

    def _agreed(self) -> tuple[bool, bool]:
        """Return whether to stop and whether to save."""
        self._batches += 1
        if self._batches < self._due:
            return False, False
        (batches, when), now = self._agreed_at, time.monotonic()
        self._agreed_at = (self._batches, now)
        warned = self._warned() and not self._heeded
        self._heeded |= warned
        own = [float(self._stop_requested), float(warned), 0.0]
        if self._channel is not None:
            own[1] += now - self._saved >= self._save_every
            own[2] = _BETWEEN / max((now - when) / (self._batches - batches), 1e-3)
        stop, save, pace = self._agree(own)
        self._due = self._batches + max(1, int(pace))
        return stop > 0, save > 0
