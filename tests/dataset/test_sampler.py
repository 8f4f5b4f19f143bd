from collections import Counter

import numpy as np
import pytest

from fracture.dataset.sampler import BalancedSampler, label_by_source, row_weights

SIZES = [40, 1, 1, 3, 5, 2, 1, 7]  # rows of each group; the first four are normal
GROUPS = np.repeat(np.arange(8), SIZES)
LABELS = (GROUPS >= 4).astype(int)
SHUFFLED = np.random.default_rng(0).permutation(len(GROUPS))


def by_radiograph(seed: int = 0) -> BalancedSampler:
    return BalancedSampler(GROUPS[SHUFFLED], LABELS[SHUFFLED], "radiograph", seed)


def test_by_image_each_row_is_drawn_once():
    sampler = BalancedSampler(GROUPS, LABELS, "image", 0)
    assert sampler.rows(3).tolist() == list(range(60))


@pytest.mark.parametrize("epoch", [0, 1, 17])
def test_by_radiograph_classes_are_alike_and_groups_within_them(epoch: int):
    rows = by_radiograph().rows(epoch)
    assert len(rows) == 60
    assert Counter(LABELS[SHUFFLED][rows].tolist()) == {0: 30, 1: 30}
    counts = Counter(GROUPS[SHUFFLED][rows].tolist())
    assert set(counts.values()) == {7, 8}, "30 samples over 4 groups"


def test_within_a_group_rows_take_turns_over_the_epochs():
    drawn = Counter()
    for epoch in range(16):
        drawn.update(by_radiograph().rows(epoch).tolist())
        for group in range(8):
            uses = [drawn[i] for i in np.flatnonzero(GROUPS[SHUFFLED] == group)]
            assert max(uses) - min(uses) <= 1
    per_group = {g: sum(drawn[i] for i in np.flatnonzero(GROUPS[SHUFFLED] == g)) for g in range(8)}
    assert set(per_group.values()) == {120}, "16 epochs of 30 samples over 4 groups, exactly"


def test_an_epoch_can_be_had_alone_and_the_seed_changes_it():
    assert by_radiograph().rows(5).tolist() == by_radiograph().rows(5).tolist()
    assert by_radiograph().rows(5).tolist() != by_radiograph(seed=1).rows(5).tolist()


def test_one_row_a_group_and_equal_classes_is_each_row_once():
    sampler = BalancedSampler(np.arange(20), np.arange(20) % 2, "radiograph", 0)
    assert sampler.rows(4).tolist() == list(range(20))


def test_one_class_alone():
    assert len(BalancedSampler(np.arange(5), np.zeros(5, int), "radiograph", 0).rows(0)) == 5


def test_weights_are_the_mean_samples_of_a_row():
    """60 rows, so 30 samples a class, and 4 radiographs in each: 7.5 for each radiograph, divided among its rows."""
    weights = row_weights(GROUPS, LABELS, "radiograph")
    assert np.allclose(weights, 7.5 / np.array(SIZES)[GROUPS])
    drawn = Counter()
    for epoch in range(80):
        drawn.update(BalancedSampler(GROUPS, LABELS, "radiograph", 0).rows(epoch).tolist())
    assert max(abs(drawn[i] / 80 - weights[i]) for i in range(60)) <= 1 / 80
    assert row_weights(GROUPS, LABELS, "image").tolist() == [1] * 60


def test_a_radiograph_under_both_labels_weighs_in_both_classes():
    weights = row_weights(np.array([7, 7, 7, 8]), np.array([0, 1, 1, 1]), "radiograph")
    assert weights.tolist() == [2, 0.5, 0.5, 1]


def test_by_source_each_class_of_each_source_is_alike():
    """Hospital a has 50 radiographs, b has 10: each class of each gets a quarter of the samples."""
    sources = np.array(["a"] * 50 + ["b"] * 10)
    labels = np.array([1] * 40 + [0] * 10 + [1] * 5 + [0] * 5)
    classes = label_by_source(labels, sources)
    assert classes.tolist() == [1] * 40 + [0] * 10 + [3] * 5 + [2] * 5
    rows = BalancedSampler(np.arange(60), classes, "source", 0).rows(0)
    assert Counter(classes[rows].tolist()) == {0: 15, 1: 15, 2: 15, 3: 15}
    assert row_weights(np.arange(60), classes, "source")[[0, 45, 50, 59]].tolist() == [15 / 40, 1.5, 3, 3]
