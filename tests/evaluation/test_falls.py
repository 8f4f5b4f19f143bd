import numpy as np
import pyarrow as pa
import pytest

from fracture.evaluation.falls import FIGURES, compute_falls
from fracture.evaluation.metrics import Sample, resample_figures


def scores(labels: list[int], probabilities: list[float], first: int, origins: list[str] | None = None) -> pa.Table:
    """Each radiograph has one image and is a group, numbered from `first`."""
    ids = np.arange(first, first + len(labels))
    origin = origins or ["x"] * len(labels)
    columns = {"label": labels, "radiograph_id": ids, "group_id": ids, "probability": probabilities, "origin": origin}
    return pa.table(columns)


GOOD = ([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9])
ONE_WRONG = ([0, 0, 1, 1], [0.1, 0.85, 0.8, 0.9])  # one of four pairs, one of two normals
REVERSED = ([1, 1, 0, 0], [0.1, 0.2, 0.8, 0.9])


def test_a_fall_is_inside_minus_outside_and_the_mean_counts_each_source_alike():
    """Two folds: from AUC 1 to 0.75 and from 0.75 to 0."""
    folds = {
        "north": (scores(*GOOD, first=0), scores(*ONE_WRONG, first=10), 0.5),
        "south": (scores(*ONE_WRONG, first=10), scores(*REVERSED, first=0), 0.5),
    }
    falls, mean = compute_falls(folds, resamples=50)
    north, south = falls["north"], falls["south"]
    values = {name: (north.inside[name].value, north.outside[name].value, north.fall[name].value) for name in FIGURES}
    assert values["auc"] == pytest.approx((1, 0.75, 0.25))
    assert values["recall"] == pytest.approx((1, 1, 0))
    assert values["specificity"] == pytest.approx((1, 0.5, 0.5))
    assert values["brier"] == pytest.approx((0.025, (0.01 + 0.7225 + 0.04 + 0.01) / 4, 0.025 - 0.195625))
    assert south.fall["auc"].value == pytest.approx(0.75)
    assert [part["auc"].value for part in (mean.inside, mean.outside, mean.fall)] == pytest.approx([0.875, 0.375, 0.5])
    assert mean.fall["recall"].value == pytest.approx((0 + 1) / 2)


def test_the_interval_of_a_fall_is_that_of_two_independent_shares():
    """Specificity 0.9 of 100 normals inside, 0.6 of 100 outside: the deviation is √(.09 / 100 + .24 / 100) = 0.0574."""

    def sample(right: int, first: int) -> pa.Table:
        return scores([0] * 100 + [1] * 100, [0.1] * right + [0.9] * (200 - right), first)

    falls, _ = compute_falls({"a": (sample(90, 0), sample(60, 500), 0.5), "b": (sample(90, 500), sample(60, 0), 0.5)})
    fall = falls["a"].fall["specificity"]
    assert fall.value == pytest.approx(0.3)
    # Groups are drawn, not normals: with 200 groups, half of them normals, it is nearly the same.
    assert (fall.high - fall.low) / 2 == pytest.approx(1.96 * 0.0574, rel=0.12)
    inside = falls["a"].inside["specificity"]
    assert (inside.high - inside.low) / 2 == pytest.approx(1.96 * 0.03, rel=0.15)


def test_inside_of_several_sources_only_pairs_of_the_same_source_count():
    """All of b is scored higher than all of a: over both 3 of 4 pairs are in order, within each source all."""
    inside = scores([0, 1, 0, 1], [0.1, 0.2, 0.8, 0.9], 0, ["a", "a", "b", "b"])
    falls, _ = compute_falls({"c": (inside, scores(*GOOD, first=10), 0.5)}, resamples=20)
    assert falls["c"].inside["auc"].value == 1
    assert falls["c"].fall["auc"].value == 0


def test_a_share_of_1_is_not_taken_for_certain():
    """Resampling cannot vary it. The exact interval of 10 of 10 is [0.692, 1], that of 0 of 5 [0, 0.522]."""
    inside, outside = ([0, 1] * 10, [0.1, 0.9] * 10), ([0, 1] * 5, [0.1] * 10)
    folds = {name: (scores(*inside, first), scores(*outside, first + 50), 0.5) for name, first in (("a", 0), ("b", 99))}
    falls, mean = compute_falls(folds, resamples=20)
    fall = falls["a"].fall["recall"]
    deviation = ((1 - 0.0250 ** (1 / 10)) ** 2 + (1 - 0.0250 ** (1 / 5)) ** 2) ** 0.5
    assert (fall.value, fall.low, fall.high) == pytest.approx((1, 1 - deviation, 1))
    assert mean.fall["recall"].low == pytest.approx(1 - deviation / 2**0.5), "of two alike"
    assert mean.inside["recall"].low == pytest.approx(1 - (1 - 0.025**0.1) / 2**0.5)


def test_a_figure_that_is_undefined_has_no_fall():
    outside = scores([0, 0], [0.1, 0.9], 10)
    falls, mean = compute_falls({"c": (scores(*GOOD, first=0), outside, 0.5)}, resamples=20)
    assert falls["c"].fall["auc"].value is falls["c"].fall["recall"].value is mean.fall["auc"].value is None
    assert falls["c"].fall["specificity"].value == pytest.approx(0.5)


def test_a_group_in_several_samples_is_drawn_once_for_all():
    def sample(groups: np.ndarray) -> Sample:
        labels = np.arange(40) % 2
        probabilities = np.where(np.arange(40) < 30, labels, 1 - labels).astype(float)
        return Sample(labels, probabilities, probabilities >= 0.5, groups, np.full(40, "x"))

    same, apart = np.arange(40), np.arange(100, 140)
    values = resample_figures([sample(same), sample(same), sample(apart)], ["recall"], resamples=50)[..., 0]
    assert values[0].tolist() == [0.75] * 3
    assert (values[:, 0] == values[:, 1]).all()
    assert abs(np.corrcoef(values[1:, 0], values[1:, 2])[0, 1]) < 0.4
