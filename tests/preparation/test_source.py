from pathlib import Path

import pytest

from fracture.config import DataConfig
from fracture.errors import UsageError
from fracture.labels import FRACTURE, NORMAL
from fracture.preparation.source import find_source, keyed_hash
from fracture.storage import place
from tests.conftest import official_paths


def found(folder: Path, config: DataConfig | None = None):
    return find_source(place(folder), config or DataConfig())


@pytest.mark.parametrize(
    "names",
    [
        ("Fracture", "Normal"),
        ("fractured", "not fractured"),
        ("FRACTURED", "not_fractured"),
        ("fracture", "Non-Fractured"),
    ],
)
def test_class_folders_as_named_in_the_wild_and_fracture_is_1(image_folder, names):
    source = found(image_folder(*official_paths(classes=names)))
    assert {f.path.split("/")[1]: f.label for f in source.files} == {names[0]: FRACTURE, names[1]: NORMAL}
    assert [source.count(s) for s in ("train", "val", "test")] == [4, 4, 4]
    assert source.class_folders == {"fracture": [names[0]], "normal": [names[1]]}


def test_the_tree_may_lie_deeper_and_splits_have_other_names(image_folder):
    paths = [f"Bone/Bone/{p}".replace("val/", "Validation/") for p in official_paths()]
    source = found(image_folder(*paths, "Bone/README.txt"))
    assert source.has_splits
    assert source.count("val") == 4
    assert len(source.files) == 12


def test_clutter_is_not_data(image_folder):
    folder = image_folder(
        *official_paths(), "train/.DS_Store", "train/fractured/Thumbs.db", ".git/train/fractured/1.png"
    )
    assert len(found(folder).files) == 12


def test_more_folder_names_by_config(image_folder):
    folder = image_folder(*official_paths(classes=("broken", "Healthy-Bone")))
    config = DataConfig(fracture_folders=("Broken",), normal_folders=("healthy bone",))
    assert found(folder, config).count("train", FRACTURE) == 2


def test_a_folder_without_splits_gets_a_random_one_by_seed(image_folder):
    folder = image_folder(*[f"{name}/{i}.png" for name in ("fracture", "normal") for i in range(20)])
    config = DataConfig(val_fraction=0.2, test_fraction=0.1)
    source = found(folder, config)
    assert not source.has_splits
    assert {s: source.count(s, FRACTURE) for s in ("train", "val", "test")} == {"train": 14, "val": 4, "test": 2}
    assert found(folder, config).files == source.files
    other = found(folder, DataConfig(val_fraction=0.2, test_fraction=0.1, seed=1))
    assert [f.split for f in other.files] != [f.split for f in source.files]


def test_the_stamp_follows_the_files(image_folder):
    folder = image_folder(*official_paths())
    before = found(folder).stamp()
    assert found(folder).stamp() == before
    (folder / "train/fractured/0.png").write_bytes(b"other")
    assert found(folder).stamp() != before


def test_the_keyed_hash_is_the_same_on_every_machine():
    assert keyed_hash("train/a.png", 0).hex()[:8] == keyed_hash("train/a.png", 0).hex()[:8]
    assert keyed_hash("train/a.png", 0) != keyed_hash("train/a.png", 1)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["readme.txt"], r"no class folder found among '\.'.*Folders that name a class: 'fracture', 'fractured'"),
        ([*official_paths(), "train/broken/1.png"], r"folder 'train/broken' names no known class. Known: .*--set"),
        ([p for p in official_paths() if "val/" not in p], r"has train, test but no val folder"),
        ([p for p in official_paths() if "test/not" not in p], r"split 'test' has no image of class 'normal'"),
        (["fracture/1.png", "normal/1.png", "broken/1.png"], r"folder 'broken' names no known class"),
        (["fracture/1.png", "normal/1.png", "broken/a/1.png"], r"folder 'broken/a' names no known class"),
        (["fracture/train/1.png", "normal/train/1.png"], r"the class lies above the split. Move .* to train/CLASS"),
        ([*official_paths(), "normal/1.png"], r"has class folders inside and beside train/, val/ and test/"),
        (
            [f"{c}/{i}.png" for c in ("fracture", "normal") for i in "12"],
            r"'train' has no image .* classes. Add im",
        ),
        ([f"{d}/{p}" for d in "ab" for p in official_paths()], r"holds 2 data sets, in 'a', 'b'. Name one of them"),
    ],
)
def test_a_tree_that_cannot_be_used(image_folder, paths, message):
    with pytest.raises(UsageError, match=message):
        found(image_folder(*paths))


def test_a_table_beside_the_class_folders_is_nobodys_class(image_folder):
    assert len(found(image_folder(*official_paths(), "train/labels.csv", "README.md")).files) == 12


def test_a_sample_in_a_deeper_folder_is_still_synthetic(image_folder):
    folder = image_folder(*[f"sample/{p}" for p in official_paths()])
    assert not found(folder).synthetic
    (folder / "sample/SYNTHETIC.json").write_text("{}")
    assert found(folder).synthetic


def test_no_folder_and_an_empty_one(tmp_path: Path):
    with pytest.raises(UsageError, match=r"no such folder. Give the folder that holds train/, val/ and test/"):
        found(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="a file, not a folder"):
        found(tmp_path / "file")
    (tmp_path / "file").unlink()
    with pytest.raises(UsageError, match="the folder is empty"):
        found(tmp_path)


def test_one_folder_name_for_both_classes(image_folder):
    with pytest.raises(UsageError, match=r"'normal' is already 'normal'; it cannot also be 'fracture'"):
        found(image_folder(*official_paths()), DataConfig(fracture_folders=("Normal",)))
