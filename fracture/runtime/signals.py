"""Handlers of SIGTERM and Ctrl-C, which end a job after it has saved."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

stop_requested = threading.Event()  # a signal came
_patient = threading.Event()  # the code that runs looks at `stop_requested` itself


def stop_by_signals() -> None:
    """Treat SIGTERM, which schedulers send, as Ctrl-C; Ray would answer it with a stack trace."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)


def _stop(number: int, frame: Any) -> None:
    first = not stop_requested.is_set()
    stop_requested.set()  # an exception raised inside some library's import may be swallowed there
    if not (first and _patient.is_set()):
        raise KeyboardInterrupt


@contextmanager
def patience() -> Iterator[threading.Event]:
    """Let the first signal only set the event that is given, which the code within has to look at."""
    _patient.set()
    try:
        yield stop_requested
    finally:
        _patient.clear()


def stop_soon() -> None:
    """Stop as a first Ctrl-C does, with a last checkpoint; from any thread."""
    stop_requested.set()


def stop_at_once() -> None:
    """Stop as a second Ctrl-C does, without a last checkpoint; from any thread."""
    stop_requested.set()
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
