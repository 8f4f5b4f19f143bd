"""A linear head in closed form: ridge regression (Hoerl and Kennard 1970, doi:10.1080/00401706.1970.10488634)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from fracture.evaluation.metrics import average_by_radiograph, rank_pairs
from fracture.evaluation.operating_point import fit_calibration

FOLDS = 5
PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True)
class RidgeFit:
    """A linear head: logit = features @ kernel + bias."""

    kernel: np.ndarray  # [F] float64
    bias: float
    penalty: float  # one of `aucs`
    aucs: Mapping[float, float]  # penalty -> AUC of the cases by heads that were fitted without their fold
    logits: np.ndarray  # [N] float64, of each row by the head that was fitted without its fold


def fit_ridge(
    features: np.ndarray,
    labels: np.ndarray,
    weights: np.ndarray,
    groups: np.ndarray,
    penalties: Sequence[float] = PENALTIES,
) -> RidgeFit:
    """Fit the head by weighted least squares on targets of ±1, its penalty chosen by grouped folds.

    Rows of the same group and class are one case in the choice, as the mean of their scores. The best penalty has the
    highest AUC over pairs of cases of the same fold; of equal ones the strongest is taken. Then the head is fitted on
    all rows, and scaled and shifted so that the scores out of fold are logits with the lowest cross-entropy.

    Args:
        features: [N, F] float, standardised: a mean of about 0 and a variance of about 1 each.
        labels: [N] of 0 and 1, both in two groups or more.
        weights: [N] > 0, how often each row counts. They are scaled so that both classes weigh the same, and all
            together what they did before.
        groups: [N] int64; the rows of a group are in one fold.
        penalties: what to choose from. A penalty p adds p·F·|kernel|² to the weighted sum (not the mean) of squared
            errors. So p·F is scikit-learn's `alpha`; p compares with the number of features, since a standardised row
            has a squared length of about F, and the same p suits few rows and many as a prior does.
    """
    ordered = sorted(penalties)
    folds = assign_folds(labels, groups)
    scores = np.empty((len(ordered), len(labels)))
    for fold in np.unique(folds):
        rest, own = folds != fold, folds == fold
        for row, (kernel, bias) in zip(
            scores, _solve(features[rest], labels[rest], weights[rest], ordered), strict=True
        ):
            row[own] = features[own] @ kernel + bias
    first, averages = average_by_radiograph(labels, groups, *scores)
    aucs = {p: rank_pairs(labels[first], expit(a), folds[first])[0] for p, a in zip(ordered, averages, strict=True)}
    best = max(range(len(ordered)), key=lambda number: (aucs[ordered[number]], number))
    temperature, offset = fit_calibration(labels[first], expit(averages[best]), np.arange(len(first)))
    [(kernel, bias)] = _solve(features, labels, weights, [ordered[best]])
    logits = scores[best] / temperature + offset
    return RidgeFit(kernel / temperature, bias / temperature + offset, ordered[best], aucs, logits)


def assign_folds(labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return the fold, from 0, of each row: [N] int64; at most `FOLDS`, each with both classes if it can be.

    Args:
        labels: [N] of 0 and 1, both in two groups or more.
        groups: [N] int64; the rows of a group are in one fold.
    """
    from sklearn.model_selection import StratifiedGroupKFold  # takes a second to load

    count = min(FOLDS, *(len(np.unique(groups[labels == label])) for label in (0, 1)))
    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=0)
    folds = np.empty(len(labels), np.int64)
    for number, (_, rows) in enumerate(splitter.split(labels, labels, groups)):
        folds[rows] = number
    return folds


def _solve(
    features: np.ndarray, labels: np.ndarray, weights: np.ndarray, penalties: Sequence[float]
) -> list[tuple[np.ndarray, float]]:
    """Return (kernel, bias) for each penalty; the bias is not penalised."""
    from scipy.linalg import solve

    balanced = _balance(labels, weights)
    roots, rows = np.sqrt(balanced), features.astype(np.float64)
    targets = np.where(labels == 1, 1.0, -1.0)  # their weighted mean is 0, since the classes weigh the same
    mean = np.average(rows, axis=0, weights=balanced)
    centred, weighted = (rows - mean) * roots[:, None], targets * roots
    count, width = centred.shape
    dual = count < width  # the smaller of the two systems, with the same solution
    gram = centred @ centred.T if dual else centred.T @ centred
    right = weighted if dual else centred.T @ weighted
    found = []
    for penalty in penalties:
        solution = solve(gram + penalty * width * np.eye(len(gram)), right, assume_a="pos")
        kernel = centred.T @ solution if dual else solution
        found.append((kernel, -float(mean @ kernel)))
    return found


def _balance(labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the weights, [N] float64, scaled so that each class has half of their sum."""
    fractured, weights = labels == 1, weights.astype(np.float64)
    sums = weights[fractured].sum(), weights[~fractured].sum()
    return weights * np.where(fractured, 1 / sums[0], 1 / sums[1]) * weights.sum() / 2
