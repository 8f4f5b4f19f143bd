"""What one GPU does, in at most six minutes.

make bench ONLY=gpu

Each stage is a process of its own, and prints its rows as they are measured: one that fails or takes too long costs no
other. Without a GPU everything is small, to try the benchmark itself.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil

from fracture.config import load_config
from tests.benchmarks.measure import Part, radiographs_and_shards
from tests.benchmarks.roof import read_planes

SECONDS = 360.0  # of all stages
TORCH = Path(".venv-torch/bin/python")

Row = tuple[str, float | str]


@dataclass(frozen=True)
class Sizes:
    image: int
    batches: tuple[int, ...]
    images: int  # that are there
    filters: tuple[int, ...]
    seconds: float  # that a row is timed
    radiographs: int


LARGE = Sizes(224, (32, 256, 1024), 4096, (64, 128, 256, 512), 1.0, 600)
SMALL = Sizes(32, (8, 16), 64, (4, 8), 0.1, 60)


def run(data: str | None) -> Part:
    ends, lines, figures = time.monotonic() + SECONDS, ["| what | measured |", "|---|---|"], {}
    for name, (_, seconds) in STAGES.items():
        left = min(seconds, ends - time.monotonic())
        print(f"  {name}", file=sys.stderr, flush=True)
        for what, value in _stage(name, left):
            figures[what] = value
            lines.append(f"| {what} | {value if isinstance(value, str) else f'{value:,.4g}'} |")
            print(f"    {what}: {value}", file=sys.stderr, flush=True)
    return Part(lines, figures)


def _stage(name: str, seconds: float) -> Iterator[Row]:
    """Yield the rows of a stage; the last one says so where it did not come to its end."""
    if seconds <= 0:
        yield name, "not measured: no time left"
        return
    with tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, "-m", __name__, name]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)
        late = threading.Timer(seconds, partial(_end, child.pid))
        late.start()
        for line in child.stdout:
            if line.startswith("["):
                what, value = json.loads(line)
                yield what, value
        code = child.wait()
        over = not late.is_alive()
        late.cancel()
        if code:
            errors.seek(0)
            last = (errors.read().strip().splitlines() or [f"exit status {code}"])[-1]
            yield name, f"not measured: {f'it took more than {seconds:.0f} s' if over else last[:200]}"


def _end(pid: int) -> None:
    with suppress(psutil.NoSuchProcess):
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def _sizes() -> Sizes:
    import fracture.models  # noqa: F401 - first: it keeps TensorFlow quiet as it loads

    import tensorflow as tf  # isort: skip

    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    return LARGE if gpus else SMALL


def _rate(call: Callable[[], Any], images: int, seconds: float) -> float:
    """Images a second of a call that takes so many, after a first one that compiles."""
    call()
    started, calls = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        call()
        calls += 1
    return calls * images / (time.perf_counter() - started)


def _phase_model(strategy: Any, sizes: Sizes, batch: int, xla: str, on_card: bool) -> Any:
    """The network, the optimizer and the data as a worker has them."""
    from fracture.dataset.pipeline import WorkerRows
    from fracture.dataset.sampler import BalancedSampler
    from fracture.dataset.sharding import ShardedBatches
    from fracture.training.checkpoint import LoopState
    from fracture.training.phase_model import build_phase_model
    from fracture.training.phases import list_phases
    from fracture.training.precision import choose_precision
    from fracture.training.setup import Worker

    import tensorflow as tf  # isort: skip

    config = load_config(
        None,
        [
            f"training.batch_size={batch}",
            f"training.xla={xla}",
            f"data.image_size={sizes.image}",
            f"model.filters={list(sizes.filters)}",
        ],
    )
    pixels = np.random.default_rng(0).integers(0, 256, (sizes.images, sizes.image, sizes.image, 1), np.uint8)
    labels = np.arange(sizes.images) % 2
    sampler = BalancedSampler(np.arange(sizes.images), labels, "image", 0)
    with tf.device("CPU:0"):
        rows = WorkerRows(
            ShardedBatches(sizes.images, batch), sampler, 0, pixels, tf.constant(labels.astype(np.float32))
        )
    manifest = SimpleNamespace(pixel_mean=60.0, pixel_std=50.0)
    assignment = SimpleNamespace(config=config, dataset=SimpleNamespace(manifest=manifest))
    free_memory = 8 * pixels.nbytes if on_card else 0  # training and validation are the same images, twice
    worker = Worker(assignment, 0, 1, None, strategy, rows, rows, np.ones(sizes.images), [], free_memory)
    state = LoopState(precision=choose_precision("auto"))
    return config, build_phase_model(worker, list_phases(config)[0], state)


def training() -> Iterator[Row]:
    sizes = _sizes()
    import tensorflow as tf

    for gpu in tf.config.list_physical_devices("GPU")[:1]:
        yield "card", str(tf.config.experimental.get_device_details(gpu).get("device_name", "unknown"))
    strategy = tf.distribute.MultiWorkerMirroredStrategy()  # as one worker has it
    for batch in sizes.batches:
        for xla in ("never", "always"):
            for on_card in (True, False):
                where = "data on the card" if on_card else "data on the host"
                for steps in (16, 1):
                    what = f"training, batch {batch}, {steps} steps a call, XLA {xla}, {where}: images/s (ms a step)"
                    try:
                        if steps == 16:
                            config, model = _phase_model(strategy, sizes, batch, xla, on_card)
                        rate = _training_rate(config, model, batch, steps, sizes.seconds)
                        yield what, f"{rate:,.0f} ({1000 * batch / rate:.2f})"
                    except Exception as error:  # the next row may do
                        yield what, f"not measured: {str(error).splitlines()[0][:150]}"


def _training_rate(config: Any, model: Any, batch: int, steps: int, seconds: float) -> float:
    from fracture.dataset.pipeline import training_batches

    batches = iter(training_batches(model.train, 0, 0, config.augment).repeat())
    return _rate(lambda: model.replica.train_steps(batches, steps), steps * batch, seconds)


def kernels() -> Iterator[Row]:
    """Forward and backward of the first block, in bfloat16."""
    sizes = _sizes()
    import tensorflow as tf

    from tests.benchmarks.kernels import VARIANTS

    batch = sizes.batches[1]
    images = tf.cast(tf.random.normal((batch, sizes.image, sizes.image, 1)), tf.bfloat16)
    kernel = tf.cast(tf.random.normal((3, 3, 1, sizes.filters[0])), tf.bfloat16)
    for name, block in VARIANTS.items():
        for xla in (False, True):

            def gradient(block: Any = block) -> Any:
                with tf.GradientTape() as tape:
                    tape.watch(kernel)
                    loss = tf.reduce_sum(tf.cast(block(images, kernel), tf.float32) ** 2)
                return tf.reduce_sum(tape.gradient(loss, kernel))

            what = f"first block, {name}, XLA {'on' if xla else 'off'}: ms of {batch} images"
            try:
                compiled = tf.function(gradient, jit_compile=xla)
                rate = _rate(lambda compiled=compiled: compiled().numpy(), batch, sizes.seconds / 2)
                yield what, 1000 * batch / rate
            except Exception as error:
                yield what, f"not measured: {str(error).splitlines()[0][:150]}"


def torch() -> Iterator[Row]:
    sizes = _sizes()
    python = sys.executable if find_spec("torch") else str(TORCH)
    for batch in sizes.batches[:2]:
        for mode in ("eager", "compiled"):
            command = [python, "tests/benchmarks/peers/torch_gpu.py", str(sizes.image), str(batch), str(sizes.seconds)]
            yield f"PyTorch, bfloat16, batch {batch}, {mode}: images/s", _figure([*command, mode])


def keras_fit() -> Iterator[Row]:
    """As the reference README has it, from files."""
    sizes = _sizes()
    with tempfile.TemporaryDirectory() as scratch:
        folder, _ = radiographs_and_shards(scratch, sizes.radiographs)
        command = [sys.executable, "-m", "tests.benchmarks.peers.keras3", folder, str(sizes.image), "2"]
        yield "Keras 3 fit, as the reference README has it, batch 32: images/s", _figure(command)


def _figure(command: list[str]) -> float | str:
    done = subprocess.run(command, env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}, capture_output=True, text=True)
    if done.returncode:
        return f"not measured: {(done.stderr.strip().splitlines() or ['?'])[-1][:150]}"
    return float(json.loads(done.stdout.splitlines()[-1]))


def scoring() -> Iterator[Row]:
    """In float32, as the exported model computes."""
    sizes = _sizes()
    from fracture.models import build_model

    config = load_config(None, [f"data.image_size={sizes.image}", f"model.filters={list(sizes.filters)}"])
    model = build_model(config, 60.0, 50.0)
    for batch in (16, 64, 256, 512):
        images = np.random.default_rng(0).integers(0, 256, (batch, sizes.image, sizes.image, 1), np.uint8)
        rate = _rate(partial(model.predict_on_batch, images), batch, sizes.seconds / 2)
        yield f"scoring, float32, batch {batch}: images/s", rate
    images = np.random.default_rng(0).integers(0, 256, (sizes.images, sizes.image, sizes.image, 1), np.uint8)
    yield "model.predict of an array: images/s", _rate(partial(model.predict, images, verbose=0), sizes.images, 0.1)


def profile() -> Iterator[Row]:
    """The kernels in which 16 steps spend most of the card's time."""
    sizes = _sizes()
    import tensorflow as tf

    from fracture.dataset.pipeline import training_batches

    batch, steps = sizes.batches[1], 16
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    config, model = _phase_model(strategy, sizes, batch, "always" if sizes is LARGE else "never", on_card=True)
    batches = iter(training_batches(model.train, 0, 0, config.augment).repeat())
    model.replica.train_steps(batches, steps)
    with tempfile.TemporaryDirectory() as folder:
        tf.profiler.experimental.start(folder)
        model.replica.train_steps(batches, steps)
        tf.profiler.experimental.stop()
        spent = _milliseconds_by_kernel(folder)
    for name, milliseconds in sorted(spent.items(), key=lambda kernel: -kernel[1])[:10]:
        yield f"kernel {name[:80]}: ms a step of {batch}", milliseconds / steps


def _milliseconds_by_kernel(folder: str) -> dict[str, float]:
    found = read_planes(folder)
    planes = [plane for plane in found if plane.name.startswith("/device:GPU")]
    spent: dict[str, float] = {}
    for plane in planes or [plane for plane in found if plane.name == "/host:CPU"]:
        for line in plane.lines:
            for event in line.events if not planes or line.name.startswith("Stream") else ():
                name = plane.event_metadata[event.metadata_id].name
                spent[name] = spent.get(name, 0.0) + event.duration_ps / 1e9
    return spent


def job() -> Iterator[Row]:
    """A whole run from shards; one whose worker is killed; and two workers on one card."""
    sizes = _sizes()
    from fracture.storage import storage_path
    from tests.conftest import write_shards

    with tempfile.TemporaryDirectory() as scratch:
        rows = {"train": sizes.images // 2, "val": sizes.images // 8, "test": sizes.images // 8}
        write_shards(storage_path(f"{scratch}/shards"), rows, image_size=sizes.image, rows_per_shard=1024)
        train = partial(_train, scratch, sizes)
        started = time.monotonic()
        undisturbed = train("whole", 1)
        training_seconds = sum(record["seconds"] for record in undisturbed)
        yield "a run of three epochs, from shards to the bundle: s", time.monotonic() - started
        yield "of these, in epochs: s", training_seconds
        killed = train("killed", 1, kill=True)
        yield "a worker killed after the first epoch: largest difference of a loss", _difference(undisturbed, killed)
        both = train("both", 2)
        yield "two workers on one card, over RING: largest difference of a loss", _difference(undisturbed, both)


def _train(scratch: str, sizes: Sizes, name: str, workers: int, kill: bool = False) -> list[dict[str, float]]:
    """Train three epochs; return the history.

    Two workers share the card as if they had none of their own: Ray leaves it visible to all, and the sums go over
    RING, since NCCL takes one process a card.
    """
    command = [sys.executable, "job/train.py", "--shards", f"{scratch}/shards", "--storage", scratch, "--run", name]
    settings = ["training.epochs=3", f"compute.workers={workers}", f"model.filters={list(sizes.filters)}"]
    # Batch norm has the statistics of each worker, and dropout the mask of each.
    settings += ["model.batch_norm=false", "model.dropout=0.0", f"data.image_size={sizes.image}"]
    command += [word for setting in settings for word in ("--set", setting)]
    if sizes is LARGE and workers == 1:
        command.append("--gpu")
    environment = os.environ | {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
    log = Path(scratch, "runs", name, "metrics.jsonl")
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while kill and child.poll() is None:
        if log.exists() and log.read_text().count("\n") >= 1:
            _kill_worker(child.pid)
            break
        time.sleep(0.05)
    _, errors = child.communicate()
    if child.returncode:
        raise RuntimeError(f"{name}: {errors.strip().splitlines()[-1][:200]}")
    return [json.loads(line) for line in log.read_text().splitlines()]


def _kill_worker(job: int) -> None:
    for process in psutil.Process(job).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                process.kill()
                return


def _difference(a: list[dict[str, float]], b: list[dict[str, float]]) -> float:
    return max(abs(x[key] - y[key]) for x, y in zip(a, b, strict=True) for key in ("loss", "val_loss"))


STAGES: dict[str, tuple[Callable[[], Iterator[Row]], float]] = {  # and the most seconds; the most important first
    "training": (training, 170),
    "torch": (torch, 60),
    "profile": (profile, 40),
    "job": (job, 150),
    "kernels": (kernels, 60),
    "scoring": (scoring, 40),
    "keras_fit": (keras_fit, 60),
}

if __name__ == "__main__":
    for row in STAGES[sys.argv[1]][0]():
        print(json.dumps(row), flush=True)
