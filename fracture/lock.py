"""A lock on a folder, on a disk or in a bucket: of those who want it, one works at a time.

It needs neither a conditional write nor a rename, only that reads and lists show what was written before, as those of
S3, GCS and file systems do:

1. Who wants it writes a claim of its own, then lists the folder, and enters only if it sees no other that may live.
   Of two who want it, the one that lists later lists after the other wrote: so it sees that one's claim, and does
   not enter while the other is in or on its way. Both may be kept out; never are both let in.
2. The holder rewrites its claim every 5 s, with a higher count.
3. A claim of this machine is dead once its process is. One of another machine is when it has not changed for 30 s of
   our own clock; the clocks of two machines, which differ and may go back, are never compared.
4. A holder that finds its claim gone, or another holder's that it did not take over itself, was taken for dead (it
   slept, or was cut off from the store) and is told. Until that beat two may work: no lock that outlives its holder
   can exclude it.
"""

import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import psutil
from pydantic import BaseModel

from fracture.errors import RunError, UsageError
from fracture.storage import StoragePath

BEAT = 5.0  # seconds between two signs of life
SILENCE = 30.0  # seconds without one after which another machine's holder is dead
_TRIES = 5
_LENGTH = 1024  # bytes of a claim
_FAILURES = (OSError, RunError, UsageError)  # of a disk or a store


class HeldError(UsageError):
    """Somebody else holds the lock."""


class Claim(BaseModel, frozen=True):
    """Who wants a lock, or holds it."""

    host: str
    machine: str  # where a process's number means this process
    pid: int
    started: float  # the process, as psutil has it: a number is given again when its process is gone
    since: datetime
    what: str
    beat: int = 0  # 0: does not hold it yet
    took: list[str] = []  # names of the claims that it took for dead

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
    """Containers number their processes anew, hosts may share a name, and a user may not see another's processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {os.getuid()}"
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode()} {os.getuid()}"


def is_gone(claim: Claim | None) -> bool | None:
    """Whether the process has ended; None where that cannot be known from here."""
    if claim is None or claim.machine != _machine():
        return None
    try:
        process = psutil.Process(claim.pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return True
        # Another start may be another process, or the same after the clock was set: Linux counts from its boot.
        return False if process.create_time() == claim.started else None
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return None


def holder(folder: StoragePath) -> tuple[Claim, datetime] | None:
    """Who holds the lock, dead or alive, and when it gave its last sign of life."""
    found = []
    for info in folder.files():
        claim = _parse(_read(folder / info.base_name) or b"")
        if claim is not None and claim.beat:
            found.append((claim, info.mtime))
    return max(found, key=lambda pair: pair[1], default=None)


def _read(file: StoragePath) -> bytes | None:
    """None where it is gone since it was listed."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None
    except RunError:  # or between the two requests that a read from a bucket is; and may be there anew by now
        return file.read_bytes() if file.is_file() else None


def _parse(data: bytes) -> Claim | None:
    try:
        return Claim.model_validate_json(data)
    except ValueError:
        return None


class Lease:
    """`with Lease(...):` holds the lock; no file of it is left after."""

    def __init__(
        self,
        folder: StoragePath,
        claim: Claim,
        name: str,
        lost: Callable[[], None],
        tell: Callable[[str], None] = print,
        *,
        beat: float = BEAT,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """
        Args:
            name: of what is locked, for what is told.
            lost: called once, in another thread, when somebody took the holder for dead.
            tell: gets a line when it has to wait, or takes over.
        """
        self._folder, self._claim, self._name, self._lost, self._tell = folder, claim, name, lost, tell
        self._seconds, self._clock, self._sleep = beat, clock, sleep
        self._own = folder / f"{uuid.uuid4().hex}.json"
        self._made = _missing(folder)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def __enter__(self) -> Self:
        """
        Raises:
            HeldError: another holds it, and lives.
        """
        try:
            self._enter()
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
            with suppress(*_FAILURES):  # it is dead in any case, once this process is
                self._own.delete()
            with suppress(OSError):
                for folder in self._made:
                    folder.rmdir()

    def _enter(self) -> None:
        silent: dict[str, bytes] = {}  # what did not change while it was watched
        for _ in range(_TRIES):
            self._write()
            others = self._claims()
            entered = others.pop(self._own.name, None) is not None  # else taken for dead between the two
            dead = {name for name, data in others.items() if silent.get(name) == data or is_gone(_parse(data))}
            if entered and dead == set(others):
                self._take_over({name: _parse(others[name]) for name in dead})
                return
            self._own.delete()  # so that two who came at once do not keep each other out for ever
            living = {name: data for name, data in others.items() if name not in dead}
            for data in living.values():
                claim = _parse(data)
                if is_gone(claim) is False and claim.beat:
                    raise self._held(claim)
            silent |= self._watch({name: data for name, data in living.items() if is_gone(_parse(data)) is None})
            self._sleep(random.uniform(0, 1))
        raise self._held(*map(_parse, living.values()))

    def _watch(self, watched: dict[str, bytes]) -> dict[str, bytes]:
        """Those that stay as they are; looks no longer when all are gone.

        Raises:
            HeldError: one has changed, so it lives.
        """
        if watched:
            who = _who(_parse(data) for data in watched.values())
            self._tell(f"{self._name} may be held by {who}; waiting up to {SILENCE:.0f} s to see whether it lives")
        until = self._clock() + SILENCE
        while watched and self._clock() < until:
            self._sleep(1)
            now = self._claims()
            watched = {name: data for name, data in watched.items() if name in now}
            for name, data in watched.items():
                if now[name] != data:
                    raise self._held(_parse(now[name]))
        return watched

    def _take_over(self, dead: dict[str, Claim | None]) -> None:
        self._claim = self._claim.model_copy(update={"beat": 1, "took": sorted(dead)})
        self._write()
        for name, claim in dead.items():
            (self._folder / name).delete()
            self._tell(f"{self._name} was held by {_who([claim])}, and that is dead: taking over")
        for info in self._folder.files():
            if info.base_name.endswith(".part"):  # its writer was killed; or it is just coming, and tries again
                with suppress(FileNotFoundError):
                    (self._folder / info.base_name).delete()

    def _keep(self) -> None:
        while not self._ended.wait(self._seconds):
            with suppress(*_FAILURES):  # the next beat may get through
                if self._is_lost():
                    self._lost()
                    return
                self._claim = self._claim.model_copy(update={"beat": self._claim.beat + 1})
                self._write()

    def _is_lost(self) -> bool:
        """A beat that was late may have brought back a claim that was removed, so that it is not enough to find it."""
        claims = self._claims()
        there = claims.pop(self._own.name, None) is not None
        holders = {name for name, data in claims.items() if (claim := _parse(data)) and claim.beat}
        return not there or bool(holders - set(self._claim.took))

    def _claims(self) -> dict[str, bytes]:
        """Content of the claims that are there, by name; of its own nobody asks for the content."""
        found = {}
        for name in (info.base_name for info in self._folder.files()):
            if name.endswith(".json"):
                found[name] = b"" if name == self._own.name else _read(self._folder / name)
        return {name: data for name, data in found.items() if data is not None}

    def _write(self) -> None:
        # Always of one length: Arrow asks a store for an object's length, and then for so many bytes of what is there.
        data = self._claim.model_dump_json(indent=1).encode().ljust(_LENGTH)
        for _ in range(_TRIES):
            with suppress(FileNotFoundError):  # somebody left, and took the empty folder along
                return self._own.write_bytes(data)
        raise RunError(f"{self._folder} cannot be written: it disappears each time. Check the disk, and run again.")

    def _held(self, *claims: Claim | None) -> HeldError:
        return HeldError(f"{self._name} is held by {_who(claims)}")


def _who(claims: Iterable[Claim | None]) -> str:
    return " and ".join(str(claim or "somebody whose claim cannot be read") for claim in claims) or "somebody else"


def _missing(folder: StoragePath) -> list[Path]:
    """The folders on a disk that are made for a claim and go with it, innermost first."""
    if not folder.is_local:
        return []
    path = Path(folder.path)
    return [path, *(parent for parent in path.parents if not parent.exists())]
