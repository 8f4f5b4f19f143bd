import numpy as np
import pyarrow as pa
import pytest
from scipy.special import expit

from fracture.config import EvaluationConfig
from fracture.evaluation.calibration import apply_temperature, choose_threshold, decide, fit_temperature, group_weights

EACH_ALONE = np.arange(10)
LABELS = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
PROBABILITIES = np.array([0.1, 0.2, 0.3, 0.4, 0.55, 0.35, 0.6, 0.7, 0.8, 0.9])


def test_a_model_that_is_too_sure_is_cooled_by_its_factor():
    """Labels drawn with probability expit(z), told as expit(3 z): the temperature is 3."""
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 2, 20000)
    labels = generator.random(20000) < expit(logits)
    assert fit_temperature(labels, expit(3 * logits), np.arange(20000)) == pytest.approx(3, rel=0.05)


def test_a_family_of_copies_counts_once():
    labels, raw = np.array([1, 0, 1, 0]), np.array([0.8, 0.3, 0.6, 0.55])
    alone = fit_temperature(labels, raw, np.arange(4))
    copied = np.r_[np.zeros(50, int), 1, 2, 3]
    assert fit_temperature(labels[copied], raw[copied], copied) == pytest.approx(alone, rel=1e-3)
    assert group_weights(np.array([7, 7, 9])).tolist() == [0.5, 0.5, 1]


def test_a_perfect_validation_set_gives_a_finite_temperature():
    assert 1 / 20 <= fit_temperature(LABELS[[0, 9]], PROBABILITIES[[0, 9]], np.arange(2)) <= 20


def test_temperature_moves_logits_not_ranks():
    assert apply_temperature(np.array([0.9]), 2.0)[0] == pytest.approx(expit(np.log(9) / 2))
    assert apply_temperature(np.array([0.0, 0.5, 1.0]), 1.0).tolist() == pytest.approx([0, 0.5, 1], abs=1e-6)


@pytest.mark.parametrize(
    ("config", "threshold", "rule"),
    [
        (EvaluationConfig(), 0.35, "highest with a sensitivity of at least 0.95 on validation"),
        (EvaluationConfig(min_sensitivity=0.8), 0.6, "highest with a sensitivity of at least 0.8 on validation"),
        (EvaluationConfig(threshold_rule="youden"), 0.6, "highest sensitivity + specificity on validation (Youden)"),
        (EvaluationConfig(threshold_rule="given", threshold=0.4), 0.4, "given: 0.4"),
    ],
)
def test_the_threshold_follows_its_rule(config, threshold, rule):
    assert choose_threshold(LABELS, PROBABILITIES, EACH_ALONE, config) == (pytest.approx(threshold), rule)


def test_the_threshold_is_of_the_calibrated_probability():
    scores = pa.table({"label": LABELS, "group": EACH_ALONE, "probability": PROBABILITIES.astype(np.float32)})
    decision = decide(scores, EvaluationConfig())
    calibrated = apply_temperature(PROBABILITIES, decision.temperature)
    assert decision.threshold == pytest.approx(calibrated[5], rel=1e-5)
    assert ((calibrated >= decision.threshold) & (LABELS == 1)).sum() == 5
