"""The private interfaces of Ray that the project uses, all of them as of Ray 2.60.

No public interface serves for these two:

1. The hook into Ray Train's controller (`ControllerHook`). `ray.train.UserCallback` hears of reports and of workers'
   exceptions alone. It does not hear that a group is resized, that it could not start, or that a machine was taken
   away with notice, which must not count as a failure; and it has no handle to end a run that others' Ray would go on
   with.
2. The most that an autoscaler may grow a cluster to (`read_autoscaler_ceiling`). `ray.cluster_resources` counts the
   machines that are there now, by which a run on a cluster that starts small would be refused.

`tests/runtime/test_ray_internals.py` fails where a new version of Ray has changed them.
"""

from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train import PreemptionError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import (
    PreemptingState,
    ReschedulingState,
    ResizingState,
    RestartingState,
)

from fracture.progress.events import ControllerStarted, Resizing, WorkersFailed
from fracture.runtime.channel import EventChannel
from fracture.runtime.failures import explain_failure, last_line
from fracture.storage import StoragePath


class ControllerHook(ControllerCallback):
    """Sends the driver what Ray Train's controller, in whose process it is, sees and does."""

    def __init__(self, channel: EventChannel, run: StoragePath) -> None:
        self._channel, self._run = channel, run

    def after_controller_start(self, train_run_context: Any) -> None:
        self._channel.send_soon(ControllerStarted(ray.get_runtime_context().current_actor))

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        if isinstance(current_state, ResizingState):
            self._channel.send_soon(Resizing(current_state.scaling_decision.num_workers))
        if isinstance(current_state, RestartingState):
            preempting = isinstance(previous_state, PreemptingState)
            self._channel.send_soon(_describe_failure(current_state.training_failed_error, preempting, self._run))
        if isinstance(current_state, ReschedulingState):  # mostly for want of machines, which is no failure
            error = getattr(current_state.training_failed_error, "controller_failure", None)
            if isinstance(error, WorkerGroupStartupFailedError):
                self._channel.send_soon(WorkersFailed(f"a worker could not start: {last_line(error)}"))


def _describe_failure(error: Exception, preempting: bool, run: StoragePath) -> WorkersFailed:
    if isinstance(error, PreemptionError):
        return WorkersFailed("a machine is being taken away", preempted=True)
    if not isinstance(error, WorkerGroupError):
        return WorkersFailed(last_line(error))
    # Of a worker that does not answer Ray wraps the reason.
    errors = {rank: getattr(e, "health_check_failure", e) for rank, e in error.worker_failures.items()}
    reclaimed = any(isinstance(e, RayActorError) and e.preempted for e in errors.values())
    return WorkersFailed(preempted=preempting or reclaimed, **vars(explain_failure(errors, run)))


def abort_training(controller: Any, timeout: float) -> None:
    """End the controller and its workers, which would go on on a Ray that others use too.

    Raises:
        Exception: of any kind; the controller's process ends in the call.
    """
    ray.get(controller.abort.remote(), timeout=timeout)


def read_autoscaler_ceiling() -> dict[str, float]:
    """Return the resources that the cluster may grow to; empty where it cannot grow."""
    from ray._private.state import state

    return state.get_max_resources_from_cluster_config() or {}
