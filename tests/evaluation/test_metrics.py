import numpy as np
import pytest

from fracture.evaluation.metrics import compute_metrics


def test_worked_numbers():
    labels = np.array([1, 1, 1, 0, 0, 0, 0])
    probabilities = np.array([0.9, 0.6, 0.2, 0.7, 0.5, 0.3, 0.1])
    m = compute_metrics(labels, probabilities, 0.5)
    assert (m.images, m.true_positives, m.false_positives, m.true_negatives, m.false_negatives) == (7, 2, 2, 2, 1)
    assert m.accuracy == pytest.approx(4 / 7)
    assert m.precision == pytest.approx(2 / 4)
    assert m.recall == pytest.approx(2 / 3)
    assert m.specificity == pytest.approx(2 / 4)
    assert m.auc == pytest.approx(8 / 12)  # pairs in the right order: 4 + 3 + 1 of 3 × 4
    assert m.loss == pytest.approx(-np.mean(np.log([0.9, 0.6, 0.2, 0.3, 0.5, 0.7, 0.9])))


def test_a_probability_at_the_threshold_is_a_fracture():
    assert compute_metrics(np.array([1]), np.array([0.5]), 0.5).true_positives == 1


def test_what_is_undefined_is_none_and_not_zero():
    m = compute_metrics(np.array([0, 0]), np.array([0.1, 0.2]), 0.5)
    assert (m.precision, m.recall, m.auc) == (None, None, None)
    assert (m.accuracy, m.specificity) == (1, 1)
