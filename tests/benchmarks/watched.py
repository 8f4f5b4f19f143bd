"""Runs a job on a terminal of its own, and notes when its lines come."""

import os
import pty
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Watched:
    """The moments of a job, in seconds from its start."""

    first_step: float
    epoch_ends: list[float]
    text: str  # all of it
    marks: list[float]  # what `probe` returned at each epoch's end


def watch(command: list[str], probe: Callable[[], float] = lambda: 0.0) -> Watched:
    """Run the command on a terminal, which shows each step; a file would not."""
    ours, theirs = pty.openpty()
    started = time.monotonic()
    job = subprocess.Popen(command, stdout=theirs, stderr=subprocess.STDOUT, close_fds=True)
    os.close(theirs)
    found = Watched(0.0, [], "", [])
    rest = ""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # the job has closed its end
            break
        if not data:
            break
        found.text += data.decode(errors="replace")
        *lines, rest = re.split(r"[\r\n]+", rest + data.decode(errors="replace"))
        for line in [*lines, rest]:
            if not found.first_step and re.search(r"epoch 1: step \d+ of", line):
                found.first_step = time.monotonic() - started
        for line in lines:
            if re.search(r"^(\x1b\[K)?\s*\d+\s+\d+\.\d{3}\s", line):
                found.epoch_ends.append(time.monotonic() - started)
                found.marks.append(probe())
    os.close(ours)
    if job.wait():
        raise RuntimeError(f"{' '.join(command)} failed:\n{found.text[-3000:]}")
    return found
