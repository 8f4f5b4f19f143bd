"""The checkpoints in a run's folder: `checkpoint_000001`, `checkpoint_000002`, ...

A checkpoint is one file, which is there whole or not at all, so the newest folder that holds it is the newest
checkpoint: no other file has to name it. Rank 0 writes them, and after each removes all but the last two; what a kill
between the two leaves over is removed after the next one.
"""

import re
import tempfile
from pathlib import Path

from fracture.storage import StoragePath
from fracture.training.checkpoint import FILE, DamagedCheckpointError, LoopState

_KEPT = 2  # each holds the best weights too
BEST = "best"  # folder of the best weights, from the end of the training until the model is exported


def list_checkpoints(run: StoragePath) -> list[StoragePath]:
    """Return the folders of the run's checkpoints, oldest first."""
    names = {info.path.rsplit("/", 2)[-2] for info in run.files() if info.base_name == FILE}
    return [run / name for name in sorted(names) if re.fullmatch(r"checkpoint_\d+", name)]


def save_checkpoint(run: StoragePath, state: LoopState) -> None:
    """Write a checkpoint and remove those that are older than the one before it.

    Raises:
        RunError: the disk is full, or the store fails.
    """
    before = list_checkpoints(run)
    number = int(before[-1].name.removeprefix("checkpoint_")) + 1 if before else 1
    write_state(run / f"checkpoint_{number:06d}", state)
    for folder in before[: 1 - _KEPT]:
        folder.delete()


def write_state(folder: StoragePath, state: LoopState) -> None:
    """Write a state into a folder, which may be in a bucket."""
    with tempfile.TemporaryDirectory() as local:
        state.save(Path(local))
        folder.upload(Path(local))


def read_state(folder: StoragePath) -> LoopState:
    """Read a state from a folder, which may be in a bucket.

    Raises:
        DamagedCheckpointError: it is not what was written.
    """
    with tempfile.TemporaryDirectory() as local:
        try:
            (Path(local) / FILE).write_bytes((folder / FILE).read_bytes())
        except FileNotFoundError as error:
            raise DamagedCheckpointError(str(error)) from error
        return LoopState.load(Path(local))
