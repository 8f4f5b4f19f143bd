"""From files to batches on one core: ours, and others' ways of reading the same images.

  make bench ONLY=reading

Every reader runs in a process of its own that may use one core. Memory: a worker whose images are three times the
memory that it may hold them in, against one that holds them all.
"""

import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fracture.config import AugmentConfig
from fracture.storage import storage_path
from tests.benchmarks.measure import Part, child, radiographs_and_shards, ratio, spread, take_turns

RADIOGRAPHS, SIZE, ROUNDS, BATCH = 1200, 224, 5, 32
OURS, PLAIN = "ours, augmented", "ours, as they are"
KERAS = "(a) image_dataset_from_directory, three layers"
RAY, RECORDS = "(d) Ray Data, iter_tf_batches of our shards", "(d) TFRecord with tf.data"
WANTED = ((OURS, KERAS, 4), (PLAIN, KERAS, 20), (PLAIN, RAY, 2))


def run(data: str | None) -> Part:
    with tempfile.TemporaryDirectory() as scratch:
        radiograph_ids, shards = radiographs_and_shards(scratch, RADIOGRAPHS)
        _on_one_core("write-records", shards, f"{scratch}/records")
        contestants: dict[str, Callable[[], float]] = {
            OURS: partial(_on_one_core, "ours", shards, "augmented"),
            PLAIN: partial(_on_one_core, "ours", shards, "plain"),
            KERAS: partial(_keras, radiograph_ids),
            RAY: partial(_on_one_core, "ray", shards),
            RECORDS: partial(_on_one_core, "records", f"{scratch}/records"),
        }
        figures = take_turns(contestants, ROUNDS)
        memory = {held: _on_one_core("memory", shards, held) for held in ("all", "third")}
    rows = [f"| {name} | {spread(values)} |" for name, values in figures.items()]
    ratios = [f"| {ours} / {peer} | {ratio(figures[ours], figures[peer])} | {least} |" for ours, peer, least in WANTED]
    lines = ["| reader, one core | images/s |", "|---|---|", *rows, ""]
    lines += ["| ratio | measured | wanted |", "|---|---|---|", *ratios, ""]
    lines += ["| a worker's images | MB of them | memory it takes beyond an empty set, MB |", "|---|---|---|"]
    lines += [f"| {held} in memory | {size:.0f} | {peak:.0f} |" for held, (size, peak) in memory.items()]
    return Part(lines, figures | {"memory": memory})


def _on_one_core(*arguments: str) -> float:
    command = ["taskset", "-c", "0", sys.executable, "-m", "tests.benchmarks.reading", *arguments]
    return child(command, TF_CPP_MIN_LOG_LEVEL="3", RAY_DATA_DISABLE_PROGRESS_BARS="1")


def _keras(radiograph_ids: str) -> float:
    command = ["taskset", "-c", "0", sys.executable, "-m", "tests.benchmarks.peers.keras3"]
    return float(child([*command, radiograph_ids, str(SIZE), "2", "input"], TF_CPP_MIN_LOG_LEVEL="3"))


def _timed(epochs: Iterable[Iterable[object]], images: int) -> float:
    """Images a second of the last epoch."""
    for epoch in epochs:
        started = time.monotonic()
        for _ in epoch:
            pass
    return images / (time.monotonic() - started)


def _worker_rows(folder: str, memory: int) -> Any:
    from fracture.dataset.format import Dataset, read_manifest
    from fracture.dataset.pipeline import load_worker_rows
    from fracture.dataset.sampler import BalancedSampler
    from fracture.dataset.sharding import ShardedBatches

    shards = storage_path(folder)
    manifest = read_manifest(shards)
    index = Dataset(shards, manifest).read_columns("train", ["radiograph_id", "label"])
    sampler = BalancedSampler(index["radiograph_id"].to_numpy(), index["label"].to_numpy(), "radiograph", 0)
    return load_worker_rows(
        Dataset(shards, manifest), "train", ShardedBatches(sampler.count, BATCH), sampler, 9, memory
    )


def ours(folder: str, how: str) -> float:
    """Reading the shards is part of the first epoch only, as in training; so it is counted in, a ninth of it each."""
    import tensorflow as tf

    from fracture.dataset.augment import augment
    from fracture.dataset.pipeline import evaluation_batches, training_batches

    started = time.monotonic()
    rows = _worker_rows(folder, 10**10)
    loading = time.monotonic() - started
    weights = np.ones(rows.sampler.count, np.float32)
    if how == "augmented":
        applied = tf.function(augment)
        epochs_of_batches = (training_batches(rows, 0, epoch, AugmentConfig()) for epoch in range(3))
        epochs = ((applied(*batch[0]) for batch in epoch) for epoch in epochs_of_batches)
    else:
        epochs = (evaluation_batches(rows, weights) for _ in range(3))
    speed = _timed(epochs, rows.sampler.count)
    return 1 / (1 / speed + loading / 9 / rows.sampler.count)


def ray_data(folder: str) -> float:
    import ray
    import ray.data

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    files = sorted(str(path) for path in Path(folder).glob("train-*.parquet"))
    data = ray.data.read_parquet(files, columns=["image", "label"])
    count = data.count()

    def to_arrays(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        images = np.frombuffer(b"".join(batch["image"]), np.uint8).reshape(-1, SIZE, SIZE, 1)
        return {"image": images, "label": batch["label"]}

    epochs = (
        data.map_batches(to_arrays, batch_size=BATCH).iter_tf_batches(
            batch_size=BATCH, local_shuffle_buffer_size=4 * BATCH
        )
        for _ in range(3)
    )
    return _timed(epochs, count)


def write_records(folder: str, file: str) -> float:
    import tensorflow as tf

    from fracture.dataset.format import Dataset, images_of, read_manifest

    manifest = read_manifest(storage_path(folder))
    with tf.io.TFRecordWriter(file) as writer:
        for block in Dataset(storage_path(folder), manifest).read_blocks("train", 0, manifest.rows("train")):
            for image, label in zip(images_of(block, SIZE), block["label"].to_pylist(), strict=True):
                features = {
                    "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[image.tobytes()])),
                    "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
                }
                writer.write(tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString())
    return 0.0


def records(file: str) -> float:
    import tensorflow as tf

    wanted = {"image": tf.io.FixedLenFeature([], tf.string), "label": tf.io.FixedLenFeature([], tf.int64)}

    def parse(examples: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        parsed = tf.io.parse_example(examples, wanted)
        return tf.reshape(tf.io.decode_raw(parsed["image"], tf.uint8), [-1, SIZE, SIZE, 1]), parsed["label"]

    count = sum(1 for _ in tf.data.TFRecordDataset(file))
    batches = tf.data.TFRecordDataset(file).shuffle(4 * BATCH).batch(BATCH).map(parse).prefetch(2)
    return _timed((batches for _ in range(3)), count)


def memory(folder: str, held: str) -> tuple[float, float]:
    """(MB of images, MB of memory that nothing but this process's end gives back), after two epochs of batches."""
    from fracture.dataset.pipeline import training_batches

    rows = _worker_rows(folder, 0)  # warms up all that is loaded with the first batch
    next(iter(training_batches(rows, 0, 0, AugmentConfig())))
    size = rows.images.nbytes
    del rows
    before = _own_memory()
    rows = _worker_rows(folder, size if held == "all" else size // 3)
    peak = before
    for epoch in range(2):
        for _ in training_batches(rows, 0, epoch, AugmentConfig()):
            peak = max(peak, _own_memory())
    return size / 1e6, (peak - before) / 1e6


def _own_memory() -> float:
    """Bytes; without the pages of files, which the system takes back when it needs them."""
    status = Path("/proc/self/status").read_text()
    return 1024.0 * int(re.search(r"RssAnon:\s+(\d+) kB", status)[1])


if __name__ == "__main__":
    os.sched_setaffinity(0, {0})
    asked = {"ours": ours, "ray": ray_data, "write-records": write_records, "records": records, "memory": memory}
    print(json.dumps(asked[sys.argv[1]](*sys.argv[2:])))
