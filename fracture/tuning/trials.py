"""The trials of a search on Ray Tune, each a run of Ray Train in a folder of its own.

Tune decides which trial goes on: ASHA (https://arxiv.org/abs/1810.05934) compares their lowest validation losses so
far. What Tune itself could restore does not hold what ASHA has seen. So a search that was killed begins anew with the
same trials: those that are done only report again what they gave, and the one that was under way goes on from its
checkpoint.
"""

import os
import queue
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

from fracture.config import Config, with_settings
from fracture.dataset.format import Dataset, Manifest
from fracture.errors import RunError, UsageError
from fracture.progress.console import Console
from fracture.progress.events import (
    EpochDone,
    Event,
    PhaseStarted,
    TrainingEvent,
    TrainingStarted,
    TrialCleanedUp,
    TrialCompleted,
    TrialEnded,
    TrialFailed,
    TrialInterrupted,
    TrialProgress,
    TrialStarted,
)
from fracture.progress.history import read_history
from fracture.runtime.channel import EventChannel, start_channel
from fracture.runtime.failures import last_line
from fracture.runtime.signals import patience, stop_soon
from fracture.runtime.trainer import POLL
from fracture.storage import StoragePath, disk_full, store_failed
from fracture.training.checkpoint import BACKBONE
from fracture.training.checkpoint_folder import list_checkpoints
from fracture.training.launch import DivergedError, train
from fracture.training.phases import count_epochs
from fracture.tuning.space import Result, describe_settings, sample_trials, trial_run, write_results

_TUNE = "tune"  # folder of Tune's own files, of no use afterwards
_MORE_GRACE = 5.0  # seconds for a trial to hear that it is to stop, and to report that it has
_NO_CPU = {"CPU": 0, "memory": 1}  # a trial only waits for its workers, who have the CPUs; Tune requires something


@dataclass(frozen=True)
class Search:
    """The arguments that all trials share."""

    config: Config  # a trial's own settings replace some of it
    dataset: Dataset
    run: StoragePath
    results: dict[int, Result]  # of trials that were done before
    channel: EventChannel


class Trial(tune.Trainable):
    """Trains in a thread, which waits after each epoch until Tune asks for the next.

    It is a class, since Tune waits for its cleanup, and so for the end of its workers; not so for a function's.
    """

    def setup(self, point: dict[str, Any], search: Search) -> None:
        self._search, self._number = search, point["trial"]
        self._config = with_settings(search.config, sample_trials(search.config)[self._number - 1])
        self._run = trial_run(search.run, self._number)
        self._send = search.channel.send
        self._reports: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._may_go_on = threading.Semaphore(0)
        self._last: dict[str, Any] = {"epoch": 0, "val_loss": float("inf")}
        self._stepped = self._stopped = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def step(self) -> dict[str, Any]:
        if self._stepped:  # the first report comes by itself
            self._may_go_on.release()
        self._stepped = True
        return self._reports.get()

    def cleanup(self) -> None:
        """Stop the workers as Ctrl-C does: a run that is cut off may keep its CPUs from the next trial."""
        self._stopped = True
        stop_soon()
        self._may_go_on.release()
        self._thread.join()
        self._send(TrialCleanedUp(self._number))

    def _work(self) -> None:
        """Train, and end without a last report where the search is about to end: Tune has nothing to do then."""
        try:
            self._train()
        except KeyboardInterrupt:
            if not self._stopped:
                self._send(TrialInterrupted(self._number))
            return
        except Exception as error:
            if self._stopped:
                return
            known = isinstance(error, RunError | UsageError)
            self._fail(error if known else RunError(f"{type(error).__name__}: {last_line(error)}"))
            return
        self._reports.put(self._last | {"done": True})

    def _fail(self, error: RunError | UsageError) -> None:
        self._send(TrialFailed(self._number, type(error)(f"trial {self._number}: {error}")))

    def _train(self) -> None:
        if done := self._search.results.get(self._number):
            self._report(done.epochs)
            return
        self._send(TrialStarted(self._number))
        self._report()  # what it had done before the search, or its process, was killed
        if self._stopped:
            return
        search, diverged = self._search, False
        try:
            train(self._config, search.dataset, self._run, [self._see], search=search.run)
        except DivergedError:
            diverged = True
        if self._stopped:
            return
        self._report()
        self._send(TrialEnded(self._number, diverged))

    def _see(self, event: TrainingEvent) -> None:
        if self._stopped:
            return
        self._send(TrialProgress(self._number, event))
        if self._search.channel.stop_requested():
            stop_soon()
        if isinstance(event, EpochDone):
            self._report()

    def _report(self, most: int | None = None) -> None:
        """Report to Tune the epochs that the log has and Tune has not, and wait after each until it asks for more.

        Args:
            most: epochs to report; one more may have been logged before the trial was stopped.
        """
        for record in read_history(self._run)[self._last["epoch"] : most]:
            lowest = min(self._last["val_loss"], record["val_loss"])
            self._last = {"epoch": int(record["epoch"]), "val_loss": lowest}
            self._reports.put(self._last)
            self._may_go_on.acquire()
            if self._stopped:
                return


class TuneCallback(tune.Callback):
    """Sends the search what Tune does to a trial."""

    def __init__(self, channel: EventChannel) -> None:
        self._channel = channel

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._channel.send_soon(TrialCompleted(trial.config["trial"], trial.last_result["epoch"]))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number = trial.config["trial"]
        error = RunError(f"the process of trial {number} ended again and again. Run again with -v for the traces")
        self._channel.send_soon(TrialFailed(number, error))


class TrialConsole(Console):
    """Shows a line when a trial begins and one an epoch, each with the trial's number."""

    def __init__(self, number: int) -> None:
        super().__init__(sys.stdout)
        self._number = number

    def show(self, event: TrainingEvent) -> None:
        match event:
            case TrainingStarted():
                if event.steps_done or event.epochs_done:
                    self.show_line(f"resuming after epoch {event.epochs_done}, from its checkpoint")
            case PhaseStarted():
                pass
            case EpochDone(r, best_epoch):
                best = "*" if best_epoch == r["epoch"] else " "
                self.show_line(
                    f"epoch {r['epoch']:3d}  loss {r['loss']:5.3f}  val loss {r['val_loss']:5.3f}{best} "
                    f"val AUC {r['val_auc']:5.3f}  {r['seconds']:.0f} s"
                )
            case _:
                super().show(event)

    def show_settings(self, settings: Mapping[str, Any]) -> None:
        """Show the settings of a trial that begins."""
        self.show_line(describe_settings(settings))

    def show_result(self, result: Result) -> None:
        """Show how a trial ended."""
        epochs = f"{result.epochs} epoch{'' if result.epochs == 1 else 's'}"
        self.show_line(f"{result.state}{',' if result.state == 'diverged' else ''} after {epochs}")

    def show_line(self, text: str) -> None:
        super().show_line(f"trial {self._number:3d}  {text}")

    def show_status(self, text: str) -> None:
        super().show_status(f"trial {self._number:3d}  {text}" if text and sys.stdout.isatty() else text)


def run_trials(config: Config, dataset: Dataset, run: StoragePath, results: dict[int, Result], at_once: int) -> None:
    """Run the trials that are not done, and add their results to `results` and to the file of them.

    Args:
        at_once: trials at a time at most.

    Raises:
        RunError, UsageError: a trial failed in a way that would fail the others.
        KeyboardInterrupt: a signal came; the trials under way have saved what they could.
    """
    if config.pretrained:
        from fracture.training.pretrained import keep_backbone  # loads TensorFlow

        keep_backbone(run, config, None)
    channel = start_channel()
    ledger = _Ledger(config, dataset.manifest, run, results)
    (run / _TUNE).delete()
    tuner = _make_tuner(Search(config, dataset, run, dict(results), channel), at_once)
    failure: list[Exception] = []

    def fit() -> None:
        try:
            tuner.fit()
        except Exception as error:  # handed to the main thread
            failure.append(error)

    thread = threading.Thread(target=fit, daemon=True)  # in the main thread it would take over SIGINT
    thread.start()
    stop_by: float | None = None
    with patience() as stopping:
        alive = True
        while alive:
            alive = thread.is_alive()  # looked up before the last events are taken
            for event in channel.take():
                ledger.see(event)
            if stopping.is_set() and stop_by is None:
                stop_by = time.monotonic() + config.recovery.grace_seconds + _MORE_GRACE
                channel.request_stop()
            if stop_by is not None and (not ledger.under_way or time.monotonic() > stop_by):
                raise KeyboardInterrupt
            thread.join(POLL)
    if failure:
        known = disk_full(failure[0], run) or store_failed(failure[0], run)
        raise known or RunError(f"Ray Tune gave up: {last_line(failure[0])}. Run again with -v for the traces")
    (run / _TUNE).delete()
    (run / BACKBONE).delete()


def _make_tuner(search: Search, at_once: int) -> tune.Tuner:
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
            name=_TUNE,
            storage_path=search.run.path,
            storage_filesystem=search.run.filesystem,
            verbose=0,
            callbacks=[TuneCallback(search.channel)],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            failure_config=tune.FailureConfig(max_failures=config.recovery.max_failures),
        ),
    )


class _Ledger:
    """The search's view of its trials: which are under way, and what the others gave."""

    def __init__(self, config: Config, manifest: Manifest, run: StoragePath, results: dict[int, Result]) -> None:
        self._config, self._manifest, self._run, self._results = config, manifest, run, results
        self._settings = sample_trials(config)
        self._consoles = [TrialConsole(number) for number in range(1, config.tune.trials + 1)]
        self._diverged: dict[int, bool] = {}  # of trials that ended by themselves
        self.under_way: set[int] = set()

    def see(self, event: Event) -> None:
        """Take in an event.

        Raises:
            RunError, UsageError: a trial failed.
        """
        match event:
            case TrialStarted(trial):
                self.under_way.add(trial)
                self._consoles[trial - 1].show_settings(self._settings[trial - 1])
            case TrialProgress(trial, training_event):
                self._consoles[trial - 1].show(training_event)
            case TrialEnded(trial, diverged):
                self._diverged[trial] = diverged
            case TrialCompleted(trial, epochs):
                self._complete(trial, epochs)
            case TrialInterrupted(trial):
                self.under_way.discard(trial)
            case TrialFailed(error=error):
                raise error
            case TrialCleanedUp(trial):
                if trial in self._results:
                    self._drop_checkpoints(trial)

    def _complete(self, trial: int, epochs: int) -> None:
        self.under_way.discard(trial)
        if trial in self._results:
            return
        by_itself = trial in self._diverged or epochs >= count_epochs(self._config)
        state = "diverged" if self._diverged.get(trial) else "ended" if by_itself else "stopped early"
        history = read_history(trial_run(self._run, trial))[:epochs]
        self._results[trial] = Result.from_history(trial, self._settings[trial - 1], state, history)
        write_results(self._run, self._config, self._manifest, self._results)
        self._consoles[trial - 1].show_result(self._results[trial])

    def _drop_checkpoints(self, trial: int) -> None:
        for folder in list_checkpoints(trial_run(self._run, trial)):
            folder.delete()
