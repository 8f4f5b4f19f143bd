"""The fall from inside to outside: figures on the sources that a model was trained on, and on one that was held out."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from fracture.evaluation.metrics import (
    RESAMPLES,
    Figure,
    Sample,
    auc_within_folds,
    average_by_radiograph,
    compute_metrics,
    resample_figures,
)

FIGURES = {
    "auc": "AUC",
    "recall": "sensitivity",
    "specificity": "specificity",
    "brier": "Brier score",
    "calibration_error": "calibration error",
}
_FEWEST_DEFINED = 0.5  # share of the resamples in which a figure is defined, below which it has no interval


@dataclass(frozen=True)
class Fall:
    """Figures per radiograph, of one held-out source or their mean over all; each is name of FIGURES -> figure."""

    inside: dict[str, Figure]  # on validation of the sources that the model was trained on
    outside: dict[str, Figure]  # on the source that was held out
    fall: dict[str, Figure]  # inside minus outside

    def as_json(self) -> dict[str, Any]:
        """Return the figures as values that JSON can hold."""
        return {
            part: {name: figure.model_dump() for name, figure in figures.items()}
            for part, figures in asdict(self).items()
        }


def compute_falls(
    folds: Mapping[str, tuple[pa.Table, pa.Table, float]], resamples: int = RESAMPLES
) -> tuple[dict[str, Fall], Fall]:
    """Compare each fold's model on validation with the same model on test, at the threshold that validation chose.

    Where a model was trained on several sources, its AUC inside counts pairs of a fracture and a normal of the same
    source, as the AUC outside does. Intervals are 95 %, by bootstrap over groups. Those of falls and means draw the
    groups of all folds together, see `resample_figures`. Where a figure is 0 or 1, which resampling cannot vary, they
    join the figures' own intervals, which are exact there.

    Args:
        folds: source held out -> its model's scores of validation, those of test, and the threshold.

    Returns:
        Source -> its fall; and the mean over the sources, each of which counts alike.
    """
    pairs = [
        (
            _make_sample(inside, inside["origin"].to_pylist(), threshold),
            _make_sample(outside, [title] * len(outside), threshold),
        )
        for title, (inside, outside, threshold) in folds.items()
    ]
    values = resample_figures([sample for pair in pairs for sample in pair], list(FIGURES), resamples)
    thresholds = [threshold for _, _, threshold in folds.values()]
    figures = [
        [_compute_figures(sample, threshold, resamples) for sample in pair]
        for pair, threshold in zip(pairs, thresholds, strict=True)
    ]
    inside, outside = [pair[0] for pair in figures], [pair[1] for pair in figures]
    drawn_inside, drawn_outside = values[:, ::2], values[:, 1::2]
    drawn_falls, count = drawn_inside - drawn_outside, len(pairs)
    falls = {
        title: Fall(own, other, _summarise(drawn_falls[:, number], [(1, own), (-1, other)]))
        for number, (title, own, other) in enumerate(zip(folds, inside, outside, strict=True))
    }
    weighted_inside = [(1 / count, figure) for figure in inside]
    weighted_outside = [(1 / count, figure) for figure in outside]
    subtracted = [(-1 / count, figure) for figure in outside]
    return falls, Fall(
        inside=_summarise(drawn_inside.mean(axis=1), weighted_inside),
        outside=_summarise(drawn_outside.mean(axis=1), weighted_outside),
        fall=_summarise(drawn_falls.mean(axis=1), [*weighted_inside, *subtracted]),
    )


def _make_sample(scores: pa.Table, sources: Sequence[str], threshold: float) -> Sample:
    names = ("label", "radiograph_id", "group_id", "probability")
    labels, radiograph_ids, groups, probabilities = (scores[name].to_numpy() for name in names)
    first, (means,) = average_by_radiograph(labels, radiograph_ids, probabilities)
    return Sample(labels[first], means, means >= threshold, groups[first], np.array(sources, str)[first])


def _compute_figures(sample: Sample, threshold: float, resamples: int) -> dict[str, Figure]:
    s = sample
    metrics = compute_metrics(s.labels, s.probabilities, s.groups, threshold, "radiograph", resamples)
    auc = auc_within_folds(s.labels, s.probabilities, s.groups, s.sources, resamples)
    return {name: metrics.figures[name] for name in FIGURES} | {"auc": auc}


_Terms = Sequence[tuple[float, dict[str, Figure]]]  # of a sum: weight and figures


def _summarise(values: np.ndarray, terms: _Terms) -> dict[str, Figure]:
    """Return value and interval of sums of figures.

    Args:
        values: [1 + resamples, figures], the sums; first those of the samples as they are.
        terms: of the sums.
    """
    found = {}
    for name, (value, *drawn) in zip(FIGURES, values.T, strict=True):
        defined = np.array(drawn)[~np.isnan(drawn)]
        found[name] = figure = Figure(value=None if np.isnan(value) else float(value))
        if figure.value is None:
            continue
        of_terms = [(weight, each[name]) for weight, each in terms]
        if any(term.value in (0, 1) for _, term in of_terms):
            if all(term.low is not None for _, term in of_terms):
                figure.low, figure.high = _join_intervals(value, of_terms)
        elif len(defined) > _FEWEST_DEFINED * len(drawn):
            figure.low, figure.high = np.percentile(defined, [2.5, 97.5]).tolist()
    return found


def _join_intervals(value: float, terms: Sequence[tuple[float, Figure]]) -> tuple[float, float]:
    """Return the interval of a sum from the intervals of its terms (Zou and Donner 2008, doi:10.1002/sim.3095)."""
    below = above = 0.0
    for weight, figure in terms:
        limits = [weight * (limit - figure.value) for limit in (figure.low, figure.high)]
        below, above = below + min(limits) ** 2, above + max(limits) ** 2
    return value - below**0.5, value + above**0.5
