"""Figures from labels and probabilities, counted exactly, with intervals that know which images belong together."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from pydantic import BaseModel
from sklearn.metrics import auc, average_precision_score, roc_curve

RESAMPLES = 1000
_BINS = 10  # of the calibration error
_LEAST = 1e-7  # probabilities are kept this far from 0 and 1 for logarithms, as Keras does


class Figure(BaseModel):
    """A figure and its 95 % interval; None where it is undefined (0 / 0, or one class only)."""

    value: float | None
    low: float | None = None
    high: float | None = None


class Metrics(BaseModel):
    """Scores of one split; fracture is the positive class."""

    unit: str  # "image", or "radiograph": the mean probability over each group's images
    count: int  # of that unit
    groups: int
    threshold: float | None  # None where images have thresholds of their own
    true_positives: int
    false_positives: int
    true_negatives: int
    false_negatives: int
    figures: dict[str, Figure]

    def __getitem__(self, name: str) -> float | None:
        return self.figures[name].value


Evaluation = dict[str, Metrics]  # unit -> its figures


def as_json(evaluations: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Several evaluations by name, as plain values."""
    return {name: {unit: m.model_dump() for unit, m in evaluation.items()} for name, evaluation in evaluations.items()}


def compute_metrics(
    labels: np.ndarray,
    probabilities: np.ndarray,
    groups: np.ndarray,
    threshold: float | np.ndarray,
    unit: str = "image",
    resamples: int = RESAMPLES,
) -> Metrics:
    """All figures, with percentile intervals by bootstrap over groups (Efron 1979, doi:10.1214/aos/1176344552).

    A fracture is called at `probability >= threshold`. Images of one radiograph or patient are not independent, so
    whole groups are drawn, not images.

    Args:
        labels: [N] of 0 and 1; of images, or of radiographs as `by_radiograph` makes them.
        probabilities: [N] in [0, 1].
        groups: [N] int64.
        threshold: one for all, or [N] where models of several folds were pooled.
    """
    truth, called = labels.astype(bool), probabilities >= threshold
    values = _figures(truth, called, probabilities)
    intervals = _bootstrap(lambda rows: _figures(truth[rows], called[rows], probabilities[rows]), groups, resamples)
    counted = {
        "accuracy": np.ones_like(truth),
        "recall": truth,
        "specificity": ~truth,
        "precision": called,
        "npv": ~called,
    }
    cases = {name: len(np.unique(groups[rows])) for name, rows in counted.items()}
    cases["auc"] = min(cases["recall"], cases["specificity"])
    for name, count in cases.items():
        if values[name] in (0, 1) and name in intervals:
            intervals[name] = _exact(values[name], count)
    return Metrics(
        unit=unit,
        count=len(labels),
        groups=len(np.unique(groups)),
        threshold=float(threshold) if np.ndim(threshold) == 0 else None,
        true_positives=int((called & truth).sum()),
        false_positives=int((called & ~truth).sum()),
        true_negatives=int((~called & ~truth).sum()),
        false_negatives=int((~called & truth).sum()),
        figures={name: Figure(value=value, **intervals.get(name, {})) for name, value in values.items()},
    )


def by_radiograph(labels: np.ndarray, films: np.ndarray, *values: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """The row of each film's first image, and the values' means over its images.

    A film that stands under both labels counts under each.
    """
    pairs = np.stack([films, labels.astype(np.int64)])
    _, first, position, count = np.unique(pairs, axis=1, return_index=True, return_inverse=True, return_counts=True)
    return first, [np.bincount(position.ravel(), value) / count for value in values]


def _bootstrap(
    figures: Callable[[np.ndarray], dict[str, float | None]], groups: np.ndarray, resamples: int
) -> dict[str, dict[str, float]]:
    """95 % intervals of each figure over groups drawn with replacement; resamples without it are left out."""
    order = np.argsort(groups, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)
    generator = np.random.default_rng(0)
    drawn: dict[str, list[float]] = {}
    for _ in range(resamples):
        rows = np.concatenate([members[i] for i in generator.integers(0, len(members), len(members))])
        for name, value in figures(rows).items():
            if value is not None:
                drawn.setdefault(name, []).append(value)
    return {
        name: dict(zip(("low", "high"), np.percentile(values, [2.5, 97.5]).tolist(), strict=True))
        for name, values in drawn.items()
        if len(values) > resamples / 2
    }


def _exact(value: float, cases: int) -> dict[str, float]:
    """95 % interval where all cases or none are right, so that resampling finds nothing to vary.

    Clopper and Pearson 1934, doi:10.1093/biomet/26.4.404; cases are groups.
    """
    least = 0.025 ** (1 / cases)
    return {"low": least, "high": 1.0} if value == 1 else {"low": 0.0, "high": 1 - least}


def _figures(truth: np.ndarray, called: np.ndarray, probabilities: np.ndarray) -> dict[str, float | None]:
    tp, fp = int((called & truth).sum()), int((called & ~truth).sum())
    tn, fn = int((~called & ~truth).sum()), int((~called & truth).sum())
    clipped = bounded(probabilities)
    found = {
        "accuracy": _ratio(tp + tn, len(truth)),
        "precision": _ratio(tp, tp + fp),  # positive predictive value
        "recall": _ratio(tp, tp + fn),  # sensitivity
        "specificity": _ratio(tn, tn + fp),
        "npv": _ratio(tn, tn + fn),
        "f1": _ratio(2 * tp, 2 * tp + fp + fn),
        "brier": float(np.mean((probabilities - truth) ** 2)),
        "calibration_error": calibration_error(truth, probabilities),
        "loss": float(-np.mean(np.log(np.where(truth, clipped, 1 - clipped)))),
    }
    return found | _ranking(truth, probabilities)


def _ranking(truth: np.ndarray, probabilities: np.ndarray) -> dict[str, float | None]:
    names = ("auc", "average_precision")
    at = [(f"{a}_at_{b}_{c}", a, b / 100) for a, c in _OPPOSITES.items() for b in (90, 95)]
    if not 0 < truth.sum() < len(truth):
        return dict.fromkeys([*names, *(name for name, _, _ in at)])
    false_rate, true_rate, _ = roc_curve(truth, probabilities, drop_intermediate=False)
    found: dict[str, float | None] = {
        "auc": float(auc(false_rate, true_rate)),
        "average_precision": float(average_precision_score(truth, probabilities)),
    }
    for name, wanted, least in at:
        if wanted == "sensitivity":
            found[name] = float(true_rate[false_rate <= 1 - least + 1e-12].max())
        else:
            found[name] = float(1 - false_rate[true_rate >= least - 1e-12].min())
    return found


_OPPOSITES = {"sensitivity": "specificity", "specificity": "sensitivity"}


def calibration_error(truth: np.ndarray, probabilities: np.ndarray) -> float:
    """Expected calibration error over ten bins of equal width (Naeini et al. 2015, doi:10.1609/aaai.v29i1.9602)."""
    bins = np.minimum((probabilities * _BINS).astype(int), _BINS - 1)
    gaps = np.bincount(bins, weights=probabilities - truth, minlength=_BINS)
    return float(np.abs(gaps).sum() / len(truth))


def bounded(probabilities: np.ndarray) -> np.ndarray:
    """Probabilities whose logarithms are finite, float64."""
    return np.clip(probabilities.astype(np.float64), _LEAST, 1 - _LEAST)


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
