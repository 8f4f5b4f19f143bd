import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from fracture.evaluation.metrics import (
    auc_differences,
    auc_within_folds,
    average_by_radiograph,
    compute_metrics,
    join_studies,
    rate_differences,
)

LABELS = np.array([1, 1, 1, 0, 0, 0, 0])
PROBABILITIES = np.array([0.9, 0.6, 0.2, 0.7, 0.5, 0.3, 0.1])


def test_worked_numbers():
    m = compute_metrics(LABELS, PROBABILITIES, np.arange(7), 0.5)
    assert (m.unit, m.count, m.groups, m.threshold) == ("image", 7, 7, 0.5)
    assert (m.true_positives, m.false_positives, m.true_negatives, m.false_negatives) == (2, 2, 2, 1)
    expected = {
        "accuracy": 4 / 7,
        "precision": 2 / 4,
        "recall": 2 / 3,
        "specificity": 2 / 4,
        "npv": 2 / 3,
        "f1": 4 / 7,
        "auc": 8 / 12,  # pairs in the right order: 4 + 3 + 1 of 3 × 4
        "average_precision": (1 / 1 + 2 / 3 + 3 / 6) / 3,
        "sensitivity_at_90_specificity": 1 / 3,
        "specificity_at_95_sensitivity": 1 / 4,
        "brier": np.mean([0.01, 0.16, 0.64, 0.49, 0.25, 0.09, 0.01]),
        "loss": -np.mean(np.log([0.9, 0.6, 0.2, 0.3, 0.5, 0.7, 0.9])),
    }
    assert {name: m[name] for name in expected} == pytest.approx(expected)


def test_a_probability_at_the_threshold_is_a_fracture():
    assert compute_metrics(np.array([1]), np.array([0.5]), np.array([0]), 0.5).true_positives == 1


def test_what_is_undefined_is_none_and_not_zero():
    m = compute_metrics(np.array([0, 0]), np.array([0.1, 0.2]), np.array([0, 1]), 0.5)
    assert (m["precision"], m["recall"], m["auc"], m["sensitivity_at_95_specificity"]) == (None, None, None, None)
    assert m.figures["auc"].low is None
    assert (m["accuracy"], m["specificity"]) == (1, 1)


def test_a_radiograph_is_the_mean_of_its_images():
    first, (means,) = average_by_radiograph(
        np.array([1, 1, 0, 1]), np.array([5, 5, 7, -3]), np.array([0.2, 0.6, 0.1, 0.9])
    )
    assert dict(zip(first.tolist(), means.tolist(), strict=True)) == pytest.approx({3: 0.9, 0: 0.4, 2: 0.1})


def test_images_may_have_thresholds_of_their_own():
    m = compute_metrics(LABELS, PROBABILITIES, np.arange(7), np.array([0.5, 0.5, 0.1, 0.8, 0.8, 0.8, 0.8]))
    assert (m.threshold, m.true_positives, m.false_positives) == (None, 3, 0)
    assert m["auc"] == pytest.approx(8 / 12)


def test_copies_do_not_make_an_interval_narrower():
    """The interval of 50 radiographs, shown once or ten times each, is the same; of 500 it is narrower by √10."""
    generator = np.random.default_rng(0)
    labels = np.arange(500) % 2
    probabilities = np.clip(0.5 + 0.15 * (2 * labels - 1) + generator.normal(0, 0.3, 500), 0, 1)

    def width(rows: np.ndarray, groups: np.ndarray) -> float:
        figure = compute_metrics(labels[rows], probabilities[rows], groups, 0.5).figures["accuracy"]
        assert figure.low < figure.value < figure.high
        return figure.high - figure.low

    few, copied = np.arange(50), np.repeat(np.arange(50), 10)
    assert width(copied, copied) == pytest.approx(width(few, few), rel=0.05)
    assert width(few, few) / width(np.arange(500), np.arange(500)) == pytest.approx(10**0.5, rel=0.25)


def test_an_interval_of_a_proportion_is_what_theory_says():
    """90 of 100 right: a standard error of √(.9 · .1 / 100) = .03."""
    labels = np.ones(100, int)
    figure = compute_metrics(labels, np.r_[np.ones(90), np.zeros(10)], np.arange(100), 0.5).figures["recall"]
    assert (figure.high - figure.low) / 2 == pytest.approx(1.96 * 0.03, rel=0.1)


def test_three_of_three_right_is_not_certainty():
    """The exact bound: a sensitivity of .292 finds three of three in one sample of forty."""
    labels = np.array([1, 1, 1, 0, 0, 0])
    figures = compute_metrics(labels, labels * 0.9, np.arange(6), 0.5).figures
    for name in ("recall", "specificity", "auc", "precision"):
        assert (figures[name].value, figures[name].low, figures[name].high) == (1, pytest.approx(0.292, abs=1e-3), 1)
    assert compute_metrics(labels, labels * 0.4, np.arange(6), 0.5).figures["recall"].high == pytest.approx(
        0.708, abs=1e-3
    )


def test_intervals_are_the_same_every_time():
    one, other = (compute_metrics(LABELS, PROBABILITIES, np.arange(7), 0.5) for _ in range(2))
    assert one == other


@pytest.mark.parametrize("normals", [30, 37])
def test_all_in_the_right_order_is_an_auc_of_1_and_nothing_less(normals: int):
    """Sums of 1 / 30 make 0.9999999999999999, which would have no exact interval."""
    labels = np.r_[np.ones(2, int), np.zeros(normals, int)]
    auc = compute_metrics(labels, np.linspace(1, 0, normals + 2), np.arange(normals + 2), 0.5).figures["auc"]
    assert (auc.value, auc.low, auc.high) == (1, pytest.approx(0.025**0.5), 1)


def test_calibration_error_by_hand():
    """Bin .2–.3: two say .25, one is true: gap .25; bin .9–1: one says .95 and is true: gap .05."""
    m = compute_metrics(np.array([1, 0, 1]), np.array([0.25, 0.25, 0.95]), np.arange(3), 0.5)
    assert m["calibration_error"] == pytest.approx((2 * 0.25 + 1 * 0.05) / 3)


@pytest.mark.parametrize("seed", range(5))
def test_ranking_is_that_of_scikit_learn_ties_included(seed: int):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, 60)
    probabilities = np.round(np.clip(0.5 + 0.2 * (labels - 0.5) + generator.normal(0, 0.2, 60), 0, 1), 1)
    m = compute_metrics(labels, probabilities, np.arange(60), 0.5)
    assert m["auc"] == pytest.approx(roc_auc_score(labels, probabilities))
    assert m["average_precision"] == pytest.approx(average_precision_score(labels, probabilities))
    false_rate, true_rate, _ = roc_curve(labels, probabilities, drop_intermediate=False)
    assert m["sensitivity_at_90_specificity"] == pytest.approx(true_rate[false_rate <= 0.1 + 1e-12].max())
    assert m["specificity_at_95_sensitivity"] == pytest.approx(1 - false_rate[true_rate >= 0.95 - 1e-12].min())


def test_a_resample_counts_each_case_as_often_as_it_was_drawn():
    """Two groups: the four equally likely resamples have accuracies 1, ½, ½ and 0."""
    figure = compute_metrics(np.array([1, 1]), np.array([0.9, 0.1]), np.array([0, 1]), 0.5).figures["accuracy"]
    assert (figure.value, figure.low, figure.high) == (0.5, 0, 1)


def test_two_models_are_compared_on_the_same_resamples():
    """The second ranks one fracture below all normals: a third of the AUC of the pairs."""
    assert set(auc_differences(LABELS, PROBABILITIES, PROBABILITIES, np.arange(7))) == {0}
    perfect = np.where(LABELS == 1, 0.9, 0.5)
    slipped = perfect.copy()
    slipped[0] = 0.1
    found = auc_differences(LABELS, perfect, slipped, np.arange(7))
    assert found.min() == 0
    assert found.mean() == pytest.approx(1 / 3, abs=0.02)
    of_groups = auc_differences(LABELS, perfect, slipped, np.array([0, 0, 0, 1, 1, 2, 2]))
    assert of_groups == pytest.approx(1 / 3), "all fractures are drawn together"
    assert len(of_groups) < 1000, "without fractures there is no AUC"


def test_an_auc_within_folds_leaves_out_pairs_across_them():
    """Fold a has 2 of 2 pairs in order, fold b 1 and a tie of 2; across them every normal of a is ahead."""
    labels = np.array([1, 0, 0, 1, 1, 0])
    probabilities = np.array([0.9, 0.8, 0.8, 0.3, 0.2, 0.2])
    folds = np.array(["a", "a", "a", "b", "b", "b"])
    figure = auc_within_folds(labels, probabilities, np.arange(6), folds)
    assert figure.value == (2 + 1.5) / 4
    assert figure.low < figure.value < figure.high
    best = auc_within_folds(labels, labels * 1.0, np.arange(6), folds)
    assert (best.value, best.low, best.high) == (1, 0.025 ** (1 / 3), 1), "of 3 groups with a fracture, 3 without"
    assert auc_within_folds(labels, probabilities, np.arange(6), labels).value is None, "no fold has a pair"


def test_sensitivity_and_specificity_are_compared_in_pairs():
    """The first finds two of three fractures where the second finds one, and clears one normal less."""
    first, second = np.array([1, 1, 0, 1, 1, 0, 0], bool), np.array([1, 0, 0, 0, 1, 0, 0], bool)
    one_group = rate_differences(LABELS, first, second, np.zeros(7, int))
    assert one_group["recall"] == pytest.approx(1 / 3)
    assert one_group["specificity"] == pytest.approx(-1 / 4)
    resampled = rate_differences(LABELS, first, second, np.arange(7))
    assert resampled["recall"].mean() == pytest.approx(1 / 3, abs=0.03)
    assert set(np.sign(resampled["recall"])) == {0, 1}, "never worse in any resample"
    assert len(resampled["recall"]) < 1000, "without fractures there is no sensitivity"


def test_a_study_is_a_fracture_if_a_radiograph_is_and_has_the_largest_or_the_mean_probability():
    labels, studies = np.array([0, 1, 0, 0]), np.array([7, 7, 9, 9])
    probabilities = np.array([0.1, 0.5, 0.3, 0.2])
    first, of_study, [largest] = join_studies(labels, studies, "max", probabilities)
    assert (first.tolist(), of_study.tolist(), largest.tolist()) == ([0, 2], [1, 0], [0.5, 0.3])
    [means] = join_studies(labels, studies, "mean", probabilities)[2]
    assert means.tolist() == pytest.approx([0.3, 0.25])
