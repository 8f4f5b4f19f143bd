"""The events of a run: what workers, Ray Train and Ray Tune report to the driver while it runs.

Each carries what its readers need, so that they need not know the settings. Readers `match` on the type.
"""

from dataclasses import dataclass
from typing import Any, Literal

from fracture.errors import RunError, UsageError


@dataclass(frozen=True)
class ControllerStarted:
    """Ray Train's controller is up."""

    controller: Any  # its actor handle


@dataclass(frozen=True)
class WorkersStarted:
    """A group of workers is up; they still have to load TensorFlow and the images."""

    workers: int


@dataclass(frozen=True)
class TrainingStarted:
    """The workers have their images and their checkpoint, if there is one, and begin to train."""

    workers: int
    unit: Literal["CPU", "GPU"]
    units_per_worker: int
    batch_size: int  # over all workers
    steps: int  # of an epoch
    max_epochs: int  # of the run
    epochs_done: int
    steps_done: int  # of the epoch under way
    precision: str  # of the finished model's training


@dataclass(frozen=True)
class FeaturesComputed:
    """The frozen backbone's features of some images are computed."""

    done: int
    count: int  # images


@dataclass(frozen=True)
class PhaseStarted:
    """A phase of training begins, or goes on after a restart."""

    number: int  # from 1
    phases: int  # of the run
    model: str
    precision: str
    trained_part: Literal["all", "head", "fine-tuning"]  # fine-tuning: the head and the backbone's last layers
    unfrozen_layers: int | Literal["all"]  # of the backbone, where `trained_part` is "fine-tuning"
    max_epochs: int  # of the phase
    last_epoch: int  # number of the last epoch that the phase can have
    parameters: int
    trained_parameters: int
    frozen_features: bool  # the head is trained on features that are computed once
    mirrored: bool  # and those of the mirror images too


@dataclass(frozen=True)
class StepDone:
    """Training steps are done; sent about once a second."""

    epoch: int  # from 1
    step: int  # of the epoch, from 1
    steps: int


@dataclass(frozen=True)
class Validating:
    """The epoch's steps are done, and validation is under way."""

    epoch: int
    step: int
    steps: int


@dataclass(frozen=True)
class EpochDone:
    """An epoch is trained, validated, saved and logged."""

    record: dict[str, float]  # its line of the metrics log
    best_epoch: int  # so far


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint inside an epoch is saved."""

    epoch: int
    step: int
    steps: int


@dataclass(frozen=True)
class DamagedCheckpoint:
    """A checkpoint cannot be read; the one before it is tried."""

    checkpoint: str
    reason: str


@dataclass(frozen=True)
class WorkerError:
    """A worker is about to fail with an exception."""

    epoch: int
    step: int  # of the epoch, after which it was, ...
    last: int  # ... or one up to this: steps run in groups


@dataclass(frozen=True)
class WorkersFailed:
    """The group of workers failed; Ray Train starts another."""

    reason: str
    error: RunError | UsageError | None = None  # a cause that a restart would not remove
    lost: bool = True  # a worker ended or went out of reach, which may be chance
    preempted: bool = False  # its machine was taken away with notice
    failures: int = 0  # of this job so far, this one included; the driver counts


@dataclass(frozen=True)
class Resizing:
    """Ray Train restarts the group with another number of workers, since machines came or went."""

    workers: int


@dataclass(frozen=True)
class WaitingForMachines:
    """No group of workers could start yet."""

    workers_that_fit: int  # on the machines that are there now, `workers` at most
    workers: int
    seconds: float  # so far


@dataclass(frozen=True)
class Stopping:
    """A signal came, and the workers may save a last checkpoint."""

    seconds: float  # that they have for it


@dataclass(frozen=True)
class TrainingStopped:
    """All workers saved and ended, since a stop was requested."""

    epoch: int
    step: int  # of the epoch; 0: none of the next one is done


@dataclass(frozen=True)
class Scoring:
    """Training is over; validation and test are scored with the best weights."""

    workers: int


@dataclass(frozen=True)
class Diverged:
    """The loss or a weight is not finite; the run ends."""

    epoch: int
    step: int
    steps: int
    setting: str  # the learning rate's key
    learning_rate: float

    def __str__(self) -> str:
        return (
            f"the loss is not finite: epoch {self.epoch}, step {self.step} of {self.steps}. "
            f"Lower {self.setting} ({self.learning_rate:g}) and start a new run"
        )


TrainingEvent = (
    ControllerStarted
    | WorkersStarted
    | TrainingStarted
    | FeaturesComputed
    | PhaseStarted
    | StepDone
    | Validating
    | EpochDone
    | CheckpointSaved
    | DamagedCheckpoint
    | WorkerError
    | WorkersFailed
    | Resizing
    | WaitingForMachines
    | Stopping
    | TrainingStopped
    | Scoring
    | Diverged
)


@dataclass(frozen=True)
class TrialStarted:
    """A trial begins to train, or goes on from its checkpoint."""

    trial: int  # from 1


@dataclass(frozen=True)
class TrialProgress:
    """An event of a trial's training."""

    trial: int
    event: TrainingEvent


@dataclass(frozen=True)
class TrialEnded:
    """A trial's training ended by itself: by its last epoch, an early stop, or a loss that is not finite."""

    trial: int
    diverged: bool


@dataclass(frozen=True)
class TrialCompleted:
    """Ray Tune is done with a trial, which ended by itself or was stopped early."""

    trial: int
    epochs: int  # that Tune compared it by


@dataclass(frozen=True)
class TrialInterrupted:
    """A trial stopped since the search is to stop."""

    trial: int


@dataclass(frozen=True)
class TrialFailed:
    """A trial failed in a way that would fail the others."""

    trial: int
    error: RunError | UsageError


@dataclass(frozen=True)
class TrialCleanedUp:
    """A trial's workers have ended, and nothing writes into its folder any more."""

    trial: int


TrialEvent = (
    TrialStarted | TrialProgress | TrialEnded | TrialCompleted | TrialInterrupted | TrialFailed | TrialCleanedUp
)
Event = TrainingEvent | TrialEvent
