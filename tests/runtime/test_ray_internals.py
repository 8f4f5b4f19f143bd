"""The private interfaces of Ray 2.60: a new version that changes them fails here."""

import inspect
from pathlib import Path

import pytest
import ray
from ray.exceptions import ActorDiedError
from ray.train import ControllerError, PreemptionError, PreemptionInfo, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.controller.state import (
    PreemptingState,
    ReschedulingState,
    ResizingState,
    RestartingState,
    RunningState,
)
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision

from fracture.progress.events import Event, Resizing, WorkersFailed
from fracture.runtime.ray_internals import ControllerHook, read_autoscaler_ceiling
from fracture.storage import storage_path


class Recorder:
    """A channel that keeps what is sent."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def send_soon(self, event: Event) -> None:
        self.events.append(event)


def sent(tmp_path: Path, previous: object, current: object) -> list[Event]:
    recorder = Recorder()
    ControllerHook(recorder, storage_path(tmp_path)).after_controller_state_update(previous, current)
    return recorder.events


def test_the_version_is_the_one_that_these_were_read_in():
    assert ray.__version__.startswith("2.60."), "read fracture/runtime/ray_internals.py against the new version"


def test_the_controller_calls_the_hook_and_can_be_aborted():
    hooks = dict(inspect.getmembers(ControllerCallback))
    for name in ("after_controller_start", "after_controller_state_update"):
        ours = inspect.signature(getattr(ControllerHook, name))
        assert list(ours.parameters) == list(inspect.signature(hooks[name]).parameters)
    assert inspect.iscoroutinefunction(TrainController.abort)


def test_workers_that_died_are_a_failure_with_its_reason(tmp_path: Path):
    died = WorkerHealthCheckFailedError("no answer", ActorDiedError())
    [event] = sent(tmp_path, RunningState(), RestartingState(WorkerGroupError("", {1: died})))
    assert event == WorkersFailed("worker 1 was killed, or crashed", lost=True)
    broken = WorkerGroupError("", {0: FloatingPointError("a bug of ours")})
    [event] = sent(tmp_path, RunningState(), RestartingState(broken))
    assert event == WorkersFailed("worker 0 failed: a bug of ours", lost=False)


def test_a_machine_that_is_taken_away_with_notice_is_no_failure_of_ours(tmp_path: Path):
    error = PreemptionError(PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"node": [1]}))
    [event] = sent(tmp_path, PreemptingState(error.preemption_info, 0.0), RestartingState(error))
    assert event == WorkersFailed("a machine is being taken away", preempted=True)
    [event] = sent(
        tmp_path,
        PreemptingState(error.preemption_info, 0.0),
        RestartingState(WorkerGroupError("", {0: RuntimeError("lost its peer")})),
    )
    assert event.preempted


def test_a_resized_group_and_one_that_could_not_start(tmp_path: Path):
    assert sent(tmp_path, RunningState(), ResizingState(ResizeDecision(3, {"CPU": 1}))) == [Resizing(3)]
    failed = ReschedulingState(ControllerError(WorkerGroupStartupFailedError("the machine went away")))
    assert sent(tmp_path, RunningState(), failed) == [
        WorkersFailed("a worker could not start: the machine went away"),
    ]
    assert sent(tmp_path, RunningState(), ReschedulingState(ControllerError(TimeoutError("no machines")))) == []


def test_a_ray_that_cannot_grow_has_no_ceiling(ray_cluster):
    assert read_autoscaler_ceiling() == {}


def test_the_ceiling_is_that_of_the_cluster_file(ray_cluster, monkeypatch: pytest.MonkeyPatch):
    from ray._private.state import state

    monkeypatch.setattr(state, "get_max_resources_from_cluster_config", lambda: {"CPU": 64})
    assert read_autoscaler_ceiling() == {"CPU": 64}
