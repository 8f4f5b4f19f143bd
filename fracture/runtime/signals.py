"""SIGTERM and Ctrl-C, which end a job after it has saved."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

stop_requested = threading.Event()  # a signal came
_patient = threading.Event()  # whoever is at work looks at `stop_requested` itself


def stop_by_signals() -> None:
    """Makes SIGTERM, which schedulers send, what Ctrl-C is; Ray would answer it with a stack trace."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)


def _stop(number: int, frame: Any) -> None:
    first = not stop_requested.is_set()
    stop_requested.set()  # an exception raised inside some library's import may be swallowed there
    if not (first and _patient.is_set()):
        raise KeyboardInterrupt


@contextmanager
def patience() -> Iterator[threading.Event]:
    """Within, the first signal only sets this event, at which whoever is at work has to look."""
    _patient.set()
    try:
        yield stop_requested
    finally:
        _patient.clear()


def stop_soon() -> None:
    """From any thread: as a first Ctrl-C would, with a last checkpoint."""
    stop_requested.set()


def stop_at_once() -> None:
    """From any thread: as a second Ctrl-C would, without a last checkpoint."""
    stop_requested.set()
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
