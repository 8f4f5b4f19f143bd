"""Figures from labels and probabilities, counted exactly."""

from dataclasses import asdict, dataclass

import numpy as np
from sklearn.metrics import log_loss, roc_auc_score


@dataclass(frozen=True)
class Metrics:
    """Scores of one split; fracture is the positive class. Undefined ratios (0 / 0) are None."""

    images: int
    threshold: float
    true_positives: int
    false_positives: int
    true_negatives: int
    false_negatives: int
    accuracy: float
    precision: float | None
    recall: float | None  # sensitivity
    specificity: float | None
    auc: float | None
    loss: float  # binary cross-entropy

    def as_dict(self) -> dict[str, float | None]:
        return asdict(self)


def compute_metrics(labels: np.ndarray, probabilities: np.ndarray, threshold: float) -> Metrics:
    """A fracture is called at `probability >= threshold`.

    Args:
        labels: [N] of 0 and 1.
        probabilities: [N] in [0, 1].
    """
    called, truth = probabilities >= threshold, labels.astype(bool)
    tp, fp = int((called & truth).sum()), int((called & ~truth).sum())
    tn, fn = int((~called & ~truth).sum()), int((~called & truth).sum())
    both = 0 < truth.sum() < len(truth)
    return Metrics(
        images=len(labels),
        threshold=threshold,
        true_positives=tp,
        false_positives=fp,
        true_negatives=tn,
        false_negatives=fn,
        accuracy=(tp + tn) / len(labels),
        precision=_ratio(tp, tp + fp),
        recall=_ratio(tp, tp + fn),
        specificity=_ratio(tn, tn + fp),
        auc=float(roc_auc_score(truth, probabilities)) if both else None,
        loss=float(log_loss(truth, probabilities.astype(np.float64), labels=[False, True])),
    )


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
