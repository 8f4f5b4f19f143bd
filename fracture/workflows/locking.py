"""Keep two jobs from working on the same run or registry, or writing to the same folder."""

import getpass
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fracture.errors import RunError, UsageError
from fracture.lock import HeldError, Lock, claim_of_this_process
from fracture.progress.status import LOCK
from fracture.runtime.signals import stop_at_once, stop_by_signals
from fracture.runtime.submission import submission_id
from fracture.storage import StoragePath
from fracture.workflows.arguments import Report

_taken_over = threading.Event()  # set when another job took over a lock of this process


def is_taken_over() -> bool:
    """True once another job has taken over a lock that this process held."""
    return _taken_over.is_set()


@contextmanager
def hold_run_lock(run: StoragePath, command: str, report: Report, kind: str = "run") -> Iterator[None]:
    """Keep other jobs out of the run's folder.

    Args:
        command: of `fracture`, which others are shown as the holder.
        kind: "run" or "comparison", for messages.

    Raises:
        UsageError: another job holds the lock.
        RunError: another job took the lock over.
    """
    try:
        with hold_lock(
            run / LOCK, f"{kind} {run.name!r}", command, f"fracture status {run.name} shows how far it is", report
        ):
            yield
    except HeldError as error:
        raise UsageError(f"{error}. Wait for it to end, stop that job, or give another --run name.") from None


@contextmanager
def hold_output_lock(lock: StoragePath, name: str, report: Report) -> Iterator[None]:
    """Keep other jobs from writing what this one writes.

    Args:
        name: of what is written, for messages.

    Raises:
        UsageError: another job holds the lock. It is no HeldError, which would mean that a retraining is at work.
        RunError: another job took the lock over.
    """
    try:
        with hold_lock(lock, name, "preprocess", "run the same command again", report):
            yield
    except HeldError as error:
        raise UsageError(f"{error}. Two would remove each other's files: wait for its end, or stop that job.") from None


@contextmanager
def hold_lock(lock: StoragePath, name: str, command: str, advice: str, report: Report) -> Iterator[None]:
    """Hold a lock, and stop this job where another one takes the lock over.

    Args:
        name: of what is locked, for messages.
        command: of `fracture`, which others are shown as the holder.
        advice: what to do or look at after the lock was lost, for the message.

    Raises:
        HeldError: another job holds the lock.
        RunError: another job took the lock over.
    """

    is_lost = threading.Event()  # this lock: a job may hold another one around it

    def stop_this_job() -> None:
        is_lost.set()
        _taken_over.set()
        stop_at_once()

    stop_by_signals()  # so that the lock is released
    claim = claim_of_this_process(describe_job(command))
    try:
        with Lock(lock, claim, name, stop_this_job, lambda line: report(f"lock       {line}")):
            yield
    except BaseException:
        if not is_lost.is_set():
            raise
    if is_lost.is_set():
        raise RunError(
            f"another job took over {name}: this one gave no sign of life in {lock} for half a minute, because it "
            f"was asleep or cut off. Every finished epoch is kept; {advice}"
        )


def describe_job(command: str) -> str:
    """Return the name of this job for the lock; without its flags, which would then be in the storage."""
    return f"ray job {job}" if (job := submission_id()) else f"fracture {command}"


def describe_user() -> str:
    """Return who asks for what is recorded: a Ray job, or a person on a machine."""
    if job := submission_id():
        return f"ray job {job}"
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = f"user {os.getuid()}"
    return f"{user} on {socket.gethostname()}"
