"""The state of a run in `status.json`, written beside it while the job runs and read by anybody at any time.

Reading imports neither TensorFlow nor Ray, nor the plots of reports.
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any, Self

from pydantic import BaseModel

from fracture.errors import RunError, UsageError
from fracture.lock import Claim, holder, is_gone
from fracture.progress.events import (
    EpochDone,
    Resizing,
    Scoring,
    StepDone,
    TrainingEvent,
    TrainingStarted,
    Validating,
    WaitingForMachines,
    WorkersFailed,
)
from fracture.progress.history import LOG_REPAIR, METRICS_LOG, find_best, read_history
from fracture.progress.time_left import TimeLeft
from fracture.storage import StoragePath

STATUS = "status.json"
LOCK = "lock"  # folder of a run's lock, whose beats are signs of life too
EVERY = 15.0  # seconds at least between two writings that only say how far the run is
SILENCE = 60.0  # seconds without a sign of life after which the status says so
_FINAL = ("finished", "stopped")
_FIGURES = {"AUC": "auc", "sensitivity": "recall", "specificity": "specificity"}


class Status(BaseModel):
    """The state of a run as its job last wrote it."""

    updated: datetime
    state: str = "starting"  # training, validating, waiting, scoring, finished, stopped
    message: str = ""  # why it stopped
    epochs: int  # at most
    epoch: int = 0  # the one under way
    step: int = 0
    steps: int = 0
    seconds_left: float | None = None  # of the phase under way, if nothing stops it early
    restarts: int = 0  # of workers, by this job
    reason: str = ""  # of the last restart


class StatusWriter:
    """Keeps `status.json` while within: at once when the state changes or an epoch ends, else every 15 s at most.

    Training goes on where the file cannot be written.
    """

    def __init__(
        self,
        run: StoragePath,
        epochs: int,
        may_write: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """
        Args:
            epochs: of the run, at most.
            may_write: false once another job has taken over the run.
        """
        self._file, self._may_write, self._clock, self._now = run / STATUS, may_write, clock, now
        self._status = Status(updated=now(), epochs=epochs)
        self._written = clock()
        self._time_left = TimeLeft(clock)
        self._starts = 0

    def __enter__(self) -> Self:
        self._write()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self._change(state="finished")
        elif isinstance(error, KeyboardInterrupt):
            self._change(state="stopped", message="by Ctrl-C or SIGTERM; every finished epoch is kept")
        else:
            known = isinstance(error, UsageError | RunError)
            self._change(state="stopped", message=str(error) if known else f"{kind.__name__}: {error}")
        self._write()

    def show(self, event: TrainingEvent) -> None:
        """Take in an event of the training; kinds that change nothing here are passed over."""
        state = self._status.state
        self._time_left.see(event)
        self._see(event)
        urgent = isinstance(event, TrainingStarted | WorkersFailed | EpochDone) or self._status.state != state
        if urgent or self._clock() - self._written >= EVERY:
            self._write()

    def _see(self, event: TrainingEvent) -> None:
        match event:
            case TrainingStarted():
                self._starts += 1
                restarts = max(self._status.restarts, self._starts - 1)
                self._change(state="training", epoch=event.epochs_done + 1, step=0, restarts=restarts)
                self._change(steps=event.steps)
            case StepDone(epoch, step, steps):
                self._change(state="training", epoch=epoch, step=step, steps=steps)
                self._change(seconds_left=self._time_left.within_epoch())
            case Validating(epoch):
                self._change(state="validating", epoch=epoch, step=0)
            case EpochDone(record):
                self._change(epoch=record["epoch"], step=self._status.steps)
                self._change(seconds_left=self._time_left.after_epoch())
            case WorkersFailed(reason=reason, failures=failures):
                restarts = max(self._status.restarts, failures)
                self._change(state="restarting", restarts=restarts, reason=reason)
            case Resizing():
                self._change(state="restarting")
            case WaitingForMachines():
                self._change(state="waiting")
            case Scoring():
                self._change(state="scoring", seconds_left=None)

    def _change(self, **fields: Any) -> None:
        self._status = self._status.model_copy(update=fields)

    def _write(self) -> None:
        if not self._may_write():
            return
        self._written = self._clock()
        self._change(updated=self._now())
        with suppress(OSError, UsageError, RunError):
            self._file.write_bytes(self._status.model_dump_json(indent=1).encode())


def status_lines(runs: StoragePath, name: str, now: datetime) -> list[str]:
    """Return lines for a person that say how far the run is; of a run in folds, or of a comparison, one a fold.

    Raises:
        UsageError: there is no such run, or one of its files is damaged.
    """
    folders = runs.folders()
    if name not in folders:
        there = f"There are: {', '.join(folders)}." if folders else "There are none; check --storage."
        raise UsageError(f"there is no run {name!r} in {runs}. {there}")
    run = runs / name
    folds = _folds(run)
    if not folds and not (run / "bundle").is_dir():  # as in a comparison's
        folds = [f"{contender}/{fold}" for contender in run.folders() for fold in _folds(run / contender)]
    held = holder(run / LOCK)
    with ThreadPoolExecutor(8) as threads:  # a bucket takes its time for each
        facts = list(threads.map(lambda part: _facts(part, held, now), [run / fold for fold in folds] or [run]))
    lines = [f"run        {run}"]
    if folds:
        lines += [f"{fold:<10} {_join_facts(of_fold)}" for fold, of_fold in zip(folds, facts, strict=True)]
    else:
        lines += [f"{label:<10} {text}" for label, text in facts[0].items()]
    return lines + ([f"job        {held[0]}"] if held else [])


def _folds(run: StoragePath) -> list[str]:
    """Return the names of the folds' folders, in their order."""
    folds = [folder for folder in run.folders() if re.fullmatch(r"fold-\d+", folder)]
    return sorted(folds, key=lambda fold: int(fold.removeprefix("fold-")))


def _join_facts(facts: Mapping[str, str]) -> str:
    return " · ".join(f"best {text}" if label == "best" else text for label, text in facts.items())


def _facts(run: StoragePath, held: tuple[Claim, datetime] | None, now: datetime) -> dict[str, str]:
    """Return what is known of one training, by the label of its line."""
    if (finished := _finished(run)) is not None:
        return finished
    status = _status(run)
    facts = {"state": _state(status, held, now)} | _best(run)
    if status is not None:
        if status.seconds_left is not None and facts["state"].startswith(("training", "validating")):
            left = status.seconds_left - (now - status.updated).total_seconds()
            facts["left"] = f"about {_duration(left)} left, less if it stops early"
        if status.restarts:
            facts["restarts"] = f"{status.restarts} restart{'s' if status.restarts > 1 else ''} of workers"
            facts["restarts"] += f", the last since {status.reason}" if status.reason else ""
    return facts


def _finished(run: StoragePath) -> dict[str, str] | None:
    file = run / "bundle/bundle.json"
    repair = "Restore it from a copy, or train again under another --run name."
    with _damage_named(file, repair):
        bundle = _json(file, repair)
        if bundle is None:
            return None
        return {
            "state": f"finished: {bundle['run']['epochs']} epochs, the best was {bundle['run']['best_epoch']}",
            "test": _figures(bundle["metrics"]["test"]["radiograph"]),
        }


def _state(status: Status | None, held: tuple[Claim, datetime] | None, now: datetime) -> str:
    claim, beat = held or (None, None)
    seen = [moment for moment in (status and status.updated, beat) if moment]
    if not seen:
        return "started; no job is at work on it"
    old = status is None or (claim is not None and claim.since > status.updated)  # an earlier job wrote it
    if status and status.state in _FINAL and not old:
        return f"{status.state}: {status.message}" if status.message else status.state
    silent = (now - max(seen)).total_seconds()
    was = f"; it was {status.state}{_progress(status)}" if status else ""
    if is_gone(claim):
        return f"killed: its process has ended without a word, {_duration(silent)} ago{was}"
    if silent > SILENCE:
        return f"no sign of life for {_duration(silent)}{was}"
    if old:
        return "starting: preparing the data"
    return f"{'waiting for machines' if status.state == 'waiting' else status.state}{_progress(status)}"


def _progress(status: Status) -> str:
    if not status.epoch or status.state == "scoring":
        return ""
    step = f", step {status.step} of {status.steps}" if status.step else ""
    return f": epoch {status.epoch} of {status.epochs}{step}"


def _best(run: StoragePath) -> dict[str, str]:
    with _damage_named(run / METRICS_LOG, LOG_REPAIR):
        history = read_history(run)
        if not history:
            return {}
        best = find_best(history)
        return {"best": f"epoch {best['epoch']}: validation loss {best['val_loss']:.3f}, AUC {best['val_auc']:.3f}"}


def _figures(metrics: Mapping[str, Any]) -> str:
    figures = [f"{word} {_figure(metrics['figures'][name])}" for word, name in _FIGURES.items()]
    return f"{metrics['count']:,} {metrics['unit']}s: {', '.join(figures)}"


def _figure(figure: Mapping[str, float | None]) -> str:
    if figure["value"] is None:
        return "undefined"
    interval = f" [{figure['low']:.3f}, {figure['high']:.3f}]" if figure["low"] is not None else ""
    return f"{figure['value']:.3f}{interval}"


def _status(run: StoragePath) -> Status | None:
    file = run / STATUS
    repair = "Delete it; a job that is at work writes it again."
    with _damage_named(file, repair):
        content = _json(file, repair)
        return None if content is None else Status.model_validate(content)


@contextmanager
def _damage_named(file: StoragePath, repair: str) -> Iterator[None]:
    """Turn what reading something else than this program wrote raises into an error that names the file."""
    try:
        yield
    except UsageError:
        raise
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{file} is damaged. {repair}") from None


def _json(file: StoragePath, repair: str) -> Any:
    try:
        return file.read_json(repair)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _duration(seconds: float) -> str:
    seconds = max(seconds, 0)  # clocks of two machines differ
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
