from pathlib import Path

import pytest

from fracture.errors import UsageError
from fracture.progress.history import METRICS_LOG, find_best, read_history, write_history
from fracture.storage import storage_path


def test_the_log_is_read_as_it_was_written(tmp_path: Path):
    run = storage_path(tmp_path / "x")
    assert read_history(run) == []
    history = [{"epoch": n, "val_loss": 1 / 3 / n} for n in (1, 2)]
    write_history(run, history)
    assert read_history(run) == history
    assert len((tmp_path / "x" / METRICS_LOG).read_text().splitlines()) == 2


@pytest.mark.parametrize("line", [b"", b"{", b"1", b"\xff"])
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes):
    run = storage_path(tmp_path / "x")
    (run / METRICS_LOG).write_bytes(b'{"epoch": 1, "val_loss": 0.5}\n' + line + b"\n")
    with pytest.raises(
        UsageError, match=r"metrics.jsonl is damaged at line 2. Restore it from a copy; a run that is not"
    ):
        read_history(run)


def test_a_bucket_without_a_log_has_no_history(bucket: str):
    assert read_history(storage_path(bucket) / "runs/x") == []


def test_the_best_epoch_is_the_first_of_those_with_the_lowest_validation_loss():
    history = [{"epoch": n, "val_loss": loss} for n, loss in enumerate((0.6, 0.5, 0.5, 0.7), 1)]
    assert find_best(history)["epoch"] == 2
