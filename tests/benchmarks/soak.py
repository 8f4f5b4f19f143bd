"""Kills a training again and again, at random moments and in three ways, and compares its end with an undisturbed one.

make soak KILLS=20          about 30 s a kill

The ways: SIGKILL of a worker; SIGSTOP of a worker, which the watchdog has to notice; SIGTERM to the job, which saves,
ends, and is started again. The job is the real one, on a Ray of its own; 2 workers, a small network, 250 steps an
epoch, checkpoints as often as the workers can agree on them.
"""

import argparse
import json
import queue
import random
import runpy
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil

from fracture.progress.events import (
    CheckpointSaved,
    EpochDone,
    Scoring,
    StepDone,
    TrainingEvent,
    TrainingStarted,
    WorkersFailed,
)
from fracture.progress.history import read_history
from fracture.storage import storage_path
from tests.benchmarks.measure import machine, spread
from tests.conftest import write_shards

STUCK = 15  # recovery.stuck_seconds
ROWS = {"train": 2000, "val": 300, "test": 300}
SETTINGS = (
    "data.image_size=32",
    "model.filters=[16,32]",
    "model.dense=[8]",
    "training.batch_size=8",
    "training.learning_rate=0.0001",
    "training.patience=1000",
    "compute.workers=2",
    "checkpoint.every_minutes=0.05",
    f"recovery.stuck_seconds={STUCK}",
)
_KINDS = (StepDone, WorkersFailed, CheckpointSaved, EpochDone)
NAMES = {"kill": "SIGKILL of a worker", "stop": "SIGSTOP of a worker", "term": "SIGTERM to the job, started again"}


def job() -> None:
    """Run the job and print each event as a line of JSON."""
    from fracture.progress import console

    class EventPrinter(console.Console):
        def show(self, event: TrainingEvent) -> None:
            print("EVENT", json.dumps({"event": type(event).__name__, **vars(event)}, default=str), flush=True)

    console.Console = EventPrinter
    sys.argv = ["job/train.py", *sys.argv[2:]]
    sys.path.insert(0, "job")
    runpy.run_path("job/train.py", run_name="__main__")


class Job:
    """The job as a process, and its events."""

    def __init__(self, shards: Path, storage: Path, run: str, epochs: int) -> None:
        command = [sys.executable, "-m", __spec__.name, "--job", "--shards", str(shards), "--storage", str(storage)]
        command += ["--run", run, *(w for s in (*SETTINGS, f"training.epochs={epochs}") for w in ("--set", s))]
        self.started = time.monotonic()
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout:
            if line.startswith("EVENT "):
                self._events.put(json.loads(line[6:]))
        self._events.put(None)

    def next(self, timeout: float) -> dict[str, Any] | None:
        """Return the next event; None at the end. Raise queue.Empty when none comes in time."""
        return self._events.get(timeout=timeout)

    def until(self, *kinds: type[TrainingEvent]) -> dict[str, Any] | None:
        """Return the next event of these kinds; None where the job has ended."""
        while (event := self.next(timeout=180)) is not None and event["event"] not in {kind.__name__ for kind in kinds}:
            pass
        return event

    def signal_worker(self, number: signal.Signals, chance: random.Random) -> None:
        ours = psutil.Process(self._process.pid).children(recursive=True)
        workers = [process for process in ours if "RayTrainWorker" in " ".join(process.cmdline())]
        newest = max(process.create_time() for process in workers)
        chance.choice([w for w in workers if newest - w.create_time() < 5]).send_signal(number)

    def terminate(self) -> None:
        self._process.terminate()
        while self.next(timeout=60) is not None:
            pass
        self.end(1)

    def end(self, code: int) -> None:
        if self._process.wait(timeout=180) != code:
            raise RuntimeError(f"exit code {self._process.returncode}, not {code}:\n{self._process.stderr.read()}")


def soak(kills: int, seed: int, scratch: Path) -> list[str]:
    shards, storage = scratch / "shards", scratch / "storage"
    write_shards(storage_path(shards), ROWS)
    epochs = 4 + kills // 4  # 14 s each, of which a kill leaves 4 to the training
    undisturbed = Job(shards, storage, "undisturbed", epochs)
    undisturbed.until(StepDone)
    startup = time.monotonic() - undisturbed.started
    undisturbed.until(Scoring)
    undisturbed.end(0)

    chance = random.Random(seed)
    back: dict[str, list[float]] = defaultdict(list)  # seconds to the next step, for each way
    lost: list[int] = []  # steps done twice
    running = Job(shards, storage, "disturbed", epochs)
    steps_before = _seen(running.until(StepDone))
    for number in range(kills):
        kind = chance.choice(["kill", "kill", "stop", "term"])
        moment = time.monotonic() + chance.uniform(0.5, 6)
        while (left := moment - time.monotonic()) > 0:
            try:
                event = running.next(timeout=left)
            except queue.Empty:
                break
            if event is None or event["event"] == "Scoring":
                raise RuntimeError(f"the training was over after {number} of {kills} kills; it needs more epochs")
            steps_before = _seen(event) or steps_before
        when = time.monotonic()
        if kind == "term":
            running.terminate()
            running = Job(shards, storage, "disturbed", epochs)
        else:
            running.signal_worker(signal.SIGKILL if kind == "kill" else signal.SIGSTOP, chance)
            while (event := running.until(*_KINDS))["event"] != "WorkersFailed":
                steps_before = _seen(event) or steps_before
        resumed = running.until(TrainingStarted)
        running.until(StepDone)
        back[kind].append(time.monotonic() - when)
        lost.append(max(steps_before - _position(resumed["epochs_done"], resumed["steps_done"]), 0))
        line = f"{back[kind][-1]:.1f} s to the next step, {lost[-1]} steps done again"
        print(f"  {number + 1} of {kills}: {NAMES[kind]}: {line}", file=sys.stderr, flush=True)
    running.until(Scoring)
    running.end(0)
    difference, alike = _compare(storage / "runs/undisturbed", storage / "runs/disturbed")
    rows = [
        f"| {NAMES[kind]} | {len(times)} | {spread(times)} | {statistics.median(times) / startup:.2f} |"
        for kind, times in sorted(back.items())
    ]
    return [
        f"| what | times | seconds to the next step, median [least, most] | / start-up ({startup:.1f} s) |",
        "|---|---|---|---|",
        *rows,
        "",
        f"{kills} survived of {kills}, over {epochs} epochs of 250 steps; steps done again: {spread(lost)}.",
        f"{alike}; largest difference in the history: {difference:.2g}.",
    ]


def _position(epochs_done: int, steps_done: int) -> int:
    return epochs_done * (ROWS["train"] // 8) + steps_done


def _seen(event: dict[str, Any] | None) -> int | None:
    """Return how many steps of the whole training are done by the event."""
    if event is None or event["event"] not in ("StepDone", "CheckpointSaved"):
        return None
    return _position(event["epoch"] - 1, event["step"])


def _compare(undisturbed: Path, disturbed: Path) -> tuple[float, str]:
    """Return the largest relative difference of two histories, and whether their ends are alike."""
    histories = [read_history(storage_path(run)) for run in (undisturbed, disturbed)]
    if len(histories[0]) != len(histories[1]):
        raise RuntimeError(f"{len(histories[1])} epochs in place of {len(histories[0])}")
    measured = [key for key in histories[0][0] if key not in ("seconds", "images_per_second")]
    difference = max(abs(a[k] - b[k]) / max(abs(a[k]), 1e-9) for a, b in zip(*histories, strict=True) for k in measured)
    bundles = [json.loads((run / "bundle/bundle.json").read_text()) for run in (undisturbed, disturbed)]
    best = [bundle["run"]["best_epoch"] for bundle in bundles]
    aucs = [bundle["metrics"]["test"]["image"]["figures"]["auc"]["value"] for bundle in bundles]
    return difference, f"best epoch {best[0]} and {best[1]}; AUC on test {aucs[0]:.6f} and {aucs[1]:.6f}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        job()
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines = soak(args.kills, args.seed, Path(folder))
    print("\n".join([", ".join(f"{name} {value}" for name, value in machine().items()), "", *lines]))
