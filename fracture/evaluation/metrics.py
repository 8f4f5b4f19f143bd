"""Metrics from labels and probabilities, with intervals by bootstrap over groups of dependent images."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel

RESAMPLES = 1000
BINS = 10  # of the expected calibration error, equally wide
_EPSILON = 1e-7  # distance of clipped probabilities from 0 and 1, as in Keras


class Figure(BaseModel):
    """The value of a metric and its 95 % interval; None where it is undefined (0 / 0, or one class only)."""

    value: float | None
    low: float | None = None
    high: float | None = None


class MatchedFigure(Figure):
    """The AUC over the pairs of a fracture and a normal that are alike in a property other than the anatomy."""

    pairs: int  # that are alike
    all_pairs: int  # of the radiographs whose property is known
    plain: float | None  # AUC over all of them


class Outcomes(BaseModel):
    """How many radiographs of each class have which outcome: fracture, doubt or none."""

    counts: dict[str, dict[str, int]]  # class -> outcome -> units
    doubt: float  # share of all
    sensitivity: float | None  # among the fractures that are not in doubt; None without any
    specificity: float | None  # among the normals that are not in doubt
    unlike: float | None  # share of all that are unlike the training images; None where it is not known
    as_a_whole: bool = False  # whether they are unlike them as a whole, which puts every one in doubt


class Metrics(BaseModel):
    """The metrics of one split; fracture is the positive class."""

    unit: str  # "image", "radiograph", whose probability is the mean over its images, or "study"
    count: int  # number of units
    groups: int
    threshold: float | None  # None where images have different thresholds
    true_positives: int
    false_positives: int
    true_negatives: int
    false_negatives: int
    figures: dict[str, Figure]
    matched: dict[str, MatchedFigure] = {}  # property -> its figure; of test per radiograph, where properties are known
    outcomes: Outcomes | None = None  # of validation and test

    @property
    def counted(self) -> str:
        """Return the number of units with their name: "60 studies"."""
        return f"{self.count:,} {'studies' if self.unit == 'study' else f'{self.unit}s'}"

    @property
    def fewest(self) -> int:
        """Return the number of units of the class that has fewer."""
        fractures = self.true_positives + self.false_negatives
        return min(fractures, self.count - fractures)

    def __getitem__(self, name: str) -> float | None:
        return self.figures[name].value

    def without_cases(self) -> "Metrics":
        """Return the same figures, all undefined, of a model that was not tested."""
        return Metrics(
            unit=self.unit,
            count=0,
            groups=0,
            threshold=None,
            **dict.fromkeys(_CELLS, 0),
            figures={name: Figure(value=None) for name in self.figures},
        )


Evaluation = dict[str, Metrics]  # unit -> metrics


def as_json(evaluations: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Return evaluations, by name, as values that JSON can hold."""
    return {name: {unit: m.model_dump() for unit, m in evaluation.items()} for name, evaluation in evaluations.items()}


def compute_metrics(
    labels: np.ndarray,
    probabilities: np.ndarray,
    groups: np.ndarray,
    threshold: float | np.ndarray,
    unit: str = "image",
    resamples: int = RESAMPLES,
) -> Metrics:
    """Compute all metrics, with percentile intervals by bootstrap over groups (Efron 1979, doi:10.1214/aos/1176344552).

    The model calls a fracture at `probability >= threshold`. Images of one radiograph or patient are not independent,
    so whole groups are resampled, not images.

    Args:
        labels: [N] of 0 and 1, for images or for radiographs as `average_by_radiograph` makes them.
        probabilities: [N] in [0, 1].
        groups: [N] int64.
        threshold: one for all, or [N] where several folds are pooled.
    """
    truth, called = labels.astype(bool), probabilities >= threshold
    cases = _Cases(truth, called, probabilities.astype(np.float64))
    values = cases.figures(np.ones(len(labels)))
    intervals = _bootstrap(cases, groups, resamples)
    counted = {"accuracy": np.ones_like(truth), "recall": truth, "specificity": ~truth}
    counted |= {"precision": called, "npv": ~called}
    number = {name: len(np.unique(groups[rows])) for name, rows in counted.items()}
    number["auc"] = min(number["recall"], number["specificity"])
    for name, count in number.items():
        if values[name] in (0, 1) and name in intervals:
            intervals[name] = _exact_interval(values[name], count)
    return Metrics(
        unit=unit,
        count=len(labels),
        groups=len(np.unique(groups)),
        threshold=float(threshold) if np.ndim(threshold) == 0 else None,
        **dict(zip(_CELLS, cases.cells.sum(axis=1).astype(int).tolist(), strict=True)),
        figures={name: Figure(value=value, **intervals.get(name, {})) for name, value in values.items()},
    )


def average_by_radiograph(
    labels: np.ndarray, radiograph_ids: np.ndarray, *values: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the row of each radiograph's first image, and the mean of each of the values over its images.

    A radiograph that has images under both labels counts once under each.
    """
    pairs = np.stack([radiograph_ids, labels.astype(np.int64)])
    _, first, position, count = np.unique(pairs, axis=1, return_index=True, return_inverse=True, return_counts=True)
    return first, [np.bincount(position.ravel(), value) / count for value in values]


def join_studies(
    labels: np.ndarray, study_ids: np.ndarray, rule: str, *values: np.ndarray
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Join radiographs to studies. A study is a fracture if one of its radiographs is.

    Args:
        labels: [N] of 0 and 1, one for each radiograph.
        study_ids: [N] int64.
        rule: "max" or "mean", how each of the values [N] of a study's radiographs are joined.

    Returns:
        The row of each study's first radiograph, its label, and its values; all [studies].
    """
    _, first, position, count = np.unique(study_ids, return_index=True, return_inverse=True, return_counts=True)
    largest = np.zeros((1 + len(values), len(first)))
    for joined, each in zip(largest, (labels, *values), strict=True):
        np.maximum.at(joined, position, each)
    means = [np.bincount(position, each) / count for each in values]
    return first, largest[0].astype(labels.dtype), list(largest[1:]) if rule == "max" else means


def auc_within_folds(
    labels: np.ndarray, probabilities: np.ndarray, groups: np.ndarray, folds: np.ndarray, resamples: int = RESAMPLES
) -> Figure:
    """Compute the AUC over pairs of a fracture and a normal of the same fold, both scored by the same network.

    Pairs across folds would compare the probabilities of two networks, whose calibrations differ by chance.

    Args:
        labels: [N] of 0 and 1.
        probabilities: [N] in [0, 1].
        groups: [N] int64, each within one fold.
        folds: [N], the fold of each row.
    """
    cases = _Folds(labels, probabilities, folds)
    value = cases.auc(np.ones(len(labels)))
    if value is None:
        return Figure(value=None)
    resampled = [auc for weights in _bootstrap_weights(groups, resamples) if (auc := cases.auc(weights)) is not None]
    interval = _percentile_interval(resampled)
    if value in (0, 1):
        interval = _exact_interval(value, min(len(np.unique(groups[labels == label])) for label in (0, 1)))
    return Figure(value=value, **interval)


def rank_pairs(labels: np.ndarray, probabilities: np.ndarray, folds: np.ndarray) -> tuple[float | None, int]:
    """Return the AUC of `auc_within_folds` without its interval, and the number of its pairs."""
    cases, each_once = _Folds(labels, probabilities, folds), np.ones(len(labels))
    return cases.auc(each_once), cases.count_pairs(each_once)


def auc_differences(
    labels: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    groups: np.ndarray,
    resamples: int = RESAMPLES,
    folds: np.ndarray | None = None,
) -> np.ndarray:
    """Compute the first model's AUC minus the second's on each of the same bootstrap resamples over groups.

    In a resample both models are scored on the same cases, hard ones included. So a difference shows with far fewer
    cases than two separate intervals need to not overlap.

    Args:
        labels: [N] of 0 and 1, both present.
        first: [N] probabilities of one model.
        second: [N] probabilities of the other.
        groups: [N] int64.
        folds: [N], the fold of each row, as of `auc_within_folds`; None: the same network scored all.

    Returns:
        [resamples]; fewer where a resample has one class only.
    """
    folds = np.zeros(len(labels)) if folds is None else folds
    models = [_Folds(labels, probabilities, folds) for probabilities in (first, second)]
    aucs = ([model.auc(weights) for model in models] for weights in _bootstrap_weights(groups, resamples))
    return np.array([one - other for one, other in aucs if one is not None])


def rate_differences(
    labels: np.ndarray, first: np.ndarray, second: np.ndarray, groups: np.ndarray, resamples: int = RESAMPLES
) -> dict[str, np.ndarray]:
    """Compute the first model's sensitivity and specificity minus the second's on each of the same resamples.

    Args:
        labels: [N] of 0 and 1.
        first: [N] bool, true where one model calls a fracture.
        second: [N] bool, the same of the other.
        groups: [N] int64.

    Returns:
        "recall" and "specificity" -> [resamples]; fewer where a resample lacks that class.
    """
    truth = labels.astype(bool)
    # 1 where only the first model is right, -1 where only the second is, else 0.
    advantage = np.where(truth, 1.0, -1.0) * (first.astype(float) - second)
    found: dict[str, list[float]] = {"recall": [], "specificity": []}
    for weights in _bootstrap_weights(groups, resamples):
        for name, cases in (("recall", truth), ("specificity", ~truth)):
            if total := weights @ cases:
                found[name].append(float(weights[cases] @ advantage[cases] / total))
    return {name: np.array(values) for name, values in found.items()}


@dataclass(frozen=True)
class Sample:
    """Radiographs that one model scored. All are [N]."""

    labels: np.ndarray  # 0 or 1
    probabilities: np.ndarray  # in [0, 1]
    called: np.ndarray  # bool, true where the model calls a fracture
    groups: np.ndarray  # int64
    sources: np.ndarray  # str; pairs of the AUC are within a source


def resample_figures(samples: Sequence[Sample], names: Sequence[str], resamples: int = RESAMPLES) -> np.ndarray:
    """Compute figures of several samples on each of the same bootstrap resamples over groups.

    Groups that are in the same samples are drawn among themselves. So each sample keeps its number of groups, samples
    without a common group vary independently, and a group that is in several counts alike in all of them.

    Args:
        names: of figures of `compute_metrics`; "auc" is over pairs of a fracture and a normal of the same source.

    Returns:
        [1 + resamples, samples, names], first the samples as they are; NaN where a figure is undefined.
    """
    everything = np.unique(np.concatenate([sample.groups for sample in samples]))
    members = np.stack([np.isin(everything, sample.groups) for sample in samples])
    _, stratum = np.unique(members, axis=1, return_inverse=True)
    strata = [np.flatnonzero(stratum.ravel() == number) for number in range(stratum.max() + 1)]
    positions = [np.searchsorted(everything, sample.groups) for sample in samples]
    cases = [_Cases(s.labels.astype(bool), s.called, s.probabilities.astype(np.float64)) for s in samples]
    ranked = [_Folds(s.labels, s.probabilities, s.sources) for s in samples]

    def compute(counts: np.ndarray) -> list[list[float | None]]:
        found = []
        for each, within, position in zip(cases, ranked, positions, strict=True):
            weights = counts[position]
            figures = each.figures(weights) | {"auc": within.auc(weights)}
            found.append([figures[name] for name in names])
        return found

    generator, rows = np.random.default_rng(0), [compute(np.ones(len(everything)))]
    for _ in range(resamples):
        counts = np.empty(len(everything))
        for alike in strata:
            drawn = generator.integers(0, len(alike), len(alike))
            counts[alike] = np.bincount(drawn, minlength=len(alike))
        rows.append(compute(counts))
    return np.array(rows, float)


def mean_with_interval(values: np.ndarray, groups: np.ndarray, resamples: int = RESAMPLES) -> Figure:
    """Compute a mean with its percentile interval by bootstrap over groups; resamples are the same for the same groups.

    Args:
        values: [N], bool for a proportion, whose interval is exact where resampling cannot vary it.
        groups: [N] int64.
    """
    value = float(values.mean())
    if values.dtype == bool and value in (0, 1):
        return Figure(value=value, **_exact_interval(value, len(np.unique(groups))))
    weights = _bootstrap_weights(groups, resamples)
    return Figure(value=value, **_percentile_interval([float(w @ values / w.sum()) for w in weights]))


_CELLS = ("true_positives", "false_positives", "true_negatives", "false_negatives")


class _Cases:
    """Images or radiographs, sorted once, so that each resample costs only sums."""

    def __init__(self, truth: np.ndarray, called: np.ndarray, probabilities: np.ndarray) -> None:
        """All arguments are [N]."""
        # [4, N] of 0 and 1: the cell of the confusion matrix that each case is in, in the order of `_CELLS`.
        self.cells = np.stack([called & truth, called & ~truth, ~called & ~truth, ~called & truth]).astype(float)
        self._order = np.argsort(-probabilities, kind="stable")
        # Thresholds lie between different probabilities, never between equal ones.
        self._ends = np.r_[np.flatnonzero(np.diff(probabilities[self._order])), len(probabilities) - 1]
        clipped = clip_probabilities(probabilities)
        self._square = (probabilities - truth) ** 2
        self._loss = -np.log(np.where(truth, clipped, 1 - clipped))
        self._bin, self._gap = assign_bins(probabilities), probabilities - truth
        self._sorted_truth = truth[self._order]

    def figures(self, weights: np.ndarray) -> dict[str, float | None]:
        """Compute all figures.

        Args:
            weights: [N], how often each case counts.
        """
        tp, fp, tn, fn = self.cells @ weights
        total = weights.sum()
        found = {
            "accuracy": _ratio(tp + tn, total),
            "precision": _ratio(tp, tp + fp),  # positive predictive value
            "recall": _ratio(tp, tp + fn),  # sensitivity
            "specificity": _ratio(tn, tn + fp),
            "npv": _ratio(tn, tn + fn),
            "f1": _ratio(2 * tp, 2 * tp + fp + fn),
            "brier": _ratio(weights @ self._square, total),
            "calibration_error": _ratio(np.abs(np.bincount(self._bin, weights * self._gap)).sum(), total),
            "loss": _ratio(weights @ self._loss, total),
        }
        return found | self.ranking(weights)

    def ranking(self, weights: np.ndarray) -> dict[str, float | None]:
        """Compute the figures that depend on the order of the probabilities alone, not on the threshold."""
        names = ("auc", "average_precision")
        at = [(f"{a}_at_{b}_{c}", a, b / 100) for a, c in _OPPOSITES.items() for b in (90, 95)]
        found_true, found_false = self.count_called(weights)
        if not (found_true[-1] and found_false[-1]):
            return dict.fromkeys([*names, *(name for name, _, _ in at)])
        true_rate, false_rate = found_true / found_true[-1], found_false / found_false[-1]
        precision = found_true[1:] / np.maximum(found_true[1:] + found_false[1:], 1e-12)
        found: dict[str, float | None] = {
            "auc": round(float(np.trapezoid(true_rate, false_rate)), 12),  # rounding of sums may miss 1 by a bit
            "average_precision": float(np.diff(true_rate) @ precision),
        }
        for name, metric, minimum in at:
            if metric == "sensitivity":
                found[name] = float(true_rate[false_rate <= 1 - minimum + 1e-12].max())
            else:
                found[name] = float(1 - false_rate[true_rate >= minimum - 1e-12].min())
        return found

    def count_called(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Count the fractures, and the normals, that are called fractures at each threshold, from none to all."""
        sorted_weights, truth = weights[self._order], self._sorted_truth
        return tuple(np.r_[0, np.cumsum(sorted_weights * which)[self._ends]] for which in (truth, ~truth))


class _Folds:
    """Cases of several folds, which are ranked within each fold."""

    def __init__(self, labels: np.ndarray, probabilities: np.ndarray, folds: np.ndarray) -> None:
        """All arguments are [N]."""
        self._rows = [np.flatnonzero(folds == fold) for fold in np.unique(folds)]
        truth, none_called, values = labels.astype(bool), np.zeros(len(labels), bool), probabilities.astype(np.float64)
        self._cases = [_Cases(truth[rows], none_called[rows], values[rows]) for rows in self._rows]

    def auc(self, weights: np.ndarray) -> float | None:
        """Return the share of pairs whose fracture has the higher probability, ties by half; None without a pair."""
        in_order = pairs = 0.0
        for rows, cases in zip(self._rows, self._cases, strict=True):
            found_true, found_false = cases.count_called(weights[rows])
            in_order += np.trapezoid(found_true, found_false)
            pairs += found_true[-1] * found_false[-1]
        return round(float(in_order / pairs), 12) if pairs else None  # rounding of sums may miss 1 by a bit

    def count_pairs(self, weights: np.ndarray) -> int:
        """Return the number of pairs that `auc` ranks."""
        ends = [cases.count_called(weights[rows]) for rows, cases in zip(self._rows, self._cases, strict=True)]
        return int(sum(fractures[-1] * normals[-1] for fractures, normals in ends))


_OPPOSITES = {"sensitivity": "specificity", "specificity": "sensitivity"}


def _bootstrap(cases: _Cases, groups: np.ndarray, resamples: int) -> dict[str, dict[str, float]]:
    """Return the 95 % interval of each figure, over the resamples in which it is defined."""
    resampled: dict[str, list[float]] = {}
    for weights in _bootstrap_weights(groups, resamples):
        for name, value in cases.figures(weights).items():
            if value is not None:
                resampled.setdefault(name, []).append(value)
    return {name: _percentile_interval(values) for name, values in resampled.items() if len(values) > resamples / 2}


def _percentile_interval(values: list[float]) -> dict[str, float]:
    low, high = np.percentile(values, [2.5, 97.5]).tolist()
    return {"low": low, "high": high}


def _bootstrap_weights(groups: np.ndarray, resamples: int) -> Iterator[np.ndarray]:
    """Yield [N] float64 for each resample: how often the group of each case was drawn, with replacement."""
    _, position = np.unique(groups, return_inverse=True)
    count = position.max() + 1
    generator = np.random.default_rng(0)
    for _ in range(resamples):
        yield np.bincount(generator.integers(0, count, count), minlength=count)[position].astype(float)


def _exact_interval(value: float, cases: int) -> dict[str, float]:
    """Return the exact 95 % interval of a proportion of 0 or 1, which resampling cannot vary.

    Clopper and Pearson 1934, doi:10.1093/biomet/26.4.404; the cases are groups.
    """
    limit = 0.025 ** (1 / cases)
    return {"low": limit, "high": 1.0} if value == 1 else {"low": 0.0, "high": 1 - limit}


def assign_bins(probabilities: np.ndarray) -> np.ndarray:
    """Return the bin of each probability, [N] int, for the expected calibration error.

    Naeini et al. 2015, doi:10.1609/aaai.v29i1.9602.
    """
    return np.minimum((probabilities * BINS).astype(int), BINS - 1)


def clip_probabilities(probabilities: np.ndarray) -> np.ndarray:
    """Clip probabilities so that their logarithms are finite; float64."""
    return np.clip(probabilities.astype(np.float64), _EPSILON, 1 - _EPSILON)


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None
