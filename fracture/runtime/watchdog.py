"""Ends a worker that is alive but stuck, so that a hang becomes a restart.

Ray notices a worker that is gone, never one that waits for ever: in a collective that another one does not take part
in, in a driver, in a file system, or stopped by a signal. So each worker has a small process of its own beside it,
which hears of every group of steps. When none comes in time, it has the worker write the stack of each of its threads,
keeps that in the run's folder, and kills the worker. A thread of the worker itself would not do: it stops with the
process, or waits for Python's lock.
"""

import faulthandler
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

SLOWER = 10  # times the slowest group of steps seen is stuck
LEAST = 300.0  # seconds; loading, compiling, validating and saving may take longer than many steps
STACKS = "stacks"  # folder in the run's
_ROOT = Path(__file__).resolve().parents[2]


class Watchdog:
    """The worker's side: `step` reports a step, `busy` all other progress."""

    def __init__(self, run: str, name: str, stuck_seconds: float | None) -> None:
        """
        Args:
            run: path or URI of the run's folder.
            name: the worker's, for the file.
            stuck_seconds: allowed without progress; None: `SLOWER` times the slowest group of steps, at least `LEAST`.
        """
        self._fixed, self._slowest = stuck_seconds, 0.0
        self._last_step: float | None = None
        self._stacks = tempfile.TemporaryFile()  # noqa: SIM115 - until close; without a name, so that no kill leaves it
        faulthandler.register(signal.SIGUSR1, self._stacks, all_threads=True)
        reads, self._writes = os.pipe()
        os.set_blocking(self._writes, False)  # nothing may wait for the watchdog
        stacks = self._stacks.fileno()
        command = [sys.executable, "-m", __name__, str(reads), str(os.getpid()), str(stacks), run, name]
        environment = os.environ | {"PYTHONPATH": str(_ROOT)}  # Ray puts the package on this process' path alone
        self._process = subprocess.Popen(command, pass_fds=[reads, stacks], env=environment, start_new_session=True)
        os.close(reads)
        self.busy("starting")

    @property
    def limit(self) -> float:
        """Seconds without progress after which the worker counts as stuck."""
        return self._fixed or max(LEAST, SLOWER * self._slowest)

    def step(self, what: str) -> None:
        """Report that a group of steps is done."""
        now = time.monotonic()
        if self._last_step is not None:
            self._slowest = max(self._slowest, now - self._last_step)
        self._last_step = now
        self._send(self.limit, what)

    def busy(self, what: str, more: float = 0.0) -> None:
        """Report other progress.

        Args:
            what: the worker does now.
            more: seconds that it may take beyond the limit.
        """
        self._last_step = None  # what comes between two steps is none
        self._send(self.limit + more, what)

    def rest(self, what: str) -> None:
        """Report that the worker waits for others, which have watchdogs of their own."""
        self._last_step = None
        self._send(0, what)

    def _send(self, seconds: float, what: str) -> None:
        with suppress(OSError):  # it is behind, or gone
            os.write(self._writes, f"{seconds} {what}\n".encode())

    def close(self) -> None:
        """End the watchdog's process."""
        os.close(self._writes)
        self._process.wait()
        faulthandler.unregister(signal.SIGUSR1)
        self._stacks.close()


def _watch(reads: int, pid: int, stacks: int, run: str, name: str) -> None:
    """The watchdog's side. Ends with the worker, whose end closes the pipe."""
    seconds, what, rest = 0.0, "starting", b""
    while select.select([reads], [], [], seconds or None)[0]:
        received = os.read(reads, 1 << 16)
        if not received:
            return
        *lines, rest = (rest + received).split(b"\n")
        if lines:
            allowed, _, what = lines[-1].decode().partition(" ")
            seconds = float(allowed)
    title = f"{name} was {what}, and then for {seconds:.0f} s nothing happened. Its threads, newest call first:"
    text = f"{title}\n\n{_stacks_of(pid, stacks)}"
    # Not for long: a store that does not answer may be what the worker waits for.
    writer = threading.Thread(target=_keep, args=(run, name, text), daemon=True)
    writer.start()
    writer.join(timeout=20)
    os.kill(pid, signal.SIGKILL)


def _stacks_of(pid: int, stacks: int) -> str:
    os.kill(pid, signal.SIGUSR1)
    os.kill(pid, signal.SIGCONT)  # a stopped process writes nothing
    size, deadline = -1, time.monotonic() + 10
    while (os.fstat(stacks).st_size != size or size <= 0) and time.monotonic() < deadline:
        size = os.fstat(stacks).st_size
        time.sleep(1.0)  # a process that hardly gets a processor writes slowly
    return os.pread(stacks, os.fstat(stacks).st_size, 0).decode() or "(it did not answer)"


def _keep(run: str, name: str, text: str) -> None:
    from fracture.storage import storage_path

    (storage_path(run) / STACKS / f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{name}.txt").write_bytes(
        text.encode()
    )


if __name__ == "__main__":
    *numbers, folder, worker = sys.argv[1:]
    _watch(*map(int, numbers), folder, worker)
