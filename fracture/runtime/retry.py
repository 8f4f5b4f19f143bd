"""How long a run that fails goes on: decided from its events alone."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from fracture.config import RecoveryConfig
from fracture.errors import RunError

_SAME_ERROR, _SAME_DEATH = 2, 3  # times in a row at one place; a death may be chance


class Recovery:
    """Counts failures. Ray Train would count all of a run; a run that makes progress between them may go on."""

    def __init__(self, config: RecoveryConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._clock = config, clock
        self.waiting_since: float | None = clock()  # for machines to hold the workers
        self.training = False  # workers are at work, and would hear that they are to stop
        self.failures = 0  # in all
        self._in_a_row = 0  # since the last checkpoint
        self._place: tuple[int, int] | None = None  # epoch and step, as last told since the workers started
        self._failed_at: tuple[int, int] | None = None
        self._at_one_place = 0

    def see(self, event: Mapping[str, Any]) -> None:
        """
        Raises:
            RunError, UsageError: it is no use to go on.
        """
        match event["event"]:
            case "placed":
                self.waiting_since, self._place = None, None
            case "step" | "validating":
                self.training = True
                self._place = (event["epoch"], event["step"])
            case "broke":
                self._place = (event["epoch"], event["step"])
            case "epoch" | "saved":
                self._in_a_row, self._failed_at = 0, None
            case "scoring" | "left":
                self.training = False
            case "resizing":
                self.training, self.waiting_since = False, self._clock()
            case "failure":
                self.training, self.waiting_since = False, self._clock()
                self._fail(event)

    def _fail(self, event: Mapping[str, Any]) -> None:
        if event["error"] is not None:  # it says itself what is to be done
            raise event["error"]
        self.failures += 1
        if event["preempted"]:
            return
        self._in_a_row += 1
        same = self._place is not None and self._place == self._failed_at
        self._at_one_place = self._at_one_place + 1 if same else 1
        self._failed_at, self._place = self._place, None
        where = f"epoch {self._failed_at[0]}, step {self._failed_at[1]}" if self._failed_at else "no step done"
        if self._failed_at and self._at_one_place >= (_SAME_DEATH if event["lost"] else _SAME_ERROR):
            raise RunError(
                f"it fails again and again at the same place ({where}): {event['reason']}. "
                "Run again with -v for the traces"
            )
        if self._in_a_row > self._config.max_failures:
            raise RunError(
                f"{self._in_a_row} failures without a checkpoint between them, more than recovery.max_failures = "
                f"{self._config.max_failures} ({where}): {event['reason']}. Run again with -v for the traces"
            )

    def check_waiting(self, workers: int) -> None:
        """Raises RunError where the machines have not come in time."""
        if self.waiting_since is None or self._clock() - self.waiting_since < 60 * self._config.wait_minutes:
            return
        raise RunError(
            f"no machines for {workers} workers came within recovery.wait_minutes = {self._config.wait_minutes:g}. "
            "Run the same command again, when there are, to go on"
        )
