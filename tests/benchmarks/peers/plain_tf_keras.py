"""Peer (c): our network and our input in one process, `fit` without Ray and without a strategy.

python -m tests.benchmarks.peers.plain_tf_keras SHARDS EPOCHS [KEY=VALUE ...]
"""

import json
import sys
import time
from collections.abc import Callable

import tensorflow as tf
import tf_keras as keras

from fracture.config import load_config
from fracture.dataset.format import read_index, read_manifest
from fracture.dataset.pipeline import load_share, training_batches
from fracture.dataset.sampler import Draws
from fracture.dataset.sharding import Lanes
from fracture.models import build_model
from fracture.storage import place
from fracture.training.augmenting import AugmentingModel
from fracture.training.precision import choose_precision


def prepare(folder: str, assignments: list[str]) -> tuple[Callable[[int], None], int, int]:
    """A function that trains one epoch, how many steps that has, and how many images."""
    config = load_config(None, assignments)
    shards = place(folder)
    manifest = read_manifest(shards)
    keras.mixed_precision.set_global_policy(choose_precision(config.training.precision))
    index = read_index(shards, manifest, "train", ["film", "label"])
    draws = Draws(index["film"].to_numpy(), index["label"].to_numpy(), config.training.sampling, 0)
    lanes = Lanes(draws.count, config.training.batch_size)
    share = load_share(shards, manifest, "train", lanes, draws, config.training.epochs, memory=10**10)
    optimizer = keras.optimizers.Adam(config.training.learning_rate, weight_decay=config.training.weight_decay)
    network = build_model(config, manifest.pixel_mean, manifest.pixel_std, step=lambda: optimizer.iterations)
    model = AugmentingModel(network.inputs, network.outputs)
    model.compile(optimizer, "binary_crossentropy", metrics=["accuracy"])

    def train_epoch(epoch: int) -> None:
        model.fit(training_batches(share, 0, epoch, config.augment), steps_per_epoch=share.steps, verbose=0)

    return train_epoch, share.steps, draws.count


def main(folder: str, epochs: int, assignments: list[str]) -> float:
    train_epoch, _, images = prepare(folder, assignments)
    for epoch in range(epochs):
        started = time.monotonic()
        train_epoch(epoch)
    return images / (time.monotonic() - started)


if __name__ == "__main__":
    tf.config.threading.set_inter_op_parallelism_threads(2)
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])))
