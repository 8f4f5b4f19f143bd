"""Peer (c): our network and our input in one process, `fit` without Ray and without a strategy.

python -m tests.benchmarks.peers.plain_keras SHARDS EPOCHS [KEY=VALUE ...]
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from fracture.config import load_config
from fracture.dataset.augment import augment
from fracture.dataset.format import Dataset, read_manifest
from fracture.dataset.pipeline import load_worker_rows, training_batches
from fracture.dataset.sampler import BalancedSampler
from fracture.dataset.sharding import ShardedBatches
from fracture.models import build_model
from fracture.storage import storage_path
from fracture.training.precision import choose_precision


class AugmentingModel(keras.Model):
    """A model whose `fit` takes our training batches."""

    def train_step(self, data: Any) -> dict[str, Any]:
        inputs, labels, _ = data
        return super().train_step((augment(*inputs), labels))


def prepare(folder: str, assignments: list[str]) -> tuple[Callable[[int], None], int, int]:
    """A function that trains one epoch, how many steps that has, and how many images."""
    config = load_config(None, assignments)
    shards = storage_path(folder)
    manifest = read_manifest(shards)
    keras.config.set_dtype_policy(choose_precision(config.training.precision))
    index = Dataset(shards, manifest).read_columns("train", ["radiograph_id", "label"])
    sampler = BalancedSampler(index["radiograph_id"].to_numpy(), index["label"].to_numpy(), config.training.sampling, 0)
    batches = ShardedBatches(sampler.count, config.training.batch_size)
    rows = load_worker_rows(Dataset(shards, manifest), "train", batches, sampler, config.training.epochs, memory=10**10)
    optimizer = keras.optimizers.Adam(config.training.learning_rate, weight_decay=config.training.weight_decay)
    network = build_model(config, manifest.pixel_mean, manifest.pixel_std, step=lambda: optimizer.iterations)
    model = AugmentingModel(network.inputs, network.outputs)
    model.compile(optimizer, "binary_crossentropy", metrics=["accuracy"])

    def train_epoch(epoch: int) -> None:
        model.fit(training_batches(rows, 0, epoch, config.augment), steps_per_epoch=rows.steps, verbose=0)

    return train_epoch, rows.steps, sampler.count


def main(folder: str, epochs: int, assignments: list[str]) -> float:
    train_epoch, _, images = prepare(folder, assignments)
    for epoch in range(epochs):
        started = time.monotonic()
        train_epoch(epoch)
    return images / (time.monotonic() - started)


if __name__ == "__main__":
    tf.config.threading.set_inter_op_parallelism_threads(2)
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])))
