"""Shards to batches: each worker's rows, shuffled and batched by tf.data, with the random numbers of augmentation.

Everything random is keyed by (seed, epoch, slot), never by what came before, so that any epoch can be repeated alone.
The sampler chooses the rows of an epoch; `sharding` divides them among steps and workers.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import tensorflow as tf

from fracture.config import AugmentConfig
from fracture.dataset.augment import draw_exposures, draw_transforms
from fracture.dataset.format import Dataset, images_of
from fracture.dataset.sampler import BalancedSampler
from fracture.dataset.sharding import ShardedBatches
from fracture.errors import RunError
from fracture.storage import disk_full


@dataclass(frozen=True)
class WorkerRows:
    """One worker's rows of one split: 50 kB an image of 224×224."""

    batches: ShardedBatches  # of the sampled rows
    sampler: BalancedSampler
    first: int  # number in the split of the first of `images`
    images: np.ndarray  # [N, H, W, 1] uint8; in memory, or in a file on this machine's disk; or features: features.py
    labels: tf.Tensor  # [N] float32, 0 or 1
    on_device: tf.Tensor | None = None  # the bytes of `images`: see copy_to_device

    @property
    def steps(self) -> int:
        """Return the number of steps in an epoch."""
        return self.batches.steps

    def indices(self, seed: int | None, epoch: int) -> np.ndarray:
        """Return which of `images` each step takes: [steps, own slots] int64, -1 where a slot is idle."""
        indices = self.batches.indices(seed, epoch)
        sampled = self.sampler.rows(epoch)[self.batches.start : self.batches.stop] - self.first
        return np.where(indices >= 0, sampled[indices], -1) if len(sampled) else indices

    def copy_to_device(self) -> "WorkerRows":
        """Return the rows with a copy of their images in the memory of the device that trains.

        Batches then hold row numbers in place of images, and a step gathers its images there.
        """
        flat = np.ascontiguousarray(self.images).reshape(len(self.images), self._size).view(np.uint8)
        # Eight bytes as one number: TensorFlow has no kernel that gathers uint8 on a GPU.
        padded = np.pad(flat, ((0, 0), (0, -flat.shape[1] % 8))) if flat.shape[1] % 8 else flat
        return replace(self, on_device=tf.constant(padded.view(np.int64)))

    def take(self, batch: tf.Tensor) -> tf.Tensor:
        """Return the images of a batch, [n, H, W, 1], inside a step: `batch` itself, or those at its row numbers."""
        if self.on_device is None:
            return batch
        kind = self.images.dtype
        values = tf.reshape(tf.bitcast(tf.gather(self.on_device, batch), tf.uint8), [tf.shape(batch)[0], -1])
        values = values[:, : self._size * kind.itemsize]
        if kind.itemsize > 1:
            values = tf.bitcast(tf.reshape(values, [-1, self._size, kind.itemsize]), kind)
        return tf.reshape(values, [-1, *self.images.shape[1:]])

    @property
    def _size(self) -> int:
        """Return the number of values of an image."""
        return int(np.prod(self.images.shape[1:]))


def load_worker_rows(
    dataset: Dataset,
    split: str,
    batches: ShardedBatches,
    sampler: BalancedSampler,
    epochs: int,
    memory: int,
    each_block: Callable[[], None] = lambda: None,
) -> WorkerRows:
    """Read every row that this worker needs in so many epochs, and those of its slots: one stretch, a little longer.

    Args:
        memory: bytes of images to hold in memory. If there are more, they go to a file on this machine's disk, which
            the system caches in free memory; the batches are the same.
        each_block: is called after each row group that is read.

    Raises:
        RunError: neither the memory nor the disk has room for them.
    """
    sampled = [sampler.rows(epoch)[batches.start : batches.stop] for epoch in range(epochs)]
    first = min([batches.start, *(int(rows[0]) for rows in sampled if len(rows))])
    stop = max([batches.stop, *(int(rows[-1]) + 1 for rows in sampled if len(rows))])
    shape = (stop - first, dataset.image_size, dataset.image_size, 1)
    labels: list[np.ndarray] = []

    def blocks() -> Iterator[np.ndarray]:
        for block in dataset.read_blocks(split, first, stop):
            labels.append(block["label"].to_numpy())
            yield images_of(block, dataset.image_size)
            each_block()

    images = _in_memory(blocks(), shape) if np.prod(shape) <= memory else _on_disk(blocks(), shape)
    with tf.device("CPU:0"):  # all labels stay in host memory; batches go to the device
        all_labels = tf.constant(np.concatenate(labels) if labels else [], tf.float32)
    assert len(all_labels) == len(images) == stop - first
    return WorkerRows(batches, sampler, first, images, all_labels)


def _in_memory(blocks: Iterable[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Return the images in one array, without a second copy of all."""
    images = np.empty(shape, np.uint8)
    row = 0
    for block in blocks:
        images[row : row + len(block)] = block
        row += len(block)
    return images


def _on_disk(blocks: Iterable[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Write the images into a file without a name, which is gone when this process ends, however it ends."""
    with tempfile.TemporaryFile() as file:
        try:
            for block in blocks:
                file.write(block)
            file.flush()
        except OSError as error:
            if not disk_full(error, file):
                raise
            raise RunError(
                f"no room for {np.prod(shape) / 1e9:.2g} GB of images in {tempfile.gettempdir()}. Free space there, "
                "name another folder by TMPDIR, or raise compute.image_memory_gb"
            ) from None
        return np.memmap(file, np.uint8, "r", shape=shape)


def training_batches(
    rows: WorkerRows, seed: int, epoch: int, augment: AugmentConfig, first: int = 0
) -> tf.data.Dataset:
    """Return the batches of one epoch, from step `first` on.

    Yields:
        (images [n, H, W, 1] uint8, transforms [n, 8] float32, exposures [n, 2] float32), labels [n, 1] float32,
        weights [n] float32. The images are unchanged; the device that trains applies the other two, see `augment`. A
        weight is 1 / rows of the global batch, so that the weighted sum over all workers is the mean. Where the images
        are on the device, row numbers [n] int64 stand for them: see `WorkerRows.take`.
    """
    indices = rows.indices(seed, epoch)  # [steps, slots]
    size = rows.images.shape[1]
    weights = (1 / rows.batches.batch_rows()).astype(np.float32)  # [steps]
    transforms = np.zeros((*indices.shape, 8), np.float32)
    exposures = np.zeros((*indices.shape, 2), np.float32)
    first_slot = rows.batches.rank * rows.batches.batch_size // rows.batches.workers
    for column in range(indices.shape[1]):
        generator = np.random.default_rng([seed, epoch, first_slot + column, 1])
        transforms[:, column] = draw_transforms(generator, len(indices), augment, size)
        exposures[:, column] = draw_exposures(generator, len(indices), augment)

    def batch(
        index: tf.Tensor, transforms: tf.Tensor, exposures: tf.Tensor, weight: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        present = index >= 0
        chosen = tf.boolean_mask(index, present)
        images, labels = _gather(rows, chosen)
        augmentation = (tf.boolean_mask(values, present) for values in (transforms, exposures))
        return (images, *augmentation), labels, tf.fill(tf.shape(chosen), weight)

    steps = (indices, transforms, exposures, weights)
    return _run_ahead(tf.data.Dataset.from_tensor_slices(tuple(array[first:] for array in steps)), batch)


def evaluation_batches(rows: WorkerRows, weights: np.ndarray) -> tf.data.Dataset:
    """Return batches of each row once, in order, unchanged.

    Args:
        weights: of each row of the split, [rows] float32.

    Yields:
        images [n, H, W, 1] uint8, or row numbers as in training, labels [n, 1] float32, weights [n] float32.
    """
    own_weights = tf.constant(weights[rows.first : rows.first + len(rows.images)])

    def batch(index: tf.Tensor) -> tuple[tf.Tensor, ...]:
        chosen = tf.boolean_mask(index, index >= 0)
        return *_gather(rows, chosen), tf.gather(own_weights, chosen)

    return _run_ahead(tf.data.Dataset.from_tensor_slices(rows.indices(None, 0)), batch)


def _gather(rows: WorkerRows, chosen: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the chosen images, or their numbers where they are on the device, and labels [n, 1] float32."""
    labels = tf.gather(rows.labels, chosen)[:, tf.newaxis]
    if rows.on_device is not None:
        return chosen, labels
    # TensorFlow cannot gather from a file, NumPy can.
    images = tf.numpy_function(lambda chosen: rows.images[chosen], [chosen], rows.images.dtype, stateful=False)
    images = tf.ensure_shape(images, [None, *rows.images.shape[1:]])
    return images, labels


def _run_ahead(steps: tf.data.Dataset, batch: Callable[..., tuple[tf.Tensor, ...]]) -> tf.data.Dataset:
    """Map steps to batches in order, two ahead of the training."""
    options = tf.data.Options()
    # Nothing here to tune; and its thread sleeps up to a minute, for which an iterator that is dropped waits.
    options.autotune.enabled = False
    batch = tf.autograph.experimental.do_not_convert(batch)
    return steps.map(batch, num_parallel_calls=2, deterministic=True).prefetch(2).with_options(options)
