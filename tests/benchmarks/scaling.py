"""How far a training step is from what the machine can do, what it sends, and what that means for more machines.

  make bench ONLY=scaling

Measured: this machine's rates for the operations of a step, one by one; the step itself; the bytes it sends. Assumed:
that machines are alike, that a ring adds up gradients, and the networks' bandwidths and latency.
"""

import json
import re
import statistics
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from fracture.config import ModelConfig
from tests.benchmarks.measure import Part, child, films_and_shards, spread
from tests.benchmarks.watched import watch

SIZE, BATCH, ROUNDS, EPOCHS = 224, 32, 5, 3
HEADS = {"pooled": (), "flatten": ("model.head=flatten",)}
NETWORKS = {"10 Gbit/s": (10e9 / 8, 50e-6), "100 Gbit/s": (100e9 / 8, 20e-6)}  # assumed: bytes/s, s of latency a hop
WORKERS = (1, 2, 4, 8, 16, 32, 64)


def run(data: str | None) -> Part:
    roof = _roof()
    with tempfile.TemporaryDirectory() as scratch:
        _, shards = films_and_shards(scratch, 300)
        found = {head: _step(shards, scratch, settings) for head, settings in HEADS.items()}
    lines = ["| operation, 2 cores, bfloat16 unless said | GFLOP/s, or GB/s |", "|---|---|"]
    lines += [f"| {name} | {spread(values)} |" for name, values in roof.items()]
    lines += ["", *_account(roof, found["pooled"]["images_per_second"]), "", *_wire(found), "", *_model(found)]
    return Part(lines, {"roof": roof, "steps": found})


def convolutions() -> list[tuple[str, int, int, int]]:
    """(name, side, channels in, channels out) of the default network's."""
    sizes, channels = [], 1
    for number, filters in enumerate(ModelConfig().filters):
        sizes.append((f"conv{number + 1}", SIZE >> number, channels, filters))
        channels = filters
    return sizes


def gflop(side: int, channels: int, filters: int) -> float:
    """Of one image's forward 3×3 convolution."""
    return 2 * 9 * side**2 * channels * filters / 1e9


def _roof() -> dict[str, list[float]]:
    rates = child([sys.executable, "-m", "tests.benchmarks.scaling", "roof"], TF_CPP_MIN_LOG_LEVEL="3")
    return {name: [float(value) for value in values] for name, values in rates.items()}


def measure_roof() -> dict[str, list[float]]:
    import time

    import numpy as np
    import tensorflow as tf

    def rate(function: object, work: float) -> list[float]:
        function()  # type: ignore[operator]
        values = []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            for _ in range(4):
                function()  # type: ignore[operator]
            values.append(4 * work / (time.perf_counter() - started))
        return values

    found: dict[str, list[float]] = {}
    source = np.ones(400_000_000, np.uint8)
    target = np.empty_like(source)
    found["copying memory, one thread, read and written"] = rate(lambda: np.copyto(target, source), 0.8)
    for name, kind in (("matrix product 4096³", tf.bfloat16), ("matrix product 4096³, float32", tf.float32)):
        a = tf.cast(tf.random.normal((4096, 4096)), kind)
        product = tf.function(tf.matmul)
        found[name] = rate(lambda p=product, a=a: p(a, a).numpy()[0, 0], 2 * 4096**3 / 1e9)
    for name, side, channels, filters in convolutions():
        images = tf.cast(tf.random.normal((BATCH, side, side, channels)), tf.bfloat16)
        kernel = tf.cast(tf.random.normal((3, 3, channels, filters)), tf.bfloat16)

        @tf.function
        def forward(images: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
            return tf.nn.conv2d(images, kernel, 1, "SAME")

        @tf.function
        def backward(images: tf.Tensor, kernel: tf.Tensor) -> list[tf.Tensor]:
            with tf.GradientTape() as tape:
                tape.watch([images, kernel])
                out = tf.nn.conv2d(images, kernel, 1, "SAME")
            return tape.gradient(out, [images, kernel])

        work = BATCH * gflop(side, channels, filters)
        title = f"{name}, {side}²×{channels} to {filters}"
        found[f"{title}, forward"] = rate(lambda f=forward, a=images, k=kernel: f(a, k)[0, 0, 0, 0].numpy(), work)
        both = 2 if channels > 1 else 1  # the first has no gradient of its input to compute, in training
        found[f"{title}, gradients"] = rate(
            lambda f=backward, a=images, k=kernel: f(a, k)[1][0, 0, 0, 0].numpy(), both * work
        )
    return found


def _account(roof: dict[str, list[float]], images_per_second: float) -> list[str]:
    """Where a step's time goes, were it made of its convolutions alone at their measured rates."""
    lines = ["| of one image's step | GFLOP | ms at the measured rate |", "|---|---|---|"]
    total = 0.0
    for name, side, channels, filters in convolutions():
        forward = gflop(side, channels, filters)
        work = {"forward": forward, "gradients": forward * (2 if channels > 1 else 1)}
        for kind, flops in work.items():
            took = 1e3 * flops / statistics.median(roof[f"{name}, {side}²×{channels} to {filters}, {kind}"])
            total += took
            lines.append(f"| {name} {kind} | {flops:.2f} | {took:.1f} |")
    step = 1e3 / images_per_second
    lines += [f"| all convolutions | | {total:.1f} |", f"| the step, measured | | {step:.1f} |"]
    return [*lines, f"| what is not convolution | | {step - total:.1f} |"]


def _step(shards: str, scratch: str, settings: tuple[str, ...]) -> dict[str, float]:
    """Images/s and bytes sent a step, of the later epochs of a run on 2 workers."""
    storage = tempfile.mkdtemp(dir=scratch)
    command = [sys.executable, "job/train.py", "--shards", shards, "--storage", storage, "--run", "r"]
    for setting in (f"training.epochs={EPOCHS}", *settings):
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
    """Bytes over the loopback so far; the two workers, and Ray's own talk."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return float(line.split()[9])


def _wire(found: dict[str, dict[str, float]]) -> list[str]:
    lines = ["| head | MB of gradients | MB sent a step by 2 workers, measured |", "|---|---|---|"]
    for head, step in found.items():
        lines.append(f"| {head} | {4 * step['parameters'] / 1e6:.1f} | {step['bytes_a_step'] / 1e6:.1f} |")
    return lines


def _model(found: dict[str, dict[str, float]]) -> list[str]:
    """Seconds of a step of 32 images a worker, computed; nothing overlaps."""
    columns = [(head, network) for head in found for network in NETWORKS]
    lines = [
        "A step of 32 images on each worker, seconds, by the model: computing as measured, then a ring of all-reduce.",
        "",
        f"| workers | {' | '.join(f'{head}, {network}' for head, network in columns)} |",
        f"|---|{'---|' * len(columns)}",
    ]
    for workers in WORKERS:
        cells = []
        for head, network in columns:
            step, (bandwidth, latency) = found[head], NETWORKS[network]
            computing = BATCH / step["images_per_second"]
            sending = 2 * (workers - 1) / workers * 4 * step["parameters"] / bandwidth + 2 * (workers - 1) * latency
            cells.append(f"{computing + sending:.2f} ({computing / (computing + sending):.0%})")
        lines.append(f"| {workers} | {' | '.join(cells)} |")
    return [*lines, "", "In brackets: the share of it that computes."]


if __name__ == "__main__":
    print(json.dumps(measure_roof()))
