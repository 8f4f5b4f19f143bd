"""What the workers agree on between two groups of steps: to save, to stop, and how many steps the next group has."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from fracture.progress.events import TrainingEvent
from fracture.runtime.channel import EventChannel

_SECONDS = 1.0  # that a group should take, and between two events of steps


@dataclass(frozen=True)
class Agreed:
    """The same on all workers."""

    save: bool
    stop: bool


class Agreement:
    """Has the workers agree, once for each group of steps.

    All have to save and stop after the same step; but only rank 0 hears that the job is to end, and clocks differ. So
    they add up what each knows. The number of steps until then is rank 0's choice too: about a second of them.
    """

    NUMBERS = 3  # that each worker adds: stop, save, and steps of the next group

    def __init__(
        self,
        channel: EventChannel | None,
        add: Callable[[list[float]], list[float]],
        is_preempted: Callable[[], bool],
        save_seconds: float,
    ) -> None:
        """
        Args:
            channel: on rank 0.
            add: adds up `NUMBERS` over all workers.
            is_preempted: whether a machine is about to be taken away; is called on all workers alike.
            save_seconds: seconds between two checkpoints inside an epoch.
        """
        self._channel, self._add, self._is_preempted = channel, add, is_preempted
        self._save_seconds, self._saved, self._sent = save_seconds, time.monotonic(), 0.0
        self._saved_for_preemption = False
        self.steps = 1  # of the next group; the first ones also trace and compile

    def reach(self, event: TrainingEvent | None = None, steps: int = 0, seconds: float = 0.0) -> Agreed:
        """Send the event, about once a second, and agree. Every worker calls it.

        Args:
            steps: of the group that is done; 0: there was none.
            seconds: that they took.
        """
        preempted = self._is_preempted() and not self._saved_for_preemption
        self._saved_for_preemption |= preempted
        own = [float(self._stop_requested(event)), float(preempted), 0.0]
        if self._channel is not None:
            own[1] += time.monotonic() - self._saved >= self._save_seconds
            own[2] = steps * _SECONDS / max(seconds, 1e-6) if steps else 1
        stop, save, group = self._add(own)
        self.steps = max(1, int(group))
        return Agreed(save > 0, stop > 0)

    def begin(self) -> None:
        """Begin an epoch or its validation with a group of one step: how long one takes there is not known yet."""
        self.steps = 1

    def saved(self) -> None:
        """Count the seconds to the next checkpoint from now on."""
        self._saved = time.monotonic()

    def _stop_requested(self, event: TrainingEvent | None) -> bool:
        """Return whether the driver asks to stop, which rank 0 hears of."""
        if self._channel is None:
            return False
        if event is not None and (now := time.monotonic()) - self._sent >= _SECONDS:
            self._sent = now
            self._channel.send(event)
        return self._channel.stop_requested()
