"""Trainings of a few seconds, and one that nothing disturbs, to compare with."""

import time
from collections.abc import Callable
from contextlib import suppress
from io import StringIO
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

from fracture.config import Config, load_config
from fracture.dataset.format import Dataset, Manifest
from fracture.progress.console import Console
from fracture.progress.events import TrainingEvent
from fracture.progress.history import METRICS_LOG, Record
from fracture.storage import StoragePath, storage_path
from fracture.training.checks import check_run, with_data_of
from fracture.training.launch import train
from tests.conftest import TINY, write_shards

ROWS = {"train": 45, "val": 19, "test": 13}  # no multiple of anything
MEASURES = [f"{split}{name}" for split in ("", "val_") for name in ("loss", "accuracy", "precision", "recall", "auc")]
History = list[Record]
Kind = TypeVar("Kind", bound=TrainingEvent)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> tuple[StoragePath, Manifest]:
    folder = storage_path(tmp_path_factory.mktemp("shards"))
    return folder, write_shards(folder, ROWS)


@pytest.fixture(scope="session")
def undisturbed(data, tmp_path_factory, ray_cluster) -> tuple[Config, Path, History]:
    """A run with all that is random: batch norm, dropout and augmentation, on 2 workers."""
    config = load_config(None, [*TINY, "training.epochs=4", "training.patience=3", "compute.workers=2"])
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    return config, run, start(config, data, run)


class Meddler:
    """A listener that keeps the events, and does something to the run when it hears of one."""

    def __init__(self, meddle: Callable[[TrainingEvent], None] = lambda event: None) -> None:
        self._stream = StringIO()
        self._console, self._meddle = Console(self._stream), meddle
        self.events: list[TrainingEvent] = []

    def __call__(self, event: TrainingEvent) -> None:
        self._console.show(event)
        self.events.append(event)
        self._meddle(event)

    @property
    def text(self) -> str:
        """The lines that a person sees."""
        return self._stream.getvalue()

    def of(self, kind: type[Kind]) -> list[Kind]:
        return [event for event in self.events if isinstance(event, kind)]


def start(config: Config, data: tuple[StoragePath, Manifest], run: Path, listener: Meddler | None = None) -> History:
    folder, manifest = data
    config = with_data_of(config, manifest)
    dataset = Dataset(folder, manifest)
    check_run(storage_path(run), config, dataset)
    return train(config, dataset, storage_path(run), [listener or Meddler()]).history


def training_workers() -> list[psutil.Process]:
    """The newest group; those of an earlier one may not be gone yet. In no order of their ranks."""
    workers = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has just gone, or is not quite gone yet
            workers += [process] if "RayTrainWorker" in " ".join(process.cmdline()) else []
    newest = max(process.create_time() for process in workers)
    return [process for process in workers if newest - process.create_time() < 3]


def assert_same_history(a: History, b: History, tolerance: float) -> None:
    assert [r["epoch"] for r in a] == [r["epoch"] for r in b]
    for key in MEASURES:
        assert [r[key] for r in a] == pytest.approx([r[key] for r in b], rel=tolerance, abs=tolerance), key
    assert [r["learning_rate"] for r in a] == pytest.approx([r["learning_rate"] for r in b], rel=1e-6)


def wait_for_epochs(run: Path, epochs: int) -> None:
    """Wait until so many epochs are saved and logged."""
    log = run / METRICS_LOG
    deadline = time.monotonic() + 120
    while not log.exists() or len(log.read_text().splitlines()) < epochs:
        assert time.monotonic() < deadline, f"{run} did not get to epoch {epochs}"
        time.sleep(0.02)
