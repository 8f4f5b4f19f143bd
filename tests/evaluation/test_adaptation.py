import numpy as np
import pyarrow as pa
import pytest
from scipy.special import expit

from fracture.config import EvaluationConfig
from fracture.errors import UsageError
from fracture.evaluation.adaptation import (
    Head,
    LastLayer,
    LocalCases,
    calibrate_head,
    check_cases,
    choose_head,
    fit_head,
    format_figures,
    judge_by_folds,
    largest_unit,
)
from fracture.evaluation.operating_point import OperatingPoint, choose_operating_point

CONFIG = EvaluationConfig()
OWN = LastLayer(np.array([0.0, 1.0, 0.0, 0.0]), 2.0)  # listens to the second input, and calls too much a fracture


def make_cases(labels: np.ndarray, first: float = 2.0, second: float = 1.0, **columns: np.ndarray) -> LocalCases:
    """Each image a radiograph of its own; the first two of four inputs are larger by so much in a fracture."""
    count = len(labels)
    inputs = np.random.default_rng(0).normal(size=(count, 4)).astype(np.float32)
    inputs[:, :2] += np.outer(labels, [first, second])
    given = {"radiograph_id": np.arange(count), "group_id": np.arange(count), "study_id": [None] * count} | columns
    rows = {
        "row": np.arange(count),
        "split": ["test"] * count,
        **given,
        "label": labels.astype(np.uint8),
        "probability": OWN.score(inputs),
    }
    types = {"study_id": pa.int64()}
    return LocalCases(pa.table({n: pa.array(v, types.get(n)) for n, v in rows.items()}), inputs, OWN, CONFIG)


def by_turns(count: int) -> np.ndarray:
    return np.arange(count) % 2


def test_a_last_layer_scores_as_the_network_does():
    assert LastLayer(np.array([1.0, -2.0]), 0.5).score(np.array([[3.0, 1.0]])) == pytest.approx([expit(1.5)])


def test_the_operating_point_is_that_of_a_training_on_these_cases():
    cases = make_cases(by_turns(60))
    head = calibrate_head(cases)
    assert head.layer is OWN
    trained = choose_operating_point(cases.rows, CONFIG)
    assert head.operating_point == trained.model_copy(update={"rule": head.operating_point.rule})
    assert head.operating_point.rule == "highest with a sensitivity of at least 0.95 on the local cases"
    assert head.operating_point.offset < -1  # the model's bias of 2 is undone


def test_a_ridge_head_finds_the_input_that_the_model_does_not_use():
    cases = make_cases(by_turns(200))
    head = fit_head(cases)
    assert head.layer.kernel[0] > abs(head.layer.kernel[1:]).max()
    # Its scores are logits already: of calibration little is left to do.
    assert head.operating_point.temperature == pytest.approx(1, abs=0.2)
    assert head.operating_point.offset == pytest.approx(0, abs=0.2)


def test_scales_and_shifts_of_the_inputs_do_not_matter_to_a_ridge_head():
    cases = make_cases(by_turns(200))
    moved = LocalCases(cases.rows, cases.inputs * 100 - 30, OWN, CONFIG)
    first, second = fit_head(cases).layer.score(cases.inputs), fit_head(moved).layer.score(moved.inputs)
    assert second == pytest.approx(first, abs=1e-2)


def test_an_input_that_never_varies_has_no_weight():
    cases = make_cases(by_turns(200))
    cases.inputs[:, 3] = 7
    assert fit_head(cases).layer.kernel[3] == pytest.approx(0, abs=1e-9)


def test_no_case_is_judged_by_a_head_that_has_seen_it():
    """Each head writes down what it was fitted on, as its kernel."""
    groups = np.repeat(np.arange(40), 3)
    labels = (groups % 2).astype(np.uint8)
    cases = make_cases(labels, group_id=groups)
    seen: list[set[int]] = []

    def fit(given: LocalCases) -> Head:
        seen.append(set(given.rows["group_id"].to_pylist()))
        point = OperatingPoint(temperature=1.0, offset=0.0, threshold=len(seen) / 10, rule="")
        return Head(OWN, point)

    judged = judge_by_folds(cases, fit)
    *folds, whole = seen
    assert len(folds) == 5
    assert whole == set(range(40))
    rows = judged.scores.to_pylist()
    assert sorted(row["row"] for row in rows) == list(range(120))
    for row in rows:
        assert row["group_id"] not in folds[int(row["fold"]) - 1]
        assert row["threshold"] == int(row["fold"]) / 10  # of the head of its fold
    assert judged.evaluation["image"].threshold is None
    assert judged.evaluation["image"].count == 120


@pytest.mark.parametrize(("count", "tried"), [(198, False), (200, True)])
def test_a_ridge_head_is_tried_from_200_radiographs_on(count: int, tried: bool):
    cases = make_cases(by_turns(count))
    choice = choose_head(cases, cases.evaluate(0.5))
    assert list(choice.figures) == ["calibrated", "ridge"][: 1 + tried]
    assert choice.ridge == tried
    assert (choice.judged.head.layer is OWN) == (not tried)


def test_a_ridge_head_that_ranks_no_better_is_not_taken():
    """The first input says nothing, and the model's own layer is the best there is."""
    cases = make_cases(by_turns(200), first=0.0, second=1.5)
    own = cases.evaluate(0.5)
    choice = choose_head(cases, own)
    assert choice.figures["ridge"]["radiograph"]["auc"] <= own["radiograph"]["auc"]
    assert not choice.ridge
    assert choice.judged.head.layer is OWN


def test_the_same_cases_give_the_same_model():
    first, second = (choose_head(make_cases(by_turns(200)), make_cases(by_turns(200)).evaluate(0.5)) for _ in range(2))
    assert first.judged.head.layer.kernel.tolist() == second.judged.head.layer.kernel.tolist()
    assert first.judged.head.operating_point == second.judged.head.operating_point
    assert first.judged.evaluation == second.judged.evaluation


def test_calibration_by_folds_is_calibrated_and_ranks_as_before():
    cases = make_cases(by_turns(400))
    before, after = cases.evaluate(0.5), judge_by_folds(cases, calibrate_head).evaluation
    assert before["radiograph"]["calibration_error"] > 0.2 > 0.1 > after["radiograph"]["calibration_error"]
    assert after["radiograph"]["auc"] == pytest.approx(before["radiograph"]["auc"], abs=0.01)


def check(cases: LocalCases, left_out: int = 0) -> None:
    check_cases(cases, cases.evaluate(0.5), left_out)


def test_studies_count_where_they_are_known():
    """120 radiographs are 40 studies, of three views each."""
    studies = np.repeat(np.arange(40), 3)
    cases = make_cases(studies % 2, study_id=studies, group_id=studies)
    assert largest_unit(cases.evaluate(0.5)).counted == "40 studies"
    with pytest.raises(UsageError, match="40 studies are too few to adapt to: a threshold chosen on fewer than 50"):
        check(cases)


def test_ten_cases_are_too_few():
    with pytest.raises(UsageError, match=r"10 radiographs are too few to adapt to.*fewer than 50.*Name more labelled"):
        check(make_cases(by_turns(10)))


def test_the_message_says_how_many_the_model_was_trained_on():
    with pytest.raises(UsageError, match=r"40 radiographs \(and 1,200 images that the model was trained on, which do"):
        check(make_cases(by_turns(40)), left_out=1200)


@pytest.mark.parametrize(
    ("fractures", "message"),
    [
        (0, "have 0 separate fractured and 60 separate normal"),
        (60, "have 60 separate fractured and 0 separate normal"),
        (9, "have 9 separate fractured and 51 separate normal"),
    ],
)
def test_both_classes_are_needed(fractures: int, message: str):
    with pytest.raises(UsageError, match=f"{message}.*adapting needs 10 of each.*Name more of the rarer class"):
        check(make_cases((np.arange(60) < fractures).astype(int)))


def test_views_of_few_patients_are_not_many_cases():
    groups = np.arange(60) % 12
    with pytest.raises(UsageError, match="have 6 separate fractured and 6 separate normal"):
        check(make_cases(groups % 2, group_id=groups))


def test_fifty_radiographs_with_ten_of_a_class_are_enough():
    cases = make_cases((np.arange(50) < 10).astype(int))
    check(cases)
    assert set(judge_by_folds(cases, calibrate_head).scores["fold"].to_pylist()) == {"1", "2", "3", "4", "5"}


def test_the_figures_say_which_are_by_folds():
    cases = make_cases(by_turns(60))
    evaluation = cases.evaluate(0.5)
    unadapted, calibrated = format_figures({"unadapted": evaluation, "calibrated": evaluation})
    auc = evaluation["radiograph"]["auc"]
    assert unadapted.startswith(f"unadapted  60 radiographs: AUC {auc:.3f} [")
    assert calibrated.startswith(f"calibrated 60 radiographs, by folds: AUC {auc:.3f} [")
    assert "calibration error" in calibrated
