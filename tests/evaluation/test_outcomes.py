import numpy as np
import pyarrow as pa
import pytest

from fracture.evaluation.operating_point import OperatingPoint
from fracture.evaluation.outcomes import count_outcomes, join_outcomes, name_outcomes
from fracture.evaluation.report import Report, add_outcomes, evaluate_run, format_outcomes, write_report
from fracture.storage import storage_path
from tests.evaluation.test_report import SCORES

POINT = OperatingPoint(temperature=1.0, offset=0.0, threshold=0.3, rule="given: 0.3", fracture_threshold=0.6)
EARLIER = POINT.model_copy(update={"fracture_threshold": None})
PROBABILITIES = np.array([0.29, 0.3, 0.59, 0.6, 0.9])
ALIKE = np.zeros(5, bool)


def test_between_the_thresholds_is_doubt():
    assert name_outcomes(PROBABILITIES, POINT, ALIKE).tolist() == ["none", "doubt", "doubt", "fracture", "fracture"]
    assert name_outcomes(PROBABILITIES, EARLIER, ALIKE).tolist() == ["none", *["fracture"] * 4]
    equal = POINT.model_copy(update={"fracture_threshold": 0.3})
    assert "doubt" not in name_outcomes(PROBABILITIES, equal, ALIKE)


def test_what_is_unlike_is_in_doubt_whatever_its_probability():
    assert name_outcomes(PROBABILITIES, EARLIER, ~ALIKE).tolist() == ["doubt"] * 5


def test_a_study_has_the_most_serious_outcome_or_that_of_its_mean():
    outcomes = np.array(["none", "fracture", "none", "none", "doubt", "fracture", "doubt"])
    studies = np.array([0, 1, 2, 1, 1, 2, 0])  # 0 has none and doubt; 1 fracture, none and doubt; 2 none and fracture
    means, unlike = np.array([0.1, 0.5, 0.7]), np.zeros(3, bool)
    assert join_outcomes(outcomes, studies, means, POINT, ~unlike, "max").tolist() == ["doubt", "fracture", "fracture"]
    assert join_outcomes(outcomes, studies, means, POINT, unlike, "mean").tolist() == ["none", "doubt", "fracture"]
    assert join_outcomes(outcomes, studies, means, POINT, ~unlike, "mean").tolist() == ["doubt"] * 3
    alone = np.array(["none", "none"])
    assert join_outcomes(alone, np.arange(2), means[:2], POINT, unlike[:2], "max").tolist() == ["none", "none"]


@pytest.mark.parametrize(("rule", "outcome"), [("max", "fracture"), ("mean", "doubt")])
def test_studies_are_counted_where_one_has_several_radiographs(dataset, rule: str, outcome: str):
    """Of test, the normals .2, which is unlike the training images, and .7 are a study, and the fracture is another."""
    studies, distances = pa.array([1, 2, 3, 4, 3, 3], pa.int64()), pa.array([0.5, 0.5, 2.0, 0.5, 0.5, 0.5])
    scores = SCORES.append_column("study_id", studies).append_column("distance", distances)
    evaluations = evaluate_run(scores, dataset(), EARLIER.threshold)
    add_outcomes(evaluations, scores, EARLIER, rule)
    found = evaluations["test"]["study"].outcomes
    assert found.counts["normal"] == {"fracture": 0, "doubt": 0, "none": 0} | {outcome: 1}
    assert found.counts["fracture"]["fracture"] == 1
    assert found.unlike == 0.5
    assert set(evaluations["val"]) == {"image", "radiograph"}
    assert evaluations["val"]["radiograph"].outcomes is not None


def test_outcomes_are_counted_by_class():
    labels = np.array([1, 1, 1, 1, 0, 0, 0])
    outcomes = np.array(["fracture", "fracture", "none", "doubt", "none", "fracture", "doubt"])
    found = count_outcomes(labels, outcomes, np.arange(7) == 3)
    assert found.counts == {
        "fracture": {"fracture": 2, "doubt": 1, "none": 1},
        "normal": {"fracture": 1, "doubt": 1, "none": 1},
    }
    assert (found.sensitivity, found.specificity) == (pytest.approx(2 / 3), 0.5)
    assert (found.doubt, found.unlike) == (pytest.approx(2 / 7), pytest.approx(1 / 7))
    all_in_doubt = count_outcomes(labels, np.full(7, "doubt"), None)
    assert (all_in_doubt.sensitivity, all_in_doubt.specificity, all_in_doubt.unlike) == (None, None, None)


def test_images_that_are_unlike_as_a_whole_are_all_in_doubt(dataset, tmp_path):
    data = dataset()
    scores = SCORES.append_column("study_id", pa.array([None, None, 3, 3, None, None], pa.int64()))
    scores = scores.append_column("distance", pa.array([0.5] * 6))
    evaluations = evaluate_run(scores, data, POINT.threshold)
    add_outcomes(evaluations, scores, POINT, "max", as_a_whole=True)
    for unit in ("image", "radiograph", "study"):
        found = evaluations["test"][unit].outcomes
        assert found.doubt == 1
        assert (found.sensitivity, found.unlike, found.as_a_whole) == (None, 0, True), unit
    assert format_outcomes(evaluations["test"]) == [
        "outcome    all in doubt: as a whole the images are unlike the training images",
        "unlike     0.0% of 2 studies: unlike the training images, so in doubt",
    ]
    write_report(storage_path(tmp_path), Report("x", data, POINT, evaluations, [], 0, {}, []), scores)
    assert "<b>All are in doubt</b>: as a whole these images" in (tmp_path / "report.html").read_text()


def test_the_report_shows_the_outcomes_of_each_class(dataset, tmp_path):
    """Test has the normals .2 and .7, the mean of two images, and a fracture of .4; 5 and 7 are one study."""
    data = dataset()
    scores = SCORES.append_column("study_id", pa.array([None, None, 3, 3, None, None], pa.int64()))
    evaluations = evaluate_run(scores, data, POINT.threshold)
    assert format_outcomes(evaluations["test"]) == []
    add_outcomes(evaluations, scores, POINT, "max")
    test = {unit: metrics.outcomes.counts for unit, metrics in evaluations["test"].items()}
    assert test["radiograph"]["fracture"] == {"fracture": 0, "doubt": 1, "none": 0}
    assert test["radiograph"]["normal"] == {"fracture": 1, "doubt": 0, "none": 1}
    assert test["image"]["normal"] == {"fracture": 2, "doubt": 0, "none": 1}
    assert test["study"]["fracture"] == {"fracture": 0, "doubt": 1, "none": 0}
    assert evaluations["val"]["radiograph"].outcomes.doubt == 0
    assert format_outcomes(evaluations["test"]) == [
        "outcome    2 studies: 50% in doubt; sensitivity undefined, specificity 0.000 among the others"
    ]
    assert format_outcomes(evaluations["test"], has_doubt=False) == [
        "outcome    fracture or none: a model of an earlier version has no second threshold"
    ]
    write_report(storage_path(tmp_path), Report("x", data, POINT, evaluations, [], 0, {}, []), scores)
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Fracture, doubt, none</h2>" in page
    assert "fracture from\n0.600 on, and doubt between" in page
