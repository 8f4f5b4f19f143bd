"""Measures start-up, the rest of an epoch and the memory of the job, against what they must cost.

make bench ONLY=startup
"""

import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path

import psutil

from tests.benchmarks.measure import Part, child, radiographs_and_shards, ratio, spread, take_turns
from tests.benchmarks.roof import BATCH, SIZE, convolutions
from tests.benchmarks.watched import watch

ROUNDS, RADIOGRAPHS, EPOCHS = 5, 600, 3
FLOOR = """
import json, time
started = time.monotonic()
import keras, ray
ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
print(json.dumps(time.monotonic() - started))
"""
LIBRARIES = {
    "worker": ("keras", "ray.train"),
    "driver": ("keras", "ray.train", "matplotlib.pyplot", "scipy.optimize", "sklearn.metrics"),
}
HELD = """
import json, psutil, sys
for name in sys.argv[1:]:
    __import__(name)
print(json.dumps(psutil.Process().memory_full_info().uss / 1e6))
"""


def run(data: str | None) -> Part:
    with tempfile.TemporaryDirectory() as scratch:
        _, shards = radiographs_and_shards(scratch, RADIOGRAPHS)
        tiny = ("data.image_size=224", "model.filters=[4,8]", "training.epochs=1", "compute.workers=1")
        contestants = {
            "to the first step": lambda: watch(_job(shards, scratch, *tiny)).first_step,
            "TensorFlow and Ray alone": lambda: float(child([sys.executable, "-c", FLOOR], TF_CPP_MIN_LOG_LEVEL="3")),
            "--help": _help,
        }
        figures = take_turns(contestants, ROUNDS)
        tail, peaks, accounted = _epochs(shards, scratch)
    rows = [f"| {name} | {spread(values)} |" for name, values in figures.items()]
    floor = ratio(figures["to the first step"], figures["TensorFlow and Ray alone"])
    lines = ["| from the shell's prompt, on tiny layers | seconds |", "|---|---|", *rows]
    lines += ["", f"To the first step / TensorFlow and Ray alone: {floor} (wanted: at most 1.6)", ""]
    lines += [f"Of an epoch of the default network, neither training nor validating: {spread(tail)} s", ""]
    lines += ["| process | peak memory, MB | accounted for, MB | ratio (wanted: at most 1.5) |", "|---|---|---|---|"]
    for name, peak in peaks.items():
        lines.append(f"| {name} | {peak:.0f} | {accounted[name]:.0f} | {peak / accounted[name]:.2f} |")
    return Part(lines, figures | {"tail": tail, "peak memory": peaks, "accounted for": accounted})


def _job(shards: str, scratch: str, *settings: str) -> list[str]:
    storage = tempfile.mkdtemp(dir=scratch)
    command = [sys.executable, "job/train.py", "--shards", shards, "--storage", storage, "--run", "r"]
    return [*command, *(word for setting in settings for word in ("--set", setting))]


def _help() -> float:
    started = time.monotonic()
    subprocess.run([sys.executable, "job/train.py", "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def _epochs(shards: str, scratch: str) -> tuple[list[float], dict[str, float], dict[str, float]]:
    """Seconds between the ends of epochs beyond what they report; peak MB of each process, and what it must hold."""
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
    gaps = [after - before for before, after in pairwise(watched.epoch_ends)]
    tail = [gap - record["seconds"] for gap, record in zip(gaps, records[1:], strict=True)]
    found = re.search(r"([\d,]+) parameters", watched.text)
    assert found
    return tail, peaks, _accounted(int(found[1].replace(",", "")))


def _accounted(parameters: int) -> dict[str, float]:
    """MB: the libraries, and in the worker the images, what a step keeps for its gradients, and what weights need."""
    libraries = {name: float(child([sys.executable, "-c", HELD, *modules])) for name, modules in LIBRARIES.items()}
    images = RADIOGRAPHS * SIZE**2 / 1e6
    outputs = sum(2 * BATCH * side**2 * filters for _, side, _, filters in convolutions()) / 1e6
    kept = outputs * (1 + 1 / 4 + 1 / 8 + 1 / 4)  # convolution, pooled, which pixel it was, normalised
    copies = 8  # weights, gradients, Adam's two; and of the checkpoint weights, Adam's two, the best weights
    return libraries | {"worker": libraries["worker"] + images + kept + copies * 4 * parameters / 1e6}


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
