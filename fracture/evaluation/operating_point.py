"""The operating point, which validation chooses after training: calibration and threshold."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from pydantic import BaseModel
from scipy.special import expit, log_expit, logit

from fracture.config import EvaluationConfig
from fracture.evaluation.metrics import clip_probabilities


class OperatingPoint(BaseModel):
    """The threshold and the calibration it belongs to; chosen on validation, stored in the bundle, used on test."""

    temperature: float  # calibrated logit = logit / temperature + offset
    offset: float
    threshold: float  # a calibrated probability
    rule: str  # that chose the threshold, in words
    # A calibrated probability, not below `threshold`: from it on the outcome is "fracture", between the two "doubt".
    fracture_threshold: float | None = None  # None: of an earlier version, without doubt

    def calibrate(self, probabilities: np.ndarray) -> np.ndarray:
        """Return calibrated probabilities, float32; calibration keeps their order."""
        return calibrate(probabilities, self.temperature, self.offset)


def choose_operating_point(scores: pa.Table, config: EvaluationConfig, chosen_on: str = "validation") -> OperatingPoint:
    """Choose calibration and threshold from the uncalibrated scores of validation, or of what is named instead."""
    labels, radiograph_ids = scores["label"].to_numpy(), scores["radiograph_id"].to_numpy()
    raw = scores["probability"].to_numpy()
    temperature, offset = fit_calibration(labels, raw, radiograph_ids)
    calibrated = calibrate(raw, temperature, offset)
    threshold, rule = choose_threshold(labels, calibrated, radiograph_ids, config, chosen_on)
    specific = choose_fracture_threshold(labels, calibrated, radiograph_ids, config.min_specificity)
    return OperatingPoint(
        temperature=temperature,
        offset=offset,
        threshold=threshold,
        rule=rule,
        fracture_threshold=max(threshold, specific),
    )


def mean_operating_point(operating_points: Sequence[OperatingPoint]) -> OperatingPoint:
    """Return the operating point for the mean of calibrated probabilities: the mean of the models' thresholds.

    Without doubt where one of the models has none.
    """
    if len(operating_points) == 1:
        return operating_points[0]
    thresholds = [operating_point.threshold for operating_point in operating_points]
    listed = ", ".join(f"{threshold:.3f}" for threshold in thresholds)
    rule = f"the mean of the {len(thresholds)} models' own: {listed}"
    surely = [operating_point.fracture_threshold for operating_point in operating_points]
    return OperatingPoint(
        temperature=1.0,
        offset=0.0,
        threshold=float(np.mean(thresholds)),
        rule=rule,
        fracture_threshold=None if None in surely else float(np.mean(surely)),
    )


def radiograph_weights(radiograph_ids: np.ndarray) -> np.ndarray:
    """Return weights, [N] float64, that sum to 1 for each radiograph, so that copies do not count double."""
    _, position, size = np.unique(radiograph_ids, return_inverse=True, return_counts=True)
    return 1 / size[position]


def fit_calibration(labels: np.ndarray, probabilities: np.ndarray, radiograph_ids: np.ndarray) -> tuple[float, float]:
    """Fit the (temperature, offset) of the logits with the lowest cross-entropy; each radiograph counts once.

    A sampler that balances the classes shifts all logits, and a temperature alone (Guo et al. 2017,
    https://arxiv.org/abs/1706.04599) cannot shift them back. As in Platt scaling, the targets keep a distance from 0
    and 1 that shrinks with the number of radiographs. So a small validation set without a mistake does not make the
    model overconfident (Lin, Lin and Weng 2007, doi:10.1007/s10994-007-5018-6).
    """
    from scipy.optimize import minimize  # takes a second to load; training does not need it

    logits, weights, fractured = (
        logit(clip_probabilities(probabilities)),
        radiograph_weights(radiograph_ids),
        labels.astype(bool),
    )
    positives, negatives = weights[fractured].sum(), weights[~fractured].sum()
    targets = np.where(fractured, (positives + 1) / (positives + 2), 1 / (negatives + 2))

    def cross_entropy(parameters: np.ndarray) -> float:
        scaled = logits / np.exp(parameters[0]) + parameters[1]
        return -float(np.average(targets * log_expit(scaled) + (1 - targets) * log_expit(-scaled), weights=weights))

    found = minimize(cross_entropy, x0=[0.0, 0.0], bounds=[(-np.log(20), np.log(20)), (-10, 10)])
    return float(np.exp(found.x[0])), float(found.x[1])


def calibrate(probabilities: np.ndarray, temperature: float, offset: float) -> np.ndarray:
    """Return calibrated probabilities, float32."""
    return expit(logit(clip_probabilities(probabilities)) / temperature + offset).astype(np.float32)


def choose_threshold(
    labels: np.ndarray,
    probabilities: np.ndarray,
    radiograph_ids: np.ndarray,
    config: EvaluationConfig,
    chosen_on: str = "validation",
) -> tuple[float, str]:
    """Return (threshold, rule in words) by the configured rule; each radiograph counts once."""
    if config.threshold_rule == "given":
        return config.threshold, f"given: {config.threshold:g}"
    false_rate, true_rate, thresholds = _compute_rates(labels, probabilities, radiograph_ids)
    if config.threshold_rule == "youden":
        # Youden 1950, doi:10.1002/1097-0142(1950)3:1<32::AID-CNCR2820030106>3.0.CO;2-3
        best = int(np.argmax(true_rate - false_rate))
        return float(thresholds[best]), f"highest sensitivity + specificity on {chosen_on} (Youden)"
    first = int(np.argmax(true_rate >= config.min_sensitivity - 1e-12))
    return float(thresholds[first]), f"highest with a sensitivity of at least {config.min_sensitivity:g} on {chosen_on}"


def choose_fracture_threshold(
    labels: np.ndarray, probabilities: np.ndarray, radiograph_ids: np.ndarray, min_specificity: float
) -> float:
    """Return the lowest threshold with that specificity on validation, or the highest if none has it."""
    false_rate, _, thresholds = _compute_rates(labels, probabilities, radiograph_ids)
    reach = thresholds[false_rate <= 1 - min_specificity + 1e-12]
    return float(reach[-1] if len(reach) else thresholds[0])


def _compute_rates(
    labels: np.ndarray, probabilities: np.ndarray, radiograph_ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the false positive rate and the sensitivity at each threshold, the highest threshold first."""
    from sklearn.metrics import roc_curve

    rates = roc_curve(labels, probabilities, sample_weight=radiograph_weights(radiograph_ids), drop_intermediate=False)
    finite = np.isfinite(rates[-1])
    return tuple(each[finite] for each in rates)
