"""The cause of a failure of workers, from the exceptions of all of them."""

from collections.abc import Mapping
from dataclasses import dataclass

from fracture.errors import RunError, UsageError
from fracture.storage import StoragePath, disk_full, store_failed


class PeerLost(Exception):
    """Another worker ended while this one was waiting for it."""


@dataclass(frozen=True)
class Failure:
    """The cause of a failure of workers."""

    error: RunError | UsageError | None  # a cause that a restart would not remove
    reason: str
    lost: bool  # a worker ended or went out of reach, which may be chance


def explain_failure(errors: Mapping[int, BaseException], run: StoragePath) -> Failure:
    """Find the error that the others follow from.

    Args:
        errors: rank -> the exception of each worker that failed.
        run: named in errors of the storage.
    """
    from ray.exceptions import RayActorError

    for error in errors.values():
        known = error if isinstance(error, RunError | UsageError) else None
        if known := known or disk_full(error, run) or store_failed(error, run):
            return Failure(known, str(known), lost=False)
    for rank, error in errors.items():
        if isinstance(error, RayActorError):
            return Failure(None, f"worker {rank} {_describe_death(str(error))}", lost=True)
    for rank, error in errors.items():
        if not isinstance(error, PeerLost):
            return Failure(None, f"worker {rank} failed: {last_line(error)}", lost=False)
    return Failure(None, "a worker was lost", lost=True)


def _describe_death(text: str) -> str:
    """Say how a worker ended; Ray's text has several lines, with the useful word somewhere in them."""
    if "node has died" in text or "node was terminated" in text or "nodeid" in text.lower().replace(" ", ""):
        return "is gone with its machine"
    if "OOM" in text and "memory monitor" in text:
        return "was killed for want of memory on its machine"
    return "was killed, or crashed"


def last_line(error: BaseException) -> str:
    """Return the last line of an exception's text, which says most in a text of Ray or TensorFlow."""
    text = str(error).strip().splitlines()
    return (text[-1] if text else type(error).__name__).rstrip(".")
