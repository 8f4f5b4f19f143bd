"""Peer (a): how the reference README does it. Keras 3's `fit`, float32, image_dataset_from_directory, three layers.

python -m tests.benchmarks.peers.keras3 DIR SIZE EPOCHS          trains; images/s of the last epoch
python -m tests.benchmarks.peers.keras3 DIR SIZE EPOCHS input    only reads and augments
"""

import json
import sys
import time

import keras
import tensorflow as tf
from keras import layers

FILTERS = (64, 128, 256, 512)


def images(folder: str, size: int) -> tf.data.Dataset:
    return keras.utils.image_dataset_from_directory(
        f"{folder}/train",
        label_mode="binary",
        color_mode="grayscale",
        image_size=(size, size),
        batch_size=32,
        shuffle=True,
        seed=0,
        verbose=False,
    )


def augmentation() -> list[layers.Layer]:
    return [layers.RandomFlip("horizontal_and_vertical"), layers.RandomRotation(0.1), layers.RandomZoom(0.1)]


def network(size: int) -> keras.Model:
    stack: list[layers.Layer] = [layers.Input((size, size, 1)), layers.Rescaling(1 / 255)]
    for filters in FILTERS:
        stack += [
            layers.Conv2D(filters, 3, padding="same", activation="relu"),
            layers.BatchNormalization(),
            layers.MaxPooling2D(),
        ]
    stack += [layers.Flatten(), layers.Dense(256, activation="relu"), layers.Dropout(0.5)]
    return keras.Sequential([*stack, layers.Dense(1, activation="sigmoid")])


def main(folder: str, size: int, epochs: int, only_input: bool) -> float:
    data = images(folder, size)
    count = len(data.file_paths)
    augment = keras.Sequential(augmentation())
    batches = data.map(lambda x, y: (augment(x, training=True), y), num_parallel_calls=tf.data.AUTOTUNE).prefetch(2)
    model = network(size)
    model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
    for _ in range(epochs):
        if only_input:
            started = time.monotonic()
            for _ in batches:
                ended = time.monotonic()
        else:
            # Not until `fit` returns: it waits for the next waking of tf.data's tuning thread, up to a minute away.
            marks: list[float] = []
            clock = keras.callbacks.LambdaCallback(
                on_epoch_begin=lambda *_, marks=marks: marks.append(time.monotonic()),
                on_epoch_end=lambda *_, marks=marks: marks.append(time.monotonic()),
            )
            model.fit(batches, verbose=0, callbacks=[clock])
            started, ended = marks
    return count / (ended - started)


if __name__ == "__main__":
    speed = main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), "input" in sys.argv[4:])
    print(json.dumps(speed))
