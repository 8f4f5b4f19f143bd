"""All that is needed to go on as if nothing had happened, in one `.safetensors` file.

The format cannot hold code, so loading runs none, and a checksum covers every byte.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fracture.arrays import parse_arrays, save_arrays
from fracture.errors import RunError

Arrays = list[np.ndarray]
FORMAT_VERSION = 2  # 1 was of Keras 2, whose optimizer has its variables in another order
FILE = "state.safetensors"
BACKBONE = "backbone.safetensors"  # the weights that a run began with, until it is finished
_ARRAYS = ("weights", "optimizer", "best_weights", "metric_sums")
_VALUES = "state"  # the key, in the file's metadata, of all that is not an array


class DamagedCheckpointError(Exception):
    """A checkpoint is not what was written."""


@dataclass
class LoopState:
    """The position of the training loop. The schedule and every random number follow from the seed and these counts."""

    precision: str = ""  # chosen when the run began; another machine might choose another
    phase: int = 0  # counted from 0
    phase_began: int = 0  # epochs of the run before this phase
    epochs_done: int = 0
    steps_done: int = 0  # steps of the epoch under way
    group: int = 0  # steps of the group under way
    seconds: float = 0.0  # time that these steps took
    history: list[dict[str, float]] = field(default_factory=list)  # one record an epoch, as in metrics.jsonl
    best_epoch: int = 0
    best_val_loss: float = float("inf")
    epochs_without_better: int = 0
    weights: Arrays = field(default_factory=list)  # of the trained model; when a phase begins, of the whole network
    optimizer: Arrays = field(default_factory=list)  # slots, step count and, in float16, the loss scale
    best_weights: Arrays = field(default_factory=list)
    metric_sums: Arrays = field(default_factory=list)  # of the epoch under way, over all workers: metric_sums.py

    def pause(self, steps: int, seconds: float, weights: Arrays, optimizer: Arrays, metric_sums: Arrays) -> None:
        """Record an epoch that is under way."""
        self.steps_done, self.seconds = steps, seconds
        self.weights, self.optimizer, self.metric_sums = weights, optimizer, metric_sums

    def record(self, epoch: dict[str, float], weights: Arrays, optimizer: Arrays) -> None:
        """Record a finished epoch, and keep its weights if its validation loss is the lowest so far."""
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
        """Return every array of the state."""
        return [array for name in _ARRAYS for array in getattr(self, name)]

    def finished(self, epochs: int, patience: int) -> bool:
        """Return whether a phase of so many epochs is over."""
        return self.epochs_done - self.phase_began >= epochs or self.epochs_without_better >= patience

    def end_phase(self, backbone: Arrays) -> None:
        """Begin the next phase with the best weights so far.

        Args:
            backbone: weights that the phase has not trained, and that are not among the best weights; may be empty.
        """
        self.best_weights = [*backbone, *self.best_weights]
        self.weights, self.optimizer = self.best_weights, []
        self.phase, self.phase_began, self.epochs_without_better = self.phase + 1, self.epochs_done, 0

    def save(self, folder: Path) -> None:
        """Write the state into a file of the folder."""
        values: dict[str, Any] = {key: value for key, value in vars(self).items() if key not in _ARRAYS}
        values |= {name: len(getattr(self, name)) for name in _ARRAYS} | {"format_version": FORMAT_VERSION}
        arrays = {_array_name(name, number): a for name in _ARRAYS for number, a in enumerate(getattr(self, name))}
        save_arrays(folder / FILE, arrays, {_VALUES: json.dumps(values)})

    @classmethod
    def load(cls, folder: Path) -> "LoopState":
        """Read the state that `save` has written.

        Raises:
            DamagedCheckpointError: a byte is missing or changed.
            RunError: another version of this program wrote it.
        """
        try:
            arrays, metadata = parse_arrays((folder / FILE).read_bytes())
            values = json.loads(metadata[_VALUES])
            if (version := values.pop("format_version", 1)) != FORMAT_VERSION:
                raise RunError(
                    f"the run's checkpoints have format {version!r:.20}, and this program goes on from format "
                    f"{FORMAT_VERSION}. End the run with the version that began it, or train anew under another --run "
                    "name"
                )
            lists = {name: [arrays[_array_name(name, n)] for n in range(values[name])] for name in _ARRAYS}
            return cls(**values | lists)
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedCheckpointError(f"{FILE} {str(error).rstrip('. ')}") from error
        except FileNotFoundError as error:  # no other OSError: a network's disk may answer later
            raise DamagedCheckpointError(str(error)) from error


def _array_name(name: str, number: int) -> str:
    return f"{name}.{number}"
