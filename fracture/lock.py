"""A lock on a folder, on a disk or in a bucket: of the jobs that want it, one holds it at a time.

It needs neither a conditional write nor a rename: reads and lists that show every earlier write are enough, and S3,
GCS and file systems have these. pyarrow has no conditional write, and obstore 0.12, which has it, finds fewer
credentials than pyarrow: no AWS_PROFILE and no workload identity of Google. Such a job would read its data and fail to
lock its run.

1. A job that wants the lock writes a claim, a file of its own, then lists the folder. It enters only if it sees no
   other claim whose process may be alive. Of two jobs, the one that lists later sees the other's claim, and stays out
   while the other holds the lock or may be about to. Both may be refused; both are never let in.
2. The holder writes its claim again every 5 s, with a higher count.
3. A claim of this machine is dead once its process has ended. A claim of another machine is dead once it has not
   changed for 30 s of our own clock. The clocks of two machines are never compared: they differ, and may be set back.
4. A holder that finds its claim gone, or a holder's claim that it did not take over itself, was taken for dead: it was
   suspended, or cut off from the store. It is informed at its next beat. Until then two jobs may work: a lock that
   expires cannot exclude that.
"""

import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path
from typing import Self

import psutil
from pyarrow.fs import FileInfo
from pydantic import BaseModel

from fracture.errors import RunError, UsageError
from fracture.storage import StoragePath

BEAT = 5.0  # seconds between two signs of life
SILENCE = 30.0  # seconds without one after which the holder of another machine is dead
_TRIES = 5
_CLAIM_BYTES = 1024
_FAILURES = (OSError, RunError, UsageError)  # of a disk or a store


class HeldError(UsageError):
    """Another process holds the lock."""


class Claim(BaseModel, frozen=True):
    """The process that wants a lock or holds it."""

    host: str
    machine: str  # within it a process id names one process
    pid: int
    started: float  # psutil's start time of the process: process ids are used again
    since: datetime
    what: str
    beat: int = 0  # signs of life given as the holder; 0: it does not hold the lock yet

    def __str__(self) -> str:
        return f"{self.what} on {self.host}, process {self.pid}, since {self.since:%Y-%m-%d %H:%M} UTC"


def claim_of_this_process(what: str) -> Claim:
    process = psutil.Process()
    return Claim(
        host=socket.gethostname(),
        machine=_machine(),
        pid=process.pid,
        started=process.create_time(),
        since=datetime.now(UTC),
        what=what,
    )


def _machine() -> str:
    """Return a name for the processes that can see each other.

    Containers have process ids of their own, hosts may share a name, and a user may not see another user's processes.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {os.getuid()}"
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode()} {os.getuid()}"


def is_gone(claim: Claim | bytes | None) -> bool | None:
    """Return True once the process has ended, False while it runs, None where this process cannot find out."""
    if not isinstance(claim, Claim) or claim.machine != _machine():
        return None
    try:
        process = psutil.Process(claim.pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return True
        # Another start time means another process, or this one after the clock was set: Linux counts from the boot.
        return False if process.create_time() == claim.started else None
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return None


def holder(folder: StoragePath) -> tuple[Claim, datetime] | None:
    """Return who holds the lock, dead or alive, and the time of its last sign of life, without taking the lock."""
    found = [(claim, info.mtime) for info, claim in _read_claims(folder) if isinstance(claim, Claim) and claim.beat]
    return max(found, key=itemgetter(1), default=None)


def _read_claims(folder: StoragePath) -> Iterator[tuple[FileInfo, Claim | bytes]]:
    """Yield the claims that are there, a damaged one as its bytes; one that goes before it is read is not there."""
    for info in folder.files():
        if info.base_name.endswith(".json"):
            with suppress(FileNotFoundError):
                data = (folder / info.base_name).read_bytes()
                try:
                    yield info, Claim.model_validate_json(data)
                except ValueError:
                    yield info, data


class Lock:
    """`with Lock(...):` holds the lock; none of its files is left after."""

    def __init__(
        self,
        folder: StoragePath,
        claim: Claim,
        name: str,
        on_lost: Callable[[], None],
        report: Callable[[str], None] = print,
        *,
        beat: float = BEAT,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """
        Args:
            name: what is locked, for messages.
            on_lost: called once, in another thread, when another process took this holder for dead.
            report: gets a line when the lock has to be waited for, or is taken over.
            beat: seconds between two signs of life.
        """
        self._folder, self._claim, self._name, self._on_lost, self._report = folder, claim, name, on_lost, report
        self._seconds, self._clock, self._sleep = beat, clock, sleep
        self._own = folder / f"{uuid.uuid4().hex}.json"
        self._taken_over: set[str] = set()  # names of the claims of dead holders
        self._new_folders = _find_missing_folders(folder)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def __enter__(self) -> Self:
        """
        Raises:
            HeldError: another process holds it, and is alive.
        """
        try:
            self._acquire()
            self._thread.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        try:
            if self._thread.ident:
                self._thread.join()  # a beat under way would write the claim again
        finally:
            with suppress(*_FAILURES):  # the claim is dead in any case once this process has ended
                self._own.delete()
            with suppress(OSError):
                for folder in self._new_folders:
                    folder.rmdir()

    def _acquire(self) -> None:
        silent: dict[str, Claim | bytes] = {}  # claims that did not change while they were watched
        for _ in range(_TRIES):
            self._write()
            own_is_there, others = self._look()
            alive = {
                name: claim
                for name, claim in others.items()
                if silent.get(name) != claim and is_gone(claim) is not True
            }
            if own_is_there and not alive:  # without its own claim it was taken for dead meanwhile
                self._take_over(others)
                return
            self._own.delete()  # else two jobs that come at the same time would keep each other out for ever
            for claim in alive.values():
                if is_gone(claim) is False and claim.beat:
                    raise self._held_error(claim)
            silent |= self._watch({name: claim for name, claim in alive.items() if is_gone(claim) is None})
            self._sleep(random.uniform(0, 1))
        raise self._held_error(*alive.values())

    def _watch(self, watched: dict[str, Claim | bytes]) -> dict[str, Claim | bytes]:
        """Return the claims that stay unchanged for `SILENCE` seconds; return early once all are gone.

        Raises:
            HeldError: a claim has changed, so its process is alive.
        """
        if watched:
            who = _describe(watched.values())
            self._report(f"{self._name} may be held by {who}; waiting up to {SILENCE:.0f} s to see whether it is alive")
        until = self._clock() + SILENCE
        while watched and self._clock() < until:
            self._sleep(1)
            _, now = self._look()
            watched = {name: claim for name, claim in watched.items() if name in now}
            for name, claim in watched.items():
                if now[name] != claim:
                    raise self._held_error(now[name])
        return watched

    def _take_over(self, dead: dict[str, Claim | bytes]) -> None:
        self._taken_over = set(dead)
        self._beat()
        for name, claim in dead.items():
            (self._folder / name).delete()
            self._report(f"{self._name} was held by {_describe([claim])}, which is dead: taking over")
        for info in self._folder.files():
            if info.base_name.endswith(".part"):  # its writer was killed; one that is alive writes it again
                (self._folder / info.base_name).delete()

    def _keep(self) -> None:
        while not self._ended.wait(self._seconds):
            with suppress(*_FAILURES):  # the next beat may get through
                if self._is_lost():
                    self._on_lost()
                    return
                self._beat()

    def _is_lost(self) -> bool:
        """Return whether another process took this one for dead.

        Its own claim alone proves nothing: a late beat may have written it again after it was removed.
        """
        own_is_there, others = self._look()
        holders = {name for name, claim in others.items() if isinstance(claim, Claim) and claim.beat}
        return not own_is_there or bool(holders - self._taken_over)

    def _beat(self) -> None:
        self._claim = self._claim.model_copy(update={"beat": self._claim.beat + 1})
        self._write()

    def _look(self) -> tuple[bool, dict[str, Claim | bytes]]:
        """Return whether the own claim is there, and the others by name."""
        claims = {info.base_name: claim for info, claim in _read_claims(self._folder)}
        return claims.pop(self._own.name, None) is not None, claims

    def _write(self) -> None:
        # Always of one length: Arrow asks a store for an object's length, and then for that many bytes of it. They must
        # hold the store's error text too: with fewer, Arrow takes a claim that has gone for a failure of the store.
        data = self._claim.model_dump_json(indent=1).encode().ljust(_CLAIM_BYTES)
        for _ in range(_TRIES):
            with suppress(FileNotFoundError):  # a process that left the lock has removed the empty folder
                return self._own.write_bytes(data)
        raise RunError(f"{self._folder} cannot be written: it disappears each time. Check the disk, and run again.")

    def _held_error(self, *claims: Claim | bytes) -> HeldError:
        return HeldError(f"{self._name} is held by {_describe(claims)}")


def _describe(claims: Iterable[Claim | bytes]) -> str:
    names = (str(claim) if isinstance(claim, Claim) else "a process whose claim cannot be read" for claim in claims)
    return " and ".join(names) or "another process"


def _find_missing_folders(folder: StoragePath) -> list[Path]:
    """Return the folders on a disk that are made for the claim and removed with it, innermost first."""
    if not folder.is_local:
        return []
    path = Path(folder.path)
    return [path, *(parent for parent in path.parents if not parent.exists())]
