"""All that is needed to go on as if nothing had happened, in two files: numbers in NumPy's format, the rest in JSON.

Neither can hold code, so loading one runs none.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Arrays = list[np.ndarray]
SNAPSHOT, SNAPSHOT_COPY = "checkpoint_manager_snapshot.json", "checkpoint_manager_snapshot.copy.json"  # Ray Train's
_ARRAYS = ("weights", "optimizer", "best_weights")


@dataclass
class LoopState:
    """Where the loop is. The schedule and every random draw follow from the seed and these counts."""

    epochs_done: int = 0
    history: list[dict[str, float]] = field(default_factory=list)  # one record an epoch, as in metrics.jsonl
    best_epoch: int = 0
    best_val_loss: float = float("inf")
    epochs_without_better: int = 0
    weights: Arrays = field(default_factory=list)
    optimizer: Arrays = field(default_factory=list)  # slots, step count and, in float16, the loss scale
    best_weights: Arrays = field(default_factory=list)

    def record(self, epoch: dict[str, float], weights: Arrays, optimizer: Arrays) -> None:
        """Takes in a finished epoch and keeps its weights if its validation loss is the lowest so far."""
        self.epochs_done += 1
        self.history.append(epoch)
        self.weights, self.optimizer = weights, optimizer
        if epoch["val_loss"] < self.best_val_loss:
            self.best_epoch, self.best_val_loss = self.epochs_done, epoch["val_loss"]
            self.best_weights = weights
            self.epochs_without_better = 0
        else:
            self.epochs_without_better += 1

    def finished(self, epochs: int, patience: int) -> bool:
        return self.epochs_done >= epochs or self.epochs_without_better >= patience

    def save(self, folder: Path) -> None:
        for name in _ARRAYS:
            np.savez(folder / f"{name}.npz", *getattr(self, name))
        plain = {key: value for key, value in asdict(self).items() if key not in _ARRAYS}
        (folder / "state.json").write_text(json.dumps(plain), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "LoopState":
        plain: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return cls(**plain, **{name: _load_arrays(folder / f"{name}.npz") for name in _ARRAYS})


def _load_arrays(file: Path) -> Arrays:
    with np.load(file, allow_pickle=False) as arrays:
        return [arrays[f"arr_{i}"] for i in range(len(arrays.files))]
