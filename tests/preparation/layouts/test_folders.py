import shlex
import subprocess
import unicodedata
from itertools import pairwise

import pytest

from fracture.config import DataConfig, load_config
from fracture.errors import UsageError
from fracture.labels import FRACTURE, NORMAL
from fracture.preparation.labels.class_words import ClassWords
from fracture.preparation.labels.labelling import Labelling
from fracture.preparation.layouts.folders import read
from fracture.storage import storage_path
from tests.conftest import official_paths

ROOT = storage_path("/data")  # nothing in it is opened


def read_paths(*paths: str, words: ClassWords | None = None) -> Labelling:
    return read(ROOT, paths, words or ClassWords(DataConfig()))


def labels(*paths: str, words: ClassWords | None = None) -> dict[str, int]:
    return {file.path: file.label for file in read_paths(*paths, words=words).files}


@pytest.mark.parametrize(
    ("fracture", "normal"),
    [
        *(("Fracture", "Normal"), ("fractured", "not fractured"), ("FRACTURED", "not_fractured"), ("Bruch", "gesund")),
        *(("study1_positive", "study1_negative"), ("1_fracture", "0_normal"), ("yes", "no"), ("骨折", "正常")),
        ("fracturée", "non fracturé"),
        (unicodedata.normalize("NFD", "fracturée"), unicodedata.normalize("NFD", "unauffällig")),
    ],
)
def test_folders_of_many_names_mean_a_class(fracture: str, normal: str):
    assert labels(f"{fracture}/1.png", f"{normal}/2.png") == {f"{fracture}/1.png": FRACTURE, f"{normal}/2.png": NORMAL}


def test_splits_of_any_usual_name_at_any_depth():
    paths = [f"Bone/Bone/{path}".replace("val/", "Validation/") for path in official_paths()]
    labelling = read_paths(*paths, "Bone/README.txt")
    assert {file.path.split("/")[2]: file.split for file in labelling.files} == {
        "train": "train",
        "Validation": "val",
        "test": "test",
    }
    assert len(labelling.files) == 12
    assert labelling.words == {"fracture": ["fractured"], "normal": ["not fractured"]}
    assert labelling.left_out == {"document or table": 1}


def test_a_set_called_test_has_its_own_splits():
    files = read_paths(*[f"test/{path}" for path in official_paths()]).files
    assert {(file.path.split("/")[1], file.split) for file in files} == {(s, s) for s in ("train", "val", "test")}


def test_classes_below_patients_or_body_parts():
    paths = ("ann/fracture/1.png", "ben/normal/1.png", "train/fracture/2.png")
    assert labels(*paths[:2]) == {"ann/fracture/1.png": FRACTURE, "ben/normal/1.png": NORMAL}
    files = read_paths("train/XR_ELBOW/p1/study1_positive/1.png", "val/XR_HAND/p2/study2_negative/1.png").files
    assert [(file.split, file.label) for file in files] == [("train", FRACTURE), ("val", NORMAL)]


def test_numbers_before_a_word_are_no_words_of_their_own():
    assert read_paths("p1/study1_positive/1.png", "p1/study2_positive/1.png", "p2/0 negative/1.png").words == {
        "fracture": ["positive"],
        "normal": ["negative"],
    }


def test_the_name_of_the_whole_is_no_class():
    assert labels("Fracture/Normal/1.png", "Fracture/Broken/2.png") == {
        "Fracture/Normal/1.png": NORMAL,
        "Fracture/Broken/2.png": FRACTURE,
    }
    assert labels("x/fracture/no/1.png", "x/fracture/yes/1.png") == {
        "x/fracture/no/1.png": NORMAL,
        "x/fracture/yes/1.png": FRACTURE,
    }
    assert labels("fracture/broken/1.png", "fracture/2.png") == {"fracture/broken/1.png": 1, "fracture/2.png": 1}


def test_clutter_annotations_and_files_elsewhere_are_counted():
    labelling = read_paths(
        *official_paths(),
        *("train/.DS_Store", "System Volume Information/x", "train/@eaDir/1.png", "train/fractured/Thumbs.db"),
        *("train/masks/1.png", "train/fractured/1_mask.png", "train/fractured/1.json", "notes/1.png", "1.png"),
    )
    assert len(labelling.files) == 12
    assert labelling.left_out == {
        "left by a system, a camera or a program": 4,
        "mask or annotation": 2,
        "document or table": 1,
        "outside the class folders": 2,
    }


def test_excluded_folders_are_left_out_wherever_they_are(words):
    paths = ("fracture/1.png", "normal/2.png", "unclear/3.png", "fracture/unclear/4.png", "Unclear/normal/5.png")
    labelling = read_paths(*paths, words=words("data.excluded_labels=unclear"))
    assert [file.path for file in labelling.files] == ["fracture/1.png", "normal/2.png"]
    assert labelling.left_out == {"named by data.excluded_labels": 3}


def test_what_is_uncertain_in_a_class_folder_is_left_out():
    paths = ("fracture/1.png", "fracture/uncertain/2.png", "normal/03 Normal Variant/3.png", "normal/ann/4.png")
    labelling = read_paths(*paths, "Unklar/normal/5.png", "fracture/ben/fraglich/6.png", "fracture/Zweifel/7.png")
    assert [file.path for file in labelling.files] == ["fracture/1.png", "fracture/Zweifel/7.png", "normal/ann/4.png"]
    assert labelling.left_out == {"in folders that cast doubt on their class, such as 'uncertain'": 4}
    assert read_paths("fracture/uncertain/1.png", "2.png").files == ()
    assert len(read_paths("possible set/fracture/1.png", "possible set/normal/2.png").files) == 2, (
        "the name of the whole"
    )


def test_what_is_uncertain_is_of_the_class_that_the_settings_say(words):
    paths = ("fracture/1.png", "fracture/uncertain/2.png", "normal/normal variant/3.png")
    named = words("data.fracture_labels=uncertain", "data.normal_labels=normal variant")
    assert labels(*paths, words=named) == dict(zip(paths, (1, 1, 0), strict=True))


def test_one_class_word_among_other_folders_may_be_a_surname(words):
    paths = ("A-M/Bruch/1.png", "A-M/Bruch/2.png", "N-Z/Nowak/3.png")
    with pytest.raises(
        UsageError, match=r"'Bruch' alone names a class, fracture, and 1 images are in other .*--labels"
    ):
        read_paths(*paths)
    assert len(read_paths(*paths, words=words("data.fracture_labels=Bruch")).files) == 2
    assert len(read_paths("fracture/1.png", "fracture/2.png").files) == 2, "its other class is in another --data"


def test_names_that_are_no_utf8_are_read_as_others():
    assert labels("fracture/R\udcf6ntgen.png", "B\udcf6sch/normal/1.png") == {
        "fracture/R\udcf6ntgen.png": FRACTURE,
        "B\udcf6sch/normal/1.png": NORMAL,
    }


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (
            ["readme.txt"],
            r"no class folder found among '\.' \(passed over: 1 x document or table\)\. Folders that name a ",
        ),
        ([".DS_Store"], r"no class folder found among '\.' .*Make such folders, or use --labels FILE\.$"),
        (["images/1.png"], r"among 'images'\. .* Make such folders, or use --labels FILE\.$"),
        ([*official_paths(), "train/brokn/1.png"], r"folder 'train/brokn' names no known class. Known: .*--set"),
        (["fracture/1.png", "normal/1.png", "odd/a/1.png"], r"folder 'odd' names no known class"),
        (["fracture/1.png", "normal/1.png", "odd/1.png"], r"say what it is: --set 'data.fracture_labels=\[odd\]' or"),
        (["fracture/1.png", "normal/1.png", "o/1.png", "p/1.png"], r"Several names go into one list: \[A, B\]"),
        (["fracture/1.png", "normal/1.png", "o\udcf6/1.png"], r"folder 'o\\udcf6' names .* Rename it\.$"),
        (["fracture/train/1.png", "normal/train/1.png"], r"the class is above the split. Move .* to train/CLASS"),
        ([*official_paths(), "normal/1.png"], r"has class folders inside and beside train/, val/ and test/"),
        ([f"{d}/{p}" for d in "ab" for p in official_paths()], r"holds 2 data sets, in 'a', 'b'. Name one of them"),
        (
            ["fracture/normal/1.png", "normal/1.png"],
            r"folder 'fracture/normal' is in both classes, by 'fracture' and 'normal'. Rename the one that is no class",
        ),
    ],
)
def test_a_tree_that_cannot_be_used(paths: list[str], message: str):
    with pytest.raises(UsageError, match=message):
        read_paths(*paths)


def test_the_nearest_known_word_is_named():
    with pytest.raises(UsageError, match=r"Did you mean 'fracture' by 'fracure'\? If fracure means fracture: --set"):
        read_paths("fracure/1.png", "norml/1.png")
    with pytest.raises(UsageError, match=r"Did you mean 'normal' by 'norml'\? Rename it, or say what it is:"):
        read_paths("fracture/1.png", "norml/1.png")


def test_machines_folders_are_never_said_to_be_a_class():
    with pytest.raises(UsageError, match="among 'odd', 'other'") as raised:
        read_paths("odd/1.png", "other/1.png", "System Volume Information/1", "$RECYCLE.BIN/1.png", "masks/1.png")
    assert "System" not in str(raised.value)
    assert "RECYCLE" not in str(raised.value)


def settings_of(message: str) -> list[str]:
    """The assignments of a message as a shell passes them on when they are pasted behind a command."""
    pasted = message[message.index("--set") :].replace(" or --set", " --set").replace("; --set", " --set")
    script = f"printf '%s\\0' {pasted.partition(' leaves it out')[0]}"
    arguments = subprocess.run(["sh", "-c", script], check=True, capture_output=True).stdout.decode().split("\0")
    return [value for flag, value in pairwise(arguments) if flag == "--set"]


def test_folders_of_digits_are_not_guessed_and_the_advice_works():
    paths = ("train/0/1.png", "train/1/2.png", "val/0/3.png", "val/1/4.png")
    with pytest.raises(
        UsageError,
        match=r"If 1 means fracture: --set 'data.fracture_labels=\[1\]' --set 'data.normal_labels=\[0\]'$",
    ) as raised:
        read_paths(*paths)
    assert labels(*paths, words=ClassWords(load_config(None, settings_of(str(raised.value))).data)) == {
        "train/0/1.png": 0,
        "train/1/2.png": 1,
        "val/0/3.png": 0,
        "val/1/4.png": 1,
    }


@pytest.mark.parametrize(
    "name",
    [
        *("odd", "two words", "a, b", "it's", 'an "inner" one', "[a]", "a: b", "#7", "-x", "*", "1.50", "null", "{b}"),
        *(
            "a\nb",
            "$HOME",
            "`x`",
            "Röntgen",
            unicodedata.normalize("NFD", "Röntgen"),
            "骨",
            "\x7f",
            "100%",
            " x ",
            "\\",
        ),
    ],
)
def test_the_advice_for_a_folder_of_any_name_works_as_it_stands(name: str):
    paths = ("fracture/1.png", "normal/2.png", f"{name}/3.png")
    with pytest.raises(UsageError, match="names no known class") as raised:
        read_paths(*paths)
    fracture, normal, excluded = settings_of(str(raised.value))
    for setting, label in ((fracture, FRACTURE), (normal, NORMAL), (excluded, None)):
        words = ClassWords(load_config(None, [setting]).data)
        assert labels(*paths, words=words).get(f"{name}/3.png") == label


def test_the_advice_keeps_what_the_settings_have_already(words):
    with pytest.raises(UsageError, match="names no known class") as raised:
        read_paths("one/1.png", "normal/2.png", "two/3.png", words=words("data.fracture_labels=one"))
    assert settings_of(str(raised.value))[0] == "data.fracture_labels=[one, two]"
    assert shlex.split(str(raised.value).partition("is: ")[2])[:2] == ["--set", "data.fracture_labels=[one, two]"]


def test_the_work_grows_with_the_number_of_folders_alone():
    """10,000 folders beside 10,000 took 100 million comparisons, were each compared with each."""
    paths = [f"p{i:05d}/{'fracture' if i % 2 else 'normal'}/1.png" for i in range(10_000)]
    assert len(read_paths(*paths, *[f"q{i:05d}/other/1.png" for i in range(10_000)]).files) == 10_000
