"""Starts Ray, hands the work to Ray Train, shows how it goes, and turns its failures into one clear line."""

import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fracture.config import Config, DataConfig, flatten
from fracture.errors import RunError, UsageError
from fracture.input.lanes import Lanes
from fracture.input.shards import Manifest
from fracture.storage import Place, disk_full, store_failed
from fracture.training.checkpoint import SNAPSHOT, SNAPSHOT_COPY
from fracture.training.screen import Screen
from fracture.training.status import LOCK, STATUS

_ROOT = Path(__file__).resolve().parents[2]  # workers of a local Ray find the package here
_CARD = "run.json"  # which data and settings a run was begun with
_ENVIRONMENT = {  # of every process
    "TF_USE_LEGACY_KERAS": "1",  # else TensorFlow loads Keras 3 as well, and with it scikit-learn: 1 s of 4
    "TF_CPP_MIN_LOG_LEVEL": "3",  # read by TensorFlow's C++ side when it loads
    "GRPC_VERBOSITY": "ERROR",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # `report` waits for this poll, up to 2 s an epoch by default
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the coming default; silences a warning about the change
}
_OF_OUR_OWN = {  # a Ray of this job alone does without processes that take a core a second or more to start
    "RAY_prestart_worker_first_driver": "0",  # they would be of another environment than ours
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody takes this machine away and says so before
}

_stopping = threading.Event()
_alone = threading.Event()  # Ray is of this job alone, and ends with it


@dataclass(frozen=True)
class Outcome:
    """How the training went."""

    history: list[dict[str, float]]
    best_epoch: int
    precision: str


def start_ray(verbose: bool) -> None:
    """Joins the cluster that RAY_ADDRESS or `ray job submit` names, or starts Ray on this machine; once a process.

    Raises:
        RunError: the named cluster does not answer.
    """
    ours = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}  # a job may have set its own
    os.environ.update(ours)
    import ray

    if ray.is_initialized():
        return
    submitted, joining = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ, "RAY_ADDRESS" in os.environ
    environment: dict[str, Any] = {"env_vars": ours}
    if not submitted and not joining:
        _alone.set()
        environment["env_vars"]["PYTHONPATH"] = str(_ROOT)
        os.environ.update({**_OF_OUR_OWN, **os.environ})
    elif not submitted:  # other machines have no folder of ours: the code goes along
        environment["working_dir"] = str(_ROOT)
    if not verbose:
        logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        ray.init(
            address=None if joining else "local",
            include_dashboard=None if joining else False,
            runtime_env=environment,
            log_to_driver=verbose,
            logging_level=logging.INFO if verbose else logging.ERROR,
        )
    except (ConnectionError, ValueError) as error:
        raise RunError(
            f"no Ray cluster answers at RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}: {error}. It is HOST:6379 or auto "
            "on a node of the cluster; from elsewhere use ray job submit"
        ) from None
    stop_by_signals()


def stop_by_signals() -> None:
    """Makes SIGTERM, which schedulers send, what Ctrl-C is; Ray would answer it with a stack trace."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)


def _stop(number: int, frame: Any) -> None:
    _stopping.set()  # an exception raised inside some library's import may be swallowed there
    raise KeyboardInterrupt


def check_capacity(config: Config) -> None:
    """Ray would wait for ever for workers that can never be placed.

    Raises:
        UsageError: the cluster cannot hold the workers, now or after growing.
    """
    import ray
    from ray._private.state import state

    each = {"CPU": config.compute.cpus_per_worker} | ({"GPU": 1} if config.compute.gpu else {})
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    ceiling = state.get_max_resources_from_cluster_config() or {}  # what an autoscaler may grow it to
    room = max(_room(ceiling, each), sum(_room(node, each) for node in nodes))
    if config.compute.workers > room:
        wanted = " and ".join(f"{count} {resource}" for resource, count in each.items())
        has = ", ".join(" and ".join(f"{node.get(r, 0):g} {r}" for r in each) for node in nodes)
        fix = f"Use --workers {room} or fewer, or add machines" if room else "Ask for less, or add machines"
        raise UsageError(
            f"{config.compute.workers} workers of {wanted} each do not fit: the cluster's nodes have {has}. {fix}."
        )


def _room(resources: Mapping[str, float], each: Mapping[str, int]) -> int:
    """How many workers fit: a worker lies on one node."""
    return min(int(resources.get(resource, 0) // count) for resource, count in each.items())


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


def check_batches(config: Config, manifest: Manifest) -> None:
    """Raises UsageError where a step would leave a worker without an image: TensorFlow has no empty convolution."""
    workers, batch_size = config.compute.workers, config.training.batch_size
    if batch_size > manifest.rows("train"):
        raise UsageError(
            f"training.batch_size = {batch_size} is more than the {manifest.rows('train')} training images. "
            "Use a smaller one."
        )
    for split in ("train", "val"):
        rows = manifest.rows(split)
        for rank in range(workers):
            if (Lanes(rows, batch_size, rank, workers).indices(seed=None) < 0).all(axis=1).any():
                raise UsageError(
                    f"{rows} {split} images in batches of {batch_size} leave one of {workers} workers with nothing to "
                    "do in a step. Use fewer --workers, or more images."
                )


def check_run(run: Place, config: Config, manifest: Manifest) -> None:
    """A run's folder holds nothing, or this very run as far as it got.

    Raises:
        UsageError: the run was begun with other settings or other data, or the folder is somebody else's.
    """
    if not (run / _CARD).is_file():
        ours = (f"{run.path}/{LOCK}/", f"{run.path}/{STATUS}")
        if any(not info.base_name.endswith(".part") and not info.path.startswith(ours) for info in run.files()):
            raise UsageError(f"{run} holds other things than a run. Give another --run name.")
        return
    card = (run / _CARD).read_json()
    before = dict(flatten(card["recipe"]))
    changed = [f"{k} {before.get(k)!r} -> {v!r}" for k, v in flatten(_recipe(config)) if before.get(k) != v]
    if changed:
        raise UsageError(
            f"run {run.name!r} was begun with other settings: {'; '.join(changed)}. "
            "Give the same settings to go on with it, or another --run name."
        )
    if card["dataset"] != manifest.fingerprint:
        raise UsageError(f"run {run.name!r} was begun with other data. Give another --run name.")


def _recipe(config: Config) -> dict[str, Any]:
    """The settings that make a run what it is; the workers change only its speed."""
    return config.model_dump(mode="json", exclude={"compute", "sample"})


def train(
    config: Config,
    shards: Place,
    manifest: Manifest,
    run: Place,
    screen: Screen,
    tell: Callable[[Mapping[str, Any]], None] = lambda event: None,
) -> Outcome:
    """Trains on Ray workers to the early stop, going on from the run's newest checkpoint where there is one.

    Args:
        tell: gets each event that the screen gets.

    Raises:
        RunError: the loss diverged, the disk is full, the store fails, or workers failed more often than
            `training.max_failures`.
    """
    from ray.util.queue import Queue

    events = Queue(actor_options={"num_cpus": 0})  # its process starts while the rest is loaded here

    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError

    from fracture.training.backend import Trainer
    from fracture.training.worker import Assignment, train_worker

    (run / _CARD).write_json({"dataset": manifest.fingerprint, "recipe": _recipe(config)})
    (run / "config.yaml").write_bytes(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode())
    _mend_snapshot(run)
    compute = config.compute
    trainer = Trainer(
        train_worker,
        alone=_alone.is_set(),
        train_loop_config=Assignment(config, shards, manifest, run, events),
        scaling_config=ScalingConfig(
            num_workers=compute.workers,
            use_gpu=compute.gpu,
            resources_per_worker={"CPU": compute.cpus_per_worker} | ({"GPU": 1} if compute.gpu else {}),
        ),
        run_config=RunConfig(
            name=run.name,
            storage_path=run.path.rsplit("/", 1)[0],
            storage_filesystem=run.filesystem,
            checkpoint_config=CheckpointConfig(num_to_keep=2),  # each holds the best weights too
            failure_config=FailureConfig(max_failures=config.training.max_failures),
        ),
    )
    try:
        _fit_and_show(trainer, events, screen, tell)
    except TrainingFailedError as error:
        raise _explain(error, run) from error
    except OSError as error:  # Ray Train itself, at the storage
        raise (store_failed(error, run) or error) from error
    finally:
        screen.close()
    if screen.diverged:
        raise RunError(screen.diverged)
    return _outcome(run, screen)


def _fit_and_show(trainer: Any, events: Any, screen: Screen, tell: Callable[[Mapping[str, Any]], None]) -> None:
    """Fits in a thread, so that this one can draw, and so that Ctrl-C ends the job here and at once.

    In the main thread Ray Train would take over SIGINT and leave with exit code 0.
    """
    from ray.util.queue import Empty

    failure: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # handed to the main thread, which raises it
            failure.append(error)

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    while thread.is_alive() or not events.empty():
        if _stopping.is_set():
            raise KeyboardInterrupt
        with suppress(Empty):
            event = events.get(timeout=0.5)
            screen.show(event)
            tell(event)
    if failure:
        raise failure[0]


def _outcome(run: Place, screen: Screen) -> Outcome:
    lines = (run / "metrics.jsonl").read_bytes().decode().splitlines()
    history = [json.loads(line) for line in lines]
    best = min(history, key=lambda record: record["val_loss"])
    return Outcome(history, int(best["epoch"]), screen.precision)


def _mend_snapshot(run: Place) -> None:
    """Ray Train rewrites its list of checkpoints in place, so a kill can leave half of it; the worker keeps a copy."""
    snapshot = run / SNAPSHOT
    if not snapshot.is_file():
        return
    try:
        snapshot.read_json()
    except ValueError:
        copy = run / SNAPSHOT_COPY
        snapshot.write_bytes(copy.read_bytes()) if copy.is_file() else snapshot.delete()


def _explain(error: Any, run: Place) -> RunError | UsageError:
    """The one line that says what went wrong, out of the stack traces of all workers."""
    failures = list(getattr(error, "worker_failures", {}).values()) or [getattr(error, "controller_failure", error)]
    failures = [getattr(failure, "_base_exc", failure) for failure in failures]
    for failure in failures:
        if isinstance(failure, RunError | UsageError):
            return failure
        if known := disk_full(failure, run) or store_failed(failure, run):
            return known
    text = str(failures[0]).strip().splitlines()
    reason = text[-1] if text else type(failures[0]).__name__
    return RunError(f"a worker failed: {reason.rstrip('.')}. Run again with -v for the traces")
