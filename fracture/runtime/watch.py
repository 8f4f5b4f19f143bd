"""The driver's part while workers train: it counts failures, requests the stop, and waits for machines."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fracture.config import ComputeConfig, RecoveryConfig
from fracture.progress.events import (
    ControllerStarted,
    Stopping,
    TrainingEvent,
    TrainingStopped,
    WaitingForMachines,
    WorkersFailed,
    WorkersStarted,
)
from fracture.runtime.channel import EventChannel
from fracture.runtime.cluster import count_workers_on_nodes
from fracture.runtime.retry import Recovery
from fracture.runtime.signals import stop_requested
from fracture.runtime.watchdog import STACKS
from fracture.storage import StoragePath

_LOOK_FOR_MACHINES = 30.0  # seconds between two looks


class Watch:
    """Takes the events, acts on them, and hands them on."""

    def __init__(
        self,
        channel: EventChannel,
        compute: ComputeConfig,
        recovery: RecoveryConfig,
        run: StoragePath,
        see: Callable[[TrainingEvent], None],
    ) -> None:
        self._channel, self._compute, self._run, self._see = channel, compute, run, see
        self._recovery, self._grace_seconds = Recovery(recovery), recovery.grace_seconds
        self._stacks = self._count_stacks()
        self._stop_by: float | None = None
        self._looked_for_machines = time.monotonic()
        self.controller: Any = None  # the actor handle of Ray Train's controller
        self.stopped = False  # the workers saved and ended, as requested

    def look(self) -> None:
        """Take in what happened since the last call.

        Raises:
            RunError, UsageError: the run cannot go on.
            KeyboardInterrupt: a signal came, and the workers have had their time.
        """
        for event in self._channel.take():
            if isinstance(event, ControllerStarted):
                self.controller = event.controller
                continue
            if isinstance(event, WorkersStarted):  # the stacks of the workers before may have come after their end
                self._stacks = self._count_stacks()
            if isinstance(event, WorkersFailed):
                event = self._name_stacks(event)
            self._recovery.see(event)
            if isinstance(event, WorkersFailed):
                event = replace(event, failures=self._recovery.failures)
            self._see(event)
            self.stopped |= isinstance(event, TrainingStopped)
        if stop_requested.is_set():
            self._stop()
        self._wait_for_machines()

    def _count_stacks(self) -> int:
        return len((self._run / STACKS).files())

    def _name_stacks(self, event: WorkersFailed) -> WorkersFailed:
        """Say where a stuck worker stood, if the watchdog has ended one."""
        stacks = (self._run / STACKS).files()
        if len(stacks) <= self._stacks or not event.lost:
            return event
        first = stacks[self._stacks].base_name  # the others have waited for it
        return replace(event, reason=f"a worker was stuck; where, says {self._run / STACKS / first}")

    def _stop(self) -> None:
        if self._stop_by is None:
            self._stop_by = time.monotonic() + self._grace_seconds
            self._channel.request_stop()
            if self._recovery.training:
                self._see(Stopping(self._grace_seconds))
        if not (self._recovery.training or self.stopped) or time.monotonic() > self._stop_by:
            raise KeyboardInterrupt

    def _wait_for_machines(self) -> None:
        since, now = self._recovery.waiting_since, time.monotonic()
        if since is None or now - self._looked_for_machines < _LOOK_FOR_MACHINES:
            return
        self._looked_for_machines = now
        self._recovery.check_waiting(self._compute.fewest)
        if now - since > _LOOK_FOR_MACHINES:
            workers = self._compute.workers
            room = min(count_workers_on_nodes(self._compute), workers)
            self._see(WaitingForMachines(room, workers, now - since))
