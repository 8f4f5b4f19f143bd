import pytest

from fracture.errors import UsageError
from fracture.labels import FRACTURE, NORMAL
from fracture.preparation.layouts import yolo

BOX = "0.5 0.5 0.1 0.1"
YAML = "train: ../train/images\nnc: 3\nnames: ['elbow positive', 'humerus', 'metal']\n"
BOMB = "a: &a [x]\n" + "".join(  # of 10**9 names, were it written out
    f"{name}: &{name} [{', '.join([f'*{below}'] * 10)}]\n" for below, name in zip("abcdefghi", "bcdefghij", strict=True)
)
BOMB += "names: *j\n"
FILES = {
    "set/data.yaml": YAML,
    "set/README.dataset.txt": "about",
    "set/train/images/fracture.jpg": "",
    "set/train/labels/fracture.txt": f"1 {BOX}\n0 {BOX}\n",
    "set/train/images/outline.jpg": "",
    "set/train/labels/outline.txt": "0 0.1 0.1 0.2 0.1 0.2 0.2\n\n",
    "set/train/images/empty.jpg": "",
    "set/train/labels/empty.txt": "",
    "set/valid/images/blank.jpg": "",
    "set/valid/labels/blank.txt": " \n\n",
    "set/valid/images/humerus.jpg": "",
    "set/valid/labels/humerus.txt": f"1 {BOX}\n",
    "set/test/images/metal.jpg": "",
    "set/test/labels/metal.txt": f"2 {BOX}\n1.0 {BOX}\n",
    "set/test/images/unseen.jpg": "",
    "set/test/labels/gone.txt": f"0 {BOX}\n",
    "set/test/labels.cache": "",
    "set/loose.jpg": "",
}


def test_boxes_of_fractures_empty_files_and_no_files(tree, words):
    root, paths = tree(texts=FILES)
    assert yolo.fits(root, paths)
    labelling = yolo.read(root, paths, words())
    assert [(file.path, file.label, file.split) for file in labelling.files] == [
        ("set/train/images/empty.jpg", NORMAL, "train"),
        ("set/train/images/fracture.jpg", FRACTURE, "train"),
        ("set/train/images/outline.jpg", FRACTURE, "train"),
        ("set/valid/images/blank.jpg", NORMAL, "val"),
    ]
    assert labelling.words == {"fracture": ["elbow positive"], "normal": ["(no box)"]}
    assert labelling.left_out == {
        "document or table": 1,
        "in labels/, but not in images/": 1,
        "left by a system, a camera or a program": 1,
        "outside images/": 1,
        "with boxes of other classes alone: 'humerus', 'metal'": 2,
        "without a file in labels/": 1,
    }
    assert labelling.notes[0].startswith("An image without any box counts as normal.")


def test_boxes_of_fractures_are_kept_outlines_as_the_box_around_them(tree, words):
    """In shares of the image, without those of other classes and the parts outside; one without area is none."""
    lines = [
        "1 0.2 0.2 0.1 0.1",
        "0 0.5 0.4 0.2 0.1",
        "0 0.5 0.4 0.2 0.1",
        "0 0.95 0.5 0.2 1.5 0.9",
        "0 1.5 0.5 0.1 0.1",
    ]
    root, paths = tree(texts=FILES | {"set/train/labels/fracture.txt": "\n".join(lines)})
    boxes = {file.path.rpartition("/")[2]: file.boxes for file in yolo.read(root, paths, words()).files}
    assert boxes["outline.jpg"] == ((0.1, 0.1, 0.2, 0.2),)
    assert boxes["fracture.jpg"] == (pytest.approx((0.4, 0.35, 0.6, 0.45)), pytest.approx((0.85, 0, 1, 1)))
    assert boxes["empty.jpg"] == ()


def test_settings_say_what_other_boxes_mean(tree, words):
    root, paths = tree(texts=FILES)
    labelling = yolo.read(root, paths, words("data.normal_labels=humerus"))
    assert {file.path: file.label for file in labelling.files}["set/valid/images/humerus.jpg"] == NORMAL
    assert labelling.left_out["with boxes of other classes alone: 'metal'"] == 1, "the box of metal is still unknown"
    assert labelling.words["normal"] == ["(no box)", "humerus"]
    labelling = yolo.read(root, paths, words("data.excluded_labels=humerus"))
    assert "set/train/images/fracture.jpg" not in {file.path for file in labelling.files}
    assert labelling.left_out["named by data.excluded_labels"] == 3
    labelling = yolo.read(root, paths, words("data.fracture_labels=metal"))
    assert {file.path: file.label for file in labelling.files}["set/test/images/metal.jpg"] == FRACTURE


@pytest.mark.parametrize(
    ("image", "label", "split"),
    [
        ("images/train/1.png", "labels/train/1.txt", "train"),
        ("Images/val2017/1.png", "Labels/val2017/1.txt", "val"),
        ("images/1.png", "labels/1.txt", ""),
        ("images/images/test/a.b.png", "images/labels/test/a.b.txt", "test"),
        ("train/images/R\u00f6ntgen 1.png", "train/labels/R\u00f6ntgen 1.txt", "train"),
    ],
)
def test_images_and_labels_lie_beside_each_other_in_several_ways(tree, words, image: str, label: str, split: str):
    root, paths = tree(texts={"data.yaml": "names: {0: Fracture}", image: "", label: f"0 {BOX}"})
    assert yolo.fits(root, paths)
    assert [(file.path, file.split) for file in yolo.read(root, paths, words()).files] == [(image, split)]


def test_names_are_taken_as_they_are_written(tree, words):
    root, paths = tree(texts=FILES | {"set/data.yaml": "names:\n  0: yes\n  1: no\n  2: 7\n"})
    assert yolo.read(root, paths, words()).words == {"fracture": ["yes"], "normal": ["(no box)", "no"]}


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("data.yaml", "names: [a", r"set/data.yaml, line 1: not readable as YAML: .*Fetch it anew"),
        ("data.yaml", b"names: [\xf6]", r"set/data.yaml: not readable as YAML: 'utf-8' codec"),
        ("data.yaml", "[" * 3000 + "]" * 3000, r"set/data.yaml: not readable as YAML: "),
        ("data.yaml", "train: x", r"names of classes are taken from 'set/data.yaml': there are none"),
        (
            "data.yaml",
            "names: fracture",
            r"data.yaml: names must be a list, names: \[fracture, metal\], and is 'fracture'",
        ),
        ("data.yaml", "names: {a: fracture}", r"data.yaml: names must be a list"),
        ("data.yaml", "names: [[fracture]]", r"data.yaml: names must be a list, .* and is a structure"),
        ("data.yaml", "names: [fracture]\nnc: [1]", r"data.yaml: nc is no number, and names has 1: 'fracture'"),
        (
            "data.yaml",
            BOMB,
            r"set/data.yaml: has YAML aliases, such as \*name, which are not read. Write the names out",
        ),
        ("data.yaml", "names: [fracture]\nnc: 2", r"data.yaml: nc is 2, and names has 1: 'fracture'. Correct it"),
        ("data.yaml", "names: [fracture]", r"/metal.txt, line 1: class 2 has no name; the names are of 0 to 0"),
        (
            "data.yaml",
            "names: [bone, arm, leg]",
            r"data.yaml: no class of boxes means fracture; there are 'bone', 'arm', 'l",
        ),
        (
            "data.yaml",
            "names: ['0', '1', '2']",
            r"--set 'data.fracture_labels=\[0\]' or .*Several names go into one list",
        ),
        (
            "train/labels/fracture.txt",
            f"\n3 {BOX}",
            r"fracture.txt, line 2: class 3 has no name; .* Correct the line, or",
        ),
        ("train/labels/fracture.txt", f"-1 {BOX}", r"fracture.txt, line 1: class -1 has no name"),
        (
            "train/labels/fracture.txt",
            "0 0.5 0.5",
            r"fracture.txt, line 1: '0 0.5 0.5' is no box, CLASS X Y WIDTH HEIGHT",
        ),
        ("train/labels/fracture.txt", f"0.5 {BOX}", r"fracture.txt, line 1: .* is no box"),
        ("train/labels/fracture.txt", f"0 {BOX} nan", r"fracture.txt, line 1: .* is no box"),
        ("train/labels/fracture.txt", f"fracture {BOX}", r"fracture.txt, line 1: 'fracture .* is no box"),
        ("train/labels/fracture.txt", b"\xff\xfe0\x00", r"fracture.txt cannot be read as text: 'utf-8' codec"),
    ],
)
def test_damage_names_the_file_and_the_line(tree, words, file: str, text, message: str):
    root, paths = tree(texts=FILES | {f"set/{file}": text})
    assert yolo.fits(root, paths)
    with pytest.raises(UsageError, match=message) as raised:
        yolo.read(root, paths, words())
    assert "\n" not in str(raised.value)


def test_two_sets_are_not_mixed(tree, words):
    other = {"other/data.yaml": "names: [metal, fracture, humerus]"}
    root, paths = tree(texts=FILES | other)
    with pytest.raises(
        UsageError, match=r"'other/data.yaml', 'set/data.yaml' have different names; name the folder of"
    ):
        yolo.read(root, paths, words())


def test_an_immense_file_is_not_read(tree, words, tmp_path):
    root, paths = tree(texts=FILES)
    for name in ("set/train/labels/fracture.txt", "set/data.yaml"):
        with (tmp_path / "data" / name).open("r+b") as file:
            file.truncate(2**40)  # a hole, which takes no room on the disk
        with pytest.raises(UsageError, match=rf"{name} has 1,099,511,627,776 bytes, over the limit"):
            yolo.read(root, paths, words())


def test_other_folders_are_not_yolo(tree):
    for files in (["data.yaml", "images/1.png"], ["images/1.png", "labels/1.txt"], ["data.yaml", "labels/1.txt"]):
        assert not yolo.fits(*tree(*files)[:1], files)
