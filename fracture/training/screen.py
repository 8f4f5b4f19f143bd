"""What a person sees of a training: a line when it starts, one an epoch, and how far and how long still."""

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from fracture.config import Config

_HEADER = (
    "epoch   loss   acc.  prec.   rec.    AUC │ val loss   acc.  prec.   rec.    AUC │ images/s      lr   time  left"
)
SILENCE = 300  # seconds after which a file, too, is told how far it is
_LEGEND = "           * lowest validation loss so far; left: at most, if nothing stops it early"


class Screen:
    """Draws the events that rank 0 sends. On a terminal a last line shows the step; a file gets one in five minutes."""

    def __init__(self, config: Config, stream: TextIO = sys.stdout) -> None:
        self._config, self._stream = config, stream
        self._live = stream.isatty()
        self._epoch_seconds: list[float] = []
        self._first_step_done = time.monotonic()
        self._headed = False
        self._last_line = time.monotonic()
        self.precision = ""
        self.diverged = ""

    def show(self, event: Mapping[str, Any]) -> None:
        getattr(self, f"_show_{event['event']}")(event)

    def close(self) -> None:
        self._status("")

    def _show_start(self, event: Mapping[str, Any]) -> None:
        compute, training = self._config.compute, self._config.training
        unit = "GPU" if compute.gpu else "CPU"
        each = 1 if compute.gpu else compute.cpus_per_worker
        self.precision = event["precision"]
        plural = "s" if compute.workers > 1 else ""
        self._line(
            f"training   {compute.workers} worker{plural} × {each} {unit}, {self.precision} · {event['parameters']:,} "
            f"parameters · {event['steps']} steps of {training.batch_size} images an epoch, "
            f"at most {training.epochs} epochs"
        )
        if event["epochs_done"]:
            self._line(f"resuming   after epoch {event['epochs_done']}, from its checkpoint")
        if not self._headed:
            self._line(_LEGEND)
            self._line(_HEADER)
            self._headed = True

    def _show_step(self, event: Mapping[str, Any]) -> None:
        step, steps = event["step"], event["steps"]
        text = f"epoch {event['epoch']}: step {step} of {steps}"
        if step == 1:  # the first compiles the graph and says nothing of the others
            self._first_step_done = time.monotonic()
        else:
            each = (time.monotonic() - self._first_step_done) / (step - 1)
            text += f", {_clock(each * (steps - step))} left in it"
        self._status(text)

    def _show_validating(self, event: Mapping[str, Any]) -> None:
        self._status(f"epoch {event['epoch']}: validating")

    def _show_epoch(self, event: Mapping[str, Any]) -> None:
        r = event["record"]
        self._epoch_seconds.append(r["seconds"])
        mean = sum(self._epoch_seconds) / len(self._epoch_seconds)
        at_most = mean * (self._config.training.epochs - r["epoch"])
        best = "*" if event["best_epoch"] == r["epoch"] else " "
        train, val = (
            "  ".join(f"{r[prefix + name]:5.3f}" for name in ("accuracy", "precision", "recall", "auc"))
            for prefix in ("", "val_")
        )
        self._line(
            f"{r['epoch']:5d}  {r['loss']:5.3f}  {train} │    {r['val_loss']:5.3f}{best} {val} │ "
            f"{r['images_per_second']:8.1f} {r['learning_rate']:7.1e} {_clock(r['seconds']):>6}  ≤ {_clock(at_most)}"
        )

    def _show_scoring(self, event: Mapping[str, Any]) -> None:
        self._status("scoring validation and test with the best weights")

    def _show_diverged(self, event: Mapping[str, Any]) -> None:
        self.diverged = (
            f"the loss is not finite: epoch {event['epoch']}, step {event['step']} of {event['steps']}. "
            f"Lower training.learning_rate ({self._config.training.learning_rate:g}) and start a new run"
        )

    def _line(self, text: str) -> None:
        self._status("")
        self._last_line = time.monotonic()
        print(text, file=self._stream, flush=True)

    def _status(self, text: str) -> None:
        if self._live:
            print(f"\r\033[K{text}", end="", file=self._stream, flush=True)
        elif text and time.monotonic() - self._last_line > SILENCE:
            self._line(f"  {text}")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
