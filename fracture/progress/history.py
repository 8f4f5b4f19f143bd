"""The metrics log of a run: `metrics.jsonl`, one record an epoch, and which of its epochs is the best."""

import json
from collections.abc import Sequence

from fracture.errors import UsageError
from fracture.storage import StoragePath

METRICS_LOG = "metrics.jsonl"
LOG_REPAIR = "Restore it from a copy; a run that is not finished writes it anew when it goes on."
Record = dict[str, float]


def write_history(run: StoragePath, history: Sequence[Record]) -> None:
    """Write the whole log, so that a killed job leaves the old one or the new one."""
    (run / METRICS_LOG).write_bytes("".join(json.dumps(record) + "\n" for record in history).encode())


def read_history(run: StoragePath) -> list[Record]:
    """Return one record an epoch; none where there is no log yet.

    Raises:
        UsageError: a line is damaged.
    """
    log = run / METRICS_LOG
    try:
        lines = log.read_replaced_bytes().splitlines()
    except FileNotFoundError:
        return []
    return [_read_record(log, number, line) for number, line in enumerate(lines, 1)]


def _read_record(log: StoragePath, number: int, line: bytes) -> Record:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise UsageError(f"{log} is damaged at line {number}. {LOG_REPAIR}")
    return record


def find_best(history: Sequence[Record]) -> Record:
    """Return the record of the best epoch: the first one with the lowest validation loss."""
    return min(history, key=lambda record: record["val_loss"])
