import os
from dataclasses import replace
from pathlib import Path

import pytest

from fracture.config import DataConfig
from fracture.errors import UsageError
from fracture.labels import FRACTURE, NORMAL
from fracture.preparation.identity import PatientKey
from fracture.preparation.source import Source, describe_labels, describe_source, find_source, keyed_hash
from fracture.storage import storage_path
from tests.conftest import official_paths


def found(folder: Path, config: DataConfig | None = None, **kwargs) -> Source:
    return find_source([storage_path(folder)], config or DataConfig(), **kwargs)


def count(source: Source, split: str, label: int | None = None) -> int:
    return sum(f.split == split and label in (None, f.label) for f in source.files)


@pytest.mark.parametrize(
    "names",
    [
        ("Fracture", "Normal"),
        ("fractured", "not fractured"),
        ("FRACTURED", "not_fractured"),
        ("fracture", "Non-Fractured"),
    ],
)
def test_common_names_of_class_folders_and_fracture_is_1(image_folder, names):
    source = found(image_folder(*official_paths(classes=names)))
    assert {f.path.split("/")[1]: f.label for f in source.files} == {names[0]: FRACTURE, names[1]: NORMAL}
    assert [count(source, s) for s in ("train", "val", "test")] == [4, 4, 4]
    assert source.class_folders == {"fracture": [names[0]], "normal": [names[1]]}


def test_the_tree_may_be_deeper_and_splits_have_other_names(image_folder):
    paths = [f"Bone/Bone/{p}".replace("val/", "Validation/") for p in official_paths()]
    source = found(image_folder(*paths, "Bone/README.txt"))
    assert source.split_fault == ""
    assert count(source, "val") == 4
    assert len(source.files) == 12


def test_clutter_is_not_listed(image_folder):
    folder = image_folder(
        *official_paths(), "train/.DS_Store", "train/fractured/Thumbs.db", ".git/train/fractured/1.png"
    )
    assert len(found(folder).files) == 12


def test_more_folder_names_by_config(image_folder):
    folder = image_folder(*official_paths(classes=("broken", "Healthy-Bone")))
    config = DataConfig(fracture_labels=("Broken",), normal_labels=("healthy bone",))
    assert count(found(folder, config), "train", FRACTURE) == 2


@pytest.mark.parametrize(
    ("paths", "fault"),
    [
        (
            [f"{name}/{i}.png" for name in ("fracture", "normal") for i in range(2)],
            "has no train, val and test folders",
        ),
        ([p for p in official_paths() if "val/" not in p], "has train, test but no val folder"),
        ([p for p in official_paths() if "test/not" not in p], "split 'test' has no image of class 'normal'"),
    ],
)
def test_a_split_that_cannot_be_used_is_an_error_only_if_it_is_set(image_folder, paths, fault):
    folder = image_folder(*paths)
    assert found(folder).split_fault == fault
    with pytest.raises(UsageError, match=f"{fault}, so data.split = official is not possible. .*use --split group"):
        found(folder, DataConfig(split="official"))


def test_several_folders_are_origins_of_their_own(image_folder):
    roots = [image_folder(*official_paths(1), root=name) for name in ("north", "south")]
    source = find_source([storage_path(root) for root in roots], DataConfig())
    assert {(f.origin, f.path.split("/")[0]) for f in source.files} == {("north", "north"), ("south", "south")}
    path = "south/val/fractured/0.png"
    assert source.locate(path).read_bytes() == (roots[1] / "val/fractured/0.png").read_bytes()
    with pytest.raises(UsageError, match=r"two folders have the name 'north', and origins are distinguished by name"):
        find_source(
            [storage_path(roots[0]), storage_path(image_folder(*official_paths(1), root="deep/north"))], DataConfig()
        )


LABELS = """path,label,patient,source
a.png,Fracture,p1,north
b.png,0,p1,north
sub/c.png,normal,,
"""


@pytest.fixture
def key(tmp_path: Path) -> PatientKey:
    return PatientKey(tmp_path / "patients.key")


def labelled(folder: Path, text: str, key: PatientKey, **settings) -> Source:
    (folder / "labels.csv").write_text(text)
    return found(folder, DataConfig(**settings), labels=storage_path(folder / "labels.csv"), key=key)


def test_a_labels_file_gives_label_patient_and_source(image_folder, key):
    source = labelled(image_folder("a.png", "b.png", "sub/c.png", "not-named.png"), LABELS, key)
    ann = key.hide("patient", "north/p1")
    assert [(f.path, f.label, f.patients, f.origin) for f in source.files] == [
        ("a.png", 1, (ann,), "north"),
        ("b.png", 0, (ann,), "north"),
        ("sub/c.png", 0, (), ""),
    ]
    assert source.class_folders == {"fracture": ["Fracture"], "normal": ["0", "normal"]}
    assert source.unlabelled == ("not-named.png",)
    assert source.layout == "labels file, by path"
    assert source.left_out == {"document or table": 1}, "the labels file itself"


def test_patients_are_written_only_under_a_key(image_folder):
    with pytest.raises(UsageError, match=r"written only as HMACs under a secret key: name a file .* --key-file"):
        labelled(image_folder("a.png", "b.png", "sub/c.png"), LABELS, PatientKey(None))
    plain = LABELS.replace("p1", "")
    assert len(labelled(image_folder("a.png", "b.png", "sub/c.png"), plain, PatientKey(None)).files) == 3


def test_number_seven_of_two_hospitals_is_two_patients(image_folder, key):
    text = "path,label,patient,source\na.png,1,7,north\nb.png,0,7,south\nc.png,0,7,north\n"
    first, second, third = labelled(image_folder("a.png", "b.png", "c.png"), text, key).files
    assert first.patients == third.patients != second.patients


def test_what_a_labels_file_does_not_name_is_listed_up_to_a_share(image_folder, key):
    folder = image_folder("a.png", "b.png", "sub/c.png", "d.png", "e.png", "f.png", "g.png")
    with pytest.raises(
        UsageError,
        match=r"4 of 7 images in .* have no row \(57.1%\), more than data.max_unlabelled_fraction = 0.5. Add their",
    ):
        labelled(folder, LABELS, key)
    assert len(labelled(folder, LABELS, key, max_unlabelled_fraction=1.0).unlabelled) == 4
    text = f"{LABELS}x.png,1,,\n"
    source = labelled(folder, text, key, max_unlabelled_fraction=1.0, max_unmatched_fraction=0.3)
    assert source.unmatched_rows == (5,)
    assert "no image   1 rows of the labels file; first: row 5" in describe_source(source)
    assert "no label   4 images in the folder, which are not used" in describe_source(source)


def test_the_listing_says_where_the_labels_came_from(image_folder, key):
    text = "path,label,patient,comment\na.png,Fracture,p1,x\nb.png,0,p1,y\nb.png,0,p1,z\n"
    source = labelled(image_folder("a.png", "b.png"), text, key)
    assert describe_source(source)[1:] == [
        "labels     2 files by labels file, by path: fracture is 'Fracture', normal is '0'; 1 patients, studies not "
        "known",
        "repeated   1 rows of the labels file say what an earlier one says; first: row 4",
        "not read   1 columns of the labels file: 'comment'",
        "left out   1 file: document or table",
    ]
    no_words = replace(source, class_folders={"fracture": [], "normal": []})  # each holds a number, which may be an id
    assert describe_labels(no_words) == "2 files by labels file, by path: 1 patients, studies not known"
    folders = found(image_folder(*official_paths(), root="folders"))
    assert describe_source(folders)[1] == (
        "labels     12 files by folders: fracture is 'fractured', normal is 'not fractured'; patients not known, "
        "studies not known"
    )


def test_a_labels_file_needs_both_classes(image_folder, key):
    with pytest.raises(UsageError, match=r"no image of class 'normal'; both classes are needed"):
        labelled(image_folder("a.png", "b.png"), "path,label\na.png,1\nb.png,1\n", key)


def test_the_table_in_the_folder_is_the_labels_file_on_request(image_folder):
    folder = image_folder("a.png", "b.png", "sub/c.png")
    (folder / "my labels.csv").write_text("file;label\na.png;1\nb.png;0\nc.png;0\n")
    source = found(folder, DataConfig(layout="csv"))
    assert [f.label for f in source.files] == [1, 0, 0]
    (folder / "more.csv").write_text("x\n")
    with pytest.raises(UsageError, match=r"--layout csv: .* has 2 tables .* and one is needed. Name .* with --labels"):
        found(folder, DataConfig(layout="csv"))
    with pytest.raises(UsageError, match="--layout yolo and --labels both say where the labels are"):
        found(folder, DataConfig(layout="yolo"), labels=storage_path(folder / "my labels.csv"))


def test_a_pattern_on_the_path_names_the_patient(image_folder):
    folder = image_folder("fracture/s1-a.png", "fracture/s2-a.png", "normal/s1-b.png", "normal/other.png")
    one, other, none, again = found(folder, DataConfig(group_pattern=r"s(\d+)")).files
    assert one.group_match == again.group_match == "/1"
    assert (other.group_match, none.group_match) == ("/2", "")
    assert found(folder, DataConfig(group_pattern=r"(?:s(\d+))?")).files[2].group_match == "", "it captures nothing"


def test_patients_of_two_folders_are_apart(image_folder):
    paths = ["fracture/s1-a.png", "normal/s1-b.png"]
    roots = [storage_path(image_folder(*paths, root=name)) for name in ("north", "south")]
    files = find_source(roots, DataConfig(group_pattern=r"s\d+")).files
    assert {f.origin: f.group_match for f in files} == {"north": "north:/s1", "south": "south:/s1"}


def test_links_that_lead_out_of_the_folder_are_refused(image_folder, tmp_path):
    elsewhere = image_folder("secret.png", root="elsewhere")
    folder = image_folder(*official_paths())
    link = folder / "train/fractured/9.png"
    link.symlink_to(elsewhere / "secret.png")
    message = (
        r"--data .*: 'train/fractured/9.png' is a link to a file outside, .*elsewhere/secret.png, and such links are"
    )
    with pytest.raises(UsageError, match=message):
        found(folder)
    with pytest.raises(UsageError, match=message):
        labelled(folder, "path,label\ntrain/fractured/9.png,1\ntrain/not fractured/0.png,0\n", PatientKey(None))


@pytest.mark.parametrize("target", ["/etc", "..", ".", "../not fractured"])
def test_links_to_folders_are_refused(image_folder, target: str):
    """Two links to the folder that holds them would make a list of 2^40 files."""
    folder = image_folder(*official_paths())
    for name in ("loop", "again"):
        (folder / "train/fractured" / name).symlink_to(target)
    with pytest.raises(
        UsageError, match=r"'train/fractured/(loop|again)' is a link to a folder.* are not followed. Copy"
    ):
        found(folder)


def test_links_within_the_folder_and_to_the_folder_are_followed(image_folder, tmp_path):
    folder = image_folder(*official_paths())
    (folder / "train/fractured/9.png").symlink_to(folder / "train/fractured/0.png")
    (tmp_path / "link").symlink_to(folder)
    assert len(found(tmp_path / "link").files) == 13


def test_a_pipe_is_not_opened(image_folder):
    folder = image_folder(*official_paths())
    os.mkfifo(folder / "train/fractured/9.png")
    assert len(found(folder).files) == 12


def test_a_labels_file_that_is_not_there_or_for_several_folders(image_folder, tmp_path):
    folder = image_folder(*official_paths(1))
    with pytest.raises(UsageError, match=r"--labels .*nowhere.csv: .*"):
        found(folder, labels=storage_path(tmp_path / "nowhere.csv"))
    with pytest.raises(UsageError, match="--labels belongs to one --data folder"):
        find_source([storage_path(folder), storage_path(folder)], DataConfig(), storage_path(tmp_path / "labels.csv"))


def test_the_hash_of_the_listing_follows_the_files(image_folder):
    folder = image_folder(*official_paths())
    before = found(folder).hash_listing()
    assert found(folder).hash_listing() == before
    (folder / "train/fractured/0.png").write_bytes(b"other")
    assert found(folder).hash_listing() != before


def test_the_keyed_hash_is_the_same_on_every_machine():
    assert keyed_hash("train/a.png", 0).hex()[:8] == keyed_hash("train/a.png", 0).hex()[:8]
    assert keyed_hash("train/a.png", 0) != keyed_hash("train/a.png", 1)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["readme.txt"], r"no class folder found among '\.'.*Folders that name a class: 'fracture', 'fractured'"),
        ([*official_paths(), "train/odd/1.png"], r"folder 'train/odd' names no known class. Known: .*--set"),
        (["fracture/1.png", "normal/1.png", "odd/1.png"], r"folder 'odd' names no known class"),
        (["fracture/1.png", "normal/1.png", "odd/a/1.png"], r"folder 'odd' names no known class"),
        (["fracture/train/1.png", "normal/train/1.png"], r"the class is above the split. Move .* to train/CLASS"),
        ([*official_paths(), "normal/1.png"], r"has class folders inside and beside train/, val/ and test/"),
        (["fracture/1.png", "fracture/2.png"], r"no image of class 'normal'; both classes are needed. Add images"),
        ([f"{d}/{p}" for d in "ab" for p in official_paths()], r"holds 2 data sets, in 'a', 'b'. Name one of them"),
    ],
)
def test_a_tree_that_cannot_be_used(image_folder, paths, message):
    with pytest.raises(UsageError, match=message):
        found(image_folder(*paths))


def test_a_table_beside_the_class_folders_is_ignored(image_folder):
    assert len(found(image_folder(*official_paths(), "train/labels.csv", "README.md")).files) == 12


def test_a_sample_in_a_deeper_folder_is_still_synthetic(image_folder):
    folder = image_folder(*[f"sample/{p}" for p in official_paths()])
    assert not found(folder).synthetic
    (folder / "sample/SYNTHETIC.json").write_text("{}")
    assert found(folder).synthetic


def test_no_folder_and_an_empty_one(tmp_path: Path):
    with pytest.raises(UsageError, match=r"no such folder. Give the folder that holds the class folders, or train/"):
        found(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="a file, not a folder"):
        found(tmp_path / "file")
    (tmp_path / "file").unlink()
    with pytest.raises(UsageError, match="the folder is empty"):
        found(tmp_path)


def test_one_folder_name_for_both_classes(image_folder):
    with pytest.raises(UsageError, match=r"names 'normal', which is 'normal' already; it cannot also be 'fracture'"):
        found(image_folder(*official_paths()), DataConfig(fracture_labels=("Normal",)))
