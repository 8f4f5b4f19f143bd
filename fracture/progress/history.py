"""The metrics log of a run: `metrics.jsonl`, one record an epoch, and which of its epochs is the best."""

import json
from collections.abc import Sequence

from fracture.storage import StoragePath

METRICS_LOG = "metrics.jsonl"
Record = dict[str, float]


def write_history(run: StoragePath, history: Sequence[Record]) -> None:
    """Write the whole log, so that a killed job leaves the old one or the new one."""
    (run / METRICS_LOG).write_bytes("".join(json.dumps(record) + "\n" for record in history).encode())


def read_history(run: StoragePath) -> list[Record]:
    """Return one record an epoch; none where there is no log yet."""
    log = run / METRICS_LOG
    try:
        return [json.loads(line) for line in log.read_bytes().decode().splitlines()]
    except FileNotFoundError:
        return []


def find_best(history: Sequence[Record]) -> Record:
    """Return the record of the best epoch: the first one with the lowest validation loss."""
    return min(history, key=lambda record: record["val_loss"])
