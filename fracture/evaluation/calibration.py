"""What validation decides after training: how sure the model may sound, and from where on it calls a fracture."""

import numpy as np
import pyarrow as pa
from pydantic import BaseModel
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit, logit
from sklearn.metrics import roc_curve

from fracture.config import EvaluationConfig
from fracture.evaluation.metrics import bounded


class Decision(BaseModel):
    """Made on validation, kept in the bundle, used on test."""

    temperature: float  # logits are divided by it
    threshold: float  # of the calibrated probability
    rule: str


def decide(scores: pa.Table, config: EvaluationConfig) -> Decision:
    """Temperature and threshold from the scores of validation, before calibration."""
    labels, groups = scores["label"].to_numpy(), scores["group"].to_numpy()
    raw = scores["probability"].to_numpy()
    temperature = fit_temperature(labels, raw, groups)
    threshold, rule = choose_threshold(labels, apply_temperature(raw, temperature), groups, config)
    return Decision(temperature=temperature, threshold=threshold, rule=rule)


def group_weights(groups: np.ndarray) -> np.ndarray:
    """[N] float64: each group weighs 1 in all, so that a family of a hundred copies does not decide."""
    _, position, size = np.unique(groups, return_inverse=True, return_counts=True)
    return 1 / size[position]


def fit_temperature(labels: np.ndarray, probabilities: np.ndarray, groups: np.ndarray) -> float:
    """The temperature with the least cross-entropy (Guo et al. 2017, https://arxiv.org/abs/1706.04599).

    Each group counts once. Within [1/20, 20]: a validation set that is told apart without an error has no best one.
    """
    logits = logit(bounded(probabilities))
    signed, weights = np.where(labels.astype(bool), logits, -logits), group_weights(groups)
    found = minimize_scalar(
        lambda t: -np.average(log_expit(signed / np.exp(t)), weights=weights),
        bounds=(-np.log(20), np.log(20)),
        method="bounded",
    )
    return float(np.exp(found.x))


def apply_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    logits = logit(bounded(probabilities))
    return expit(logits / temperature).astype(np.float32)


def choose_threshold(
    labels: np.ndarray, probabilities: np.ndarray, groups: np.ndarray, config: EvaluationConfig
) -> tuple[float, str]:
    """(threshold, rule in words), by the rule of the configuration; each group counts once."""
    if config.threshold_rule == "given":
        return config.threshold, f"given: {config.threshold:g}"
    false_rate, true_rate, thresholds = roc_curve(
        labels, probabilities, sample_weight=group_weights(groups), drop_intermediate=False
    )
    finite = np.isfinite(thresholds)
    false_rate, true_rate, thresholds = false_rate[finite], true_rate[finite], thresholds[finite]
    if config.threshold_rule == "youden":
        # Youden 1950, doi:10.1002/1097-0142(1950)3:1<32::AID-CNCR2820030106>3.0.CO;2-3
        at = int(np.argmax(true_rate - false_rate))
        return float(thresholds[at]), "highest sensitivity + specificity on validation (Youden)"
    at = int(np.argmax(true_rate >= config.min_sensitivity - 1e-12))
    return float(thresholds[at]), f"highest with a sensitivity of at least {config.min_sensitivity:g} on validation"
