"""Shards to batches: each worker's rows, shuffled and batched by tf.data, with what augmentation is to do to each.

Everything random is keyed by (seed, epoch, slot), never by what came before: an epoch can be had again alone. What an
epoch sees is decided by `draws`, which worker computes it by `slots`.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

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
class Share:
    """One worker's rows of one split: 50 kB an image of 224×224."""

    batches: ShardedBatches  # of the draws
    sampler: BalancedSampler
    first: int  # row of the split that `images` begins with
    images: np.ndarray  # [N, H, W, 1] uint8; in memory, or in a file on this machine's disk; or features: features.py
    labels: tf.Tensor  # [N] float32, 0 or 1

    @property
    def steps(self) -> int:
        return self.batches.steps

    def rows(self, seed: int | None, epoch: int) -> np.ndarray:
        """[steps, own slots] int64: which of `images` each step takes; -1 where a slot sits out."""
        indices = self.batches.indices(seed, epoch)
        drawn = self.sampler.rows(epoch)[self.batches.start : self.batches.stop] - self.first
        return np.where(indices >= 0, drawn[indices], -1) if len(drawn) else indices


def load_share(
    dataset: Dataset,
    split: str,
    batches: ShardedBatches,
    sampler: BalancedSampler,
    epochs: int,
    memory: int,
    each_block: Callable[[], None] = lambda: None,
) -> Share:
    """Reads every row that this worker will need in that many epochs: one stretch, a little longer than its slots.

    Args:
        memory: bytes of images to hold in memory. If there are more, they go to a file on this machine's disk, which
            the system keeps in what memory is free; batches are the same.
        each_block: is called after each row group that is read.

    Raises:
        RunError: neither the memory nor the disk has room for them.
    """
    drawn = [sampler.rows(epoch)[batches.start : batches.stop] for epoch in range(epochs)]
    first = min((int(rows[0]) for rows in drawn if len(rows)), default=0)
    stop = max((int(rows[-1]) + 1 for rows in drawn if len(rows)), default=0)
    shape = (stop - first, dataset.image_size, dataset.image_size, 1)
    labels: list[np.ndarray] = []

    def blocks() -> Iterator[np.ndarray]:
        for block in dataset.read_blocks(split, first, stop):
            labels.append(block["label"].to_numpy())
            yield images_of(block, dataset.image_size)
            each_block()

    images = _in_memory(blocks(), shape) if np.prod(shape) <= memory else _on_disk(blocks(), shape)
    with tf.device("CPU:0"):  # the whole share stays in host memory; batches go to the device
        known = tf.constant(np.concatenate(labels) if labels else [], tf.float32)
    assert len(known) == len(images) == stop - first
    return Share(batches, sampler, first, images, known)


def _in_memory(blocks: Iterable[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    images = np.empty(shape, np.uint8)
    row = 0
    for block in blocks:
        images[row : row + len(block)] = block
        row += len(block)
    return images


def _on_disk(blocks: Iterable[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """In a file without a name, which ends with this process, however that ends."""
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


def training_batches(share: Share, seed: int, epoch: int, augment: AugmentConfig, first: int = 0) -> tf.data.Dataset:
    """One epoch of draws, from step `first` on.

    Yields:
        (images [n, H, W, 1] uint8, transforms [n, 8] float32, exposures [n, 2] float32), labels [n, 1] float32,
        weights [n] float32. The images are as they are; whoever trains applies the other two on its own device, see
        `augment`. The weights make the mean over workers of each worker's mean loss the mean over the rows of the
        global batch, also where workers hold unequal numbers of them.
    """
    indices = share.rows(seed, epoch)  # [steps, slots]
    size = share.images.shape[1]
    own = (indices >= 0).sum(axis=1)
    weights = (own * share.batches.workers / share.batches.batch_rows()).astype(np.float32)  # [steps]
    transforms = np.zeros((*indices.shape, 8), np.float32)
    exposures = np.zeros((*indices.shape, 2), np.float32)
    first_slot = share.batches.rank * share.batches.batch_size // share.batches.workers
    for column in range(indices.shape[1]):
        generator = np.random.default_rng([seed, epoch, first_slot + column, 1])
        transforms[:, column] = draw_transforms(generator, len(indices), augment, size)
        exposures[:, column] = draw_exposures(generator, len(indices), augment)

    def batch(
        index: tf.Tensor, transforms: tf.Tensor, exposures: tf.Tensor, weight: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        present = index >= 0
        rows = tf.boolean_mask(index, present)
        images, labels = _gather(share, rows)
        drawn = (tf.boolean_mask(drawn, present) for drawn in (transforms, exposures))
        return (images, *drawn), labels, tf.fill(tf.shape(rows), weight)

    steps = (indices, transforms, exposures, weights)
    return _run_ahead(tf.data.Dataset.from_tensor_slices(tuple(array[first:] for array in steps)), batch)


def evaluation_batches(share: Share, weights: np.ndarray) -> tf.data.Dataset:
    """Each row once, in order, as it is.

    Args:
        weights: [rows of the split] float32.

    Yields:
        images [n, H, W, 1] uint8, labels [n, 1] float32, weights [n] float32.
    """
    own_weights = tf.constant(weights[share.first : share.first + len(share.images)])

    def batch(index: tf.Tensor) -> tuple[tf.Tensor, ...]:
        rows = tf.boolean_mask(index, index >= 0)
        return *_gather(share, rows), tf.gather(own_weights, rows)

    return _run_ahead(tf.data.Dataset.from_tensor_slices(share.rows(None, 0)), batch)


def _gather(share: Share, rows: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Images as the share has them and labels [n, 1] float32; NumPy's, since TensorFlow cannot gather from a file."""
    images = tf.numpy_function(lambda chosen: share.images[chosen], [rows], share.images.dtype, stateful=False)
    images = tf.ensure_shape(images, [None, *share.images.shape[1:]])
    return images, tf.gather(share.labels, rows)[:, tf.newaxis]


def _run_ahead(steps: tf.data.Dataset, batch: Callable[..., tuple[tf.Tensor, ...]]) -> tf.data.Dataset:
    """Maps steps to batches in order, two ahead of the training."""
    options = tf.data.Options()
    options.autotune.enabled = False  # nothing here to tune, and its thread delays the iterator's end: see strategy.py
    return steps.map(batch, num_parallel_calls=2, deterministic=True).prefetch(2).with_options(options)
