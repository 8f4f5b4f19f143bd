"""The decision whether a run that fails goes on, from its events alone."""

import time
from collections.abc import Callable

from fracture.config import RecoveryConfig
from fracture.errors import RunError
from fracture.progress.events import (
    CheckpointSaved,
    EpochDone,
    Resizing,
    Scoring,
    StepDone,
    TrainingEvent,
    TrainingStopped,
    Validating,
    WorkerError,
    WorkersFailed,
    WorkersStarted,
)

_SAME_ERROR, _SAME_DEATH = 2, 3  # times in a row after one step; a death may be chance

Span = tuple[int, int, int]  # epoch, and the first and last step after which it may have been


class Recovery:
    """Counts failures since the last checkpoint. Ray Train would count all of a run, also where it makes progress."""

    def __init__(self, config: RecoveryConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._clock = config, clock
        self.waiting_since: float | None = clock()  # for machines that hold the workers; None: they are there
        self.training = False  # workers train, and would see a request to stop
        self.failures = 0  # of this job
        self._in_a_row = 0  # since the last checkpoint
        self._step: Span | None = None  # of the last event since the workers started
        self._failed_at: Span | None = None
        self._at_one_step = 0

    def see(self, event: TrainingEvent) -> None:
        """Take in an event.

        Raises:
            RunError, UsageError: the run cannot go on.
        """
        match event:
            case WorkersStarted():
                self.waiting_since, self._step = None, None
            case StepDone(epoch, step) | Validating(epoch, step):
                self.training = True
                self._step = (epoch, step, step)
            case WorkerError(epoch, step, last):
                self._step = (epoch, step, last)
            case EpochDone() | CheckpointSaved():
                self._in_a_row, self._failed_at = 0, None
            case Scoring() | TrainingStopped():
                self.training = False
            case Resizing():
                self.training, self.waiting_since = False, self._clock()
            case WorkersFailed():
                self.training, self.waiting_since = False, self._clock()
                self._count(event)

    def _count(self, event: WorkersFailed) -> None:
        if event.error is not None:
            raise event.error
        self.failures += 1
        if event.preempted:
            return
        self._in_a_row += 1
        same = _may_be_one(self._step, self._failed_at)
        self._at_one_step = self._at_one_step + 1 if same else 1
        self._failed_at, self._step = self._step, None
        where = _describe(self._failed_at)
        if self._failed_at and self._at_one_step >= (_SAME_DEATH if event.lost else _SAME_ERROR):
            raise RunError(
                f"it fails again and again at the same place ({where}): {event.reason}. "
                "Run again with -v for the traces"
            )
        if self._in_a_row > self._config.max_failures:
            raise RunError(
                f"{self._in_a_row} failures without a checkpoint between them, more than recovery.max_failures = "
                f"{self._config.max_failures} ({where}): {event.reason}. Run again with -v for the traces"
            )

    def check_waiting(self, workers: int) -> None:
        """Raise RunError where the machines for so many workers have not come in time."""
        if self.waiting_since is None or self._clock() - self.waiting_since < 60 * self._config.wait_minutes:
            return
        raise RunError(
            f"no machines for {workers} workers came within recovery.wait_minutes = {self._config.wait_minutes:g}. "
            "Run the same command again, when there are, to go on"
        )


def _may_be_one(span: Span | None, other: Span | None) -> bool:
    """Return whether two spans have a step in common."""
    if span is None or other is None:
        return False
    return span[0] == other[0] and span[1] <= other[2] and other[1] <= span[2]


def _describe(span: Span | None) -> str:
    if span is None:
        return "no step done"
    epoch, first, last = span
    return f"epoch {epoch}, step {first}" if first == last else f"epoch {epoch}, steps {first} to {last}"
