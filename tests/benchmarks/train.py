"""Training throughput, whole epochs with reading and augmentation, against three ways of doing the same.

  make bench ONLY=train

On generated radiographs of 224×224 pixels. An epoch goes before the one that is timed, for compiling and warming up.
"""

import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from tests.benchmarks.measure import Figures, Part, child, radiographs_and_shards, ratio, spread, take_turns

RADIOGRAPHS, SIZE, EPOCHS, ROUNDS = 400, 224, 2, 3
TORCH = Path(".venv-torch")
TORCH_PACKAGES = ("torch==2.13.0", "numpy", "pillow")
REFERENCE = ("model.block=conv-bn-relu-pool", "model.head=flatten")

OURS, OURS_REFERENCE = "ours, 2 workers", "ours, 2 workers, reference order and head"
ONE_WORKER = "ours, 1 worker of 2 CPUs"
KERAS, PLAIN = "(a) Keras 3, reference README", "(c) plain Keras, our network and input"
TORCH_MODES = (("reference", "eager"), ("ours", "eager"), ("ours", "compiled"))
TORCH_NAMES = {(order, mode): f"(b) PyTorch bfloat16, {order} order, {mode}" for order, mode in TORCH_MODES}
WANTED = (  # ours, peer, at least
    (OURS, KERAS, 8),
    (OURS_REFERENCE, TORCH_NAMES["reference", "eager"], 2.5),
    (OURS, TORCH_NAMES["ours", "eager"], 1.8),
    (OURS, PLAIN, 1.0),
    (OURS, ONE_WORKER, 0.95),
)


def run(data: str | None) -> Part:
    make_torch()
    with tempfile.TemporaryDirectory() as scratch:
        radiograph_ids, shards = radiographs_and_shards(scratch, RADIOGRAPHS)
        job = partial(_job, shards, scratch)
        contestants = {
            OURS: job,
            OURS_REFERENCE: partial(job, *REFERENCE),
            ONE_WORKER: partial(job, "compute.workers=1", "compute.cpus_per_worker=2"),
            KERAS: partial(_peer, "keras3", radiograph_ids, str(SIZE)),
            PLAIN: partial(_peer, "plain_keras", shards),
            **{name: partial(_torch, radiograph_ids, *key) for key, name in TORCH_NAMES.items()},
        }
        figures = take_turns(contestants, ROUNDS)
    return Part(_lines(figures), figures)


def make_torch() -> None:
    if not (TORCH / "bin/python").exists():
        print("  installing PyTorch into a virtual environment of its own (once)", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(TORCH)], check=True)
        install = [str(TORCH / "bin/python"), "-m", "pip", "install", "--quiet", *TORCH_PACKAGES]
        subprocess.run(install, check=True)


def _lines(figures: Figures) -> list[str]:
    rows = [f"| {name} | {spread(values)} |" for name, values in figures.items()]
    ratios = [f"| {ours} / {peer} | {ratio(figures[ours], figures[peer])} | {least} |" for ours, peer, least in WANTED]
    return [
        f"Images a second, median [least, most] of {ROUNDS} rounds:",
        "",
        "| contestant | images/s |",
        "|---|---|",
        *rows,
        "",
        "| ratio | measured | wanted, on a machine with AMX |",
        "|---|---|---|",
        *ratios,
    ]


def _job(shards: str, scratch: str, *settings: str) -> float:
    """Images a second of the last epoch, as the job itself reports it."""
    with tempfile.TemporaryDirectory(dir=scratch) as storage:
        command = [sys.executable, "job/train.py", "--shards", shards, "--storage", storage, "--run", "r"]
        for setting in (f"training.epochs={EPOCHS}", *settings):
            command += ["--set", setting]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        lines = Path(storage, "runs/r/metrics.jsonl").read_text().splitlines()
    return float(json.loads(lines[-1])["images_per_second"])


def _peer(name: str, *arguments: str) -> float:
    command = [sys.executable, "-m", f"tests.benchmarks.peers.{name}", *arguments, str(EPOCHS)]
    return float(child(command, TF_CPP_MIN_LOG_LEVEL="3"))


def _torch(radiograph_ids: str, order: str, mode: str) -> float:
    script = "tests/benchmarks/peers/torch_cnn.py"
    return float(child([str(TORCH / "bin/python"), script, radiograph_ids, str(SIZE), str(EPOCHS), order, mode]))
