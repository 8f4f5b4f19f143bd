import time

import pytest

from fracture.config import load_config
from fracture.labels import FRACTURE, NORMAL
from fracture.preparation.labels.class_words import EXCLUDED, ClassWords, without_number


def words(*assignments: str) -> ClassWords:
    return ClassWords(load_config(None, assignments).data)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        *((name, FRACTURE) for name in ("fracture", "elbow positive", "Forearm_Fracture", "class 1 fracture")),
        *((name, FRACTURE) for name in ("Bruch distal", "bone-fractures", "mit Fraktur", "left hips fractured")),
        *((name, FRACTURE) for name in ("Fraktur Füße links", "spiral fracture", "distale fracture radius")),
        *(
            (name, NORMAL)
            for name in ("wrist not fractured", "elbow negative", "arm without fracture", "fracture negative")
        ),
        *((name, None) for name in ("humerus", "text", "normal or fracture", "unfracturedish", "", "-", "wrist")),
        *((name, None) for name in ("normal fracture", "fracture left negative right", "0 broken", "elbow fracture-")),
    ],
)
def test_a_class_of_boxes_is_known_by_a_word_beside_anatomy(name: str, label: int | None):
    assert words().of_box(name) == label


@pytest.mark.parametrize(
    "name",
    [
        *("no acute fracture", "not a fracture", "fracture not visible", "Fraktur nicht sichtbar", "keinen Bruch"),
        *("Fraktur ausgeschlossen", "fracture ruled out", "fracture excluded", "elbow not positive", "non_positive"),
        *("false positive", "healed fracture", "suspected fracture", "old fracture", "pseudo fracture"),
        *("not_1_fracture", "wrist fracture (old)", "non displaced fracture"),
    ],
)
def test_any_other_word_beside_it_may_turn_the_name_of_a_class_round(name: str):
    assert words().of_box(name) is None


def test_the_classes_of_a_public_set_of_boxes():
    names = ("elbow positive", "fingers positive", "forearm fracture", "humerus fracture", "shoulder fracture")
    assert [words().of_box(name) for name in (*names, "wrist positive", "humerus")] == [FRACTURE] * 6 + [None]


SIGNED = ("-1", "-1.0", "1-", "_1", "–1", "−1", "+1", "Fraktur -", "Fraktur +", "- fracture", "fracture-", "- 0")


@pytest.mark.parametrize("text", SIGNED)
def test_a_word_with_a_sign_means_only_what_the_settings_say(text: str):
    assert [words().of_value(text), words().of_folder(text), words().of_box(text)] == [None] * 3
    named = words(f"data.excluded_labels=['{text}']")
    assert [named.of_value(text), named.of_folder(text), named.of_box(text)] == [EXCLUDED] * 3
    assert [named.of_value("1"), named.of_value("fracture"), named.of_value("0")] == [FRACTURE, FRACTURE, NORMAL]


def test_minus_one_is_named_as_it_is_typed():
    named = words("data.excluded_labels=[-1, -1.0]")
    assert [named.of_value(text) for text in ("-1", "-1.0", "1", "1.0")] == [EXCLUDED, EXCLUDED, FRACTURE, FRACTURE]


@pytest.mark.parametrize("text", ["0 fractures", "0 Frakturen", "0 yes", "1 no", "4711 fracture", "2. fracture"])
def test_a_bare_number_before_a_value_may_be_a_count(text: str):
    assert [words().of_value(text), words().of_box(text)] == [None, None]


@pytest.mark.parametrize(
    ("name", "label"),
    [
        *(("01_fracture", FRACTURE), ("0_normal", NORMAL), ("2 fracture", FRACTURE), ("study0_positive", FRACTURE)),
        *(("study1_negative", NORMAL), ("class 1 fracture", FRACTURE), ("1 yes", FRACTURE), ("study 12 no", NORMAL)),
        *(("0_fracture", None), ("1_normal", None), ("0 yes", None), ("1 no", None), ("class 0 fracture", None)),
        *(("label1_normal", None), ("not_1_fracture", None), ("study 1 2 fracture", None)),
    ],
)
def test_a_number_before_a_folders_word_agrees_with_it(name: str, label: int | None):
    assert words().of_folder(name) == label


@pytest.mark.parametrize("text", ["study1_positive", "Class 1 fracture", "label-1 yes"])
def test_a_named_number_before_a_value_is_passed_over(text: str):
    assert words().of_value(text) == FRACTURE


def test_the_number_of_an_excluded_word_says_nothing():
    assert words("data.excluded_labels=[unclear]").of_folder("1_unclear") == EXCLUDED


def test_a_cell_of_any_length_takes_no_time():
    digits = "1" * 20_000
    start = time.perf_counter()
    assert words().of_value(digits) is None
    assert words().of_folder(f"{digits} fracture") is None
    assert words().of_box(f"{'left ' * 20_000}fracture") is None
    assert time.perf_counter() - start < 1, "6 s when the number was searched for from every digit"


@pytest.mark.parametrize("text", ["f", "F", "t", "T"])
def test_a_letter_that_may_be_fracture_or_false_is_no_label(text: str):
    assert words().of_value(text) is None
    assert [words().of_value(letter) for letter in "YyJjNn"] == [FRACTURE] * 4 + [NORMAL] * 2


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
