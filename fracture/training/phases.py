"""What learns, in which order: everything at once, or a head on a backbone that knows something, and then both."""

from dataclasses import dataclass
from typing import Literal

from fracture.config import Config


@dataclass(frozen=True)
class Phase:
    learns: Literal["all", "head", "layers"]  # layers: the head and the last of the backbone's
    epochs: int  # at most
    learning_rate: float  # at its highest
    by_features: bool = False  # on features that are computed once, not on images


def phases(config: Config) -> tuple[Phase, ...]:
    """Of a run, in turn. Each begins with the best weights so far, and an optimizer that has done no step."""
    training, transfer = config.training, config.transfer
    if not config.pretrained:
        return (Phase("all", training.epochs, training.learning_rate),)
    head = Phase("head", transfer.head_epochs, training.learning_rate, by_features=transfer.features == "once")
    if not transfer.unfreeze:
        return (head,)
    return head, Phase("layers", training.epochs, transfer.learning_rate)


def most_epochs(config: Config) -> int:
    """That a run can take, if nothing stops it early."""
    return sum(phase.epochs for phase in phases(config))
