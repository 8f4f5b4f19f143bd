import json
import re

import numpy as np
import pyarrow as pa
import pytest

from fracture.evaluation.folds import format_folds, pool_folds, write_folds
from fracture.evaluation.metrics import MatchedFigure
from fracture.evaluation.scores import write_predictions
from fracture.storage import StoragePath, storage_path
from tests.conftest import write_shards


@pytest.fixture
def run(tmp_path) -> StoragePath:
    """Three finished folds of eight test images; the third's model ranks them the wrong way round."""
    folder = storage_path(tmp_path / "runs/x")
    for number in (1, 2, 3):
        fold = folder / f"fold-{number}"
        labels = np.arange(8) % 2
        right = 0.1 * number + 0.5 * labels
        table = {
            "row": [0, *range(8)],
            "split": ["val"] + ["test"] * 8,
            "radiograph_id": [-1, *range(10 * number, 10 * number + 8)],
            "group_id": [-1, *range(10 * number, 10 * number + 8)],
            "label": [1, *labels],
            "probability": [0.5, *(0.9 - right if number == 3 else right)],
        }
        write_predictions(fold, pa.table(table))
        operating_point = {"temperature": 1.0, "offset": 0.0, "threshold": 0.1 * number + 0.3, "rule": "x"}
        (fold / "bundle/bundle.json").write_json(
            {"operating_point": operating_point, "config": {"evaluation": {"study_probability": "max"}}}
        )
    return folder


def test_pooled_metrics_use_each_folds_own_threshold(run, tmp_path):
    manifest = write_shards(storage_path(tmp_path / "shards"), {"fold-1": 8, "fold-2": 8, "fold-3": 8})
    pooled = pool_folds(run, manifest)
    assert pooled.whole["image"].count == 24
    assert [evaluation["image"]["auc"] for evaluation in pooled.folds.values()] == [1, 1, 0]
    assert [evaluation["image"]["accuracy"] for evaluation in pooled.folds.values()] == [1, 1, 0.5]
    assert pooled.whole["image"]["accuracy"] == pytest.approx(20 / 24)
    assert pooled.spread("auc") == pytest.approx((2 / 3, np.std([1, 1, 0], ddof=1)))
    assert "mean       AUC per radiograph 0.667, standard deviation over folds 0.577" in format_folds(pooled)
    write_folds(run, manifest, pooled, ["SYNTHETIC: x"])
    assert json.loads((tmp_path / "runs/x/folds.json").read_text())["folds"]["fold-3"]["image"]["count"] == 8
    assert (pooled.falls, pooled.mean_fall) == ({}, None)
    assert not {"sources", "mean_over_sources"} & (run / "folds.json").read_json().keys()
    page = (tmp_path / "runs/x/folds.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    assert "0.667 ± 0.577" in page
    assert not any(words in page for words in ("inside", "held out", "mean over sources"))


def test_folds_that_are_sources_show_the_fall_from_inside_to_outside(run, tmp_path):
    """The validation radiographs are all in order; the third source's are the wrong way round."""
    manifest = write_shards(storage_path(tmp_path / "shards"), {"fold-1": 8, "fold-2": 8, "fold-3": 8})
    by_source = {"folds": ["east", "north", "south"], "parameters": manifest.parameters | {"folds": "source"}}
    manifest = manifest.model_copy(update=by_source)
    for number in (1, 2, 3):
        scores = (run / f"fold-{number}" / "predictions.parquet").read_parquet()
        test = scores.slice(1)
        ids, labels = pa.array(range(100 * number, 100 * number + 8)), test["label"].to_numpy()
        inside = pa.table(
            {
                "row": test["row"],
                "split": ["val"] * 8,
                "radiograph_id": ids,
                "group_id": ids,
                "label": labels,
                "probability": np.where(labels == 1, 0.9, 0.1),
            }
        )
        both = pa.concat_tables([inside, test])
        both = both.append_column("study_id", pa.array([10 * number + row // 2 for row in range(16)], pa.int64()))
        write_predictions(run / f"fold-{number}", both.append_column("origin", pa.array(["x"] * 16)))
    pooled = pool_folds(run, manifest)
    assert [fall.fall["auc"].value for fall in pooled.falls.values()] == [0, 0, 1]
    assert pooled.mean_fall.outside["auc"].value == pytest.approx(2 / 3)
    lines = format_folds(pooled)
    assert lines[14].split() == ["held", "out", "south:", "8", "radiographs"]
    assert re.fullmatch(
        r"  AUC +0\.000 \[0\.000, 0\.\d+\] +1\.000 \[0\.\d+, 1\.000\] +\+1\.000 \[\+0\.\d+, \+1\.000\]", lines[16]
    )
    assert lines[21] == "mean       over 3 sources"
    assert re.match(r"  AUC +0\.667 \[0\.\d+, 0\.\d+\] +1\.000 \[0\.\d+, 1\.000\] +\+0\.333 \[", lines[23])
    assert not any("pooled" in line for line in lines)
    matched = MatchedFigure(value=0.55, low=0.5, high=0.6, pairs=1200, all_pairs=4800, plain=0.9)
    pooled.whole["radiograph"].matched = {"size": matched}  # its pairs are of the same source
    assert format_folds(pooled)[-1].startswith("  radiographs alike in size: AUC 0.550")
    write_folds(run, manifest, pooled, ["NOT TESTED: source 'west' has no fractures."])
    written = (run / "folds.json").read_json()
    assert written["sources"]["south"]["fall"]["auc"]["value"] == 1
    assert written["mean_over_sources"]["inside"]["auc"]["value"] == 1
    page = (run / "folds.html").read_bytes().decode()
    assert "From inside to outside" in page
    assert "NOT TESTED: source &#39;west&#39; has no fractures." in page
    assert page.count("data:image/png;base64,") == 15, "five of each source"
    assert "Pooled test folds" not in page
    assert "<th>AUC per study</th>" in page
    assert "<td>1,200 of 4,800</td>" in page
    assert '<a href="fold-3/report/report.html">south</a>' in page


def test_studies_are_pooled_too(run, tmp_path):
    manifest = write_shards(storage_path(tmp_path / "shards"), {"fold-1": 8, "fold-2": 8, "fold-3": 8})
    for number in (1, 2, 3):
        scores = (run / f"fold-{number}" / "predictions.parquet").read_parquet()
        studies = pa.array([None, *(10 * number + row // 2 for row in range(8))], pa.int64())
        write_predictions(run / f"fold-{number}", scores.append_column("study_id", studies))
    pooled = pool_folds(run, manifest)
    assert (pooled.whole["study"].count, pooled.whole["study"].true_positives) == (12, 8), "none in the third fold"
    assert any(line.startswith("pooled     12 studies: AUC undefined") for line in format_folds(pooled))
    write_folds(run, manifest, pooled, [])
    assert "<th>per study</th>" in (run / "folds.html").read_bytes().decode()


def test_folds_of_an_earlier_version_and_of_this_one_are_pooled(run, tmp_path):
    """The first fold was finished before predictions had distances."""
    manifest = write_shards(storage_path(tmp_path / "shards"), {"fold-1": 8, "fold-2": 8, "fold-3": 8})
    for number in (2, 3):
        scores = (run / f"fold-{number}" / "predictions.parquet").read_parquet()
        distances = pa.array([0.5] * len(scores), pa.float32())
        write_predictions(run / f"fold-{number}", scores.append_column("distance", distances))
    pooled = pool_folds(run, manifest)
    assert pooled.whole["image"].count == 24
    assert pooled.whole["image"]["accuracy"] == pytest.approx(20 / 24), "each at its own threshold"
    write_folds(run, manifest, pooled, [])
    assert (run / "predictions.parquet").read_parquet()["distance"].null_count == 8


def test_matched_figures_stand_on_the_page_on_the_screen_and_in_the_file(run, tmp_path):
    manifest = write_shards(storage_path(tmp_path / "shards"), {"fold-1": 8, "fold-2": 8, "fold-3": 8})
    pooled = pool_folds(run, manifest)
    pooled.whole["radiograph"].matched = {
        "size": MatchedFigure(value=0.55, low=0.5, high=0.6, pairs=1200, all_pairs=4800, plain=0.9),
        "sharpness": MatchedFigure(value=None, pairs=3, all_pairs=4800, plain=0.9),
    }
    lines = format_folds(pooled)
    assert lines[-1] == "  radiographs alike in size: AUC 0.550 [0.500, 0.600] (0.900 among all), 1,200 of 4,800 pairs"
    assert not any("sharpness" in line for line in lines), "too few pairs"
    write_folds(run, manifest, pooled, [])
    saved = json.loads((tmp_path / "runs/x/folds.json").read_text())["pooled"]["radiograph"]["matched"]
    assert saved["size"]["pairs"] == 1200
    page = (run / "folds.html").read_bytes().decode()
    assert "AUC among pairs alike in" in page
    assert "<td>1,200 of 4,800</td>" in page
    assert '<span class="soft">too few</span>' in page
