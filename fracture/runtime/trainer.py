"""Runs a training function on a group of workers by Ray Train's TensorflowTrainer, and watches over it to its end.

Ray Train is not given checkpoints: the workers keep their own in the run's folder. So it writes no
`checkpoint_manager_snapshot.json`, which it would restore for the next run of that name, and refuse when a kill or a
full disk has left half of it or when it names a checkpoint that is gone.
"""

import json
import os
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import ray
from ray.train.backend import Backend, BackendConfig

from fracture.config import ComputeConfig, RecoveryConfig
from fracture.errors import RunError, UsageError
from fracture.progress.events import TrainingEvent
from fracture.runtime.channel import EventChannel
from fracture.runtime.cluster import resources_per_worker
from fracture.runtime.failures import explain_failure, last_line
from fracture.runtime.signals import patience
from fracture.runtime.watch import Watch
from fracture.storage import StoragePath, disk_full, store_failed

POLL = 0.2  # seconds between two looks at the events
_GROW_AFTER = 30.0  # seconds that a group trains before it may restart with more workers; Ray's view is 20 s old
_ABORT_SECONDS = 10.0


class TensorflowBackend(BackendConfig):
    """Gives each worker the addresses of all, as `ray.train.tensorflow.TensorflowConfig` does.

    Ray's own class imports TensorFlow wherever it is unpickled: in the controller too, before which no worker starts.
    """

    @property
    def backend_cls(self) -> type[Backend]:
        return _Backend


class _Backend(Backend):
    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        addresses = worker_group.execute(find_own_address)
        ranks = range(len(worker_group))
        ray.get([worker_group.execute_single_async(rank, set_cluster, addresses, rank) for rank in ranks])


def find_own_address() -> str:
    """Return this machine's address in the cluster with a port that is free now, as `host:port`."""
    host = ray.util.get_node_ip_address()
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as any_port:
        any_port.bind(("", 0))
        port = any_port.getsockname()[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def set_cluster(addresses: list[str], rank: int) -> None:
    """Set TF_CONFIG, and keep proxies out of it; before TensorFlow opens a connection.

    See https://www.tensorflow.org/guide/distributed_training#TF_CONFIG
    """
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}})
    os.environ["no_grpc_proxy"] = exempt_from_proxy(addresses, os.environ)  # noqa: SIM112 - as gRPC reads it


def exempt_from_proxy(addresses: Iterable[str], environment: Mapping[str, str]) -> str:
    """Return the value of `no_grpc_proxy` with which gRPC reaches the workers past any proxy.

    TensorFlow's gRPC would ask the proxy of grpc_proxy, https_proxy or http_proxy for the workers' addresses, and wait
    for ever. It reads no_proxy only where no_grpc_proxy is not set, so what the user has exempted is kept.

    Args:
        addresses: `host:port` of each worker.
        environment: of this process.
    """
    exempted = environment.get("no_grpc_proxy", environment.get("no_proxy", "")).split(",")
    hosts = [address.rpartition(":")[0].strip("[]") for address in addresses]
    return ",".join(dict.fromkeys(name.strip() for name in [*exempted, *hosts] if name.strip()))


def run_trainer(
    function: Callable[[Any], None],
    argument: Any,
    run: StoragePath,
    channel: EventChannel,
    compute: ComputeConfig,
    recovery: RecoveryConfig,
    resize_seconds: float,
    see: Callable[[TrainingEvent], None],
) -> None:
    """Run `function(argument)` on all workers until it returns on each, restarting the group where one fails.

    Args:
        function: importable by the workers; it saves what it has done in the run's folder, and goes on from there.
        run: the run's folder, which all workers reach.
        channel: in which the workers send their events.
        resize_seconds: that a group trains at least, before it is restarted with another number of workers: just
            after a checkpoint costs least, since Ray does not ask the workers to save.
        see: is called with each event, in the main thread.

    Raises:
        RunError, UsageError: the run cannot go on; says what to do.
        KeyboardInterrupt: a signal came; what could be saved in time is saved.
    """
    from ray.train import TrainingFailedError

    trainer = _make_trainer(function, argument, run, channel, compute, resize_seconds)
    try:
        _fit(trainer, Watch(channel, compute, recovery, run, see))
    except TrainingFailedError as error:
        raise _explain(error, run) from error
    except OSError as error:  # Ray Train itself, at the storage
        raise (store_failed(error, run) or error) from error


def _make_trainer(
    function: Callable[[Any], None],
    argument: Any,
    run: StoragePath,
    channel: EventChannel,
    compute: ComputeConfig,
    resize_seconds: float,
) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.tensorflow import TensorflowTrainer  # brings TensorFlow

    from fracture.runtime.ray_internals import ControllerHook

    if compute.min_workers:  # a group that was planned with a machine that has just gone is given up sooner: 60 s
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")
    return TensorflowTrainer(
        function,
        train_loop_config=argument,
        tensorflow_config=TensorflowBackend(),
        scaling_config=ScalingConfig(
            num_workers=(compute.min_workers, compute.workers) if compute.min_workers else compute.workers,
            use_gpu=compute.gpu,
            resources_per_worker=resources_per_worker(compute),
            elastic_resize_monitor_interval_s=resize_seconds + _GROW_AFTER,
        ),
        run_config=RunConfig(
            name=run.name,
            storage_path=run.path.rsplit("/", 1)[0],
            storage_filesystem=run.filesystem,
            failure_config=FailureConfig(max_failures=-1),  # `Recovery` counts them
            callbacks=[ControllerHook(channel, run)],
        ),
    )


def _fit(trainer: Any, watch: Watch) -> None:
    """Fit in a thread, so that this one can show the events and end the run.

    In the main thread Ray Train would take over SIGINT and end with exit code 0.
    """
    failure: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # handed to the main thread, which raises it
            failure.append(error)

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    with patience():
        try:
            alive = True
            while alive:
                alive = thread.is_alive()  # looked up before the last events are taken
                watch.look()
                thread.join(POLL)
            if watch.stopped:
                raise KeyboardInterrupt
        except BaseException:
            if watch.controller is not None:
                from fracture.runtime.ray_internals import abort_training

                with suppress(Exception):
                    abort_training(watch.controller, _ABORT_SECONDS)
            raise
    if failure:
        raise failure[0]


def _explain(error: Any, run: StoragePath) -> RunError | UsageError:
    """Make the one line that says why Ray Train gave up."""
    if errors := getattr(error, "worker_failures", {}):
        failure = explain_failure(errors, run)
        return failure.error or RunError(f"{failure.reason}. Run again with -v for the traces")
    cause = getattr(error, "controller_failure", error)
    if known := disk_full(cause, run) or store_failed(cause, run):
        return known
    return RunError(f"Ray Train gave up: {last_line(cause)}. Run again with -v for the traces")
