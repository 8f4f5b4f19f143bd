"""The metrics of an epoch from sums, against Keras' own metrics."""

import keras
import numpy as np
import pytest

from fracture.training.metric_sums import SIZE, compute_metrics, sum_batch


def sums_of(labels: list[float], logits: list[float], weights: list[float] | None = None) -> np.ndarray:
    arrays = (np.array(values, np.float32) for values in (labels, logits, weights or [1.0] * len(labels)))
    return sum_batch(*arrays).numpy()


def test_a_worked_example():
    """Probabilities 0.9, 0.2, 0.6 and 0.3 of a fracture, a fracture, a normal and a normal."""
    logits = [float(np.log(p / (1 - p))) for p in (0.9, 0.2, 0.6, 0.3)]
    metrics = compute_metrics(sums_of([1, 1, 0, 0], logits, [1, 0, 0, 3]))
    assert metrics["loss"] == pytest.approx(-np.log([0.9, 0.2, 0.4, 0.7]).mean(), rel=1e-6)
    assert metrics["weighted_loss"] == pytest.approx(-(np.log(0.9) + 3 * np.log(0.7)) / 4, rel=1e-6)
    assert (metrics["accuracy"], metrics["precision"], metrics["recall"], metrics["auc"]) == (0.5, 0.5, 0.5, 0.5)


def test_keras_metrics_agree_over_batches_of_any_size():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 500).astype(np.float32)
    logits = (generator.normal(0, 2, 500) + labels).astype(np.float32)
    logits[:3] = (0.0, 60.0, -60.0)  # probabilities 0.5, 1 and 0, at the thresholds
    sums = sum(sums_of(labels[a:b], logits[a:b]) for a, b in ((0, 1), (1, 200), (200, 500)))
    metrics, probabilities = compute_metrics(sums), 1 / (1 + np.exp(-logits))
    for name, metric in (
        ("accuracy", keras.metrics.BinaryAccuracy()),
        ("precision", keras.metrics.Precision()),
        ("recall", keras.metrics.Recall()),
        ("auc", keras.metrics.AUC()),
    ):
        metric.update_state(labels, probabilities)
        assert metrics[name] == pytest.approx(float(metric.result()), abs=1e-6), name
    log_loss = np.logaddexp(0, logits.astype(np.float64)) - labels * logits
    assert metrics["loss"] == metrics["weighted_loss"] == pytest.approx(log_loss.mean(), rel=1e-6)


def test_a_metric_of_nothing_is_0_and_a_logit_that_is_not_finite_shows_in_the_loss():
    assert compute_metrics(np.zeros(SIZE)) == dict.fromkeys(
        ("loss", "weighted_loss", "accuracy", "precision", "recall", "auc"), 0.0
    )
    only_normal = compute_metrics(sums_of([0, 0], [-1.0, -2.0]))
    assert (only_normal["accuracy"], only_normal["precision"], only_normal["recall"], only_normal["auc"]) == (
        1,
        0,
        0,
        0,
    )
    assert not np.isfinite(compute_metrics(sums_of([0, 1], [0.0, float("nan")]))["loss"])
