"""A watchdog and a real process that it watches."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from fracture.runtime.watchdog import LEAST, SLOWER, Watchdog

WORKER = """
import psutil, sys, time
from fracture.runtime.watchdog import Watchdog

def gets_stuck():
    while True:
        pass

watchdog = Watchdog(sys.argv[1], "worker-3", stuck_seconds=1.0)
{work}
"""


def run_worker(run: Path, work: str, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-c", WORKER.format(work=work), str(run)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | environment)


def stacks(run: Path) -> str:
    (file,) = (run / "stacks").iterdir()
    assert file.name.endswith("-worker-3.txt")
    return file.read_text()


@pytest.mark.slow
def test_a_worker_without_progress_says_where_it_stands_and_is_killed(tmp_path):
    (tmp_path / "temporary").mkdir()
    work = "watchdog.step('in step 7 of epoch 2'); gets_stuck()"
    with run_worker(tmp_path, work, TMPDIR=str(tmp_path / "temporary")) as worker:
        assert worker.wait(timeout=20) == -signal.SIGKILL
    assert not list((tmp_path / "temporary").iterdir()), "nothing is left behind"
    text = stacks(tmp_path)
    assert text.startswith("worker-3 was in step 7 of epoch 2, and then for 1 s nothing happened.")
    assert "in gets_stuck" in text


@pytest.mark.slow
def test_a_stopped_worker_too(tmp_path):
    with run_worker(tmp_path, "watchdog.busy('loading'); print('up', flush=True); time.sleep(60)") as worker:
        worker.stdout.readline()
        worker.send_signal(signal.SIGSTOP)
        assert worker.wait(timeout=20) == -signal.SIGKILL
    assert "worker-3 was loading" in stacks(tmp_path)


@pytest.mark.slow
def test_progress_and_waiting_for_others_are_left_alone(tmp_path):
    work = "[(watchdog.step('training'), time.sleep(0.3)) for _ in range(6)]; watchdog.rest('waiting'); time.sleep(2)"
    with run_worker(tmp_path, work + "; watchdog.close()") as worker:
        assert worker.wait(timeout=20) == 0
    assert not (tmp_path / "stacks").exists()


def test_it_ends_with_its_worker(tmp_path):
    with run_worker(tmp_path, "print(psutil.Process().children()[0].pid, flush=True); time.sleep(60)") as worker:
        watchdog = psutil.Process(int(worker.stdout.readline()))
        worker.kill()
        watchdog.wait(timeout=10)


def test_what_counts_as_stuck_follows_the_slowest_step(tmp_path, monkeypatch: pytest.MonkeyPatch):
    clock = iter([0.0, 100.0, 101.0, 500.0]).__next__
    watchdog = Watchdog(str(tmp_path), "worker-0", stuck_seconds=None)
    monkeypatch.setattr("fracture.runtime.watchdog.time.monotonic", clock)
    watchdog.step("1")
    assert watchdog.limit == LEAST
    watchdog.step("2")
    assert watchdog.limit == SLOWER * 100
    watchdog.busy("validating")
    watchdog.step("1 of the next epoch, long after")
    watchdog.step("2 of it")
    assert watchdog.limit == SLOWER * 399
    monkeypatch.undo()
    watchdog.close()
