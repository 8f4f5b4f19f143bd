"""Matched figures: the AUC among pairs of a fracture and a normal that are alike in a property beside the anatomy.

A model that knows the classes by the size of the image is no better than chance among images of one size.
"""

import numpy as np
import pyarrow as pa

from fracture.dataset.format import Dataset
from fracture.dataset.properties import read_properties
from fracture.evaluation.metrics import Figure, MatchedFigure, auc_within_folds, average_by_radiograph, rank_pairs

# Bins of a number, equally large. Within five of them nine tenths of the bias by it are gone (Cochran 1968,
# doi:10.2307/2528036). There are up to ten, as long as each has ten radiographs of the rarer class.
_LEAST_BINS, _MOST_BINS = 5, 10
_FEWEST = 10  # groups with a fracture, and without, in the pairs; with fewer there is no figure
_ALWAYS = ("size", "sharpness")  # shown, whether or not they predict the class


def match_radiographs(scores: pa.Table, dataset: Dataset) -> dict[str, MatchedFigure]:
    """Compute the matched figure of each shortcut of a dataset, and of size and sharpness, per radiograph.

    A number is the mean over a radiograph's images, a category that of its first image.

    Args:
        scores: of test; where several folds are pooled, with the column `fold`.

    Returns:
        Property, the strongest shortcut first -> its figure. Empty where shards came without their table of files.
    """
    labels, probabilities, radiograph_ids, groups = (
        scores[name].to_numpy() for name in ("label", "probability", "radiograph_id", "group_id")
    )
    folds = np.array(scores["fold"].to_pylist()) if "fold" in scores.column_names else np.zeros(len(labels))
    properties = read_properties(dataset, scores["source"].to_pylist())
    numbers = [name for name, values in properties.items() if values.dtype.kind == "f"]
    first, (means, *averages) = average_by_radiograph(
        labels, radiograph_ids, probabilities, *(properties[name] for name in numbers)
    )
    values = {name: each[first] for name, each in properties.items()} | dict(zip(numbers, averages, strict=True))
    return {
        name: compute_matched_auc(labels[first], means, groups[first], values[name], folds[first])
        for name in dict.fromkeys((*dataset.manifest.shortcuts, *_ALWAYS))
        if name in values
    }


def compute_matched_auc(
    labels: np.ndarray, probabilities: np.ndarray, groups: np.ndarray, values: np.ndarray, folds: np.ndarray
) -> MatchedFigure:
    """Compute the AUC over pairs of the same category, or of the same bin of a number.

    Args:
        labels: [N] of 0 and 1, one for each radiograph.
        probabilities: [N] in [0, 1].
        groups: [N] int64.
        values: [N] str, "" where unknown, or [N] float64, NaN where unknown; the unknown is like nothing.
        folds: [N], the fold of each radiograph; pairs are of one fold, too.

    Returns:
        The figure; its value is None where too few groups are in pairs, see `_FEWEST`.
    """
    known = values != "" if values.dtype.kind == "U" else ~np.isnan(values)
    labels, probabilities, groups, values, folds = (a[known] for a in (labels, probabilities, groups, values, folds))
    alike = values if values.dtype.kind == "U" else _assign_bins(values, labels)
    strata = _number(folds) * len(labels) + _number(alike)
    paired = np.isin(strata, strata[labels == 1]) & np.isin(strata, strata[labels == 0])
    labels_paired, groups_paired = labels[paired], groups[paired]
    plain, all_pairs = rank_pairs(labels, probabilities, folds)
    _, pairs = rank_pairs(labels, probabilities, strata)
    figure = Figure(value=None)
    if min(len(np.unique(groups_paired[labels_paired == label])) for label in (0, 1)) >= _FEWEST:
        figure = auc_within_folds(labels_paired, probabilities[paired], groups_paired, strata[paired])
    return MatchedFigure(**figure.model_dump(), pairs=pairs, all_pairs=all_pairs, plain=plain)


def _assign_bins(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the bin of each value: between two quantiles, or exactly at one.

    So a value that many radiographs share, such as the size of an export, is like itself alone.
    """
    rarer = min(np.count_nonzero(labels == label) for label in (0, 1))
    count = min(max(rarer // _FEWEST, _LEAST_BINS), _MOST_BINS)
    edges = np.quantile(values, np.arange(1, count) / count) if len(values) else values
    return np.searchsorted(edges, values, side="left") + np.searchsorted(edges, values, side="right")


def _number(values: np.ndarray) -> np.ndarray:
    return np.unique(values, return_inverse=True)[1]
