import numpy as np
import pyarrow as pa
import pytest

from fracture.config import EvaluationConfig
from fracture.evaluation.metrics import Evaluation, Figure, compute_metrics
from fracture.evaluation.outcomes import count_outcomes
from fracture.evaluation.verdict import Verdict, describe_differences, format_verdict, judge, summarise_properties

CONFIG = EvaluationConfig()  # an AUC above 0.80, a sensitivity above 0.95 - 0.05
MANY = {"normal": 10, "fracture": 10}  # groups


def evaluation(auc: Figure, sensitivity: Figure) -> Evaluation:
    metrics = compute_metrics(np.array([0, 1]), np.array([0.2, 0.9]), np.arange(2), 0.4, "radiograph")
    return {"radiograph": metrics.model_copy(update={"figures": {"auc": auc, "recall": sensitivity}})}


def figure(value: float, low: float) -> Figure:
    return Figure(value=value, low=low, high=0.99)


@pytest.mark.parametrize(
    ("auc", "sensitivity", "answer"),
    [
        (figure(0.9, 0.81), figure(0.95, 0.91), "usable"),
        (figure(0.9, 0.81), figure(0.95, 0.90), "adjust"),
        (figure(0.9, 0.80), figure(0.95, 0.91), "not usable"),
        (figure(0.6, 0.50), figure(0.95, 0.10), "not usable"),
        (Figure(value=None), figure(0.95, 0.91), "unknown"),
    ],
)
def test_the_lower_limits_decide(auc: Figure, sensitivity: Figure, answer: str):
    assert judge(evaluation(auc, sensitivity), MANY, CONFIG, []).answer == answer


def test_the_settings_of_the_model_decide():
    found = evaluation(figure(0.9, 0.81), figure(0.95, 0.91))
    assert judge(found, MANY, EvaluationConfig(usable_auc=0.85), []).answer == "not usable"
    assert judge(found, MANY, EvaluationConfig(min_sensitivity=0.97), []).answer == "adjust"


def test_a_model_to_which_all_images_are_unlike_has_to_be_adjusted():
    """Each prediction would be in doubt."""
    found = evaluation(figure(0.9, 0.81), figure(0.95, 0.91))
    outcomes = count_outcomes(np.array([0, 1]), np.array(["none", "fracture"]), np.zeros(2, bool), as_a_whole=True)
    found["radiograph"] = found["radiograph"].model_copy(update={"outcomes": outcomes})
    assert judge(found, MANY, CONFIG, []).answer == "adjust"


@pytest.mark.parametrize("probability", [0.9, 0.1])  # of the first fracture: it is found, or missed
def test_one_patient_gives_no_verdict(probability: float):
    """Every bootstrap resample of one group is that group, so the intervals have no width."""
    probabilities = np.array([0.2, 0.3, probability, *[0.9] * 20])
    metrics = compute_metrics(np.array([0, 0, *[1] * 21]), probabilities, np.zeros(23), 0.4, "radiograph")
    verdict = judge({"radiograph": metrics}, {"normal": 1, "fracture": 1}, CONFIG, [])
    assert verdict.answer == "unknown"
    assert verdict.sentence.startswith("cannot be given: it takes 10 groups")
    assert verdict.reasons[-1] == (
        "there are groups of 1 fracture and 1 normal, fewer than 10 of a class: the intervals are rough"
    )


@pytest.mark.parametrize("few", ["normal", "fracture"])
def test_a_verdict_takes_ten_groups_of_each_class(few: str):
    good = evaluation(figure(0.9, 0.81), figure(0.95, 0.91))
    assert judge(good, MANY | {few: 9}, CONFIG, []).answer == "unknown"
    assert judge(good, MANY, CONFIG, []).answer == "usable"


def test_the_verdict_ends_with_its_reasons():
    verdict = judge(evaluation(figure(0.9, 0.81), figure(0.7, 0.6)), MANY, CONFIG, ["size: smaller"])
    assert format_verdict(verdict) == [
        "verdict    usable on these radiographs after adjusting: fracture adapt chooses calibration and operating "
        "point from 50 labelled local studies",
        "           the AUC per radiograph, 0.900 [0.810, 0.990], is above 0.80 with its whole interval",
        "           the sensitivity per radiograph, 0.700 [0.600, 0.990], is not above 0.90 with its whole interval",
        "           size: smaller",
    ]
    assert not verdict.is_good
    assert Verdict.model_validate_json(verdict.model_dump_json()) == verdict


def test_a_property_whose_median_lies_outside_of_training_is_named():
    training = {"size": (100.0, 200.0, 300.0), "sharpness": (0.01, 0.02, 0.03), "border": (0.0, 1.0, 2.0)}
    here = {"size": (1.0, 24570.4, 90000.0), "sharpness": (0.001, 0.002, 0.5)}
    assert describe_differences(here | {"border": (0.0, 2.0, 9.0)}, training) == [
        "size: the median is 24,570 here, above 5 to 95% of the training images, 100 to 300",
        "sharpness: the median is 0.002 here, below 5 to 95% of the training images, 0.01 to 0.03",
    ]
    assert describe_differences({}, training) == [], "properties that are not known here"


def test_properties_are_of_one_image_of_each_radiograph(dataset):
    """Radiograph 1 has three images, of which the first counts; the border of one file is not known."""
    data = dataset()
    files = {
        "path": ["a", "b", "c", "d"],
        "width": pa.array([10, 90, 90, 30], pa.int32()),
        "height": pa.array([10, 90, 90, 10], pa.int32()),
        "border": pa.array([None, 9, 9, 4], pa.float32()),
        "format": ["PNG"] * 4,
    }
    (data.folder / "files.parquet").write_parquet(pa.table(files))
    found = summarise_properties(data, pa.table({"source": ["a", "b", "c", "d"], "radiograph_id": [1, 1, 1, 2]}))
    assert set(found) == {"size", "aspect", "border"}
    assert found["size"] == pytest.approx((110, 200, 290))
    assert found["border"] == (4, 4, 4)
    (data.folder / "files.parquet").delete()
    assert summarise_properties(data, pa.table({"source": ["a"], "radiograph_id": [1]})) == {}
