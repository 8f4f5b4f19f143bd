"""What a training step sends, and what that means for more machines.

  make bench ONLY=scaling

Measured: computing a step of 32 images on this machine, by one worker of 2 cores, and the bytes that two workers send.
Assumed: that machines are alike, that a ring adds up gradients, that nothing overlaps, that computing takes as long an
image however few a worker has (it takes longer: each worker updates all weights), and the networks' bandwidths and
latencies.
"""

import json
import re
import statistics
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from tests.benchmarks.measure import Part, radiographs_and_shards
from tests.benchmarks.watched import watch

BATCH, RADIOGRAPHS, EPOCHS = 32, 300, 3
HEADS = {"pooled": (), "flatten": ("model.head=flatten",)}
NETWORKS = {"10 Gbit/s": (10e9 / 8, 50e-6), "100 Gbit/s": (100e9 / 8, 20e-6)}  # assumed: bytes/s, s of latency a hop
WORKERS = (1, 2, 4, 8, 16, 32, 64)


def run(data: str | None) -> Part:
    with tempfile.TemporaryDirectory() as scratch:
        _, shards = radiographs_and_shards(scratch, RADIOGRAPHS)
        found = {
            (head, workers): _train(
                shards, scratch, [*settings, f"compute.workers={workers}", f"compute.cpus_per_worker={cpus}"]
            )
            for head, settings in HEADS.items()
            for workers, cpus in ((1, 2), (2, 1))
        }
    steps = {head: found[head, 2] | {"computing": BATCH / found[head, 1]["images_per_second"]} for head in HEADS}
    return Part([*_wire(steps), *_model(steps)], steps)


def _train(shards: str, scratch: str, settings: list[str]) -> dict[str, float]:
    """Images/s and bytes sent a step, of the later epochs."""
    storage = tempfile.mkdtemp(dir=scratch)
    command = [sys.executable, "job/train.py", "--shards", shards, "--storage", storage, "--run", "r"]
    for setting in [f"training.epochs={EPOCHS}", *settings]:
        command += ["--set", setting]
    watched = watch(command, _sent)
    records = [json.loads(line) for line in Path(storage, "runs/r/metrics.jsonl").read_text().splitlines()]
    manifest = json.loads(Path(shards, "dataset.json").read_text())
    rows = sum(shard["rows"] for shard in manifest["shards"]["train"])
    steps = -(-rows // BATCH)
    sent = [after - before for before, after in pairwise(watched.marks)]
    return {
        "images_per_second": statistics.median(record["images_per_second"] for record in records[1:]),
        "bytes_a_step": statistics.median(sent) / steps,
        "parameters": float(re.search(r"([\d,]+) parameters", watched.text)[1].replace(",", "")),
    }


def _sent() -> float:
    """Bytes over the loopback so far: the workers', and Ray's own talk."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return float(line.split()[9])


def _wire(steps: dict[str, dict[str, float]]) -> list[str]:
    lines = [
        "| head | MB of gradients | MB sent a step by 2 workers | images/s of 2 workers, 1 core each | of 1, 2 cores |",
        "|---|---|---|---|---|",
    ]
    for head, step in steps.items():
        lines.append(
            f"| {head} | {4 * step['parameters'] / 1e6:.1f} | {step['bytes_a_step'] / 1e6:.1f} | "
            f"{step['images_per_second']:.1f} | {BATCH / step['computing']:.1f} |"
        )
    return lines


def _model(steps: dict[str, dict[str, float]]) -> list[str]:
    columns = [(head, network) for head in steps for network in NETWORKS]
    lines = []
    each = (
        ("on each worker", WORKERS, lambda workers: BATCH),
        ("in all", WORKERS[:-1], lambda workers: BATCH / workers),
    )
    for title, counts, images in each:
        lines += [
            "",
            f"A step of {BATCH} images {title}, in seconds, and the share of them that computes:",
            "",
            f"| workers | {' | '.join(f'{head}, {network}' for head, network in columns)} |",
            f"|---|{'---|' * len(columns)}",
        ]
        for workers in counts:
            cells = []
            for head, network in columns:
                computing = steps[head]["computing"] * images(workers) / BATCH
                total = computing + _sending(4 * steps[head]["parameters"], workers, *NETWORKS[network])
                cells.append(f"{total:.2f} ({computing / total:.0%})")
            lines.append(f"| {workers} | {' | '.join(cells)} |")
    return lines


def _sending(size: float, workers: int, bandwidth: float, latency: float) -> float:
    """Seconds of a ring's all-reduce of so many bytes: https://doi.org/10.1016/j.jpdc.2008.09.002"""
    return 2 * (workers - 1) * (size / workers / bandwidth + latency)
