import json

import pytest

from fracture.errors import UsageError
from fracture.labels import FRACTURE, NORMAL
from fracture.preparation.layouts import coco

CATEGORIES = [{"id": 0, "name": "bones"}, {"id": 1, "name": "wrist fracture"}, {"id": 2, "name": "humerus"}]


def content(listed: dict[int, str], boxes: list[tuple[int, int]], **changes) -> str:
    """A COCO file: images by id, and the image and category of each box."""
    lists = {
        "images": [{"id": number, "file_name": name, "width": 9, "height": 9} for number, name in listed.items()],
        "annotations": [
            {"id": number, "image_id": image, "category_id": category, "bbox": [1, 1, 2, 2]}
            for number, (image, category) in enumerate(boxes)
        ],
        "categories": CATEGORIES,
    }
    return json.dumps({"info": {}, **lists, **changes})


ROBOFLOW = {
    "train/_annotations.coco.json": content({0: "1.jpg", 1: "2.jpg", 2: "3.jpg"}, [(0, 1), (0, 2), (2, 2)]),
    "valid/_annotations.coco.json": content({0: "1.jpg", 7: "gone.jpg"}, []),
    **dict.fromkeys(("train/1.jpg", "train/2.jpg", "train/3.jpg", "valid/1.jpg", "valid/9.jpg", "valid/.DS_Store"), ""),
}


def test_files_beside_their_images(tree, words):
    root, paths = tree(texts=ROBOFLOW)
    assert coco.fits(root, paths)
    labelling = coco.read(root, paths, words())
    assert [(file.path, file.label, file.split) for file in labelling.files] == [
        ("train/1.jpg", FRACTURE, "train"),
        ("train/2.jpg", NORMAL, "train"),
        ("valid/1.jpg", NORMAL, "val"),
    ]
    assert labelling.words == {"fracture": ["wrist fracture"], "normal": ["(no box)"]}
    assert labelling.left_out == {
        "in a JSON file, but not in the folder": 1,
        "in no JSON file": 1,
        "left by a system, a camera or a program": 1,
        "with boxes of other classes alone: 'humerus'": 1,
    }


def test_boxes_of_fractures_are_kept_as_shares_of_the_image(tree, words):
    labelling = coco.read(*tree(texts=ROBOFLOW), words("data.normal_labels=[humerus]"))
    boxes = {file.path: file.boxes for file in labelling.files}
    assert boxes["train/1.jpg"] == (pytest.approx((1 / 9, 1 / 9, 3 / 9, 3 / 9)),), "not that of the humerus"
    assert boxes["train/3.jpg"] == ()


@pytest.mark.parametrize("bbox", [None, [1, 2, 3], [1, 2, 3, "4"], [1, 2, 0, 4], [10, 2, 3, 4], [10**400, 1, 1, 1]])
def test_a_box_without_a_position_is_a_fracture_all_the_same(tree, words, bbox):
    annotations = [{"image_id": 1, "category_id": 1, "bbox": bbox}]
    root, paths = tree("1.png", texts={"a.json": content({1: "1.png"}, [], annotations=annotations)})
    (file,) = coco.read(root, paths, words()).files
    assert (file.label, file.boxes) == (FRACTURE, ())


def test_settings_say_what_other_boxes_mean(tree, words):
    labelling = coco.read(*tree(texts=ROBOFLOW), words("data.normal_labels=[humerus]"))
    assert {file.path: file.label for file in labelling.files}["train/3.jpg"] == NORMAL


@pytest.mark.parametrize("name", ["1.png", "sub/1.png", "./1.png", "C:\\data\\sub\\1.png", "/home/me/sub/1.png"])
def test_files_in_a_folder_of_their_own_and_names_from_any_folder(tree, words, name: str):
    root, paths = tree(
        "train2017/sub/1.png",
        "val2017/sub/1.png",
        texts={
            "annotations/instances_train2017.json": content({1: name}, [(1, 1)]),
            "annotations/instances_val2017.json": content({1: name}, []),
        },
    )
    assert [(file.path, file.label, file.split) for file in coco.read(root, paths, words()).files] == [
        ("train2017/sub/1.png", FRACTURE, "train"),
        ("val2017/sub/1.png", NORMAL, "val"),
    ]


def test_the_split_may_be_in_the_files_name_alone(tree, words):
    root, paths = tree("images/1.png", texts={"test.json": content({1: "1.png"}, [(1, 1)])})
    assert coco.read(root, paths, words()).files[0].split == "test"


def test_two_files_of_one_image_have_its_boxes_together(tree, words):
    root, paths = tree("1.png", texts={"a.json": content({1: "1.png"}, []), "b.json": content({5: "1.png"}, [(5, 1)])})
    (file,) = coco.read(root, paths, words()).files
    assert file.label == FRACTURE


def test_two_ids_of_one_image_have_its_boxes_together(tree, words):
    root, paths = tree("1.png", texts={"a.json": content({1: "1.png", 2: "1.png"}, [(1, 1)])})
    (file,) = coco.read(root, paths, words()).files
    assert file.label == FRACTURE


def test_an_item_that_is_listed_twice(tree, words):
    images = [{"id": 1, "file_name": "1.png"}] * 2
    root, paths = tree("1.png", texts={"a.json": content({}, [(1, 1)], images=images, categories=CATEGORIES * 2)})
    assert len(coco.read(root, paths, words()).files) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            content({}, [], images=[{"id": 1, "file_name": "1.jpg"}, {"id": 1, "file_name": "a/3.jpg"}]),
            r"coco.json: images\[1\] has the id 1 of '1.jpg', and is 'a/3.jpg'. Fetch it anew",
        ),
        (
            content({}, [], categories=[{"id": 1, "name": "fracture"}, {"id": 1, "name": "metal"}]),
            r"coco.json: categories\[1\] has the id 1 of 'fracture', and is 'metal'. Fetch it anew",
        ),
        (
            content({1: "1.jpg"}, [(2, 1)]),
            r"annotations\[0\] has image_id 2, which the file does not list. Fetch it anew",
        ),
        (
            content({1: "1.jpg"}, [(1, 1), (1, 9)]),
            r"coco.json: annotations\[1\] has category_id 9, which the file does not",
        ),
        (content({}, [], images=[{"id": 1}]), r"coco.json: images\[0\] has no 'file_name'. Fetch it anew, or export"),
        (content({}, [], annotations=[[1]]), r"coco.json: annotations\[0\] has no 'image_id'"),
        (content({}, [], categories={"1": "fracture"}), r"coco.json: has no list 'categories'"),
        (content({1: "1.jpg"}, [], categories=[{"id": 1, "name": "bone"}]), r"no class of boxes means fracture; there"),
        (content({1: "1.jpg"}, [])[:-20], r"coco.json cannot be read as JSON: .*line 1 column.*Fetch it anew"),
        ("[" * 100_000, r"coco.json cannot be read as JSON: "),
        ("[]", r"coco.json: has no list 'categories'"),
        (b"\xff\xfe\x00", r"coco.json cannot be read as JSON"),
        (
            content({1: "x/3.jpg"}, []),
            r"the image 'x/3.jpg' may be any of 'a/3.jpg', 'b/3.jpg'. Give it with its folder",
        ),
    ],
)
def test_damage_names_the_file_and_the_item(tree, words, text, message: str):
    root, paths = tree("1.jpg", "a/3.jpg", "b/3.jpg", texts={"_annotations.coco.json": text})
    assert coco.fits(root, paths)
    with pytest.raises(UsageError, match=message) as raised:
        coco.read(root, paths, words())
    assert "\n" not in str(raised.value)


def test_an_immense_file_is_not_read(tree, words, tmp_path):
    root, paths = tree(texts=ROBOFLOW)
    with (tmp_path / "data/train/_annotations.coco.json").open("r+b") as file:
        file.truncate(2**40)  # a hole, which takes no room on the disk
    assert coco.fits(root, paths)
    with pytest.raises(UsageError, match=r"_annotations.coco.json has 1,099,511,627,776 bytes, over the limit"):
        coco.read(root, paths, words())


def test_a_long_file_is_known_by_its_two_ends(tree):
    long = content({number: f"{number:05d}.png" for number in range(5000)}, [])
    assert len(long) > 2 * 2**16
    assert coco.fits(*tree(texts={"labels.json": long}))


def test_json_of_other_kinds_is_not_coco(tree):
    labelme = {f"{number}.json": '{"shapes": [], "imagePath": "1.png"}' for number in range(60)}
    assert not coco.fits(*tree("1.png", texts=labelme | {"config.json": '{"images": []}', "empty.json": ""}))
