"""What a person sees of a training: a line when it starts, one an epoch, and how far and how long still."""

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from fracture.config import Config
from fracture.training.phases import Phase, count_epochs, list_phases

_HEADER = (
    "epoch   loss   acc.  prec.   rec.    AUC │ val loss   acc.  prec.   rec.    AUC │ images/s      lr   time  left"
)
SILENCE = 300  # seconds after which a file, too, is told how far it is
_LEGEND = "           * lowest validation loss so far; left: at most, if nothing stops it early{phase}"


class Console:
    """Draws the events that rank 0 sends. On a terminal a last line shows the step; a file gets one in five minutes."""

    def __init__(self, config: Config, stream: TextIO = sys.stdout) -> None:
        self._config, self._stream = config, stream
        self._live = stream.isatty()
        self._epoch_seconds: list[float] = []
        self._told_first = (0, 0, 0.0)  # epoch, step and time
        self._headed = False
        self._last_line = time.monotonic()
        self._waiting_told = float("-inf")
        self._phase: Phase | None = None
        self._last = 0  # epoch that it can have
        self.precision = ""  # of what is handed over
        self.workers = config.compute.workers  # at work now
        self.diverged = ""

    def show(self, event: Mapping[str, Any]) -> None:
        if draw := getattr(self, f"_show_{event['event']}", None):  # some concern others alone
            draw(event)

    def close(self) -> None:
        self._status("")

    def _show_start(self, event: Mapping[str, Any]) -> None:
        self._told_first = (0, 0, 0.0)
        compute, training = self._config.compute, self._config.training
        unit = "GPU" if compute.gpu else "CPU"
        each = 1 if compute.gpu else compute.cpus_per_worker
        self.workers, self.precision = event["workers"], event["precision"]
        plural = "s" if self.workers > 1 else ""
        self._line(
            f"training   {self.workers} worker{plural} × {each} {unit} · {event['steps']} steps of "
            f"{training.batch_size} images an epoch, at most {count_epochs(self._config)} epochs"
        )
        if event["steps_done"]:
            where = f"epoch {event['epochs_done'] + 1}, step {event['steps_done']} of {event['steps']}"
            self._line(f"resuming   in {where}, from its checkpoint")
        elif event["epochs_done"]:
            self._line(f"resuming   after epoch {event['epochs_done']}, from its checkpoint")

    def _show_features(self, event: Mapping[str, Any]) -> None:
        self._status(f"features of {event['done']:,} of {event['count']:,} images")

    def _show_phase(self, event: Mapping[str, Any]) -> None:
        config, phase, count, learning = self._config, event["phase"], event["parameters"], event["learning"]
        self._last = event["last"]
        self._epoch_seconds = []  # those of another phase take another time
        if phase == self._phase:  # the workers began again
            return
        self._phase = phase
        told = f"network    {config.model.name}, {event['precision']} · "
        if phase.trains == "all":
            self._line(f"{told}{count:,} parameters")
        else:
            count_of = config.transfer.unfreeze
            which = "all layers" if count_of == "all" else f"the last {count_of} layers"
            what = "the head learns" if phase.trains == "head" else f"{which} of the backbone learn too"
            self._line(f"{told}{what}, {learning:,} of {count:,} parameters, for at most {phase.epochs} epochs")
        if phase.on_frozen_features:
            both = " and its mirror image" if config.augment.horizontal_flip else ""
            self._line(f"           on features of the frozen backbone, computed once for each image{both}")
        if not self._headed:
            self._line(_LEGEND.format(phase=", in this phase" if len(list_phases(config)) > 1 else ""))
            self._line(_HEADER)
            self._headed = True

    def _show_step(self, event: Mapping[str, Any]) -> None:
        epoch, step, steps = event["epoch"], event["step"], event["steps"]
        text = f"epoch {epoch}: step {step} of {steps}"
        if self._told_first[0] != epoch:  # the first of all compiles the graph and says nothing of the others
            self._told_first = (epoch, step, time.monotonic())
        else:
            _, first, since = self._told_first
            each = (time.monotonic() - since) / max(step - first, 1)
            text += f", {_clock(each * (steps - step))} left in it"
        self._status(text)

    def _show_validating(self, event: Mapping[str, Any]) -> None:
        self._status(f"epoch {event['epoch']}: validating")

    def _show_epoch(self, event: Mapping[str, Any]) -> None:
        r = event["record"]
        self._epoch_seconds.append(r["seconds"])
        mean = sum(self._epoch_seconds) / len(self._epoch_seconds)
        at_most = mean * (self._last - r["epoch"])
        best = "*" if event["best_epoch"] == r["epoch"] else " "
        train, val = (
            "  ".join(f"{r[prefix + name]:5.3f}" for name in ("accuracy", "precision", "recall", "auc"))
            for prefix in ("", "val_")
        )
        self._line(
            f"{r['epoch']:5d}  {r['loss']:5.3f}  {train} │    {r['val_loss']:5.3f}{best} {val} │ "
            f"{r['images_per_second']:8.1f} {r['learning_rate']:7.1e} {_clock(r['seconds']):>6}  ≤ {_clock(at_most)}"
        )

    def _show_saved(self, event: Mapping[str, Any]) -> None:
        self._status(f"epoch {event['epoch']}: step {event['step']} of {event['steps']}, saved")

    def _show_damaged(self, event: Mapping[str, Any]) -> None:
        self._line(f"damaged    {event['checkpoint']} cannot be read ({event['reason']}); the one before it is tried")

    def _show_failure(self, event: Mapping[str, Any]) -> None:
        self._line(f"restart    {event['failures']}: {event['reason']}; going on from the last checkpoint")

    def _show_resizing(self, event: Mapping[str, Any]) -> None:
        plural = "s" if event["workers"] > 1 else ""
        self._line(f"restart    with {event['workers']} worker{plural}, since machines came or went")

    def _show_waiting(self, event: Mapping[str, Any]) -> None:
        if event["room"] < self._config.compute.workers:
            what = f"for machines: {event['room']} of {self._config.compute.workers} workers fit now"
        else:
            what = "for the workers to start"
        text, now = f"waiting    {what}, {_clock(event['seconds'])} so far", time.monotonic()
        if self._live or now - self._waiting_told > SILENCE:
            self._waiting_told = now
            self._line(text) if not self._live else self._status(text)

    def _show_stopping(self, event: Mapping[str, Any]) -> None:
        self._line(f"stopping   after a last checkpoint, at most {_clock(event['seconds'])}; another signal: at once")

    def _show_left(self, event: Mapping[str, Any]) -> None:
        where = f"in epoch {event['epoch']}, step {event['step']}" if event["step"] else f"after epoch {event['epoch']}"
        self._line(f"saved      {where}")

    def _show_scoring(self, event: Mapping[str, Any]) -> None:
        self._status("scoring validation and test with the best weights")

    def _show_diverged(self, event: Mapping[str, Any]) -> None:
        layers = self._phase is not None and self._phase.trains == "fine-tuning"
        key, section = ("transfer", self._config.transfer) if layers else ("training", self._config.training)
        self.diverged = (
            f"the loss is not finite: epoch {event['epoch']}, step {event['step']} of {event['steps']}. "
            f"Lower {key}.learning_rate ({section.learning_rate:g}) and start a new run"
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
