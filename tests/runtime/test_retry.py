from dataclasses import replace

import pytest

from fracture.config import RecoveryConfig
from fracture.errors import RunError, UsageError
from fracture.progress.events import (
    CheckpointSaved,
    StepDone,
    TrainingEvent,
    Validating,
    WorkerError,
    WorkersFailed,
    WorkersStarted,
)
from fracture.runtime.retry import Recovery

STARTED, SAVED = WorkersStarted(2), CheckpointSaved(1, 5, 9)
FAILED = WorkersFailed("worker 1 was killed")


def step(epoch: int, number: int) -> StepDone:
    return StepDone(epoch, number, 9)


def see(recovery: Recovery, *events: TrainingEvent) -> None:
    for event in events:
        recovery.see(event)


def test_lost_workers_are_replaced_so_often_and_no_oftener():
    recovery = Recovery(RecoveryConfig(max_failures=2))
    see(recovery, FAILED, FAILED)
    with pytest.raises(
        RunError,
        match=r"^3 failures without a checkpoint between them, more than recovery.max_failures = 2 \(no step done\): "
        r"worker 1 was killed. Run again with -v for the traces$",
    ):
        recovery.see(FAILED)
    assert recovery.failures == 3


def test_a_run_that_makes_progress_between_failures_goes_on():
    recovery = Recovery(RecoveryConfig(max_failures=1))
    for _ in range(20):
        see(recovery, STARTED, step(1, 5), SAVED, FAILED)
    assert recovery.failures == 20


def test_an_error_at_the_same_step_again_stops_the_job():
    recovery = Recovery(RecoveryConfig(max_failures=9))
    worker_error = WorkerError(2, 7, 7)
    error = WorkersFailed("worker 0 failed: InvalidArgumentError: nope", lost=False)
    see(recovery, STARTED, step(2, 1), worker_error, error, STARTED, step(2, 1), worker_error)
    with pytest.raises(RunError, match=r"again and again at the same place \(epoch 2, step 7\): worker 0 failed: Inv"):
        recovery.see(error)


def test_an_error_in_two_groups_that_have_a_step_in_common_may_be_one():
    recovery, error = Recovery(RecoveryConfig(max_failures=9)), replace(FAILED, lost=False)
    see(recovery, STARTED, WorkerError(2, 50, 61), error, STARTED, WorkerError(2, 62, 70), error)
    see(recovery, STARTED, WorkerError(3, 66, 66), error, STARTED, WorkerError(3, 40, 50), error, STARTED)
    recovery.see(WorkerError(3, 45, 57))
    with pytest.raises(RunError, match=r"again and again at the same place \(epoch 3, steps 45 to 57\): worker 1 was"):
        recovery.see(error)


def test_errors_at_different_steps_do_not():
    recovery = Recovery(RecoveryConfig(max_failures=9))
    for number in range(9):
        see(recovery, STARTED, WorkerError(2, number, number), replace(FAILED, lost=False))


def test_a_crash_at_the_same_step_stops_the_job_at_the_third():
    recovery = Recovery(RecoveryConfig(max_failures=9))
    see(recovery, *(2 * [STARTED, step(2, 7), FAILED]), STARTED, step(2, 7))
    with pytest.raises(RunError, match=r"the same place \(epoch 2, step 7\): worker 1 was killed"):
        recovery.see(FAILED)


def test_a_mistake_of_the_user_is_not_tried_again():
    damaged = UsageError("shard a is damaged at row group 3")
    with pytest.raises(UsageError, match="row group 3"):
        Recovery(RecoveryConfig()).see(replace(FAILED, error=damaged, lost=False))


def test_machines_that_are_taken_away_with_notice_do_not_count():
    recovery = Recovery(RecoveryConfig(max_failures=0))
    see(
        recovery,
        STARTED,
        step(1, 1),
        replace(FAILED, preempted=True),
        STARTED,
        step(1, 1),
        replace(FAILED, preempted=True),
    )


def test_waiting_for_machines_has_an_end():
    now = [0.0]
    recovery = Recovery(RecoveryConfig(wait_minutes=10), clock=lambda: now[0])
    now[0] = 599
    recovery.check_waiting(2)
    recovery.see(STARTED)
    now[0] = 6000
    recovery.check_waiting(2)
    recovery.see(FAILED)
    now[0] = 6601
    with pytest.raises(
        RunError,
        match=r"no machines for 2 workers came within recovery.wait_minutes = 10. Run the same command again, when",
    ):
        recovery.check_waiting(2)


def test_workers_that_end_before_their_first_step_did_not_fail_at_one():
    recovery = Recovery(RecoveryConfig(max_failures=9))
    see(recovery, STARTED, WorkerError(1, 5, 5), replace(FAILED, lost=False))
    see(recovery, replace(FAILED, lost=False), replace(FAILED, lost=False), replace(FAILED, lost=False))


def test_only_workers_that_are_at_work_can_save():
    recovery = Recovery(RecoveryConfig())
    see(recovery, STARTED)
    assert not recovery.training
    see(recovery, step(1, 1))
    assert recovery.training
    see(recovery, FAILED, WorkerError(1, 2, 2))  # the last word of one that is gone
    assert not recovery.training
    see(recovery, STARTED, Validating(1, 9, 9))
    assert recovery.training
