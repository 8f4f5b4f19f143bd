"""Ray Train's TensorflowTrainer without the seconds that it spends on loading TensorFlow where nothing computes.

Its own configuration imports TensorFlow wherever it is made or unpickled: in the driver and in the controller, before
which no worker starts. Ours tells the workers of each other just the same.
"""

import json
import os
from collections.abc import Callable
from typing import Any

import ray
from ray.train._internal.base_worker_group import BaseWorkerGroup
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import ReschedulingState, ResizingState, RestartingState
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import PreemptionError
from ray.train.v2.tensorflow.tensorflow_trainer import TensorflowTrainer

from fracture.runtime.failures import explain, last_line
from fracture.storage import StoragePath


class Trainer(TensorflowTrainer):
    """
    Args:
        alone: Ray ends with this job, so that there is nothing to clean up after it.
    """

    def __init__(self, train_loop_per_worker: Callable[..., None], *, alone: bool, **arguments: Any) -> None:
        self._unused = (DatasetsCallback, *([PlacementGroupCleanerCallback] if alone else []))
        # Past TensorflowTrainer's own constructor, which adds its configuration and nothing else.
        DataParallelTrainer.__init__(self, train_loop_per_worker, backend_config=ClusterSpec(), **arguments)

    def _create_default_callbacks(self) -> list[Any]:
        """Without the processes that have no use here, each a core for two seconds: there are no Ray Datasets."""
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, self._unused)]


class Reporter(ControllerCallback, WorkerGroupCallback):
    """Tells the driver what Ray Train's controller, in whose process it is, sees and does."""

    def __init__(self, messages: Any, run: StoragePath) -> None:
        self._messages, self._run, self._told = messages, run, False

    def after_controller_start(self, train_run_context: Any) -> None:
        self._put(event="controller", actor=ray.get_runtime_context().current_actor)

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        if isinstance(current_state, ResizingState):
            self._put(event="resizing", workers=current_state.scaling_decision.num_workers)
        if isinstance(current_state, RestartingState) and not self._told:
            error = current_state.training_failed_error
            away = isinstance(error, PreemptionError)
            self._fail("a machine is being taken away" if away else last_line(error), away)
        if isinstance(current_state, ReschedulingState):  # mostly for want of machines, which is no failure
            error = getattr(current_state.training_failed_error, "controller_failure", None)
            if isinstance(error, WorkerGroupStartupFailedError):
                self._fail(f"a worker could not start: {last_line(error)}")

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._told = False

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        if worker_group_status.errors and not self._told:
            self._told = True
            away = worker_group_status.get_preemption_info() or worker_group_status.has_preempted_worker()
            failure = explain(worker_group_status.errors, self._run)
            self._put(event="failure", preempted=bool(away), **vars(failure))

    def _fail(self, reason: str, preempted: bool = False) -> None:
        self._put(event="failure", preempted=preempted, error=None, reason=reason, lost=True)

    def _put(self, **event: Any) -> None:
        self._messages.put.remote(event)


class ClusterSpec(BackendConfig):
    @property
    def backend_cls(self) -> type[Backend]:
        return _Backend


class _Backend(Backend):
    def on_start(self, worker_group: BaseWorkerGroup, backend_config: BackendConfig) -> None:
        addresses = worker_group.execute(_own_address)
        ray.get(
            [
                worker_group.execute_single_async(rank, _set_cluster, addresses, rank)
                for rank in range(len(worker_group))
            ]
        )


def _own_address() -> str:
    from ray._common.network_utils import build_address
    from ray.train._internal.utils import get_address_and_port

    return build_address(*get_address_and_port())


def _set_cluster(addresses: list[str], rank: int) -> None:
    """https://www.tensorflow.org/guide/distributed_training#TF_CONFIG"""
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}})
