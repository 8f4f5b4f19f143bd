from dataclasses import replace

import numpy as np
import pytest

from fracture.config import AugmentConfig
from fracture.dataset.augment import augment
from fracture.dataset.format import Dataset
from fracture.dataset.pipeline import WorkerRows, evaluation_batches, load_worker_rows, training_batches
from fracture.dataset.sampler import BalancedSampler
from fracture.dataset.sharding import ShardedBatches
from fracture.errors import RunError
from tests.conftest import small_disk

WORKERS = (1, 2, 3, 7)


def worker_rows(
    shard_folder, split: str, workers: int, sampling: str = "image", memory: int = 10**9, **rows
) -> list[WorkerRows]:
    folder, manifest = shard_folder(**rows)
    index = Dataset(folder, manifest).read_columns(split, ["radiograph_id", "label"])
    sampler = BalancedSampler(index["radiograph_id"].to_numpy(), index["label"].to_numpy(), sampling, seed=0)
    return [
        load_worker_rows(
            Dataset(folder, manifest),
            split,
            ShardedBatches(sampler.count, 16, rank, workers),
            sampler,
            epochs=6,
            memory=memory,
        )
        for rank in range(workers)
    ]


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("rows", [150, 101])
def test_training_shows_each_row_once_in_three_shards(shard_folder, workers: int, rows: int):
    found = worker_rows(shard_folder, "train", workers, train=rows)
    batches = [list(training_batches(rows_of_one, 0, 3, AugmentConfig())) for rows_of_one in found]
    ids = [int(i) for worker in batches for (images, _, _), _, _ in worker for i in images[:, 0, 0, 0]]
    assert sorted(ids) == list(range(rows))
    assert {len(worker) for worker in batches} == {found[0].steps}


@pytest.mark.parametrize("workers", WORKERS)
def test_training_by_radiograph_shows_the_samples_of_the_epoch(shard_folder, workers: int):
    """51 normal rows and 50 fractured ones, each a group of its own: 101 samples, 50 and 51 of them."""
    found = worker_rows(shard_folder, "train", workers, sampling="radiograph", train=101)
    for epoch in (0, 5):
        batches = [list(training_batches(rows_of_one, 0, epoch, AugmentConfig())) for rows_of_one in found]
        ids = [int(i) for worker in batches for (images, _, _), _, _ in worker for i in images[:, 0, 0, 0]]
        assert sorted(ids) == found[0].sampler.rows(epoch).tolist()


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("rows", [1, 3, 64, 65])
def test_evaluation_shows_each_row_once_with_its_label_and_weight(shard_folder, workers: int, rows: int):
    seen = []
    for rows_of_one in worker_rows(shard_folder, "val", workers, val=rows):
        for images, labels, weights in evaluation_batches(rows_of_one, np.arange(rows, dtype=np.float32) / 4):
            seen += zip(images[:, 0, 0, 0].numpy(), labels[:, 0].numpy(), weights.numpy(), strict=True)
    assert sorted(seen) == [(i, i % 2, i / 4) for i in range(rows)]


@pytest.mark.parametrize("workers", WORKERS)
def test_weights_make_the_sum_over_workers_the_mean_over_rows(shard_folder, workers: int):
    found = worker_rows(shard_folder, "train", workers, train=101)
    steps = zip(*(training_batches(rows_of_one, 0, 0, AugmentConfig()) for rows_of_one in found), strict=True)
    for step in steps:
        rows = sum(len(labels) for _, labels, _ in step)
        for _, _, weights in step:
            assert np.allclose(weights, 1 / rows)


def test_an_epoch_can_be_had_again_alone_and_differs_from_the_next(shard_folder):
    rows_of_one = worker_rows(shard_folder, "train", 2)[1]

    def pixels(epoch: int, seed: int = 0) -> np.ndarray:
        batches = training_batches(rows_of_one, seed, epoch, AugmentConfig())
        return np.concatenate([augment(*drawn) for drawn, _, _ in batches])

    assert np.array_equal(pixels(4), pixels(4))
    assert not np.array_equal(pixels(4), pixels(5))
    assert not np.array_equal(pixels(4), pixels(4, seed=1))


def test_a_row_is_augmented_alike_on_any_number_of_workers(shard_folder):
    def all_images(workers: int) -> list[bytes]:
        found = worker_rows(shard_folder, "train", workers)
        batches = (b for rows_of_one in found for b in training_batches(rows_of_one, 0, 1, AugmentConfig()))
        return sorted(image.numpy().tobytes() for drawn, _, _ in batches for image in augment(*drawn))

    assert all_images(1) == all_images(3)


def test_shapes_and_types(shard_folder):
    rows_of_one = worker_rows(shard_folder, "train", 1)[0]
    (images, transforms, exposures), labels, weights = next(iter(training_batches(rows_of_one, 0, 0, AugmentConfig())))
    assert (images.shape, images.dtype) == ((13, 32, 32, 1), "uint8")  # 40 rows in 3 steps: 13, 14, 13
    assert (transforms.shape, exposures.shape) == ((13, 8), (13, 2))
    assert (labels.shape, labels.dtype) == ((13, 1), "float32")
    assert (weights.shape, weights.dtype) == ((13,), "float32")


def test_images_beyond_the_memory_come_from_a_file_and_are_the_same(shard_folder):
    """101 images of 1,024 bytes: a budget of a third of them."""
    in_memory, on_disk = (
        worker_rows(shard_folder, "train", 2, sampling="radiograph", memory=memory, train=101)[1]
        for memory in (101 * 1024, 33 * 1024)
    )
    assert isinstance(on_disk.images, np.memmap)
    assert not isinstance(in_memory.images, np.memmap)
    for a, b in zip(*(training_batches(s, 0, 2, AugmentConfig()) for s in (in_memory, on_disk)), strict=True):
        assert all(np.array_equal(x, y) for x, y in zip((*a[0], *a[1:]), (*b[0], *b[1:]), strict=True))


@pytest.mark.parametrize("side", [32, 33], ids=["bytes that eight divides", "bytes that it does not"])
def test_batches_are_the_same_where_the_images_are_on_the_device(shard_folder, side: int):
    on_host = worker_rows(shard_folder, "train", 2, train=101)[1]
    on_host = replace(on_host, images=np.pad(on_host.images, ((0, 0), (0, 0), (0, side - 32), (0, 0))))
    on_device = on_host.copy_to_device()
    batches = zip(*(training_batches(rows, 0, 2, AugmentConfig()) for rows in (on_host, on_device)), strict=True)
    for (drawn, labels, weights), (same, same_labels, same_weights) in batches:
        assert (same[0].dtype, same[0].shape) == ("int64", labels.shape[:1])
        taken = on_device.take(same[0])
        assert taken.dtype == "uint8"
        pairs = [(drawn[0], taken), (drawn[0], on_host.take(drawn[0])), (labels, same_labels), (weights, same_weights)]
        assert all(np.array_equal(a, b) for a, b in (*pairs, *zip(drawn[1:], same[1:], strict=True)))


def test_features_on_the_device_are_those_on_the_host(shard_folder):
    rows = worker_rows(shard_folder, "val", 1, val=20)[0]
    rows = replace(rows, images=np.random.default_rng(0).random((20, 2, 5), np.float32)).copy_to_device()
    assert np.array_equal(rows.take(np.array([3, 0, 19])), rows.images[[3, 0, 19]])


def test_a_worker_without_an_image_has_none_on_the_device(shard_folder):
    rows = next(rows for rows in worker_rows(shard_folder, "val", 7, val=1) if not len(rows.images)).copy_to_device()
    batch, _, _ = next(iter(evaluation_batches(rows, np.ones(1, np.float32))))
    assert rows.take(batch).shape == (0, 32, 32, 1)


def test_a_disk_too_small_for_the_images_is_told_before_reading(shard_folder, tmp_path, monkeypatch):
    with small_disk(tmp_path / "small", kilobytes=40) as disk:
        monkeypatch.setattr("tempfile.tempdir", str(disk))
        with pytest.raises(RunError, match=r"no room for 0.0001 GB of images in .*/small. Free space there"):
            worker_rows(shard_folder, "train", 1, memory=10, train=101)
        assert not list(disk.iterdir())
