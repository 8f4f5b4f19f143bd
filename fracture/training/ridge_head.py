"""The head in closed form: ridge regression on the frozen features of radiographs."""

import numpy as np

from fracture.dataset.pipeline import WorkerRows
from fracture.dataset.sampler import choose_originals
from fracture.evaluation.ridge import fit_ridge
from fracture.training.checkpoint import Arrays
from fracture.training.features import EPSILON, Moments, average_cases
from fracture.training.setup import Worker
from fracture.training.strategy import adder

_MOST_CASES = 20_000  # radiographs, which take 300 MB of 3,840 features; of more, as many are chosen at random
_AT_ONCE = 64  # radiographs whose features the workers add up in one collective


def solve_head(worker: Worker, features: WorkerRows, moments: Moments) -> Arrays:
    """Return the kernel [F, 1] and bias [1] of the layer `logit`, the same on every worker.

    A case is a radiograph: the mean of the features of one image and its mirror image. It is the image of the shortest
    name, since copies add to a name: families of rotated copies are of one class more often than of the other, and
    their black corners would tell the class. The classes weigh alike, with `training.sampling=source` those of each
    source. Rank 0 solves, since other machines may round differently.

    Args:
        features: of training, [N, K, F].
        moments: that the network standardises by.
    """
    config, index, strategy = worker.assignment.config.training, worker.indices["train"], worker.strategy
    rows = _choose_cases(index.radiograph_ids, index.labels, index.name_lengths, config.seed)
    cases = np.full(len(index.labels), -1)
    cases[rows] = np.arange(len(rows))
    width = features.images.shape[-1]
    averages = average_cases(features, cases, adder(strategy, _AT_ONCE * width), _AT_ONCE)
    solution = np.zeros(width + 1)
    if worker.rank == 0:
        worker.watchdog.busy("solving the head", more=600)
        mean, variance = moments
        standardised = (averages - mean) / np.sqrt(variance + EPSILON)
        weights = _weigh(index.classes(config.sampling)[rows])
        fit = fit_ridge(standardised, index.labels[rows], weights, index.group_ids[rows])
        solution[:width], solution[width] = fit.kernel, fit.bias
    else:
        worker.watchdog.rest("waiting for rank 0 to solve the head")
    solution = np.array(adder(strategy, width + 1)(solution.tolist()), np.float32)
    return [solution[:width, np.newaxis], solution[width:]]


def _choose_cases(radiograph_ids: np.ndarray, labels: np.ndarray, lengths: np.ndarray, seed: int) -> np.ndarray:
    """Return the row of one image of each radiograph, ascending: [cases] int64; see `choose_originals`."""
    rows = choose_originals(radiograph_ids, labels, lengths)
    if len(rows) > _MOST_CASES:
        rows = np.random.default_rng([seed, 3]).permutation(rows)[:_MOST_CASES]
    return np.sort(rows)


def _weigh(classes: np.ndarray) -> np.ndarray:
    """Return the weight of each case, [cases] float64, of mean 1: all classes weigh alike."""
    _, position, count = np.unique(classes, return_inverse=True, return_counts=True)
    return len(classes) / len(count) / count[position]
