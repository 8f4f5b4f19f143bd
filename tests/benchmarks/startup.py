"""Start-up, the rest of an epoch, and memory of the job, against what they must cost.

make bench ONLY=startup
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path

import psutil

from tests.benchmarks.measure import Part, child, films_and_shards, ratio, spread, take_turns
from tests.benchmarks.watched import watch

ROUNDS, FILMS, EPOCHS = 5, 600, 3
FLOOR = """
import json, time
started = time.monotonic()
import tf_keras, ray
ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
print(json.dumps(time.monotonic() - started))
"""


def run(data: str | None) -> Part:
    with tempfile.TemporaryDirectory() as scratch:
        _, shards = films_and_shards(scratch, FILMS)
        tiny = ("data.image_size=224", "model.filters=[4,8]", "training.epochs=1", "compute.workers=1")
        contestants = {
            "to the first step": lambda: watch(_job(shards, scratch, *tiny)).first_step,
            "TensorFlow and Ray alone": lambda: float(child([sys.executable, "-c", FLOOR], TF_CPP_MIN_LOG_LEVEL="3")),
            "--help": _help,
        }
        figures = take_turns(contestants, ROUNDS)
        tail, memory = _epochs(shards, scratch)
    rows = [f"| {name} | {spread(values)} |" for name, values in figures.items()]
    floor = ratio(figures["to the first step"], figures["TensorFlow and Ray alone"])
    lines = ["| from the shell's prompt, on tiny layers | seconds |", "|---|---|", *rows]
    lines += ["", f"To the first step / TensorFlow and Ray alone: {floor} (wanted: at most 1.6)", ""]
    lines += [f"Of an epoch of the default network, neither training nor validating: {spread(tail)} s", ""]
    lines += ["| process | peak memory, MB |", "|---|---|", *(f"| {name} | {mb:.0f} |" for name, mb in memory.items())]
    return Part(lines, figures | {"tail": tail, "memory": memory})


def _job(shards: str, scratch: str, *settings: str) -> list[str]:
    storage = tempfile.mkdtemp(dir=scratch)
    command = [sys.executable, "job/train.py", "--shards", shards, "--storage", storage, "--run", "r"]
    return [*command, *(word for setting in settings for word in ("--set", setting))]


def _help() -> float:
    started = time.monotonic()
    subprocess.run([sys.executable, "job/train.py", "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def _epochs(shards: str, scratch: str) -> tuple[list[float], dict[str, float]]:
    """Seconds between the ends of epochs beyond what they report; peak memory of each kind of process."""
    command = _job(shards, scratch, f"training.epochs={EPOCHS}", "compute.workers=1", "compute.cpus_per_worker=2")
    peaks: dict[str, float] = {}
    over = threading.Event()
    watcher = threading.Thread(target=_watch_memory, args=(peaks, over))
    watcher.start()
    watched = watch(command)
    over.set()
    watcher.join()
    run = Path(command[command.index("--storage") + 1], "runs/r")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    ends = watched.epoch_ends
    gaps = [after - before for before, after in pairwise(ends)]
    return [gap - record["seconds"] for gap, record in zip(gaps, records[1:], strict=True)], peaks


def _watch_memory(peaks: dict[str, float], over: threading.Event) -> None:
    names = {"RayTrainWorker": "worker", "job/train.py": "driver"}
    while not over.wait(0.5):
        for process in psutil.Process().children(recursive=True):
            try:
                command, used = " ".join(process.cmdline()), process.memory_full_info().uss / 1e6
            except psutil.Error:
                continue
            for mark, name in names.items():
                if mark in command:
                    peaks[name] = max(peaks.get(name, 0.0), used)
