"""The three outcomes of an image, a radiograph or a study: fracture, doubt and none.

They come of two thresholds, so that a person looks at what the model is not sure of. What is unlike the training images
is in doubt, whatever its probability, and so is each image of many that are unlike them as a whole.
"""

import numpy as np

from fracture.evaluation.metrics import Outcomes
from fracture.evaluation.operating_point import OperatingPoint
from fracture.labels import CLASS_NAMES, FRACTURE, NORMAL

FRACTURED, DOUBT, NONE = OUTCOMES = ("fracture", "doubt", "none")  # the one that needs a look most comes first


def name_outcomes(probabilities: np.ndarray, operating_point: OperatingPoint, is_unlike: np.ndarray) -> np.ndarray:
    """Return the outcomes, [N] str, of calibrated probabilities.

    Args:
        is_unlike: [N] bool, true where an image is unlike the training images.
    """
    surely = operating_point.fracture_threshold
    surely = operating_point.threshold if surely is None else surely
    called = np.where(probabilities >= operating_point.threshold, DOUBT, NONE)
    return np.where(is_unlike, DOUBT, np.where(probabilities >= surely, FRACTURED, called))


def join_outcomes(
    outcomes: np.ndarray,
    studies: np.ndarray,
    probabilities: np.ndarray,
    operating_point: OperatingPoint,
    is_unlike: np.ndarray,
    rule: str,
) -> np.ndarray:
    """Return the outcomes of studies, [S] str, from those of their images or radiographs.

    By the rule "max" a study is a fracture if one of them is, else in doubt if one is. By "mean" the mean of the
    probabilities decides, unless one of them is unlike the training images, which makes that mean doubtful.

    Args:
        outcomes: [N] of `OUTCOMES`.
        studies: [N] int, the study of each, from 0 to S - 1.
        probabilities: [S], joined by the rule.
        is_unlike: [S] bool, whether one of a study's is.
    """
    if rule != "max":
        return name_outcomes(probabilities, operating_point, is_unlike)
    joined = np.full(len(probabilities), OUTCOMES.index(NONE))
    np.minimum.at(joined, studies, [OUTCOMES.index(outcome) for outcome in outcomes])
    return np.array(OUTCOMES)[joined]


def count_outcomes(
    labels: np.ndarray, outcomes: np.ndarray, is_unlike: np.ndarray | None, *, as_a_whole: bool = False
) -> Outcomes:
    """Count the outcomes of each class.

    Args:
        labels: [N] of 0 and 1.
        outcomes: [N] of `OUTCOMES`.
        is_unlike: [N] bool; None where it is not known.
        as_a_whole: whether they are unlike the training images as a whole.
    """
    if as_a_whole:
        outcomes = np.full(len(labels), DOUBT)
    counts = {
        CLASS_NAMES[label]: {name: int(((labels == label) & (outcomes == name)).sum()) for name in OUTCOMES}
        for label in (FRACTURE, NORMAL)
    }
    (found, _, missed), (called, _, cleared) = (tuple(of_class.values()) for of_class in counts.values())
    return Outcomes(
        counts=counts,
        doubt=float((outcomes == DOUBT).mean()),
        sensitivity=found / (found + missed) if found + missed else None,
        specificity=cleared / (cleared + called) if cleared + called else None,
        unlike=None if is_unlike is None else float(is_unlike.mean()),
        as_a_whole=as_a_whole,
    )
