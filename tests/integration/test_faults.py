"""Faults that a run survives, on real Ray workers: it ends with the history of a run that nothing disturbed."""

import json
import shutil
import signal
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fracture.config import Config, flatten, load_config
from fracture.errors import RunError, UsageError
from fracture.progress.events import (
    CheckpointSaved,
    EpochDone,
    StepDone,
    TrainingEvent,
    TrainingStarted,
    Validating,
    WorkersFailed,
)
from fracture.storage import storage_path
from fracture.training import loop
from fracture.training.checkpoint import FILE
from fracture.training.checkpoint_folder import list_checkpoints, read_state
from tests.conftest import small_disk, write_shards
from tests.integration.conftest import ROWS, Meddler, assert_same_history, start, training_workers

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

AT_ONCE = "checkpoint.every_minutes=0.0001"  # at each agreement


def with_(config: Config, *assignments: str) -> Config:
    given = flatten(config.model_dump(mode="json", exclude_unset=True))
    return load_config(None, [*(f"{key}={json.dumps(value)}" for key, value in given), *assignments])


def attempt(run: Path) -> int:
    """Return the number of this group of workers."""
    return len(list(run.parent.glob(f"{run.name}-attempt-*")))


def mark_attempt(assignment: Any) -> None:
    import ray.train
    from ray.train.collective import barrier

    run = Path(assignment.run.path)
    if ray.train.get_context().get_world_rank() == 0:
        (run.parent / f"{run.name}-attempt-{attempt(run)}").touch()
    barrier()


def dies(assignment: Any) -> None:
    """Kill itself in each of the first three attempts, at another moment of epoch 2."""
    import os

    import ray.train

    from fracture.training.step import Replica

    mark_attempt(assignment)
    now, rank = attempt(Path(assignment.run.path)), ray.train.get_context().get_world_rank()

    def kill_myself() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if (now, rank) == (1, 1):  # in a step, while the other waits for its gradients
        train_steps = Replica.train_steps

        def in_a_step(self, batches, steps):
            if self.steps_done() + steps >= 9:
                kill_myself()
            return train_steps(self, batches, steps)

        Replica.train_steps = in_a_step
    if (now, rank) == (2, 0):  # while it saves, with half of the file written
        save = loop.LoopState.save

        def half(self, folder):
            save(self, folder)
            if self.epochs_done == 2:
                file = folder / FILE
                file.write_bytes(file.read_bytes()[:1000])
                kill_myself()

        loop.LoopState.save = half
    if (now, rank) == (3, 1):  # while rank 0 saves
        save_together = loop.save_together
        loop.save_together = lambda *all: kill_myself() if all[1].epochs_done == 2 else save_together(*all)
    loop.train_worker(assignment)


def test_a_worker_may_be_killed_at_any_moment_and_each_row_still_counts_once(data, undisturbed, tmp_path, monkeypatch):
    config, _, expected = undisturbed
    monkeypatch.setattr("fracture.training.loop.train_worker", dies)
    saved, killed = [], []

    def kill_once(event: TrainingEvent) -> None:
        """Kill a worker between steps, after a checkpoint of the third epoch."""
        saved.extend([event] if isinstance(event, CheckpointSaved) and event.epoch == 3 else [])
        if saved and not killed:
            killed.append(training_workers()[-1])
            killed[0].kill()

    listener = Meddler(kill_once)
    history = start(with_(config, AT_ONCE), data, tmp_path / "run", listener)
    assert killed
    assert attempt(tmp_path / "run") == 5
    ways = ("worker 0 was killed, or crashed", "worker 1 was killed, or crashed", "a worker was lost")
    assert [event.reason in ways for event in listener.of(WorkersFailed)] == 4 * [True]
    last = listener.of(TrainingStarted)[-1]
    assert (last.epochs_done, last.steps_done > 0) == (2, True)
    assert f"resuming   in epoch 3, step {last.steps_done} of 6, from its checkpoint" in listener.text
    assert_same_history(history, expected, tolerance=1e-3)
    for record in history:
        assert record["accuracy"] * ROWS["train"] == pytest.approx(round(record["accuracy"] * ROWS["train"]), abs=1e-4)


def stuck(assignment: Any) -> None:
    """Do nothing for ever on rank 1, in each of the first attempts in another way."""
    import ray.train

    from fracture.training import step, strategy

    mark_attempt(assignment)
    run = Path(assignment.run.path)
    if ray.train.get_context().get_world_rank() == 1:
        if attempt(run) == 1:
            train_steps = step.Replica.train_steps

            def a_step_that_never_returns(self, batches, steps):
                # In epoch 2. It calls nothing: stacks that change while they are written can crash the process.
                spins = self.steps_done() >= 6
                while spins:
                    pass
                return train_steps(self, batches, steps)

            step.Replica.train_steps = a_step_that_never_returns
            # Its watchdog, and not that of rank 0, which waits for it from the same moment on, is to say where it is.
            recovery = assignment.config.recovery.model_copy(update={"stuck_seconds": 8.0})
            assignment = replace(assignment, config=assignment.config.model_copy(update={"recovery": recovery}))
        if attempt(run) == 2:
            reducer = step.reducer

            def without_means(own, how, variables):
                skipped = how == "mean"  # of the moving averages
                return (lambda: strategy.local_arrays(own, variables)) if skipped else reducer(own, how, variables)

            step.reducer = without_means
    loop.train_worker(assignment)


def test_a_worker_that_is_alive_but_stuck_is_noticed_and_replaced(data, undisturbed, tmp_path, monkeypatch):
    """It is stuck in a step that never returns, in a collective that a rank skips, and by SIGSTOP."""
    config, _, expected = undisturbed
    monkeypatch.setattr("fracture.training.loop.train_worker", stuck)
    stopped = []

    def stop_once(event: TrainingEvent) -> None:
        if isinstance(event, EpochDone) and event.record["epoch"] == 2 and not stopped:
            stopped.append(training_workers()[-1])
            stopped[0].send_signal(signal.SIGSTOP)

    listener = Meddler(stop_once)
    history = start(with_(config, "recovery.stuck_seconds=10"), data, tmp_path / "run", listener)
    assert_same_history(history, expected, tolerance=1e-3)
    assert attempt(tmp_path / "run") == 4
    reasons = [event.reason for event in listener.of(WorkersFailed)]
    assert len(reasons) == 3  # of the other two TensorFlow may hear first, in its collectives
    assert reasons[0].startswith(f"a worker was stuck; where, says {tmp_path}/run/stacks/")
    stacks = [file.read_text() for file in (tmp_path / "run/stacks").iterdir()]
    assert any("in a_step_that_never_returns" in text for text in stacks), reasons


def stops_while_validating(assignment: Any) -> None:
    """Stop as where SIGTERM comes then."""
    from fracture.training.agreement import Agreed, Agreement

    reach = Agreement.reach

    def stop(self, event=None, steps=0, seconds=0.0):
        agreed = reach(self, event, steps, seconds)
        return Agreed(save=True, stop=True) if isinstance(event, Validating) and event.epoch == 2 else agreed

    Agreement.reach = stop
    loop.train_worker(assignment)


def test_a_run_that_was_stopped_while_it_validated_does_not_train_that_epoch_again(
    data, undisturbed, tmp_path, monkeypatch
):
    config, _, expected = undisturbed
    with monkeypatch.context() as stopped:
        stopped.setattr("fracture.training.loop.train_worker", stops_while_validating)
        with pytest.raises(KeyboardInterrupt):
            start(config, data, tmp_path / "run")
    listener = Meddler()
    history = start(config, data, tmp_path / "run", listener)
    assert "resuming   in epoch 2, step 6 of 6, from its checkpoint" in listener.text
    assert_same_history(history, expected, tolerance=1e-3)


def breaks(assignment: Any) -> None:
    from fracture.training.agreement import Agreement

    reach = Agreement.reach

    def broken(self, event=None, steps=0, seconds=0.0):
        agreed = reach(self, event, steps, seconds)
        self.steps = 1  # so that the step is one that a group ends with
        if isinstance(event, StepDone) and (event.epoch, event.step) == (2, 3):
            raise FloatingPointError("a bug of ours")
        return agreed

    Agreement.reach = broken
    loop.train_worker(assignment)


def test_an_error_that_comes_again_at_the_same_step_stops_the_job(data, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr("fracture.training.loop.train_worker", breaks)
    with pytest.raises(
        RunError, match=r"again and again at the same place \(epoch 2, step 3\): worker \d failed: a bug of ours"
    ):
        start(with_(undisturbed[0], "compute.workers=1"), data, tmp_path / "run")


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(data, undisturbed, tmp_path):
    config, run, expected = undisturbed
    shutil.copytree(run, tmp_path / "run")
    newest = max((tmp_path / "run").glob("checkpoint_*/"))
    content = (newest / FILE).read_bytes()
    (newest / FILE).write_bytes(content[: len(content) // 2])
    listener = Meddler()
    history = start(config, data, tmp_path / "run", listener)
    assert f"damaged    {newest.name} cannot be read" in listener.text
    assert "resuming   after epoch 3, from its checkpoint" in listener.text
    assert_same_history(history, expected, tolerance=1e-3)

    folders = list((tmp_path / "run").glob("checkpoint_*/"))
    for folder in folders:
        (folder / FILE).write_bytes(b"nothing")
    with pytest.raises(RunError, match=r"no checkpoint of this run can be read, and starting anew would throw its"):
        start(config, data, tmp_path / "run")
    assert all(folder.exists() for folder in folders), "nothing is thrown away"


def test_a_disk_that_fills_up_stops_the_run_and_the_checkpoints_before_are_whole(data, undisturbed, tmp_path):
    config, _, expected = undisturbed
    with small_disk(tmp_path / "disk", kilobytes=400) as disk:

        def fill(event: TrainingEvent) -> None:
            if isinstance(event, EpochDone) and event.record["epoch"] == 2:
                with suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
                    while file.write(bytes(1024)):
                        pass

        listener = Meddler(fill)
        with pytest.raises(RunError, match=r"^the disk is full: .*run the same command again.$"):
            start(config, data, disk / "run", listener)
        assert listener.of(WorkersFailed) == [], "no use to try again"
        loaded = [read_state(folder) for folder in list_checkpoints(storage_path(disk / "run"))]
        assert loaded[-1].epochs_done >= 1
        history = loaded[-1].history
        assert_same_history(history, expected[: len(history)], tolerance=1e-3)


def test_a_damaged_shard_stops_the_run_and_is_named(undisturbed, tmp_path):
    folder = storage_path(tmp_path / "shards")
    manifest = write_shards(folder, ROWS)
    file = tmp_path / "shards" / manifest.shards["train"][0].file
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        UsageError, match=rf"shard {file} is damaged at row group 0: .* Delete it and run preprocessing"
    ):
        start(undisturbed[0], (folder, manifest), tmp_path / "run")
