"""How far a training step is from what the machine can do, and what the rest of it is.

  make bench ONLY=roof

Measured: this machine's rates for copying, for matrix products and for each convolution of the default network alone;
and by TensorFlow's profiler, what a step of it spends where. Computed: the operations and the bytes of a step, and the
time they would take at the best of these rates.
"""

import json
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fracture.config import ModelConfig
from tests.benchmarks.measure import Part, child, radiographs_and_shards, spread

SIZE, BATCH, ROUNDS, RADIOGRAPHS, CORES = 224, 32, 5, 400, 2
FORWARD, OF_INPUT, OF_FILTER = "forward", "gradient of the input", "gradient of the filter"
COPY = "copying memory, one thread, read and written"
HALF, FULL = "matrix product 4096³, bfloat16", "matrix product 4096³, float32"
GROUPS = {  # kernels of the profile -> row of the account
    FORWARD: r"Conv2D",
    OF_INPUT: r"Conv2DBackpropInput",
    OF_FILTER: r"Conv2DBackpropFilter",
    "max pooling, both ways": r"MaxPool\w*",
    "batch norm and ReLU, both ways": r"FusedBatchNorm\w*|Relu\w*",
    "augmentation: the affine transform": r"ImageProjectiveTransform\w*",
}
OTHER = "all else: casts, Adam, metrics, reading"


def run(data: str | None) -> Part:
    rates = child([sys.executable, "-m", __name__, "rates"], TF_CPP_MIN_LOG_LEVEL="3")
    with tempfile.TemporaryDirectory() as scratch:
        _, shards = radiographs_and_shards(scratch, RADIOGRAPHS)
        step = child([sys.executable, "-m", __name__, shards], TF_CPP_MIN_LOG_LEVEL="3")
    lines = [f"| alone, bfloat16, {CORES} cores | GFLOP/s, or GB/s |", "|---|---|"]
    lines += [f"| {name} | {spread(values)} |" for name, values in rates.items()]
    return Part([*lines, "", *_account(rates, step)], {"rates": rates, "step": step})


def convolutions() -> list[tuple[str, int, int, int]]:
    """(name, side, channels in, channels out) of the default network's."""
    channels = (1, *ModelConfig().filters)
    return [
        (f"{SIZE >> n}²×{channels[n]} to {channels[n + 1]}", SIZE >> n, channels[n], channels[n + 1])
        for n in range(len(channels) - 1)
    ]


def gflop(side: int, channels: int, filters: int) -> float:
    """Of a batch's 3×3 convolution; each of its two gradients takes as many."""
    return BATCH * 2 * 9 * side**2 * channels * filters / 1e9


def gigabytes() -> dict[str, float]:
    """That each row of the account must read and write: conv -> pool -> batch norm -> ReLU, in bfloat16."""
    read = Counter[str]()
    for _, side, channels, filters in convolutions():
        before, after = (2 * BATCH * side**2 * depth / 1e9 for depth in (channels, filters))
        pooled, chosen = after / 4, after / 8  # `chosen`: which pixel of the four it was, one byte
        read[FORWARD] += before + after
        read[OF_FILTER] += before + after
        read[OF_INPUT] += before + after if channels > 1 else 0  # the images need no gradient
        read["max pooling, both ways"] += 2 * (after + pooled + chosen)
        # Forward: once for mean and variance, once to normalise, and writes. Backward: ReLU reads two and writes one,
        # batch norm reads two twice and writes one.
        read["batch norm and ReLU, both ways"] += (3 + 3 + 5) * pooled
    read["augmentation: the affine transform"] = 2 * BATCH * SIZE**2 / 1e9
    return read


def _account(rates: dict[str, list[float]], step: dict[str, float]) -> list[str]:
    best = max(statistics.median(values) for name, values in rates.items() if name not in (COPY, FULL))
    copying = statistics.median(rates[COPY])
    work = {
        kind: sum(gflop(*shape) for _, *shape in convolutions() if kind != OF_INPUT or shape[1] > 1)
        for kind in (FORWARD, OF_INPUT, OF_FILTER)
    }
    moved = gigabytes()
    rows, roof = [], 0.0
    for name in (*GROUPS, OTHER):
        least = 1e3 * max(work.get(name, 0) / best, moved.get(name, 0) / copying)
        roof += least
        label = f"convolutions, {name}" if name in work else name
        rows.append(
            f"| {label} | {_or_none(work.get(name, 0), '.1f')} | {_or_none(moved.get(name, 0), '.2f')} | "
            f"{_or_none(least, '.0f')} | {step[name]:.0f} |"
        )
    total = sum(step.values())
    return [
        f"| a step of {BATCH} images, one operation at a time | GFLOP | GB to move | ms at the best rate | ms |",
        "|---|---|---|---|---|",
        *rows,
        f"| **together** | {sum(work.values()):.1f} | {sum(moved.values()):.2f} | {roof:.0f} | {total:.0f} |",
        "",
        f"The best rates are {best:.0f} GFLOP/s and {copying:.0f} GB/s. At them a step would take {roof:.0f} ms, "
        f"{1e3 * BATCH / roof:.1f} images/s; it takes {total:.0f} ms, {1e3 * BATCH / total:.1f} images/s: "
        f"{roof / total:.0%} of the roof.",
    ]


def _or_none(value: float, form: str) -> str:
    return format(value, form) if value else "–"


def measure_rates() -> dict[str, list[float]]:
    import numpy as np
    import tensorflow as tf

    tf.config.threading.set_inter_op_parallelism_threads(1)

    def rate(function: Callable[[], object], work: float) -> list[float]:
        function()
        values = []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            function()
            values.append(work / (time.perf_counter() - started))
        return values

    found: dict[str, list[float]] = {}
    source = np.ones(400_000_000, np.uint8)
    target = np.empty_like(source)
    found[COPY] = rate(lambda: np.copyto(target, source), 0.8)
    for name, kind in ((HALF, tf.bfloat16), (FULL, tf.float32)):
        a = tf.cast(tf.random.normal((4096, 4096)), kind)
        product = tf.function(tf.matmul)
        found[name] = rate(lambda product=product, a=a: product(a, a)[0, 0].numpy(), 2 * 4096**3 / 1e9)
    for name, side, channels, filters in convolutions():
        images, gradient, kernel = (
            tf.cast(tf.random.normal(shape), tf.bfloat16)
            for shape in ((BATCH, side, side, channels), (BATCH, side, side, filters), (3, 3, channels, filters))
        )
        same = {"strides": [1, 1, 1, 1], "padding": "SAME"}
        kinds = {
            FORWARD: lambda i=images, k=kernel, same=same: tf.raw_ops.Conv2D(input=i, filter=k, **same),
            OF_INPUT: lambda i=images, k=kernel, g=gradient, same=same: tf.raw_ops.Conv2DBackpropInput(
                input_sizes=i.shape, filter=k, out_backprop=g, **same
            ),
            OF_FILTER: lambda i=images, k=kernel, g=gradient, same=same: tf.raw_ops.Conv2DBackpropFilter(
                input=i, filter_sizes=k.shape, out_backprop=g, **same
            ),
        }
        for kind, operation in kinds.items():
            if kind != OF_INPUT or channels > 1:
                once = tf.function(operation)
                found[f"{name}, {kind}"] = rate(
                    lambda once=once: once()[0, 0, 0, 0].numpy(), gflop(side, channels, filters)
                )
    return found


def profile_step(shards: str) -> dict[str, float]:
    """Milliseconds a step spends in each row of the account; one process, one kernel at a time."""
    import tensorflow as tf

    from tests.benchmarks.peers.plain_keras import prepare

    tf.config.threading.set_intra_op_parallelism_threads(CORES)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    train_epoch, steps, _ = prepare(shards, [])
    train_epoch(0)
    with tempfile.TemporaryDirectory() as folder:
        tf.profiler.experimental.start(folder)
        train_epoch(1)
        tf.profiler.experimental.stop()
        events = _kernels(folder)
    found = dict.fromkeys((*GROUPS, OTHER), 0.0)
    for kernel, milliseconds in events:
        found[next((name for name, kernels in GROUPS.items() if re.fullmatch(kernels, kernel)), OTHER)] += milliseconds
    return {name: milliseconds / steps for name, milliseconds in found.items()}


def read_planes(folder: str) -> Any:
    """The planes of a profile, one for each device."""
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    space = xplane_pb2.XSpace()
    space.ParseFromString(next(Path(folder).rglob("*.xplane.pb")).read_bytes())
    return space.planes


def _kernels(folder: str) -> list[tuple[str, float]]:
    """(kind of kernel, milliseconds) of each that ran."""
    found = []
    for plane in read_planes(folder):
        for line in plane.lines:
            for event in line.events:
                name = re.fullmatch(r"[\w/.]+:(?:_MklNative)?(\w+)", plane.event_metadata[event.metadata_id].name)
                if name:
                    found.append((name[1], event.duration_ps / 1e9))
    return found


if __name__ == "__main__":
    print(json.dumps(measure_rates() if sys.argv[1] == "rates" else profile_step(sys.argv[1])))
