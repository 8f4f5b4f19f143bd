import pytest

from fracture.errors import UsageError
from fracture.preparation.layouts.layout import read_layout
from tests.conftest import official_paths
from tests.preparation.layouts.test_coco import ROBOFLOW
from tests.preparation.layouts.test_public_sets import FRACATLAS, GRAZ, MURA
from tests.preparation.layouts.test_yolo import FILES

SETS = {
    "mura": dict.fromkeys(MURA, ""),
    "fracatlas": FRACATLAS,
    "grazpedwri": GRAZ,
    "yolo": FILES,
    "coco": ROBOFLOW,
    "folders": dict.fromkeys(official_paths(), ""),
}


@pytest.mark.parametrize("name", SETS)
def test_each_set_is_recognised(tree, words, name: str):
    root, paths = tree(texts=SETS[name])
    found, labelling = read_layout("auto", root, paths, words())
    assert found == name
    assert (name, labelling) == read_layout(name, root, paths, words())
    assert {file.label for file in labelling.files} == {0, 1}
    assert [file.path for file in labelling.files] == sorted(file.path for file in labelling.files)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mura", r"--layout mura expects folders such as XR_ELBOW/patient00005/study1_positive; found 'a'. Name the f"),
        ("fracatlas", r"--layout fracatlas expects dataset.csv with the columns image_id and fractured; found 'a'"),
        ("grazpedwri", r"expects dataset.csv with the columns filestem, fracture_visible and patient_id; found 'a'"),
        ("yolo", r"--layout yolo expects data.yaml with the names of the classes, and a folder labels/ beside images/"),
        ("coco", r"--layout coco expects a JSON file with the keys .* or use --layout folders, which expects folders"),
    ],
)
def test_a_layout_that_is_named_and_does_not_fit(tree, words, name, message: str):
    with pytest.raises(UsageError, match=message):
        read_layout(name, *tree("a/1.png"), words())


def test_a_layout_that_does_not_fit_names_the_one_that_does(tree, words):
    with pytest.raises(UsageError, match=r"use --layout yolo, which expects data.yaml with"):
        read_layout("mura", *tree(texts=FILES), words())


def test_folders_decide_where_boxes_are_drawn_beside_their_images(tree, words):
    boxes = {"annotations.json": ROBOFLOW["valid/_annotations.coco.json"], "data.yaml": FILES["set/data.yaml"]}
    texts = boxes | dict.fromkeys(("fracture/images/1.png", "normal/images/2.png", "fracture/labels/1.txt"), "")
    name, labelling = read_layout("auto", *tree(texts=texts), words())
    assert name == "folders"
    assert len(labelling.files) == 2
    assert labelling.left_out == {"document or table": 3}
