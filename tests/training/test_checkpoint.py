import json
import pickle

import numpy as np
import pytest

from fracture.arrays import parse_arrays, save_arrays
from fracture.errors import RunError
from fracture.training.checkpoint import FILE, DamagedCheckpointError, LoopState


def epoch(val_loss: float) -> dict[str, float]:
    return {"val_loss": val_loss}


def run_epochs(*val_losses: float) -> LoopState:
    state = LoopState()
    for number, loss in enumerate(val_losses, start=1):
        state.record(epoch(loss), [np.full(2, number)], [np.array(number)])
    return state


def test_the_best_weights_are_those_of_the_lowest_validation_loss():
    state = run_epochs(0.7, 0.5, 0.6, 0.5)
    assert (state.best_epoch, state.best_val_loss, state.epochs_without_better) == (2, 0.5, 2)
    assert state.best_weights[0].tolist() == [2, 2]
    assert state.weights[0].tolist() == [4, 4]


@pytest.mark.parametrize(
    ("losses", "finished"), [([0.7], False), ([0.5, 0.6], False), ([0.5, 0.6, 0.7], True), ([0.5, 0.6, 0.4], False)]
)
def test_patience_counts_epochs_without_a_lower_loss(losses: list[float], finished: bool):
    assert run_epochs(*losses).finished(epochs=9, patience=2) is finished


def test_the_last_epoch_ends_it():
    assert run_epochs(0.7, 0.6).finished(epochs=2, patience=5)


def test_a_checkpoint_holds_it_all(tmp_path):
    state = run_epochs(0.7, 0.5, 0.6)
    state.save(tmp_path)
    loaded = LoopState.load(tmp_path)
    assert loaded.history == state.history
    assert (loaded.epochs_done, loaded.best_epoch, loaded.epochs_without_better) == (3, 2, 1)
    for name in ("weights", "optimizer", "best_weights"):
        assert all(map(np.array_equal, getattr(loaded, name), getattr(state, name)))


@pytest.mark.parametrize("version", [None, 3])
def test_the_checkpoint_of_another_version_is_refused_and_not_called_damaged(version: int | None, tmp_path):
    run_epochs(0.7).save(tmp_path)
    arrays, metadata = parse_arrays((tmp_path / FILE).read_bytes())
    values = json.loads(metadata["state"]) | {"format_version": version}
    if version is None:
        del values["format_version"]  # as the first format has it
    save_arrays(tmp_path / FILE, arrays, {"state": json.dumps(values)})
    with pytest.raises(
        RunError,
        match=rf"have format {version or 1}, and this program goes on from format 2\. End the run with",
    ):
        LoopState.load(tmp_path)


def test_arrays_keep_their_order_beyond_ten(tmp_path):
    state = LoopState(weights=[np.array(i) for i in range(25)])
    state.save(tmp_path)
    assert [int(a) for a in LoopState.load(tmp_path).weights] == list(range(25))


def test_an_epoch_under_way_is_part_of_it(tmp_path):
    state = run_epochs(0.7)
    state.pause(7, 12.5, [np.ones(3)], [np.array(7)], [np.array(4.0), np.zeros(200)])
    state.save(tmp_path)
    loaded = LoopState.load(tmp_path)
    assert (loaded.epochs_done, loaded.steps_done, loaded.seconds) == (1, 7, 12.5)
    assert loaded.metric_sums[0] == 4
    assert loaded.weights[0].tolist() == [1, 1, 1]
    assert loaded.best_weights[0].tolist() == [1, 1], "those of the epoch before"
    loaded.record(epoch(0.6), [], [])
    assert (loaded.epochs_done, loaded.steps_done, loaded.seconds, loaded.metric_sums) == (2, 0, 0.0, [])


def test_a_checkpoint_that_holds_code_is_refused(tmp_path):
    (tmp_path / FILE).write_bytes(pickle.dumps(print))
    with pytest.raises(DamagedCheckpointError, match=r"state.safetensors is not a whole .safetensors file"):
        LoopState.load(tmp_path)


def test_any_damage_is_noticed(tmp_path):
    """A byte changed or missing, anywhere."""
    run_epochs(0.7, 0.5).save(tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    for at in range(0, len(whole), 7):
        (tmp_path / FILE).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(DamagedCheckpointError):
            LoopState.load(tmp_path)
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        (tmp_path / FILE).write_bytes(whole[:length])
        with pytest.raises(DamagedCheckpointError):
            LoopState.load(tmp_path)
    (tmp_path / FILE).unlink()
    with pytest.raises(DamagedCheckpointError, match="No such file"):
        LoopState.load(tmp_path)
