"""Prepares a run's folder, trains in it on Ray workers, and returns the history."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import yaml

from fracture.config import Config
from fracture.dataset.format import Dataset
from fracture.errors import RunError
from fracture.progress.events import Diverged, TrainingEvent, TrainingStarted
from fracture.progress.history import Record, find_best, read_history
from fracture.storage import StoragePath
from fracture.training.checkpoint import BACKBONE
from fracture.training.checks import RUN_CARD, write_run_card

if TYPE_CHECKING:
    from fracture.inference.bundle import Bundle


class DivergedError(RunError):
    """The loss is not finite, or a weight."""


@dataclass(frozen=True)
class Outcome:
    """The result of a training."""

    history: list[Record]
    best_epoch: int
    precision: str
    workers: int  # that scored; an elastic run may have begun with others


def train(
    config: Config,
    dataset: Dataset,
    run: StoragePath,
    listeners: Sequence[Callable[[TrainingEvent], None]] = (),
    initial: "Bundle | None" = None,
    search: StoragePath | None = None,
) -> Outcome:
    """Train on Ray workers to the early stop, from the run's newest whole checkpoint on where there is one.

    Args:
        listeners: called with each event.
        initial: a finished model of this network, whose weights training begins with.
        search: the folder of the search that this is a trial of, which keeps the weights of the backbone for all its
            trials. A trial is not scored.

    Raises:
        UsageError: `transfer.weights` is no file of the backbone's weights.
        DivergedError: the loss is not finite.
        RunError: the disk is full, the store fails, no machines come, ImageNet's weights cannot be downloaded, or
            workers fail again and again.
        KeyboardInterrupt: a signal came; what could be saved in time is saved.
    """
    from fracture.runtime.channel import start_channel

    channel = start_channel()  # its process starts while the rest is loaded here

    from fracture.runtime.trainer import run_trainer
    from fracture.training.loop import train_worker
    from fracture.training.setup import Assignment

    _prepare(config, dataset, run, initial, search)
    summary = _Summary()

    def see(event: TrainingEvent) -> None:
        for listener in (summary.see, *listeners):
            listener(event)

    run_trainer(
        train_worker,
        Assignment(config, dataset, run, channel, initial, search),
        run,
        channel,
        config.compute,
        config.recovery,
        resize_seconds=60 * config.checkpoint.every_minutes,
        see=see,
    )
    if summary.diverged is not None:
        raise DivergedError(str(summary.diverged))
    assert summary.started is not None
    history = read_history(run)
    best_epoch = int(find_best(history)["epoch"])
    return Outcome(history, best_epoch, summary.started.precision, summary.started.workers)


class _Summary:
    """Keeps the events that say how the training went."""

    def __init__(self) -> None:
        self.started: TrainingStarted | None = None  # the last one
        self.diverged: Diverged | None = None

    def see(self, event: TrainingEvent) -> None:
        match event:
            case TrainingStarted():
                self.started = event
            case Diverged():
                self.diverged = event


def _prepare(
    config: Config, dataset: Dataset, run: StoragePath, initial: "Bundle | None", search: StoragePath | None
) -> None:
    if config.pretrained and search is None:
        from fracture.training.pretrained import keep_backbone  # loads TensorFlow

        if not (run / RUN_CARD).is_file():  # left by a start that did not get to say whose weights they are
            (run / BACKBONE).delete()
        keep_backbone(run, config, initial)
    write_run_card(run, config, dataset, initial)
    (run / "config.yaml").write_bytes(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode())
