from fracture.evaluation.operating_point import OperatingPoint
from fracture.workflows.answer import explain_doubt

POINT = OperatingPoint(temperature=1.0, offset=0.0, threshold=0.3, rule="", fracture_threshold=0.6)


def row(probability: float, outcome: str, unlike: bool | None = False) -> dict:
    return {"probability": probability, "outcome": outcome, "unlike": unlike}


def test_outcomes_by_the_thresholds_alone_need_no_word():
    assert explain_doubt([row(0.1, "none"), row(0.5, "doubt"), row(0.9, "fracture", None)], POINT) == []


def test_images_that_are_unlike_alone_are_counted():
    assert explain_doubt([row(0.1, "doubt", True), row(0.9, "fracture")], POINT) == [
        "1 of 2 images are unlike the training images, and so undetermined."
    ]


def test_images_in_doubt_as_a_whole_are_explained():
    assert explain_doubt([row(0.1, "doubt"), row(0.9, "doubt", True)], POINT) == [
        "1 of 2 images are unlike the training images, and so undetermined.",
        "As a whole the images of the prediction are unlike the training images, so each is undetermined.",
    ]


def test_a_model_without_a_second_threshold_has_no_doubt_of_its_own():
    point = POINT.model_copy(update={"fracture_threshold": None})
    assert explain_doubt([row(0.1, "none"), row(0.5, "fracture")], point) == []
