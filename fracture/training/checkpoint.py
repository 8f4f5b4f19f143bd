"""All that is needed to go on as if nothing had happened, in one file in NumPy's format.

It cannot hold code, so loading it runs none, and every byte of it is under a checksum.
"""

import json
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fracture.arrays import load_arrays, save_arrays

Arrays = list[np.ndarray]
FILE = "state.npz"
BACKBONE = "backbone.npz"  # weights that a run began with, while it is not finished
_ARRAYS = ("weights", "optimizer", "best_weights", "tallies")


class Damaged(Exception):
    """A checkpoint is not what was written."""


@dataclass
class LoopState:
    """Where the loop is. The schedule and every random draw follow from the seed and these counts."""

    precision: str = ""  # chosen when the run began; another machine might choose another
    phase: int = 0  # counted from 0
    phase_began: int = 0  # after how many epochs
    epochs_done: int = 0
    steps_done: int = 0  # of the epoch under way
    seconds: float = 0.0  # that these steps took
    history: list[dict[str, float]] = field(default_factory=list)  # one record an epoch, as in metrics.jsonl
    best_epoch: int = 0
    best_val_loss: float = float("inf")
    epochs_without_better: int = 0
    weights: Arrays = field(default_factory=list)  # of what learns; at the begin of a phase, of the whole network
    optimizer: Arrays = field(default_factory=list)  # slots, step count and, in float16, the loss scale
    best_weights: Arrays = field(default_factory=list)
    tallies: Arrays = field(default_factory=list)  # what metrics have added up in the epoch under way, over all workers

    def pause(self, steps: int, seconds: float, weights: Arrays, optimizer: Arrays, tallies: Arrays) -> None:
        """Takes in an epoch that is under way."""
        self.steps_done, self.seconds = steps, seconds
        self.weights, self.optimizer, self.tallies = weights, optimizer, tallies

    def record(self, epoch: dict[str, float], weights: Arrays, optimizer: Arrays) -> None:
        """Takes in a finished epoch and keeps its weights if its validation loss is the lowest so far."""
        self.pause(0, 0.0, weights, optimizer, [])
        self.epochs_done += 1
        self.history.append(epoch)
        if epoch["val_loss"] < self.best_val_loss:
            self.best_epoch, self.best_val_loss = self.epochs_done, epoch["val_loss"]
            self.best_weights = weights
            self.epochs_without_better = 0
        else:
            self.epochs_without_better += 1

    def arrays(self) -> Arrays:
        return [array for name in _ARRAYS for array in getattr(self, name)]

    def finished(self, epochs: int, patience: int) -> bool:
        """The phase, of so many epochs."""
        return self.epochs_done - self.phase_began >= epochs or self.epochs_without_better >= patience

    def end_phase(self, backbone: Arrays) -> None:
        """The next one begins with the best weights so far.

        Args:
            backbone: weights that did not learn, and so are not among them.
        """
        self.best_weights = [*backbone, *self.best_weights]
        self.weights, self.optimizer = self.best_weights, []
        self.phase, self.phase_began, self.epochs_without_better = self.phase + 1, self.epochs_done, 0

    def save(self, folder: Path) -> None:
        plain: dict[str, Any] = {key: value for key, value in vars(self).items() if key not in _ARRAYS}
        plain |= {name: len(getattr(self, name)) for name in _ARRAYS}
        save_arrays(folder / FILE, [np.frombuffer(json.dumps(plain).encode(), np.uint8), *self.arrays()])

    @classmethod
    def load(cls, folder: Path) -> "LoopState":
        """
        Raises:
            Damaged: a byte is missing or changed.
        """
        try:
            file = folder / FILE
            first, *rest = load_arrays(file, file.stat().st_size, FILE, "")
            plain = json.loads(first.tobytes())
            counted = sum(plain[name] for name in _ARRAYS)
            if len(rest) != counted:  # a changed byte of the directory can hide the last ones
                raise ValueError(f"{FILE} holds {len(rest)} arrays, and {counted} were written")
            arrays = iter(rest)
            return cls(**plain | {name: list(islice(arrays, plain[name])) for name in _ARRAYS})
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:  # not what passes, as of a network's disk
            raise Damaged(str(error).rstrip(". ")) from error
