"""Starts Ray, hands the work to Ray Train, shows how it goes, and turns its failures into one clear line."""

import json
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fracture.config import Config, flatten
from fracture.errors import RunError, UsageError
from fracture.input.lanes import Lanes
from fracture.input.shards import Manifest
from fracture.storage import Place, disk_full
from fracture.training.screen import Screen

_ROOT = Path(__file__).resolve().parents[2]  # workers of a local Ray find the package here
_CARD = "run.json"  # which data a run was begun with
_QUIET = {
    "TF_CPP_MIN_LOG_LEVEL": "3",  # read by TensorFlow's C++ side when it loads
    "GRPC_VERBOSITY": "ERROR",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # `report` waits for this poll, up to 2 s an epoch by default
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the coming default; silences a warning about the change
}


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
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return
    submitted, joining = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ, "RAY_ADDRESS" in os.environ
    environment: dict[str, Any] = {"env_vars": {name: os.environ[name] for name in _QUIET}}
    if not submitted and not joining:
        environment["env_vars"]["PYTHONPATH"] = str(_ROOT)
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
    except ConnectionError as error:
        raise RunError(f"no Ray cluster answers at {os.environ.get('RAY_ADDRESS')}: {error}") from None


def check_capacity(config: Config) -> None:
    """Ray would wait for ever for workers that can never be placed.

    Raises:
        UsageError: the cluster cannot hold the workers, now or after growing.
    """
    import ray
    from ray._private.state import state

    compute = config.compute
    total = ray.cluster_resources()
    ceiling = state.get_max_resources_from_cluster_config() or {}  # what an autoscaler may grow it to
    for resource, each in (("CPU", compute.cpus_per_worker), ("GPU", 1 if compute.gpu else 0)):
        needed, has = compute.workers * each, max(total.get(resource, 0), ceiling.get(resource, 0))
        if needed > has:
            most = int(has // each)
            fix = f"Use --workers {most} or fewer" if most else f"Use a cluster with {resource}s"
            raise UsageError(
                f"{compute.workers} workers need {needed} {resource}s, and the cluster has {has:g}. "
                f"{fix}, or add machines."
            )


def check_batches(config: Config, manifest: Manifest) -> None:
    """Raises UsageError where a step would leave a worker without a training image."""
    workers, batch_size = config.compute.workers, config.training.batch_size
    rows = manifest.rows("train")
    for rank in range(workers):
        indices = Lanes(rows, batch_size, rank, workers).indices(seed=None)
        if (indices >= 0).any(axis=1).all():
            continue
        raise UsageError(
            f"{rows} training images in batches of {batch_size} leave one of {workers} workers with nothing to do "
            "in a step. Use fewer --workers, or more images."
        )


def check_run(run: Place, config: Config, manifest: Manifest) -> None:
    """A run's folder holds nothing, or this very run as far as it got.

    Raises:
        UsageError: the run was begun with other settings or other data, or the folder is somebody else's.
    """
    if not (run / _CARD).is_file():
        if run.files():
            raise UsageError(f"{run} holds other things than a run. Give another --run name.")
        return
    before = dict(flatten(yaml.safe_load((run / "config.yaml").read_bytes())))
    changed = [f"{k} {before.get(k)!r} -> {v!r}" for k, v in flatten(_recipe(config)) if before.get(k) != v]
    if changed:
        raise UsageError(
            f"run {run.name!r} was begun with other settings: {'; '.join(changed)}. "
            "Give the same settings to go on with it, or another --run name."
        )
    if (run / _CARD).read_json()["dataset"] != manifest.fingerprint:
        raise UsageError(f"run {run.name!r} was begun with other data. Give another --run name.")


def _recipe(config: Config) -> dict[str, Any]:
    """The settings that make a run what it is; the workers change only its speed."""
    return config.model_dump(mode="json", exclude={"compute", "sample"})


def train(config: Config, shards: Place, manifest: Manifest, run: Place, screen: Screen) -> Outcome:
    """Trains on Ray workers to the early stop, going on from the run's newest checkpoint where there is one.

    Raises:
        RunError: the loss diverged, the disk is full, or workers failed more often than `training.max_failures`.
    """
    with _silent_stderr():  # TensorFlow greets before any setting can stop it
        from ray.train.tensorflow import TensorflowTrainer
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.util.queue import Queue

    from fracture.training.worker import Assignment, train_worker

    (run / "config.yaml").write_bytes(yaml.safe_dump(_recipe(config), sort_keys=False).encode())
    (run / _CARD).write_json({"dataset": manifest.fingerprint, "synthetic": manifest.synthetic})
    compute = config.compute
    events = Queue(actor_options={"num_cpus": 0})
    trainer = TensorflowTrainer(
        train_worker,
        train_loop_config=Assignment(config, shards, run, events),
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
        _fit_and_show(trainer, events, screen)
    except TrainingFailedError as error:
        raise _explain(error, run) from error
    finally:
        screen.close()
    if screen.diverged:
        raise RunError(screen.diverged)
    return _outcome(run, screen)


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Also what C++ writes; nothing is lost but greetings, since an import that fails raises."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _fit_and_show(trainer: Any, events: Any, screen: Screen) -> None:
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
        with suppress(Empty):
            screen.show(events.get(timeout=0.5))
    if failure:
        raise failure[0]


def _outcome(run: Place, screen: Screen) -> Outcome:
    lines = (run / "metrics.jsonl").read_bytes().decode().splitlines()
    history = [json.loads(line) for line in lines]
    best = min(history, key=lambda record: record["val_loss"])
    return Outcome(history, int(best["epoch"]), screen.precision)


def _explain(error: Any, run: Place) -> RunError:
    """The one line that says what went wrong, out of the stack traces of all workers."""
    failures = [getattr(f, "_base_exc", f) for f in getattr(error, "worker_failures", {}).values()] or [error]
    for failure in failures:
        if full := disk_full(failure, run):
            return full
    text = str(failures[0]).strip().splitlines()
    reason = text[-1] if text else type(failures[0]).__name__
    return RunError(f"a worker failed: {reason.rstrip('.')}. Run again with -v for the traces")
