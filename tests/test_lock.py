import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import psutil
import pytest

from fracture.errors import RunError
from fracture.lock import SILENCE, Claim, HeldError, Lock, claim_of_this_process, holder, is_gone
from fracture.storage import StoragePath, storage_path
from tests.conftest import ROOT

HOLDS = """
import sys
from fracture.lock import Lock, claim_of_this_process
from fracture.storage import storage_path
with Lock(storage_path(sys.argv[1]), claim_of_this_process("job"), "run 'x'", on_lost=print):
    print("in", flush=True)
    sys.stdin.read()
"""
FAR_HOLDS = HOLDS.replace('("job")', '("job").model_copy(update={"machine": "far"})').replace(
    "on_lost=print", 'on_lost=lambda: print("lost", flush=True), beat=0.05'
)
RACES = """
import os, sys, time
from fracture.lock import HeldError, Lock, claim_of_this_process
from fracture.storage import storage_path
folder, inside = storage_path(sys.argv[1]), sys.argv[2]
entered = 0
for _ in range(int(sys.argv[3])):
    try:
        with Lock(folder, claim_of_this_process("job"), "x", on_lost=print, sleep=lambda s: time.sleep(s / 50)):
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # fails where another is inside
            entered += 1
            os.unlink(inside)
    except HeldError:
        pass
print(entered)
"""


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path: Path) -> StoragePath:
    return storage_path(tmp_path if request.param == "disk" else request.getfixturevalue("bucket")) / "run/lock"


class Waiting:
    """A clock that only goes while somebody sleeps; `meanwhile` is done at each sleep."""

    def __init__(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        self.now, self.meanwhile = 0.0, meanwhile

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile()


def lock(folder: StoragePath, claim: Claim | None = None, waiting: object = None, **more: object) -> Lock:
    waiting = waiting or Waiting()
    more = {"on_lost": lambda: None, "report": lambda line: None} | more
    claim = claim or claim_of_this_process("job")
    return Lock(folder, claim, "run 'x'", clock=waiting.clock, sleep=waiting.sleep, **more)


def elsewhere(**changed: object) -> Claim:
    """A claim as a process of another machine makes it."""
    mine = claim_of_this_process("job").model_dump()
    return Claim(**mine | {"host": "far", "machine": "another", "pid": 7, "beat": 3} | changed)


def put(folder: StoragePath, claim: Claim, name: str = "other.json") -> None:
    (folder / name).write_bytes(claim.model_dump_json().encode().ljust(1024))  # as long as a lock writes it


def beat_of(folder: StoragePath, pid: int) -> int:
    """Return the beats of the claim that this process wrote."""
    beats = []
    for name in claim_names(folder):
        with suppress(FileNotFoundError):  # another's, removed meanwhile
            claim = Claim.model_validate_json((folder / name).read_bytes())
            beats += [claim.beat] if claim.pid == pid else []
    [beat] = beats
    return beat


def names(folder: StoragePath) -> list[str]:
    return [info.base_name for info in folder.files()]


def claim_names(folder: StoragePath) -> list[str]:
    """Return the names of the claims: not of a file that is being written, and renamed then."""
    return [name for name in names(folder) if name.endswith(".json")]


def test_the_second_is_refused_while_the_first_lives(folder: StoragePath):
    with lock(folder):
        with pytest.raises(HeldError, match=rf"^run 'x' is held by job on .*, process {os.getpid()}, since 20.* UTC$"):
            lock(folder).__enter__()
        assert len(names(folder)) == 1, "the refused one leaves nothing"
    with lock(folder):
        pass
    assert names(folder) == []


def test_nothing_is_left_on_the_disk(tmp_path: Path):
    (tmp_path / "storage").mkdir()
    with pytest.raises(KeyboardInterrupt), lock(storage_path(tmp_path / "storage/runs/x/lock")):
        raise KeyboardInterrupt
    assert list(tmp_path.rglob("*")) == [tmp_path / "storage"]


def test_folders_that_hold_something_stay(tmp_path: Path):
    with lock(storage_path(tmp_path / "runs/x/lock")):
        (tmp_path / "runs/x/file").touch()
    assert [path.name for path in (tmp_path / "runs/x").iterdir()] == ["file"]


def test_a_killed_process_is_taken_over_at_once(folder: StoragePath):
    first = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(folder)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert first.stdout.readline() == b"in\n"
    with pytest.raises(HeldError, match=rf"process {first.pid}, since"):
        lock(folder).__enter__()
    first.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # it is dead, and still in the list of processes
    lines, waiting = [], Waiting()
    with lock(folder, waiting=waiting, report=lines.append):
        assert len(names(folder)) == 1
    first.communicate()
    assert (waiting.now, len(lines)) == (0, 1)
    assert f"run 'x' was held by job on {claim_of_this_process('').host}, process {first.pid}" in lines[0]
    assert lines[0].endswith(", which is dead: taking over")
    assert names(folder) == []


def test_another_machines_holder_that_beats_is_waited_for_and_respected(folder: StoragePath):
    put(folder, elsewhere())
    lines, waiting = [], Waiting()
    waiting.meanwhile = lambda: waiting.now > 4 and put(folder, elsewhere(beat=4))
    with pytest.raises(HeldError, match=r"held by job on far, process 7, since"):
        lock(folder, waiting=waiting, report=lines.append).__enter__()
    assert 4 < waiting.now < SILENCE
    assert lines[0].startswith("run 'x' may be held by job on far, process 7")
    assert lines[0].endswith("waiting up to 30 s to see whether it is alive")
    assert names(folder) == ["other.json"]


def test_another_machines_holder_that_is_silent_is_dead(folder: StoragePath):
    put(folder, elsewhere())
    lines, waiting = [], Waiting()
    with lock(folder, waiting=waiting, report=lines.append):
        assert SILENCE <= waiting.now < SILENCE + 3
        assert "other.json" not in names(folder)
    assert "process 7, since" in lines[1]
    assert names(folder) == []


def test_clocks_of_other_machines_do_not_matter(folder: StoragePath):
    for skew in (timedelta(days=-400), timedelta(days=400)):
        claim = elsewhere(since=elsewhere().since + skew)
        put(folder, claim)
        waiting = Waiting(lambda claim=claim: put(folder, claim.model_copy(update={"beat": random.randrange(10**9)})))
        with pytest.raises(HeldError):
            lock(folder, waiting=waiting).__enter__()


def test_another_machines_holder_that_leaves_is_not_waited_for_longer(folder: StoragePath):
    put(folder, elsewhere())
    waiting = Waiting((folder / "other.json").delete)
    with lock(folder, waiting=waiting):
        assert waiting.now < 3


@pytest.mark.parametrize("content", [b"", b'{"host": "far", "pi', b"[1]", b'{"host": 3}'])
def test_a_claim_that_cannot_be_read_is_watched(folder: StoragePath, content: bytes):
    (folder / "other.json").write_bytes(content)
    lines, waiting = [], Waiting()
    with lock(folder, waiting=waiting, report=lines.append):
        assert waiting.now >= SILENCE
    assert "may be held by a process whose claim cannot be read" in lines[0]
    assert names(folder) == []


def test_a_number_that_another_process_has_now_is_watched():
    """It may be the same process, after the machine's clock was set."""
    claim = claim_of_this_process("job")
    assert is_gone(claim) is False
    assert is_gone(claim.model_copy(update={"started": claim.started - 60})) is None
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert is_gone(claim.model_copy(update={"pid": ended.pid})) is True
    assert is_gone(claim.model_copy(update={"machine": "another"})) is None


def test_what_a_kill_left_half_written_is_cleared_away(tmp_path: Path):
    folder = tmp_path / "lock"
    folder.mkdir()
    (folder / ".abc.json.123.part").write_text("{")
    with lock(storage_path(folder)):
        assert not list(folder.glob(".*"))
    assert not folder.exists()


def test_two_who_always_come_at_once_are_both_kept_out(folder: StoragePath):
    """Neither can know that the other will not enter."""
    put(folder, claim_of_this_process("job"))
    waiting = Waiting()
    with pytest.raises(HeldError):
        lock(folder, waiting=waiting).__enter__()
    assert 0 < waiting.now < 5
    assert names(folder) == ["other.json"]


class Hurrying:
    """A clock that goes ten times as fast as it should."""

    def clock(self) -> float:
        return 10 * time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds / 10)


@pytest.mark.slow
def test_one_of_many_threads_is_in_at_a_time(folder: StoragePath):
    inside = threading.Lock()
    entered = []
    machines = [claim_of_this_process("job"), elsewhere(beat=0), elsewhere(machine="third", beat=0)]
    deadline = time.monotonic() + 60

    def race(number: int) -> None:
        tries = 0
        while tries < (15 if folder.is_local else 3) or (len(set(entered)) < 2 and time.monotonic() < deadline):
            tries += 1
            with suppress(HeldError), lock(folder, machines[number % 3], Hurrying(), beat=0.05):
                assert inside.acquire(blocking=False), "two are in"
                entered.append(number)
                time.sleep(0.01)  # so that the others find it
                inside.release()
            time.sleep(random.uniform(0, 0.02))  # else the one that left would be the next that comes

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(race, range(6)))
    assert len(set(entered)) > 1
    assert names(folder) == []


def test_a_claim_that_goes_while_it_is_read_is_not_there(folder: StoragePath, monkeypatch):
    """Arrow asks a store for an object's length when it opens it, and for its bytes later."""

    def read_and_remove(file: StoragePath) -> bytes:
        with file.open() as stream:
            if file.name == "other.json":
                file.delete()
            return stream.read()

    monkeypatch.setattr(StoragePath, "read_bytes", read_and_remove)
    put(folder, elsewhere())
    assert folder.is_local or holder(folder) is None
    put(folder, elsewhere())
    waiting = Waiting()
    with lock(folder, waiting=waiting):
        assert waiting.now == 0 or folder.is_local
    assert names(folder) == []


@pytest.mark.slow
def test_one_of_many_processes_is_in_at_a_time(folder: StoragePath, tmp_path: Path):
    command = [sys.executable, "-c", RACES, str(folder), str(tmp_path / "inside"), "40" if folder.is_local else "5"]
    racers = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    counts = [int(racer.communicate(timeout=120)[0]) for racer in racers]
    assert sum(counts) > 0
    assert [racer.returncode for racer in racers] == [0] * 4
    assert names(folder) == []


@pytest.mark.parametrize("late", [False, True], ids=["gone", "brought back by a beat that was late"])
def test_the_holder_learns_once_that_it_was_taken_for_dead(folder: StoragePath, late: bool):
    command = [sys.executable, "-c", FAR_HOLDS, str(folder)]
    asleep = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert asleep.stdout.readline() == "in\n"
    asleep.send_signal(signal.SIGSTOP)
    wait_until(lambda: psutil.Process(asleep.pid).status() == psutil.STATUS_STOPPED)
    (name,) = claim_names(folder)
    content = (folder / name).read_bytes()
    lost = threading.Event()
    with lock(folder, on_lost=lost.set, beat=0.05):
        if late:
            (folder / name).write_bytes(content)
        asleep.send_signal(signal.SIGCONT)
        assert asleep.stdout.readline() == "lost\n"
        before = beat_of(folder, os.getpid())
        wait_until(lambda: beat_of(folder, os.getpid()) > before)
        assert not lost.is_set(), "the one that took over goes on"
        assert asleep.communicate()[0] == ""
    assert names(folder) == []


def test_failures_of_the_store_do_not_end_it(bucket: str, object_store, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    folder = storage_path(bucket) / "lock"
    lost = threading.Event()
    with lock(folder, on_lost=lost.set, beat=0.01):
        object_store.fail(times=30, status=503, code="SlowDown")
        wait_until(lambda: object_store.failures_left == 0)
        before = beat_of(folder, os.getpid())
        wait_until(lambda: beat_of(folder, os.getpid()) > before)
        assert not lost.is_set()
    assert names(folder) == []


def test_a_store_that_fails_at_the_start_is_one_clear_error(bucket: str, object_store, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    folder = storage_path(bucket) / "lock"
    object_store.fail(times=1, status=503, code="SlowDown")
    with pytest.raises(RunError, match="cannot be written: the store fails"):
        lock(folder).__enter__()
    assert names(folder) == []


def test_who_holds_it_can_be_asked(folder: StoragePath):
    assert holder(folder) is None
    with lock(folder, elsewhere(beat=0, what="ray job 5")):
        claim, _ = holder(folder)
        assert (claim.what, claim.host) == ("ray job 5", "far")


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
