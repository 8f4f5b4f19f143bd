from pathlib import Path

import numpy as np
import pytest

from fracture.storage import StoragePath, storage_path
from fracture.training.checkpoint import FILE, DamagedCheckpointError, LoopState
from fracture.training.checkpoint_folder import list_checkpoints, read_state, save_checkpoint


@pytest.fixture(params=["disk", "bucket"])
def run(request, tmp_path: Path) -> StoragePath:
    return storage_path(tmp_path if request.param == "disk" else request.getfixturevalue("bucket")) / "runs/x"


def state(epochs_done: int) -> LoopState:
    return LoopState(epochs_done=epochs_done, weights=[np.full((2, 3), epochs_done, np.float32)])


def test_the_last_two_are_kept_and_read_as_they_were_written(run: StoragePath):
    assert list_checkpoints(run) == []
    for epochs_done in (1, 2, 3):
        save_checkpoint(run, state(epochs_done))
    names = [folder.name for folder in list_checkpoints(run)]
    assert names == ["checkpoint_000002", "checkpoint_000003"]
    newest = read_state(run / names[-1])
    assert newest.epochs_done == 3
    assert newest.weights[0].tolist() == np.full((2, 3), 3.0).tolist()


def test_what_a_killed_job_left_over_is_neither_a_checkpoint_nor_for_ever(run: StoragePath):
    for epochs_done in (1, 2):
        save_checkpoint(run, state(epochs_done))
    (run / "checkpoint_000003/.half.part").write_bytes(b"x")
    (run / "best" / FILE).write_bytes(b"x")
    assert [folder.name for folder in list_checkpoints(run)] == ["checkpoint_000001", "checkpoint_000002"]
    save_checkpoint(run, state(3))
    assert [folder.name for folder in list_checkpoints(run)] == ["checkpoint_000002", "checkpoint_000003"]


def test_a_kill_between_writing_and_removing_leaves_one_more_which_goes_later(run: StoragePath):
    for number in (1, 2, 3):
        (run / f"checkpoint_{number:06d}" / FILE).write_bytes(b"x")
    save_checkpoint(run, state(4))
    assert [folder.name for folder in list_checkpoints(run)] == ["checkpoint_000003", "checkpoint_000004"]


def test_a_checkpoint_that_is_gone_or_changed_is_damaged(run: StoragePath):
    with pytest.raises(DamagedCheckpointError):
        read_state(run / "checkpoint_000001")
    save_checkpoint(run, state(1))
    (run / "checkpoint_000001" / FILE).write_bytes(b"nothing")
    with pytest.raises(DamagedCheckpointError):
        read_state(run / "checkpoint_000001")
