from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from fracture.config import load_config
from fracture.dataset.format import Dataset
from fracture.dataset.pipeline import WorkerRows
from fracture.dataset.sampler import BalancedSampler
from fracture.dataset.sharding import ShardedBatches
from fracture.errors import UsageError
from fracture.storage import storage_path
from fracture.training.checks import check_head
from fracture.training.features import average_cases, match_sources, mean_and_variance, measure_sources
from fracture.training.ridge_head import _choose_cases, _weigh
from tests.conftest import write_shards
from tests.training.test_features import on_workers

FEATURES = np.random.default_rng(0).normal(3, 2, (7, 2, 4)).astype(np.float32)
CASES = np.array([0, 2, 1, 0, -1, 2, 2])


def make_rows(rank: int = 0, workers: int = 1, first: int = 0, stop: int = 7, fractures: int = 4) -> WorkerRows:
    labels = (np.arange(7) < fractures).astype(int)
    sampler = BalancedSampler(np.arange(7), labels, "radiograph", seed=0)
    batches = ShardedBatches(7, 3, rank, workers)
    return WorkerRows(batches, sampler, first, FEATURES[first:stop], tf.constant(labels[first:stop], tf.float32))


@pytest.mark.parametrize("at_once", [1, 2, 5])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_case_is_the_mean_of_its_rows_and_views_however_many_workers_hold_them(workers: int, at_once: int):
    """Two workers hold rows 0 to 4 and 1 to 6: what both hold counts once."""
    held = [(0, 7)] if workers == 1 else [(0, 5), (1, 7)]
    found = on_workers(
        workers, lambda rank, add: average_cases(make_rows(rank, workers, *held[rank]), CASES, add, at_once)
    )
    expected = [FEATURES[np.equal(CASES, case)].mean((0, 1)) for case in range(3)]
    for averages in found:
        np.testing.assert_allclose(averages, expected, rtol=1e-6)


def test_sources_get_one_mean_and_variance():
    sources = np.array(["a", "b", "a", "b", "c", "a", "b"])
    rows = make_rows()

    def add(own: list[float]) -> list[float]:
        return own

    common = (np.full(4, 10.0), np.full(4, 4.0))
    moments = {name: mean_and_variance(rows, add, sources == name) for name in ("a", "b")}
    matched = match_sources(rows, sources, moments, common)
    for name in ("a", "b"):
        mean, variance = mean_and_variance(matched, add, sources == name)
        np.testing.assert_allclose(mean, common[0], rtol=1e-5)
        np.testing.assert_allclose(variance, common[1], rtol=2e-3)
    np.testing.assert_array_equal(matched.images[4], FEATURES[4], err_msg="of a source without moments")
    np.testing.assert_array_equal(rows.images, FEATURES, err_msg="the rows themselves stay")


def test_a_source_that_the_first_epoch_does_not_sample_has_no_moments():
    """The class of five fractures has four of seven samples: one is not sampled, the only image of its source."""
    rows = make_rows(fractures=5)
    [missed] = set(range(7)) - set(rows.sampler.rows(0).tolist())
    sources = np.where(np.arange(7) == missed, "small", "large")
    moments = measure_sources(rows, sources, lambda own: own)
    assert list(moments) == ["large"]
    np.testing.assert_allclose(moments["large"][0], FEATURES[rows.sampler.rows(0)].mean((0, 1)), rtol=1e-5)


def test_a_class_of_one_group_has_no_folds(tmp_path: Path):
    folder = storage_path(tmp_path)
    dataset = Dataset(folder, write_shards(folder, {"train": 40, "val": 16, "test": 16}))
    config = load_config(None, ["model.name=mobilenetv2", "transfer.head=ridge"])
    check_head(config, dataset)
    groups = dataset.manifest.groups | {"train": {"normal": 1, "fracture": 20}}
    few = Dataset(folder, dataset.manifest.model_copy(update={"groups": groups}))
    with pytest.raises(
        UsageError, match=r"transfer.head = ridge: .* has 1 group of normal images to train on, and fol"
    ):
        check_head(config, few)
    check_head(load_config(None, ["model.name=mobilenetv2"]), few)


def test_a_case_is_the_image_of_the_shortest_name():
    """Radiograph 5 has images under both labels, and is a case of each; of equal names the first counts."""
    ids, labels = np.array([5, 3, 5, 5, 3, 5]), np.array([1, 0, 0, 1, 0, 1])
    assert _choose_cases(ids, labels, np.array([9, 7, 5, 6, 7, 6]), seed=0).tolist() == [1, 2, 3]


def test_of_many_radiographs_some_are_chosen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fracture.training.ridge_head._MOST_CASES", 3)
    ids = np.repeat(np.arange(10), 2)
    chosen = _choose_cases(ids, ids % 2, np.ones(20), seed=0)
    assert len(chosen) == 3
    assert chosen.tolist() == sorted(chosen)
    assert all(row % 2 == 0 for row in chosen), "the first row of each"
    assert not np.array_equal(chosen, _choose_cases(ids, ids % 2, np.ones(20), seed=1))


def test_classes_weigh_alike():
    assert _weigh(np.array([0, 0, 0, 1])).tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2])
