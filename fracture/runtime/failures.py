"""What a failure of workers means, out of the stack traces of all of them."""

from collections.abc import Mapping
from dataclasses import dataclass

from fracture.errors import RunError, UsageError
from fracture.storage import StoragePath, disk_full, store_failed


class PeerLost(Exception):
    """Another worker ended while this one was waiting for it."""


@dataclass(frozen=True)
class Failure:
    error: RunError | UsageError | None  # says itself what is to be done; trying again would change nothing
    reason: str
    lost: bool  # a worker ended, or went out of reach: chance, for all that is known


def explain(failures: Mapping[int, BaseException], run: StoragePath) -> Failure:
    """
    Args:
        failures: of each worker that failed, by its rank.
    """
    from ray.exceptions import RayActorError

    failures = {rank: getattr(failure, "_base_exc", failure) for rank, failure in failures.items()}
    for failure in failures.values():
        known = failure if isinstance(failure, RunError | UsageError) else None
        if known := known or disk_full(failure, run) or store_failed(failure, run):
            return Failure(known, str(known), lost=False)
    for rank, failure in failures.items():  # the others' errors only follow from it
        if isinstance(getattr(failure, "health_check_failure", failure), RayActorError):
            return Failure(None, f"worker {rank} {_death(str(failure))}", lost=True)
    for rank, failure in failures.items():
        if not isinstance(failure, PeerLost):
            return Failure(None, f"worker {rank} failed: {last_line(failure)}", lost=False)
    return Failure(None, "a worker was lost", lost=True)


def _death(said: str) -> str:
    """Ray says it in several lines, the useful word somewhere in them."""
    if "node has died" in said or "node was terminated" in said or "nodeid" in said.lower().replace(" ", ""):
        return "is gone with its machine"
    if "OOM" in said and "memory monitor" in said:
        return "was killed for want of memory on its machine"
    return "was killed, or crashed"


def last_line(failure: BaseException) -> str:
    text = str(failure).strip().splitlines()
    return (text[-1] if text else type(failure).__name__).rstrip(".")
