"""Trainings on two hosts of a real Ray cluster that lose a host, the network, their driver or their job.

make test-long        runs them in 10 minutes on 2 cores, and prints the time that each fault cost
"""

import json
import math
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from fracture.storage import StoragePath, storage_path
from tests.cluster.hosts import DASHBOARD, ROOT, Host, environment, switch, wait_until, why_not
from tests.conftest import TINY, write_shards
from tests.integration.conftest import ROWS, assert_same_history

pytestmark = [pytest.mark.ray, pytest.mark.long]

EPOCHS = 12  # of about a second each: enough for two faults
CALM = re.compile(  # the expected output of a submitted job and of `ray job logs`
    r".*\tINFO (cli|job_manager)\.py:\d+ -- |Running entrypoint "
    r"|(run|starting|training|network|epoch|test|bundle|report) |CAVEAT  |  "
)
PREEMPTION = "DRAIN_NODE_REASON_PREEMPTION"
NEWS = re.compile(r"(restart|waiting|resuming|stopping|saved|lock|training)  ")  # expected in addition after a fault


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    """The head and a second host with room for one worker each."""
    if reason := why_not():
        pytest.skip(reason)
    with switch() as network:
        yield network.add("head"), network.add("second")


@dataclass
class Training:
    """A run that is submitted to the head, if necessary repeatedly."""

    head: Host
    shards: StoragePath
    code: Path
    storage: Path
    name: str
    workers: str = "2"
    epochs: int = EPOCHS
    submitted: int = 0

    @property
    def job(self) -> str:
        return f"{self.name}-{self.submitted}"

    def submit(self) -> subprocess.Popen:
        """Submit the job and return the process that runs until the job has ended."""
        self.submitted += 1
        command = ["python", "job/train.py", "--shards", str(self.shards), "--storage", str(self.storage)]
        command += ["--run", self.name, "--workers", self.workers]
        epochs = (f"training.epochs={self.epochs}", f"training.patience={self.epochs}")
        for setting in (*TINY, *epochs, "checkpoint.every_minutes=0.05"):
            command += ["--set", setting]
        return subprocess.Popen(
            self._command("submit", "--submission-id", self.job, "--working-dir", str(self.code), "--", *command),
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def begin(self) -> subprocess.Popen:
        """Submit the job and wait for two epochs."""
        job = self.submit()
        self.wait_for_epochs(2, job)
        return job

    def ray_job(self, what: str) -> str:
        """Return the output of `ray job stop` or `ray job logs`."""
        done = subprocess.run(
            self._command(what, self.job), env=environment(), capture_output=True, text=True, check=True
        )
        return done.stdout

    def history(self) -> list[dict[str, float]]:
        log = self.storage / "runs" / self.name / "metrics.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def checkpoints(self) -> set[str]:
        return {folder.name for folder in (self.storage / "runs" / self.name).glob("checkpoint_*/")}

    def wait_for_epochs(self, epochs: int, job: subprocess.Popen) -> None:
        def reached() -> bool:
            assert job.poll() is None or len(self.history()) >= epochs, self.ray_job("logs")
            return len(self.history()) >= epochs

        wait_until(180, reached, f"epoch {epochs} of {self.name}")

    def driver(self) -> psutil.Process:
        (driver,) = (p for p in self.head.processes("job/train.py") if p.cmdline()[:2] == ["python", "job/train.py"])
        return driver

    def finish(self, job: subprocess.Popen) -> str:
        """Wait for a job that must succeed and return its log."""
        wait_until(180, lambda: job.poll() is not None, f"the end of {self.job}")
        log = self.ray_job("logs")
        assert job.returncode == 0, log
        return log

    def _command(self, what: str, *arguments: str) -> list[str]:
        return self.head.command("ray", "job", what, "--address", DASHBOARD, *arguments)


@pytest.fixture(scope="module")
def training(hosts, tmp_path_factory):
    """Return a function that makes trainings on one dataset; the same name is the same run."""
    folder = tmp_path_factory.mktemp("storage")
    shards = storage_path(folder / "shards")
    write_shards(shards, ROWS)
    for part in ("fracture", "job"):
        shutil.copytree(ROOT / part, folder / "code" / part, ignore=shutil.ignore_patterns("__pycache__"))
    return lambda name, **different: Training(hosts[0], shards, folder / "code", folder, name, **different)


@pytest.fixture(scope="module")
def undisturbed(hosts, training):
    """The history and log of a run without faults, and the workers on each host after its first epoch."""
    run = training("undisturbed")
    job = run.submit()
    run.wait_for_epochs(1, job)
    workers = [host.processes("RayTrainWorker") for host in hosts]
    log = run.finish(job)
    return run.history(), log, workers


def test_each_host_has_one_worker(undisturbed):
    *_, workers = undisturbed
    assert [len(on_host) for on_host in workers] == [1, 1]


def test_the_log_of_a_job_is_calm(undisturbed):
    """The log has one line per epoch, not per worker, and no warnings."""
    _, log, _ = undisturbed
    lines = log.splitlines()
    assert [line for line in lines if not CALM.match(line)] == []
    assert [int(line[:5]) for line in lines if re.match(r" *\d+  \d", line)] == list(range(1, EPOCHS + 1))


def test_a_host_that_dies_costs_time_and_nothing_else(hosts, training, undisturbed):
    head, second = hosts
    run = training("lost")
    job = run.begin()
    done = len(run.history())
    second.kill()
    wait_until(60, lambda: not head.processes("RayTrainWorker"), "the other worker ends")
    assert job.poll() is None, "it waits for another host"
    second.start()
    _print_time_until(run, done + 1, job, "a host was killed, and its replacement has joined")
    _finish_as_undisturbed(run, job, undisturbed)


def test_a_host_that_is_cut_off_costs_time_and_nothing_else(hosts, training, undisturbed):
    _, second = hosts
    run = training("cut")
    job = run.begin()
    done = len(run.history())
    second.cut()
    heal = time.monotonic() + 30
    wait_until(31, lambda: time.monotonic() > heal or job.poll() is not None, "the end of the cut")
    second.heal()
    _print_time_until(run, done + 1, job, "a cut of 30 s was healed")
    _finish_as_undisturbed(run, job, undisturbed)


def _finish_as_undisturbed(run: Training, job: subprocess.Popen, undisturbed: tuple) -> None:
    log = run.finish(job)
    assert_same_history(run.history(), undisturbed[0], tolerance=1e-3)
    assert "\nresuming   " in log
    assert [line for line in log.splitlines() if not (CALM.match(line) or NEWS.match(line))] == []


def test_an_elastic_run_goes_on_with_the_host_that_is_left_and_grows_again(hosts, training):
    _, second = hosts
    run = training("elastic", workers="1:2", epochs=60)
    job = run.begin()
    wait_until(60, lambda: second.processes("RayTrainWorker"), "a worker on the second host")

    done = len(run.history())
    second.kill()
    _print_time_until(run, done + 1, job, "a host was killed, and one worker went on")
    second.start()
    started = time.monotonic()
    wait_until(120, lambda: second.processes("RayTrainWorker"), "it grows again")
    print(f"{time.monotonic() - started:5.1f} s from when a host came back to a worker on it")
    done = len(run.history())
    _print_time_until(run, done + 1, job, "a second worker was started")

    log = run.finish(job)
    assert re.findall(r"^training   (\d) worker", log, re.MULTILINE) == ["2", "1", "2"]
    history = run.history()
    assert [record["epoch"] for record in history] == list(range(1, 61))
    for record in history:  # the recipe holds: each image once, and the learning rate of the global batch
        seen = record["accuracy"] * ROWS["train"]
        assert seen == pytest.approx(round(seen), abs=1e-4)
        expected = 1e-3 * (1 + math.cos(math.pi * (6 * record["epoch"] - 1) / 360)) / 2  # of its last step
        assert record["learning_rate"] == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_a_job_whose_driver_was_killed_is_resumed_by_the_same_command(training, undisturbed):
    run = training("killed")
    job = run.begin()
    run.driver().kill()
    assert job.wait(60) == 1
    job, done = run.submit(), len(run.history())
    _print_time_until(run, done + 1, job, "the same was submitted after its driver was killed")
    _finish_as_undisturbed(run, job, undisturbed)


def test_a_job_that_was_stopped_has_saved_and_is_resumed_by_the_same_command(training, undisturbed):
    run = training("stopped")
    job = run.begin()
    run.ray_job("stop")
    job.wait(60)
    assert len(run.history()) < EPOCHS
    assert re.search("^saved      ", run.ray_job("logs"), re.MULTILINE)
    job, done = run.submit(), len(run.history())
    _print_time_until(run, done + 1, job, "the same was submitted after `ray job stop`")
    _finish_as_undisturbed(run, job, undisturbed)


def test_a_machine_that_is_taken_away_with_notice_has_saved(hosts, training, undisturbed):
    """The node is drained as by `cluster/spot_notice.py`, then killed and replaced."""
    _, second = hosts
    run = training("noticed")
    job = run.begin()
    drain = ["ray", "drain-node", "--address", second.switch.hosts[0].address + ":6379", "--reason", PREEMPTION]
    drain += ["--reason-message", "spot notice", "--deadline-remaining-seconds", "10", "--node-id", second.node_id()]
    subprocess.run(second.command(*drain), env=environment(), check=True, capture_output=True)
    checkpoints = run.checkpoints()
    wait_until(30, lambda: run.checkpoints() - checkpoints, "a checkpoint after the notice")
    done = len(run.history())
    second.kill()
    second.start()
    _print_time_until(run, done + 1, job, "a machine went away with notice, and its replacement has joined")
    _finish_as_undisturbed(run, job, undisturbed)


def _print_time_until(run: Training, epoch: int, job: subprocess.Popen, since: str) -> None:
    started = time.monotonic()
    run.wait_for_epochs(epoch, job)
    print(f"{time.monotonic() - started:5.1f} s from when {since} to the first new epoch")
