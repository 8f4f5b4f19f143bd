"""The phases of a training: the whole network at once, or head training on a frozen backbone and then fine-tuning."""

from dataclasses import dataclass
from typing import Literal

from fracture.config import Config


@dataclass(frozen=True)
class Phase:
    """One phase of a training, with an optimizer of its own."""

    trains: Literal["all", "head", "fine-tuning"]  # fine-tuning: the head and the last layers of the backbone
    epochs: int  # at most
    learning_rate: float  # at its highest
    rate_setting: str  # the setting that it comes from
    on_frozen_features: bool = False  # on features that are computed once, in place of images
    in_closed_form: bool = False  # solved as it begins: its one epoch, at a learning rate of 0, only measures


def list_phases(config: Config) -> tuple[Phase, ...]:
    """Return the phases of a run, in order. Each begins with the best weights so far and a new optimizer."""
    training, transfer = config.training, config.transfer
    if not config.pretrained:
        return (Phase("all", training.epochs, training.learning_rate, "training.learning_rate"),)
    once = transfer.features == "once"
    if transfer.head == "ridge":
        head = Phase("head", 1, 0.0, "transfer.head", once, in_closed_form=True)
    else:
        head = Phase("head", transfer.head_epochs, training.learning_rate, "training.learning_rate", once)
    if not transfer.unfreeze:
        return (head,)
    return head, Phase("fine-tuning", training.epochs, transfer.learning_rate, "transfer.learning_rate")


def count_epochs(config: Config) -> int:
    """Return the most epochs that a run can have, over all phases."""
    return sum(phase.epochs for phase in list_phases(config))
