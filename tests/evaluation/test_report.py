import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from fracture.evaluation.report import caveats, metrics_of, result_lines, write_report
from fracture.storage import place

SCORES = pa.table(
    {
        "split": ["val"] * 2 + ["test"] * 4,
        "label": pa.array([0, 1, 0, 1, 0, 1], pa.uint8()),
        "probability": pa.array([0.1, 0.9, 0.2, 0.4, 0.6, 0.8], pa.float32()),
    }
)
HISTORY = [
    {f"{prefix}{name}": 0.5 for prefix in ("", "val_") for name in ("loss", "accuracy", "precision", "recall", "auc")}
    | {"epoch": epoch}
    for epoch in (1, 2)
]


def test_metrics_are_of_one_split():
    test = metrics_of(SCORES, "test", 0.5)
    assert (test.images, test.true_positives, test.false_positives) == (4, 1, 1)
    assert test.auc == pytest.approx(3 / 4)
    assert metrics_of(SCORES, "val", 0.5).accuracy == 1


def test_the_report_has_its_pictures(shard_folder, tmp_path):
    _, manifest = shard_folder()
    write_report(place(tmp_path), manifest, HISTORY, 1, SCORES, metrics_of(SCORES, "test", 0.5))
    for name in ("curves", "confusion_matrix", "roc"):
        picture = np.asarray(Image.open(io.BytesIO((tmp_path / f"{name}.png").read_bytes())).convert("L"))
        assert min(picture.shape) > 400
        assert (picture < 128).mean() > 0.005, "there is something on it"


def test_caveats_stand_beside_every_figure(shard_folder):
    _, manifest = shard_folder()
    assert caveats(manifest)[0].startswith("SYNTHETIC: drawn sample radiographs")
    real = manifest.model_copy(
        update={"synthetic": False, "copies": manifest.copies.model_copy(update={"test_in_train": 9})}
    )
    assert caveats(real) == ["MEMORY: 9 of 16 test images are byte-for-byte copies of training images."]


def test_the_last_lines_say_what_was_found_and_missed():
    lines = result_lines(metrics_of(SCORES, "test", 0.5))
    assert lines == [
        "test       4 images: accuracy 0.500, AUC 0.750, recall 0.500, precision 0.500, specificity 0.500 "
        "(threshold 0.5)",
        "           1 fractures found, 1 missed · 1 normals cleared, 1 called fractures",
    ]
