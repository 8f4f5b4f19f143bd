import numpy as np
import pyarrow as pa
import pytest
from scipy.special import expit

from fracture.config import EvaluationConfig
from fracture.evaluation.operating_point import (
    OperatingPoint,
    calibrate,
    choose_fracture_threshold,
    choose_operating_point,
    choose_threshold,
    fit_calibration,
    mean_operating_point,
    radiograph_weights,
)

EACH_ALONE = np.arange(10)
LABELS = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
PROBABILITIES = np.array([0.1, 0.2, 0.3, 0.4, 0.55, 0.35, 0.6, 0.7, 0.8, 0.9])


def test_an_overconfident_model_gets_its_temperature():
    """Labels have the probability expit(z), the model says expit(3 z): the temperature is 3."""
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 2, 20000)
    labels = generator.random(20000) < expit(logits)
    temperature, offset = fit_calibration(labels, expit(3 * logits), np.arange(20000))
    assert temperature == pytest.approx(3, rel=0.05)
    assert offset == pytest.approx(0, abs=0.05)


def test_the_offset_undoes_balanced_training():
    """Nine normals to a fracture, and a model trained as if there were as many: the offset is log(1 / 9)."""
    generator = np.random.default_rng(0)
    labels = generator.random(40000) < 0.1
    evidence = np.where(labels, generator.normal(1, 2**0.5, 40000), generator.normal(-1, 2**0.5, 40000))
    temperature, offset = fit_calibration(labels, expit(evidence), np.arange(40000))
    assert temperature == pytest.approx(1, rel=0.05)
    assert offset == pytest.approx(np.log(1 / 9), abs=0.06)


def test_copies_count_once():
    labels, raw = np.array([1, 0, 1, 0]), np.array([0.8, 0.3, 0.6, 0.65])
    alone = fit_calibration(labels, raw, np.arange(4))
    copied = np.r_[np.zeros(50, int), 1, 2, 3]
    assert fit_calibration(labels[copied], raw[copied], copied) == pytest.approx(alone, rel=1e-3, abs=1e-3)
    assert radiograph_weights(np.array([7, 7, 9])).tolist() == [0.5, 0.5, 1]


def test_a_small_validation_set_without_a_mistake_does_not_make_the_model_overconfident():
    """15 of 15 right, at logits of ±1.5: no surer than (15 + 1) / (15 + 2)."""
    labels = np.arange(30) % 2
    temperature, offset = fit_calibration(labels, expit(np.where(labels, 1.5, -1.5)), np.arange(30))
    assert calibrate(expit(np.array([1.5])), temperature, offset)[0] == pytest.approx(16 / 17, abs=0.005)


def test_calibration_moves_logits_not_ranks():
    assert calibrate(np.array([0.9]), 2.0, 1.0)[0] == pytest.approx(expit(np.log(9) / 2 + 1))
    assert calibrate(np.array([0.0, 0.5, 1.0]), 1.0, 0.0).tolist() == pytest.approx([0, 0.5, 1], abs=1e-6)


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
    scores = pa.table({"label": LABELS, "radiograph_id": EACH_ALONE, "probability": PROBABILITIES.astype(np.float32)})
    operating_point = choose_operating_point(scores, EvaluationConfig())
    calibrated = operating_point.calibrate(PROBABILITIES)
    assert operating_point.threshold == pytest.approx(calibrated[5], rel=1e-5)
    assert ((calibrated >= operating_point.threshold) & (LABELS == 1)).sum() == 5


@pytest.mark.parametrize(
    ("min_specificity", "threshold"), [(0.8, 0.55), (0.9, 0.6), (0.5, 0.35), (1.0, 0.6), (0.01, 0.2)]
)
def test_the_fracture_threshold_is_the_lowest_of_that_specificity(min_specificity: float, threshold: float):
    found = choose_fracture_threshold(LABELS, PROBABILITIES, EACH_ALONE, min_specificity)
    assert found == pytest.approx(threshold)


def test_the_fracture_threshold_where_a_normal_has_the_highest_probability():
    assert choose_fracture_threshold(np.array([0, 1]), np.array([0.9, 0.4]), np.arange(2), 0.9) == 0.9


def test_there_is_no_doubt_where_the_threshold_has_the_specificity_already():
    scores = pa.table({"label": LABELS, "radiograph_id": EACH_ALONE, "probability": PROBABILITIES.astype(np.float32)})
    for specificity, rows in ((0.4, (5, 5)), (0.9, (5, 6))):
        found = choose_operating_point(scores, EvaluationConfig(min_specificity=specificity))
        calibrated = found.calibrate(PROBABILITIES)
        assert (found.threshold, found.fracture_threshold) == pytest.approx(tuple(calibrated[list(rows)]), rel=1e-5)


def test_averaged_models_use_the_mean_of_their_thresholds():
    one, other = (OperatingPoint(temperature=2.0, offset=0.1, threshold=t, rule="x") for t in (0.2, 0.5))
    joint = mean_operating_point([one, other])
    assert joint.threshold == pytest.approx(0.35)
    assert joint.rule == "the mean of the 2 models' own: 0.200, 0.500"
    assert joint.calibrate(np.array([0.3, 0.9])) == pytest.approx([0.3, 0.9]), "they are calibrated already"
    assert mean_operating_point([one]) == one
    assert joint.fracture_threshold is None
    sure, surer = one.model_copy(update={"fracture_threshold": 0.6}), other.model_copy(update={"fracture_threshold": 1})
    assert mean_operating_point([sure, surer]).fracture_threshold == pytest.approx(0.8)
    assert mean_operating_point([one, surer]).fracture_threshold is None, "of an earlier version"
