"""Starts Ray, hands the work to Ray Train, shows how it goes, and turns its failures into one clear line."""

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from fracture.config import Config, DataConfig, flatten
from fracture.dataset.format import Dataset, Manifest
from fracture.dataset.sharding import ShardedBatches
from fracture.errors import RunError, UsageError
from fracture.progress.console import Console
from fracture.progress.status import LOCK, STATUS
from fracture.runtime.cluster import RAY_ALONE, node_resources, resources_per_worker, workers_that_fit
from fracture.runtime.failures import explain, last_line
from fracture.runtime.retry import Recovery
from fracture.runtime.signals import patience, stop_requested
from fracture.runtime.watchdog import STACKS
from fracture.storage import StoragePath, disk_full, storage_path, store_failed
from fracture.training.checkpoint import BACKBONE, FILE, SNAPSHOT

if TYPE_CHECKING:  # loading it takes a tenth of a second of a job's start
    from fracture.inference.bundle import Bundle

_CARD = "run.json"  # which data and settings a run was begun with
_SCRATCH = "scratch"

POLL = 0.2  # seconds between two looks at what the workers say
_LOOK_FOR_MACHINES = 30.0  # seconds
_GROW_AFTER = (
    30.0  # seconds that an elastic group trains before it may restart with more; Ray knows what is free to 20 s
)


@dataclass(frozen=True)
class Outcome:
    """How the training went."""

    history: list[dict[str, float]]
    best_epoch: int
    precision: str
    workers: int  # that scored; an elastic run may have begun with others


def with_data_of(config: Config, manifest: Manifest) -> Config:
    """The settings with `data.*` as the shards were made with.

    Raises:
        UsageError: a setting of `data` was asked for that the shards do not have.
    """
    made_with = DataConfig.model_validate_json(json.dumps(manifest.parameters))
    for key in config.data.model_fields_set:
        asked, has = getattr(config.data, key), getattr(made_with, key)
        if asked != has:
            raise UsageError(
                f"data.{key} = {asked!r} is asked for, and the shards were made with {has!r}. "
                "Preprocess again with the new setting, or leave it out."
            )
    return config.model_copy(update={"data": made_with})


def check_batches(config: Config, dataset: Dataset) -> None:
    """Raises UsageError where a step would leave a worker without an image: TensorFlow has no empty convolution."""
    batch_size = config.training.batch_size
    most = config.compute.workers
    if batch_size > dataset.rows("train"):
        raise UsageError(
            f"training.batch_size = {batch_size} is more than the {dataset.rows('train')} training images. "
            "Use a smaller one."
        )
    for split in ("train", "val"):
        rows = dataset.rows(split)
        for workers, rank in ((n, rank) for n in range(config.compute.fewest, most + 1) for rank in range(n)):
            if (ShardedBatches(rows, batch_size, rank, workers).indices(seed=None) < 0).all(axis=1).any():
                raise UsageError(
                    f"{rows} {split} images in batches of {batch_size} leave one of {workers} workers with nothing to "
                    "do in a step. Use fewer --workers, or more images."
                )


def check_run(run: StoragePath, config: Config, dataset: Dataset, initial: "Bundle | None" = None) -> None:
    """A run's folder holds nothing, or this very run as far as it got.

    Args:
        initial: whose weights it begins with.

    Raises:
        UsageError: the run was begun with other settings or other data, or the folder is somebody else's.
    """
    if not (run / _CARD).is_file():
        ours = (f"{run.path}/{LOCK}/", f"{run.path}/{STATUS}", f"{run.path}/{BACKBONE}")
        if any(not info.base_name.endswith(".part") and not info.path.startswith(ours) for info in run.files()):
            raise UsageError(f"{run} holds other things than a run. Give another --run name.")
        return
    card = (run / _CARD).read_json()
    before = dict(flatten(card["recipe"]))
    changed = [f"{k} {before.get(k)!r} -> {v!r}" for k, v in flatten(config.recipe()) if before.get(k) != v]
    if changed:
        raise UsageError(
            f"run {run.name!r} was begun with other settings: {'; '.join(changed)}. "
            "Give the same settings to go on with it, or another --run name."
        )
    if card["dataset"] != dataset.manifest.fingerprint:
        raise UsageError(f"run {run.name!r} was begun with other data. Give another --run name.")
    if card.get("initial_weights", _SCRATCH) != initial_weights(config, initial):
        raise UsageError(
            f"run {run.name!r} was begun with other weights: {card.get('initial_weights', _SCRATCH)}, not "
            f"{initial_weights(config, initial)}. Give another --run name."
        )


def initial_weights(config: Config, initial: "Bundle | None") -> str:
    """What a model began with, as its run and its bundle say it."""
    if initial:
        return str(initial.folder)
    return config.transfer.weights if config.pretrained else _SCRATCH


def check_weights_file(config: Config) -> None:
    """Raises UsageError where `transfer.weights` names neither `imagenet` nor a file."""
    weights = config.transfer.weights
    if weights != "imagenet" and not (weights.endswith(".h5") and storage_path(weights).is_file()):
        raise UsageError(
            f"transfer.weights = {weights!r}: there is no such file, or it does not end in .h5. Name imagenet, none, "
            f"or a file of the weights of {config.backbone} without top, as tf_keras.applications writes them."
        )


def check_initial(config: Config, initial: "Bundle") -> None:
    """Raises UsageError where the bundle's network is another than the settings describe."""
    from fracture.models import weight_shapes

    wanted, there = weight_shapes(config), weight_shapes(initial.config)
    for which, shapes in ((config, wanted), (initial.config, there)):
        shapes["quantum.circuit"] = which.quantum.circuit  # a circuit and its control have weights of one shape
    differing = [name for name in wanted | there if wanted.get(name) != there.get(name)]
    if differing:
        name = differing[0]
        raise UsageError(
            f"training cannot begin with the weights of {initial.folder}: its network has {there.get(name, 'no')} at "
            f"{name!r}, and these settings {wanted.get(name, 'no')}. Use its model settings, or begin from scratch."
        )


def train(
    config: Config,
    dataset: Dataset,
    run: StoragePath,
    screen: Console,
    tell: Callable[[Mapping[str, Any]], None] = lambda event: None,
    initial: "Bundle | None" = None,
    search: StoragePath | None = None,
) -> Outcome:
    """Trains on Ray workers to the early stop, going on from the run's newest whole checkpoint where there is one.

    Args:
        tell: gets each event that the screen gets.
        initial: a finished model of this network, whose weights training begins with.
        search: that this is a trial of, which keeps the weights of the backbone for all of them. No trial is scored
            and exported.

    Raises:
        UsageError: `transfer.weights` is no file of the backbone's weights.
        RunError: the loss diverged, the disk is full, the store fails, no machines come, ImageNet's weights cannot be
            downloaded, or workers fail again and again.
        KeyboardInterrupt: a signal came; what could be saved in time is saved.
    """
    from fracture.runtime.channel import start_messages

    messages = start_messages()  # its process starts while the rest is loaded here

    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError

    from fracture.runtime.trainer import Reporter, Trainer
    from fracture.training.loop import Assignment, train_worker

    if config.pretrained and search is None:
        from fracture.training.pretrained import keep_backbone  # not loaded else: it brings TensorFlow

        if not (run / _CARD).is_file():  # of a start that did not come to say whose they are
            (run / BACKBONE).delete()
        keep_backbone(run, config, initial)
    began_with = initial_weights(config, initial)
    card = {"dataset": dataset.manifest.fingerprint, "recipe": config.recipe(), "initial_weights": began_with}
    (run / _CARD).write_json(card)
    (run / "config.yaml").write_bytes(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode())
    _list_checkpoints(run)
    compute = config.compute
    if compute.min_workers:  # a group that was planned with a machine that has just gone is given up sooner: 60 s
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")
    trainer = Trainer(
        train_worker,
        alone=RAY_ALONE in os.environ,
        train_loop_config=Assignment(config, dataset, run, messages, initial, search),
        scaling_config=ScalingConfig(
            num_workers=(compute.min_workers, compute.workers) if compute.min_workers else compute.workers,
            use_gpu=compute.gpu,
            resources_per_worker=resources_per_worker(config),
            # Ray resizes without asking the workers to save: just after they did costs least.
            elastic_resize_monitor_interval_s=60 * config.checkpoint.every_minutes + _GROW_AFTER,
        ),
        run_config=RunConfig(
            name=run.name,
            storage_path=run.path.rsplit("/", 1)[0],
            storage_filesystem=run.filesystem,
            checkpoint_config=CheckpointConfig(num_to_keep=2),  # each holds the best weights too
            failure_config=FailureConfig(max_failures=-1),  # `Recovery` counts them
            callbacks=[Reporter(messages, run)],
        ),
    )
    try:
        _fit_and_show(trainer, messages, config, run, screen, tell)
    except TrainingFailedError as error:
        raise _explain(error, run) from error
    except OSError as error:  # Ray Train itself, at the storage
        raise (store_failed(error, run) or error) from error
    finally:
        screen.close()
    if screen.diverged:
        raise RunError(screen.diverged)
    return _outcome(run, screen)


def _fit_and_show(
    trainer: Any,
    messages: Any,
    config: Config,
    run: StoragePath,
    screen: Console,
    tell: Callable[[Mapping[str, Any]], None],
) -> None:
    """Fits in a thread, so that this one can draw, watch over it, and end it.

    In the main thread Ray Train would take over SIGINT and leave with exit code 0.
    """
    import ray

    failure: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # handed to the main thread, which raises it
            failure.append(error)

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    watch = _Watch(messages, config, run, screen, tell)
    with patience():
        try:
            alive = True
            while alive:
                alive = thread.is_alive()  # asked before the last events are taken
                watch.look()
                thread.join(POLL)
            if watch.left:  # not before Ray Train has taken the last checkpoint into its list
                raise KeyboardInterrupt
        except BaseException:
            if watch.controller is not None:  # on a Ray that others use too, it would go on
                with suppress(Exception):
                    ray.get(watch.controller.abort.remote(), timeout=10)
            raise
    if failure:
        raise failure[0]


class _Watch:
    """What the driver does about what it is told."""

    def __init__(
        self,
        messages: Any,
        config: Config,
        run: StoragePath,
        screen: Console,
        tell: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self._messages, self._config, self._run, self._screen, self._tell = messages, config, run, screen, tell
        self._recovery = Recovery(config.recovery)
        self._stacks = len((run / STACKS).files())
        self._leave_by: float | None = None
        self._looked_for_machines = time.monotonic()
        self.controller: Any = None
        self.left = False  # the workers, as asked

    def look(self) -> None:
        """
        Raises:
            RunError, UsageError: it is no use to go on.
            KeyboardInterrupt: a signal came, and the workers have had their time.
        """
        import ray

        for event in ray.get(self._messages.take.remote()):
            if event["event"] == "controller":
                self.controller = event["actor"]
                continue
            if event["event"] == "placed":  # those of the workers before may have come after their end
                self._stacks = len((self._run / STACKS).files())
            if event["event"] == "failure":
                event = self._where_stuck(event)
            self._recovery.see(event)
            self._show(event | {"failures": self._recovery.failures})
            self.left |= event["event"] == "left"
        if stop_requested.is_set():
            self._stop()
        self._wait_for_machines()

    def _show(self, event: Mapping[str, Any]) -> None:
        self._screen.show(event)
        self._tell(event)

    def _where_stuck(self, event: dict[str, Any]) -> dict[str, Any]:
        stacks = (self._run / STACKS).files()
        if len(stacks) <= self._stacks or not event["lost"]:
            return event
        first = stacks[self._stacks].base_name  # the others have waited for it
        return event | {"reason": f"a worker was stuck; where, says {self._run / STACKS / first}"}

    def _stop(self) -> None:
        if self._leave_by is None:
            self._leave_by = time.monotonic() + self._config.recovery.grace_seconds
            self._messages.stop.remote()
            if self._recovery.training:
                self._show({"event": "stopping", "seconds": self._config.recovery.grace_seconds})
        if not (self._recovery.training or self.left) or time.monotonic() > self._leave_by:
            raise KeyboardInterrupt

    def _wait_for_machines(self) -> None:
        since, now = self._recovery.waiting_since, time.monotonic()
        if since is None or now - self._looked_for_machines < _LOOK_FOR_MACHINES:
            return
        self._looked_for_machines = now
        compute = self._config.compute
        self._recovery.check_waiting(compute.fewest)
        if now - since > _LOOK_FOR_MACHINES:
            each = resources_per_worker(self._config)
            room = min(sum(workers_that_fit(node, each) for node in node_resources()), compute.workers)
            self._show({"event": "waiting", "room": room, "seconds": now - since})


def read_history(run: StoragePath) -> list[dict[str, float]]:
    """One record an epoch; none where there is no log yet."""
    log = run / "metrics.jsonl"
    return [json.loads(line) for line in log.read_bytes().decode().splitlines()] if log.is_file() else []


def _outcome(run: StoragePath, screen: Console) -> Outcome:
    history = read_history(run)
    best = min(history, key=lambda record: record["val_loss"])
    return Outcome(history, int(best["epoch"]), screen.precision, screen.workers)


def _list_checkpoints(run: StoragePath) -> None:
    """Writes Ray Train's list of checkpoints anew from what is there.

    Ray Train rewrites its list in place, so a kill or a full disk can leave half of it; it refuses to start from such
    a list, or from one that names what is gone; and what was saved in the last moment may not be in it.
    """
    import ray

    there = {info.path.rsplit("/", 2)[-2] for info in run.files() if info.base_name == FILE}
    names = sorted(name for name in there if name.startswith("checkpoint_"))  # and then the time
    if not names:
        (run / SNAPSHOT).delete()
        return
    results = [{"version": 0, "checkpoint_dir_name": name, "metrics": {}} for name in names]
    empty = ("pending_training_results", "pending_validation_specs", "validated_checkpoint_dir_names")
    empty += ("timed_out_validation_checkpoint_dir_names", "failed_validation_checkpoint_dir_names")
    (run / SNAPSHOT).write_json(
        {
            "ray_version": ray.__version__,
            "checkpoint_results": results,
            "checkpoint_report_indices": list(range(len(names))),
            "latest_checkpoint_result": results[-1],
            "current_report_index": len(names),
        }
        | {name: [] for name in empty}
    )


def _explain(error: Any, run: StoragePath) -> RunError | UsageError:
    """The one line that says why Ray Train gave up."""
    if failures := getattr(error, "worker_failures", {}):
        told = explain(failures, run)
        return told.error or RunError(f"{told.reason}. Run again with -v for the traces")
    cause = getattr(error, "controller_failure", error)
    if known := disk_full(cause, run) or store_failed(cause, run):
        return known
    reason = last_line(cause)
    return RunError(f"Ray Train gave up: {reason}. Run again with -v for the traces")
