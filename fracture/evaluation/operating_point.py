"""What validation decides after training: how sure the model may sound, and from where on it calls a fracture."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from pydantic import BaseModel
from scipy.special import expit, log_expit, logit

from fracture.config import EvaluationConfig
from fracture.evaluation.metrics import bounded


class OperatingPoint(BaseModel):
    """Made on validation, kept in the bundle, used on test."""

    temperature: float  # logits are divided by it,
    offset: float  # and then this is added
    threshold: float  # of the calibrated probability
    rule: str

    def calibrate(self, probabilities: np.ndarray) -> np.ndarray:
        """The model's own probabilities as calibrated ones, float32; their order stays."""
        return calibrate(probabilities, self.temperature, self.offset)


def choose_operating_point(scores: pa.Table, config: EvaluationConfig) -> OperatingPoint:
    """Calibration and threshold from the scores of validation as the model gives them."""
    labels, radiograph_ids = scores["label"].to_numpy(), scores["radiograph_id"].to_numpy()
    raw = scores["probability"].to_numpy()
    temperature, offset = fit_calibration(labels, raw, radiograph_ids)
    threshold, rule = choose_threshold(labels, calibrate(raw, temperature, offset), radiograph_ids, config)
    return OperatingPoint(temperature=temperature, offset=offset, threshold=threshold, rule=rule)


def mean_operating_point(decisions: Sequence[OperatingPoint]) -> OperatingPoint:
    """Of models whose calibrated probabilities are averaged: at the mean of their thresholds."""
    if len(decisions) == 1:
        return decisions[0]
    thresholds = [operating_point.threshold for operating_point in decisions]
    told = ", ".join(f"{threshold:.3f}" for threshold in thresholds)
    rule = f"the mean of the {len(thresholds)} models' own: {told}"
    return OperatingPoint(temperature=1.0, offset=0.0, threshold=float(np.mean(thresholds)), rule=rule)


def radiograph_weights(radiograph_ids: np.ndarray) -> np.ndarray:
    """[N] float64: each radiograph weighs 1 in all, so that a family of a hundred copies does not decide."""
    _, position, size = np.unique(radiograph_ids, return_inverse=True, return_counts=True)
    return 1 / size[position]


def fit_calibration(labels: np.ndarray, probabilities: np.ndarray, radiograph_ids: np.ndarray) -> tuple[float, float]:
    """The (temperature, offset) of the logits with the least cross-entropy, each radiograph counting once.

    Training may show both classes equally often, however rare one is, and with that shifts all logits: a temperature
    alone (Guo et al. 2017, https://arxiv.org/abs/1706.04599) could not shift them back. As in Platt scaling, the
    targets stay as far from 0 and 1 as so many radiographs can tell, so that a small validation set without a mistake
    does not make the model boundlessly sure (Lin, Lin and Weng 2007, doi:10.1007/s10994-007-5018-6).
    """
    from scipy.optimize import minimize  # a second to load, for which no training need wait

    logits, weights, fractured = logit(bounded(probabilities)), radiograph_weights(radiograph_ids), labels.astype(bool)
    positives, negatives = weights[fractured].sum(), weights[~fractured].sum()
    targets = np.where(fractured, (positives + 1) / (positives + 2), 1 / (negatives + 2))

    def cross_entropy(parameters: np.ndarray) -> float:
        scaled = logits / np.exp(parameters[0]) + parameters[1]
        return -float(np.average(targets * log_expit(scaled) + (1 - targets) * log_expit(-scaled), weights=weights))

    found = minimize(cross_entropy, x0=[0.0, 0.0], bounds=[(-np.log(20), np.log(20)), (-10, 10)])
    return float(np.exp(found.x[0])), float(found.x[1])


def calibrate(probabilities: np.ndarray, temperature: float, offset: float) -> np.ndarray:
    return expit(logit(bounded(probabilities)) / temperature + offset).astype(np.float32)


def choose_threshold(
    labels: np.ndarray, probabilities: np.ndarray, radiograph_ids: np.ndarray, config: EvaluationConfig
) -> tuple[float, str]:
    """(threshold, rule in words), by the rule of the configuration; each radiograph counts once."""
    if config.threshold_rule == "given":
        return config.threshold, f"given: {config.threshold:g}"
    from sklearn.metrics import roc_curve

    false_rate, true_rate, thresholds = roc_curve(
        labels, probabilities, sample_weight=radiograph_weights(radiograph_ids), drop_intermediate=False
    )
    finite = np.isfinite(thresholds)
    false_rate, true_rate, thresholds = false_rate[finite], true_rate[finite], thresholds[finite]
    if config.threshold_rule == "youden":
        # Youden 1950, doi:10.1002/1097-0142(1950)3:1<32::AID-CNCR2820030106>3.0.CO;2-3
        at = int(np.argmax(true_rate - false_rate))
        return float(thresholds[at]), "highest sensitivity + specificity on validation (Youden)"
    at = int(np.argmax(true_rate >= config.min_sensitivity - 1e-12))
    return float(thresholds[at]), f"highest with a sensitivity of at least {config.min_sensitivity:g} on validation"
