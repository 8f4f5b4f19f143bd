"""The trials of a search on Ray Tune, each a run of Ray Train in a folder of its own.

Tune says which trial goes on: ASHA (https://arxiv.org/abs/1810.05934) compares their lowest validation losses so far.
What Tune itself could restore does not hold what ASHA has seen. So a search that was killed begins anew with the same
trials: those that are done only tell again what they gave, and the one that was under way goes on from its checkpoint.
"""

import os
import queue
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from io import StringIO
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

from fracture.config import Config, with_settings
from fracture.dataset.format import Dataset, Manifest
from fracture.errors import RunError, UsageError
from fracture.progress.console import Console
from fracture.runtime.channel import start_messages, teller
from fracture.runtime.failures import last_line
from fracture.runtime.signals import patience, stop_soon
from fracture.storage import StoragePath, disk_full, store_failed
from fracture.training.checkpoint import BACKBONE, SNAPSHOT
from fracture.training.launch import POLL, read_history, train
from fracture.training.phases import count_epochs
from fracture.tuning.space import Result, draw_trials, in_words, trial_run, write_results

_NOTES = "tune"  # folder of Tune's own notes, of no use afterwards
_MORE_GRACE = 5.0  # seconds for a trial to hear that it is to stop, and to say that it has
_NO_CPU = {"CPU": 0, "memory": 1}  # a trial only waits for its workers, who have the CPUs; Tune wants something of it


@dataclass(frozen=True)
class Search:
    """What each trial is handed."""

    config: Config  # on which its own are laid
    dataset: Dataset
    run: StoragePath
    results: dict[int, Result]  # of trials that were done before
    messages: Any  # the Ray actor of messages.py


class Trial(tune.Trainable):
    """Trains in a thread, which waits after each epoch until Tune asks for the next.

    A class, since Tune waits for its cleanup, and so for the end of its workers; that of a function it would not.
    """

    def setup(self, point: dict[str, Any], search: Search) -> None:
        self._search, self._number = search, point["trial"]
        self._config = with_settings(search.config, draw_trials(search.config)[self._number - 1])
        self._run = trial_run(search.run, self._number)
        self._put = teller(search.messages)
        self._reports: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._ask = threading.Semaphore(0)
        self._last: dict[str, Any] = {"epoch": 0, "val_loss": float("inf")}
        self._asked = self._stopped = False
        self._screen = Console(self._config, StringIO())  # the search has its own
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def step(self) -> dict[str, Any]:
        if self._asked:  # the first it has on its own
            self._ask.release()
        self._asked = True
        return self._reports.get()

    def cleanup(self) -> None:
        """Workers are asked to leave, as by Ctrl-C: a run that is cut off may keep its CPUs from the next trial."""
        self._stopped = True
        stop_soon()
        self._ask.release()
        self._thread.join()
        self._put(event="gone", trial=self._number)

    def _work(self) -> None:
        """Ends without a last report where the search is about to end: there is nothing that Tune should do then."""
        try:
            self._train()
        except KeyboardInterrupt:
            if not self._stopped:
                self._put(event="halted", trial=self._number)
            return
        except Exception as error:
            if self._stopped:
                return
            known = isinstance(error, RunError | UsageError)
            self._fail(error if known else RunError(f"{type(error).__name__}: {last_line(error)}"))
            return
        self._reports.put(self._last | {"done": True})

    def _fail(self, error: RunError | UsageError) -> None:
        self._put(event="failed", trial=self._number, error=type(error)(f"trial {self._number}: {error}"))

    def _train(self) -> None:
        if done := self._search.results.get(self._number):
            self._report(done.epochs)
            return
        self._put(event="began", trial=self._number)
        self._report()  # what it had done before the search, or its process, was killed
        if self._stopped:
            return
        search = self._search
        try:
            train(self._config, search.dataset, self._run, self._screen, self._hear, search=search.run)
        except RunError:
            if not self._screen.diverged:
                raise
        if self._stopped:
            return
        self._report()
        self._put(event="ended", trial=self._number, diverged=bool(self._screen.diverged))

    def _hear(self, event: Mapping[str, Any]) -> None:
        if self._stopped:
            return
        if self._put(**event, trial=self._number):
            stop_soon()
        if event["event"] == "epoch":
            self._report()

    def _report(self, most: int | None = None) -> None:
        """Tells Tune of the epochs that the log has and Tune has not, and waits after each until it asks for more.

        Args:
            most: epochs to tell of; one more may have been logged before the trial was stopped.
        """
        for record in read_history(self._run)[self._last["epoch"] : most]:
            lowest = min(self._last["val_loss"], record["val_loss"])
            self._last = {"epoch": int(record["epoch"]), "val_loss": lowest}
            self._reports.put(self._last)
            self._ask.acquire()
            if self._stopped:
                return


class Teller(tune.Callback):
    """Tells the search what Tune does to a trial."""

    def __init__(self, messages: Any) -> None:
        self._messages = messages

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._put(event="completed", trial=trial.config["trial"], epochs=trial.last_result["epoch"])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number = trial.config["trial"]
        error = RunError(f"the process of trial {number} ended again and again. Run again with -v for the traces")
        self._put(event="failed", trial=number, error=error)

    def _put(self, **event: Any) -> None:
        self._messages.put.remote(event)


class TrialConsole(Console):
    """A line when a trial begins and one an epoch, each with the trial's number."""

    def __init__(self, config: Config, number: int) -> None:
        super().__init__(config, sys.stdout)
        self._number = number

    def _show_start(self, event: Mapping[str, Any]) -> None:
        if event["steps_done"] or event["epochs_done"]:
            self._line(f"resuming after epoch {event['epochs_done']}, from its checkpoint")

    def _show_phase(self, event: Mapping[str, Any]) -> None:
        """Not of each trial."""

    def _show_epoch(self, event: Mapping[str, Any]) -> None:
        r = event["record"]
        best = "*" if event["best_epoch"] == r["epoch"] else " "
        self._line(
            f"epoch {r['epoch']:3d}  loss {r['loss']:5.3f}  val loss {r['val_loss']:5.3f}{best} "
            f"val AUC {r['val_auc']:5.3f}  {r['seconds']:.0f} s"
        )

    def show_began(self, settings: Mapping[str, Any]) -> None:
        self._line(in_words(settings))

    def show_result(self, result: Result) -> None:
        epochs = f"{result.epochs} epoch{'' if result.epochs == 1 else 's'}"
        self._line(f"{result.state}{',' if result.state == 'diverged' else ''} after {epochs}")

    def _line(self, text: str) -> None:
        super()._line(f"trial {self._number:3d}  {text}")

    def _status(self, text: str) -> None:
        super()._status(f"trial {self._number:3d}  {text}" if text and self._live else text)


def run_trials(config: Config, dataset: Dataset, run: StoragePath, results: dict[int, Result], at_once: int) -> None:
    """Runs the trials that are not done, and takes what they give into `results` and the file of them.

    Args:
        at_once: trials at most.

    Raises:
        RunError, UsageError: a trial failed in a way that would fail the others.
        KeyboardInterrupt: a signal came; the trials under way have saved what they could.
    """
    if config.pretrained:
        from fracture.training.pretrained import keep_backbone  # loads TensorFlow

        keep_backbone(run, config, None)
    messages = start_messages()
    book = _Book(config, dataset.manifest, run, results)
    (run / _NOTES).delete()
    tuner = _tuner(Search(config, dataset, run, dict(results), messages), at_once)
    failure: list[Exception] = []

    def fit() -> None:
        try:
            tuner.fit()
        except Exception as error:  # handed to the main thread
            failure.append(error)

    thread = threading.Thread(target=fit, daemon=True)  # in the main thread it would take over SIGINT
    thread.start()
    leave_by: float | None = None
    with patience() as stopping:
        alive = True
        while alive:
            alive = thread.is_alive()  # asked before the last events are taken
            for event in ray.get(messages.take.remote()):
                book.hear(event)
            if stopping.is_set() and leave_by is None:
                leave_by = time.monotonic() + config.recovery.grace_seconds + _MORE_GRACE
                messages.stop.remote()
            if leave_by is not None and (not book.under_way or time.monotonic() > leave_by):
                raise KeyboardInterrupt
            thread.join(POLL)
    if failure:
        known = disk_full(failure[0], run) or store_failed(failure[0], run)
        raise known or RunError(f"Ray Tune gave up: {last_line(failure[0])}. Run again with -v for the traces")
    (run / _NOTES).delete()
    (run / BACKBONE).delete()


def _tuner(search: Search, at_once: int) -> tune.Tuner:
    config = search.config
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the new one has no level that is silent
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # each run has its own metrics.jsonl
    asha = ASHAScheduler(
        time_attr="epoch",
        metric="val_loss",
        mode="min",
        max_t=count_epochs(config),
        grace_period=config.tune.grace_epochs,
        reduction_factor=config.tune.reduction_factor,
    )
    return tune.Tuner(
        tune.with_resources(tune.with_parameters(Trial, search=search), _NO_CPU),
        param_space={"trial": tune.grid_search(list(range(1, config.tune.trials + 1)))},
        tune_config=tune.TuneConfig(scheduler=asha, search_alg=BasicVariantGenerator(max_concurrent=at_once)),
        run_config=tune.RunConfig(
            name=_NOTES,
            storage_path=search.run.path,
            storage_filesystem=search.run.filesystem,
            verbose=0,
            callbacks=[Teller(search.messages)],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            failure_config=tune.FailureConfig(max_failures=config.recovery.max_failures),
        ),
    )


class _Book:
    """What the search knows of its trials."""

    def __init__(self, config: Config, manifest: Manifest, run: StoragePath, results: dict[int, Result]) -> None:
        self._config, self._manifest, self._run, self._results = config, manifest, run, results
        self._settings = draw_trials(config)
        self._screens = [TrialConsole(config, number) for number in range(1, config.tune.trials + 1)]
        self._diverged: dict[int, bool] = {}  # of trials that ended by themselves
        self.under_way: set[int] = set()

    def hear(self, event: Mapping[str, Any]) -> None:
        """
        Raises:
            RunError, UsageError: a trial failed.
        """
        number = event["trial"]
        screen = self._screens[number - 1]
        match event["event"]:
            case "began":
                self.under_way.add(number)
                screen.show_began(self._settings[number - 1])
            case "ended":
                self._diverged[number] = event["diverged"]
            case "completed":
                self._complete(number, event["epochs"])
            case "halted":
                self.under_way.discard(number)
            case "failed":
                raise event["error"]
            case "gone" if number in self._results:
                self._drop_checkpoints(number)
            case _:
                screen.show(event)

    def _complete(self, number: int, epochs: int) -> None:
        self.under_way.discard(number)
        if number in self._results:
            return
        by_itself = number in self._diverged or epochs >= count_epochs(self._config)
        state = "diverged" if self._diverged.get(number) else "ended" if by_itself else "stopped early"
        history = read_history(trial_run(self._run, number))[:epochs]
        self._results[number] = Result.of(number, self._settings[number - 1], state, history)
        write_results(self._run, self._config, self._manifest, self._results)
        self._screens[number - 1].show_result(self._results[number])

    def _drop_checkpoints(self, number: int) -> None:
        run = trial_run(self._run, number)
        (run / SNAPSHOT).delete()
        for name in run.folders():
            if name.startswith("checkpoint_"):
                (run / name).delete()
