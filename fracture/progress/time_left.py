"""An estimate of the time that a training still takes."""

import time
from collections.abc import Callable

from fracture.progress.events import EpochDone, PhaseStarted, StepDone, TrainingEvent, TrainingStarted


class TimeLeft:
    """Estimates seconds from the events of a training. Early stopping may end it sooner."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last_epoch = 0  # that the phase under way can have
        self._epoch_seconds: list[float] = []  # of the phase under way
        self._first = (0, 0)  # epoch and step of the epoch's first event; its steps before compiled the graph
        self._began = clock()  # when that event came
        self._epoch = self._step = self._steps = 0

    def see(self, event: TrainingEvent) -> None:
        """Take in an event; most kinds change nothing."""
        match event:
            case TrainingStarted():
                self._first = (0, 0)
                self._last_epoch = self._last_epoch or event.max_epochs
            case PhaseStarted():
                self._last_epoch = event.last_epoch
                self._epoch_seconds = []  # an epoch of another phase takes another time
            case StepDone():
                if self._first[0] != event.epoch:
                    self._first, self._began = (event.epoch, event.step), self._clock()
                self._epoch, self._step, self._steps = event.epoch, event.step, event.steps
            case EpochDone(record):
                self._epoch_seconds.append(record["seconds"])
                self._epoch = int(record["epoch"])

    def until_validation(self) -> float | None:
        """Return the seconds that the steps of the epoch under way still take; None before the second event of it."""
        each = self._step_seconds()
        return None if each is None else each * (self._steps - self._step)

    def after_epoch(self) -> float:
        """Return the seconds that the phase still takes, just after one of its epochs."""
        return self._mean() * (self._last_epoch - self._epoch)

    def within_epoch(self) -> float | None:
        """Return the seconds that the phase still takes, just after a step; None where nothing is known yet.

        It follows from the phase's mean epoch; in the phase's first epoch from the steps so far, without validation.
        """
        if self._epoch_seconds:
            remaining = max(self._mean() - (self._clock() - self._began), 0)
            return remaining + self._mean() * (self._last_epoch - self._epoch)
        each = self._step_seconds()
        if each is None:
            return None
        return each * (self._steps * (self._last_epoch - self._epoch + 1) - self._step)

    def _step_seconds(self) -> float | None:
        first = self._first[1]
        return None if self._step <= first else (self._clock() - self._began) / (self._step - first)

    def _mean(self) -> float:
        return sum(self._epoch_seconds) / len(self._epoch_seconds)
