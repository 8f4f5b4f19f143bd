import pytest

from fracture.config import load_config
from fracture.labels import FRACTURE, NORMAL
from fracture.preparation.labels.class_words import EXCLUDED, ClassWords, without_number


def words(*assignments: str) -> ClassWords:
    return ClassWords(load_config(None, assignments).data)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        *(
            (name, FRACTURE)
            for name in ("fracture", "elbow positive", "Forearm_Fracture", "wrist fracture (old)", "0 broken")
        ),
        *((name, FRACTURE) for name in ("non displaced fracture", "Bruch distal", "bone-fractures", "mit Fraktur")),
        *(
            (name, NORMAL)
            for name in ("wrist not fractured", "elbow negative", "arm without fracture", "fracture negative")
        ),
        *(
            (name, None)
            for name in ("humerus", "text", "no acute fracture", "normal or fracture", "unfracturedish", "")
        ),
    ],
)
def test_a_class_of_boxes_is_known_by_a_word_in_its_name(name: str, label: int | None):
    assert words().of_box(name) == label


def test_the_whole_name_of_a_class_goes_before_the_words_in_it():
    named = words("data.normal_labels=old fracture", "data.excluded_labels=[metal]", "data.fracture_labels=crack")
    assert [named.of_box(name) for name in ("Old_Fracture", "metal", "crack")] == [NORMAL, EXCLUDED, FRACTURE]
    assert named.of_box("crack of humerus") is None, "of the settings only whole names count"
    assert words("data.normal_labels=humerus").of_box("humerus fracture") == FRACTURE


def test_a_word_that_is_nearly_known():
    assert words().find_nearest("Fracure") == "fracture"
    assert words("data.normal_labels=[unremarkable]").find_nearest("unremarkabel") == "unremarkable"
    assert words().find_nearest("humerus") is None


def test_a_number_before_a_folders_name_is_dropped():
    assert [without_number(name) for name in ("study12_positive", "0 normal", "1. Fracture", "Fracture 2", "007")] == [
        *("positive", "normal", "Fracture", "Fracture 2", "007"),
    ]


def test_a_setting_is_quoted_for_yaml_and_for_a_shell():
    assert words().format_setting(FRACTURE, "1") == "--set 'data.fracture_labels=[1]'"
    assert words("data.excluded_labels=odd").format_setting(EXCLUDED, "a, b") == (
        """--set 'data.excluded_labels=[odd, "a, b"]'"""
    )
