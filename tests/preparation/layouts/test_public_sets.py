"""MURA, FracAtlas and GRAZPEDWRI-DX, made in their layouts."""

import json

import pytest

from fracture.errors import UsageError
from fracture.labels import FRACTURE, NORMAL
from fracture.preparation.layouts import fracatlas, grazpedwri, mura

MURA = [
    *("MURA-v1.1/train_image_paths.csv", "MURA-v1.1/train/.DS_Store", "MURA-v1.1/extra.png"),
    *(f"MURA-v1.1/train/XR_ELBOW/patient00005/study1_positive/image{i}.png" for i in (1, 2)),
    "MURA-v1.1/train/XR_WRIST/patient00005/study1_negative/image1.png",
    "MURA-v1.1/train/XR_WRIST/patient00005/study2_negative/image1.png",
    "MURA-v1.1/valid/XR_WRIST/patient11185/study1_positive/._image1.png",
    "MURA-v1.1/valid/XR_WRIST/patient11185/study1_positive/image1.png",
]


def test_mura_has_patients_studies_and_splits(tree, words):
    root, paths = tree(*MURA)
    assert mura.fits(root, paths)
    labelling = mura.read(root, paths, words())
    assert [(file.split, file.label, file.patient, file.study) for file in labelling.files] == [
        ("train", FRACTURE, "patient00005", "XR_ELBOW/patient00005/study1"),
        ("train", FRACTURE, "patient00005", "XR_ELBOW/patient00005/study1"),
        ("train", NORMAL, "patient00005", "XR_WRIST/patient00005/study1"),
        ("train", NORMAL, "patient00005", "XR_WRIST/patient00005/study2"),
        ("val", FRACTURE, "patient11185", "XR_WRIST/patient11185/study1"),
    ]
    assert labelling.words == {"fracture": ["positive"], "normal": ["negative"]}
    assert labelling.left_out == {
        "document or table": 1,
        "in no study folder of MURA": 1,
        "left by a system, a camera or a program": 2,
    }


def test_muras_abnormal_is_not_fracture_and_every_report_says_so(tree, words):
    (note,) = mura.read(*tree(*MURA), words()).notes
    assert "abnormal, which is not the same as fractured" in note


def test_one_body_part_of_mura(tree, words):
    root, paths = tree("patient00005/study1_positive/image1.png", "patient00006/study1_negative/image1.png")
    assert mura.fits(root, paths)
    assert [file.study for file in mura.read(root, paths, words()).files] == [
        "patient00005/study1",
        "patient00006/study1",
    ]


FRACATLAS = {
    "FracAtlas/dataset.csv": "image_id,hand,leg,fractured,fracture_count\nIMG0000001.jpg,1,0,1,2\n"
    "IMG0000002.jpg,0,1,0,0\nIMG0000009.jpg,0,1,0,0\n",
    "FracAtlas/images/Fractured/IMG0000001.jpg": "",
    "FracAtlas/images/Non_fractured/IMG0000002.jpg": "",
    "FracAtlas/images/Non_fractured/IMG0000003.jpg": "",
    "FracAtlas/Annotations/YOLO/IMG0000001.txt": "0 0.5 0.5 0.1 0.1",
    "FracAtlas/Annotations/COCO JSON/COCO_fracture_masks.json": '{"images": [], "annotations": [], "categories": []}',
    "FracAtlas/Utilities/Fracture Split/train.csv": "image_id\nIMG0000001.jpg\n",
}


def test_fracatlas_is_labelled_by_its_table(tree, words):
    root, paths = tree(texts=FRACATLAS)
    assert fracatlas.fits(root, paths)
    assert not grazpedwri.fits(root, paths)
    labelling = fracatlas.read(root, paths, words())
    assert [(file.path, file.label) for file in labelling.files] == [
        ("FracAtlas/images/Fractured/IMG0000001.jpg", FRACTURE),
        ("FracAtlas/images/Non_fractured/IMG0000002.jpg", NORMAL),
    ]
    assert labelling.words == {"fracture": ["1"], "normal": ["0"]}
    assert labelling.left_out == {
        "document or table": 3,
        "in dataset.csv, but not in the folder": 1,
        "no row in dataset.csv": 1,
    }
    assert "no patients" in labelling.notes[0]


def test_fracatlas_has_the_boxes_of_its_coco_file(tree, words):
    boxes = {
        "images": [{"id": 7, "file_name": "IMG0000001.jpg", "width": 200, "height": 100}],
        "annotations": [{"image_id": 7, "category_id": 0, "bbox": [20, 10, 40, 30]}],
        "categories": [{"id": 0, "name": "fractured"}],
    }
    texts = FRACATLAS | {"FracAtlas/Annotations/COCO JSON/COCO_fracture_masks.json": json.dumps(boxes)}
    files = fracatlas.read(*tree(texts=texts), words()).files
    assert [file.boxes for file in files] == [((0.1, 0.1, 0.3, 0.4),), ()]


COLUMNS = "filestem,patient_id,study_number,timehash,gender,age,projection,fracture_visible,metal\n"
GRAZ = {
    "dataset.csv": f"{COLUMNS}0001_1_01_WRI-L1_M014,0001,1,123,M,14.2,1,1,\n"
    "0001_1_02_WRI-L2_M014,0001,1,123,M,14.2,2,,\n"
    "0001_2_01_WRI-L1_M015,0001,2,124,M,15.0,1,,1\n0002_1_01_WRI-R1_F010,0002,1,9,F,10.0,1,1.0,\n",
    "images_part1/0001_1_01_WRI-L1_M014.png": "",
    "images_part1/0001_1_02_WRI-L2_M014.png": "",
    "images_part2/0001_2_01_WRI-L1_M015.png": "",
    "images_part2/0002_1_01_WRI-R1_F010.png": "",
    "folder_structure/yolov5/meta.yaml": "names: [fracture, text]\nnc: 2\n",
    "folder_structure/yolov5/labels/0001_1_01_WRI-L1_M014.txt": "0 0.5 0.5 0.1 0.1\n",
}


def test_grazpedwri_has_patients_and_studies_numbered_for_each(tree, words):
    root, paths = tree(texts=GRAZ)
    assert grazpedwri.fits(root, paths)
    assert not fracatlas.fits(root, paths)
    labelling = grazpedwri.read(root, paths, words())
    assert [(file.label, file.patient, file.study, file.split) for file in labelling.files] == [
        (FRACTURE, "0001", "0001/1", ""),
        (NORMAL, "0001", "0001/1", ""),
        (NORMAL, "0001", "0001/2", ""),
        (FRACTURE, "0002", "0002/1", ""),
    ]
    assert labelling.left_out == {"document or table": 2}
    assert "no fracture is visible" in labelling.notes[0]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (f"{COLUMNS}a,1,1,,,,,2,\n", r"dataset.csv, line 2: fracture_visible '2' is neither 0 nor 1. Correct it"),
        (
            f"{COLUMNS}a,1,1,,,,,1,\n\na,1,1,,,,,,\n",
            r"dataset.csv, line 4: 'a' is in the file twice, with other values",
        ),
        (f"{COLUMNS}a,1,1,,,,,1,\nb,1", r"dataset.csv, line 3: not readable as CSV: it has not the 9 values"),
        (f"{COLUMNS}a,1,1,,,,,1,,7\n", r"dataset.csv, line 2: not readable as CSV: it has not the 9 values"),
        (
            f'{COLUMNS}"a,1,1,,,,,1,\n',
            r"dataset.csv, line 2: not readable as CSV: unexpected end of data. Fetch it anew",
        ),
        (COLUMNS.encode() + b"\xf6,1,1,,,,,1,\n", r"dataset.csv cannot be read as text: 'utf-8' codec .*Fetch it anew"),
    ],
)
def test_a_damaged_table_names_its_line(tree, words, table, message: str):
    root, paths = tree(texts=GRAZ | {"dataset.csv": table})
    assert grazpedwri.fits(root, paths)
    with pytest.raises(UsageError, match=message):
        grazpedwri.read(root, paths, words())


def test_an_immense_table_is_not_read(tree, words, tmp_path):
    root, paths = tree(texts=GRAZ)
    with (tmp_path / "data/dataset.csv").open("r+b") as file:
        file.truncate(2**40)  # a hole, which takes no room on the disk
    with pytest.raises(UsageError, match=r"dataset.csv has 1,099,511,627,776 bytes, over the limit"):
        grazpedwri.read(root, paths, words())


def test_two_tables_are_two_sets(tree, words):
    table = GRAZ["dataset.csv"]
    root, paths = tree(texts={"a/dataset.csv": table, "b/dataset.csv": table})
    with pytest.raises(
        UsageError, match=r"holds 2 data sets, 'a/dataset.csv', 'b/dataset.csv'. Name the folder of one"
    ):
        grazpedwri.read(root, paths, words())


def test_a_table_of_other_columns_is_of_no_set(tree):
    root, paths = tree(texts={"dataset.csv": "path,label\n", "empty/dataset.csv": "", "x/dataset.csv": b"\xff\x00\n"})
    assert not fracatlas.fits(root, paths)
    assert not grazpedwri.fits(root, paths)
