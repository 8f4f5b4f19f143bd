import pytest

from fracture.config import RecoveryConfig
from fracture.errors import RunError, UsageError
from fracture.runtime.retry import Recovery

PLACED, SAVED = {"event": "placed", "workers": 2}, {"event": "saved", "epoch": 1, "step": 5, "steps": 9}


def step(epoch: int, number: int) -> dict:
    return {"event": "step", "epoch": epoch, "step": number, "steps": 9}


def failure(**different: object) -> dict:
    told = {"event": "failure", "error": None, "reason": "worker 1 was killed", "lost": True, "preempted": False}
    return told | different


def see(recovery: Recovery, *events: dict) -> None:
    for event in events:
        recovery.see(event)


def test_lost_workers_are_replaced_so_often_and_no_oftener():
    recovery = Recovery(RecoveryConfig(max_failures=2))
    see(recovery, failure(), failure())
    with pytest.raises(
        RunError,
        match=r"^3 failures without a checkpoint between them, more than recovery.max_failures = 2 \(no step done\): "
        r"worker 1 was killed. Run again with -v for the traces$",
    ):
        recovery.see(failure())
    assert recovery.failures == 3


def test_a_run_that_makes_progress_between_failures_goes_on():
    recovery = Recovery(RecoveryConfig(max_failures=1))
    for _ in range(20):
        see(recovery, PLACED, step(1, 5), SAVED, failure())
    assert recovery.failures == 20


def test_an_error_at_the_same_step_again_stops_the_job():
    recovery = Recovery(RecoveryConfig(max_failures=9))
    broke = {"event": "broke", "epoch": 2, "step": 7}
    error = failure(lost=False, reason="worker 0 failed: InvalidArgumentError: nope")
    see(recovery, PLACED, step(2, 1), broke, error, PLACED, step(2, 1), broke)
    with pytest.raises(RunError, match=r"again and again at the same place \(epoch 2, step 7\): worker 0 failed: Inv"):
        recovery.see(error)


def test_errors_at_different_steps_do_not():
    recovery = Recovery(RecoveryConfig(max_failures=9))
    for number in range(9):
        see(recovery, PLACED, {"event": "broke", "epoch": 2, "step": number}, failure(lost=False))


def test_a_crash_at_the_same_step_stops_the_job_at_the_third():
    recovery = Recovery(RecoveryConfig(max_failures=9))
    see(recovery, *(2 * [PLACED, step(2, 7), failure()]), PLACED, step(2, 7))
    with pytest.raises(RunError, match=r"the same place \(epoch 2, step 7\): worker 1 was killed"):
        recovery.see(failure())


def test_a_mistake_of_the_user_is_not_tried_again():
    damaged = UsageError("shard a is damaged at row group 3")
    with pytest.raises(UsageError, match="row group 3"):
        Recovery(RecoveryConfig()).see(failure(error=damaged, lost=False))


def test_machines_that_are_taken_away_with_notice_do_not_count():
    recovery = Recovery(RecoveryConfig(max_failures=0))
    see(recovery, PLACED, step(1, 1), failure(preempted=True), PLACED, step(1, 1), failure(preempted=True))


def test_waiting_for_machines_has_an_end():
    now = [0.0]
    recovery = Recovery(RecoveryConfig(wait_minutes=10), clock=lambda: now[0])
    now[0] = 599
    recovery.check_waiting(2)
    recovery.see(PLACED)
    now[0] = 6000
    recovery.check_waiting(2)
    recovery.see(failure())
    now[0] = 6601
    with pytest.raises(
        RunError,
        match=r"no machines for 2 workers came within recovery.wait_minutes = 10. Run the same command again, when",
    ):
        recovery.check_waiting(2)


def test_workers_that_end_before_their_first_step_were_at_no_place():
    recovery = Recovery(RecoveryConfig(max_failures=9))
    see(recovery, PLACED, {"event": "broke", "epoch": 1, "step": 5}, failure(lost=False))
    see(recovery, failure(lost=False), failure(lost=False), failure(lost=False))


def test_only_workers_that_are_at_work_can_save():
    recovery = Recovery(RecoveryConfig())
    see(recovery, PLACED)
    assert not recovery.training
    see(recovery, step(1, 1))
    assert recovery.training
    see(recovery, failure(), {"event": "broke", "epoch": 1, "step": 2})  # the last word of one that is gone
    assert not recovery.training
    see(recovery, PLACED, {"event": "validating", "epoch": 1, "step": 9, "steps": 9})
    assert recovery.training
