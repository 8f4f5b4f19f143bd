"""The lines of a training on the screen: its start, one an epoch, and how far it is."""

import sys
import time
from typing import Self, TextIO

from fracture.progress.events import (
    CheckpointSaved,
    DamagedCheckpoint,
    EpochDone,
    FeaturesComputed,
    PhaseStarted,
    Resizing,
    Scoring,
    StepDone,
    Stopping,
    TrainingEvent,
    TrainingStarted,
    TrainingStopped,
    Validating,
    WaitingForMachines,
    WorkersFailed,
)
from fracture.progress.time_left import TimeLeft

_HEADER = (
    "epoch   loss   acc.  prec.   rec.    AUC │ val loss   acc.  prec.   rec.    AUC │ images/s      lr   time  left"
)
SILENCE = 300  # seconds after which a file, too, gets a line that says how far the training is
_LEGEND = "           * lowest validation loss so far; left: at most, if nothing stops it early{phase}"


class Console:
    """Shows the events of a training. A terminal has a last line with the step; a file gets one in five minutes.

    Plain `print` and not `rich`: that would wrap the lines of epochs to 80 columns in a pipe, and can show only one
    last line at a time on a terminal, which the trials of a search share. A pipe and `ray job logs` get no escape
    codes, whatever FORCE_COLOR says.
    """

    def __init__(self, stream: TextIO = sys.stdout) -> None:
        self._stream = stream
        self._live = stream.isatty()
        self._time_left = TimeLeft()
        self._last_line = time.monotonic()
        self._last_waiting = float("-inf")
        self._phase = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the terminal's last line."""
        self.show_status("")

    def show(self, event: TrainingEvent) -> None:
        """Show the event; kinds that concern others alone are passed over."""
        self._time_left.see(event)
        match event:
            case TrainingStarted():
                self._show_training(event)
            case FeaturesComputed(done, count):
                self.show_status(f"features of {done:,} of {count:,} images")
            case PhaseStarted():
                self._show_phase(event)
            case StepDone(epoch, step, steps):
                left = self._time_left.until_validation()
                more = "" if left is None else f", {format_clock(left)} left in it"
                self.show_status(f"epoch {epoch}: step {step} of {steps}{more}")
            case Validating(epoch):
                self.show_status(f"epoch {epoch}: validating")
            case EpochDone():
                self._show_epoch(event)
            case CheckpointSaved(epoch, step, steps):
                self.show_status(f"epoch {epoch}: step {step} of {steps}, saved")
            case DamagedCheckpoint(checkpoint, reason):
                self.show_line(f"damaged    {checkpoint} cannot be read ({reason}); the one before it is tried")
            case WorkersFailed():
                self.show_line(f"restart    {event.failures}: {event.reason}; going on from the last checkpoint")
            case Resizing(workers):
                self.show_line(f"restart    with {_count(workers, 'worker')}, since machines came or went")
            case WaitingForMachines():
                self._show_waiting(event)
            case Stopping(seconds):
                clock = format_clock(seconds)
                self.show_line(f"stopping   after a last checkpoint, at most {clock}; another signal: at once")
            case TrainingStopped(epoch, step):
                self.show_line(f"saved      {f'in epoch {epoch}, step {step}' if step else f'after epoch {epoch}'}")
            case Scoring():
                self.show_status("scoring validation and test with the best weights")

    def show_line(self, text: str) -> None:
        """Write a line that stays."""
        self.show_status("")
        self._last_line = time.monotonic()
        print(text, file=self._stream, flush=True)

    def show_status(self, text: str) -> None:
        """Put the text into the terminal's last line; in a file, write it as a line after a long silence."""
        if self._live:
            print(f"\r\033[K{text}", end="", file=self._stream, flush=True)
        elif text and time.monotonic() - self._last_line > SILENCE:
            self.show_line(f"  {text}")

    def _show_training(self, event: TrainingStarted) -> None:
        self.show_line(
            f"training   {_count(event.workers, 'worker')} × {event.units_per_worker} {event.unit} · "
            f"{event.steps} steps of {event.batch_size} images an epoch, at most {event.max_epochs} epochs"
        )
        if event.steps_done:
            where = f"epoch {event.epochs_done + 1}, step {event.steps_done} of {event.steps}"
            self.show_line(f"resuming   in {where}, from its checkpoint")
        elif event.epochs_done:
            self.show_line(f"resuming   after epoch {event.epochs_done}, from its checkpoint")

    def _show_phase(self, event: PhaseStarted) -> None:
        if event.number == self._phase:  # the workers were restarted
            return
        first, self._phase = self._phase == 0, event.number
        network = f"network    {event.model}, {event.precision} · "
        if event.trained_part == "all":
            self.show_line(f"{network}{event.parameters:,} parameters")
        else:
            count = event.unfrozen_layers
            which = "all layers" if count == "all" else f"the last {count} layers"
            what = "trains the head" if event.trained_part == "head" else f"trains the head and {which} of the backbone"
            self.show_line(
                f"{network}{what}, {event.trained_parameters:,} of {event.parameters:,} parameters, "
                f"for at most {event.max_epochs} epochs"
            )
        if event.frozen_features:
            both = " and its mirror image" if event.mirrored else ""
            self.show_line(f"           on features of the frozen backbone, computed once for each image{both}")
        if first:
            self.show_line(_LEGEND.format(phase=", in this phase" if event.phases > 1 else ""))
            self.show_line(_HEADER)

    def _show_epoch(self, event: EpochDone) -> None:
        r = event.record
        best = "*" if event.best_epoch == r["epoch"] else " "
        train, val = (
            "  ".join(f"{r[prefix + name]:5.3f}" for name in ("accuracy", "precision", "recall", "auc"))
            for prefix in ("", "val_")
        )
        self.show_line(
            f"{r['epoch']:5d}  {r['loss']:5.3f}  {train} │    {r['val_loss']:5.3f}{best} {val} │ "
            f"{r['images_per_second']:8.1f} {r['learning_rate']:7.1e} {format_clock(r['seconds']):>6}  "
            f"≤ {format_clock(self._time_left.after_epoch())}"
        )

    def _show_waiting(self, event: WaitingForMachines) -> None:
        if event.workers_that_fit < event.workers:
            what = f"for machines: {event.workers_that_fit} of {event.workers} workers fit now"
        else:
            what = "for the workers to start"
        text = f"waiting    {what}, {format_clock(event.seconds)} so far"
        if self._live:
            self.show_status(text)
        elif time.monotonic() - self._last_waiting > SILENCE:
            self._last_waiting = time.monotonic()
            self.show_line(text)


def format_clock(seconds: float) -> str:
    """Return seconds as `1h05m`, `4m20s` or `12s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number > 1 else ''}"
