import io
from dataclasses import replace

import numpy as np
import pyarrow as pa
from PIL import Image

from fracture.dataset.format import Dataset, Leak
from fracture.evaluation.gallery import GROUPS, Example, Gallery
from fracture.evaluation.operating_point import OperatingPoint
from fracture.evaluation.report import (
    Report,
    evaluate_run,
    format_own_test_comparison,
    format_results,
    list_caveats,
    write_report,
)
from fracture.storage import storage_path

SCORES = pa.table(
    {
        "row": [0, 1, 0, 1, 2, 3],
        "split": ["val"] * 2 + ["test"] * 4,
        "source": [f"{i}.png" for i in range(6)],
        "origin": ["north"] * 6,
        "radiograph_id": [1, 3, 5, 7, 9, 9],
        "group_id": [1, 3, 5, 7, 9, 9],
        "label": pa.array([0, 1, 0, 1, 0, 0], pa.uint8()),
        "probability": pa.array([0.1, 0.9, 0.2, 0.4, 0.6, 0.8], pa.float32()),
    }
)
HISTORY = [
    {f"{prefix}{name}": 0.5 for prefix in ("", "val_") for name in ("loss", "accuracy", "precision", "recall", "auc")}
    | {"epoch": epoch, "phase": epoch}
    for epoch in (1, 2)
]
OPERATING_POINT = OperatingPoint(temperature=1.5, offset=0.0, threshold=0.5, rule="given: 0.5")
PLOTS = {"curves", "confusion_matrix", "roc", "precision_recall", "reliability", "histograms"}


def test_each_split_is_evaluated_per_image_and_per_radiograph(dataset):
    data = dataset()
    found = evaluate_run(SCORES, data, 0.5)
    assert set(found) == {"val", "test"}
    assert (found["test"]["image"].count, found["test"]["radiograph"].count) == (4, 3)
    assert found["test"]["image"].false_positives == 2
    assert found["test"]["radiograph"].false_positives == 1
    assert found["val"]["image"]["accuracy"] == 1


def test_studies_of_several_radiographs_are_evaluated_too(dataset):
    """Radiographs 5 (normal, .2) and 7 (fracture, .4) are one study; 9 (normal, mean .7) is of a study not known."""
    studies = SCORES.append_column("study_id", pa.array([None, None, 3, 3, None, None], pa.int64()))
    found = evaluate_run(studies, dataset(), 0.5)
    assert set(found["test"]) == {"image", "radiograph", "study"}
    assert "study" not in found["val"], "no study has several radiographs"
    study = found["test"]["study"]
    assert (study.unit, study.count, study.false_negatives, study.false_positives) == ("study", 2, 1, 1)
    assert study["auc"] == 0, "a fracture of .4 and a normal of .7"
    mean = evaluate_run(studies, dataset(), 0.25, "mean")["test"]["study"]
    assert mean.true_positives == 1, "(.2 + .4) / 2 is above .25"
    lines = format_results(found)
    assert lines[0].startswith("test       2 studies: AUC 0.000")
    assert lines[1].startswith("           3 radiographs: AUC")
    assert study.fewest == 1


def test_body_parts_and_views_with_enough_radiographs_are_evaluated_by_themselves(dataset):
    """Of 48 radiographs 24 show a hand, 20 a foot and 4 a knee; all but two hands are of one view."""
    count, data = 48, dataset()
    parts = ["HAND"] * 24 + ["FOOT"] * 20 + ["KNEE"] * 4
    traits = [[("body part", part), ("view", "PA" if n < 2 else "AP")] for n, part in enumerate(parts)]
    paths, kind = [f"{n}.dcm" for n in range(count)], pa.map_(pa.string(), pa.string())
    (data.folder / "files.parquet").write_parquet(pa.table({"path": paths, "traits": pa.array(traits, kind)}))
    data = Dataset(data.folder, data.manifest.model_copy(update={"traits": ["body part", "view"]}))
    numbers = np.arange(count)
    scores = dict.fromkeys(("row", "radiograph_id", "group_id"), numbers)
    scores |= {"split": ["test"] * count, "source": paths, "origin": [""] * count}
    scores |= {"label": (numbers % 2).astype(np.uint8), "probability": (numbers % 3 / 3).astype(np.float32)}
    found = evaluate_run(pa.table(scores), data, 0.5)
    assert set(found) == {"test", "test_of:body part: HAND", "test_of:body part: FOOT", "test_of:view: AP"}
    assert found["test_of:body part: FOOT"]["radiograph"].count == 20
    assert any(line.startswith("  body part: FOOT 20 radiographs: AUC 0.") for line in format_results(found))


def test_radiographs_of_one_patient_are_not_averaged(dataset):
    """The mean over a patient's radiographs of one label would separate the classes better than any radiograph does."""
    data = dataset()
    patients = SCORES.set_column(SCORES.schema.get_field_index("group_id"), "group_id", pa.array([1, 1, 5, 5, 5, 5]))
    test = evaluate_run(patients, data, 0.5)["test"]["radiograph"]
    assert (test.count, test.groups) == (3, 1)
    assert test["auc"] == 0.5  # fractures .4; normals .2 and the mean of .6 and .8


def test_where_test_leaks_the_part_without_leaks_is_evaluated_too(dataset):
    """Training has the groups 5 and 7, and not -9."""
    data = dataset()
    leakage = {s: Leak(images=4, by_kind={"bytes": 2}) for s in ("val", "test")}
    leaky = replace(data, manifest=data.manifest.model_copy(update={"leakage": leakage}))
    groups = pa.array([1, 3, 5, 7, -9, -9])
    scores = SCORES.set_column(SCORES.schema.get_field_index("group_id"), "group_id", groups)
    found = evaluate_run(scores, leaky, 0.5)
    assert found["test_without_leaks"]["image"].count == 2
    assert "on the 2 images that do not leak from training: AUC undefined, accuracy 0.000" in format_results(found)[-1]
    assert "test_without_leaks" not in evaluate_run(SCORES, leaky, 0.5), "all leak"


def test_each_of_several_origins_is_evaluated(dataset):
    data = dataset()
    origins = pa.array(["north", "north", "north", "north", "", ""])
    scores = SCORES.set_column(SCORES.schema.get_field_index("origin"), "origin", origins)
    found = evaluate_run(scores, data, 0.5)
    assert {name: e["image"].count for name, e in found.items()} == {
        "val": 2,
        "test": 4,
        "test_from:unknown": 2,
        "test_from:north": 2,
    }
    assert "  north    2 radiographs: AUC 1.000" in "\n".join(format_results(found))


def test_a_drop_on_another_dataset_is_reported(dataset):
    data = dataset()
    here = evaluate_run(SCORES, data, 0.5)["test"]
    own = evaluate_run(SCORES, data, 0.5)["val"]
    assert format_own_test_comparison(own, here) == (
        "compare    AUC per radiograph 1.000 on its own test, 0.500 on these: 0.500 lower here; the AUC on these "
        "is not distinguishable from chance"
    )
    assert "0.500 higher here" in format_own_test_comparison(here, own)


def test_the_report_is_one_page_with_its_plots(dataset, tmp_path):
    data = dataset()
    evaluations = evaluate_run(SCORES, data, 0.5)
    report = Report(
        "Run <x>", data, OPERATING_POINT, evaluations, HISTORY, 1, {"training.seed": 0}, list_caveats(data.manifest)
    )
    write_report(storage_path(tmp_path), report, SCORES)
    for name in PLOTS:
        picture = np.asarray(Image.open(io.BytesIO((tmp_path / f"{name}.png").read_bytes())).convert("L"))
        assert min(picture.shape) > 400
        assert (picture < 128).mean() > 0.005, "there is something on it"
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(PLOTS) + 2  # mistakes: 4.. missed, and one image of group 5
    assert "Run &lt;x&gt;" in page
    assert "SYNTHETIC" in page
    assert "normal, probability of a fracture 0.80" in page
    assert "fracture, probability of a fracture 0.40" in page
    assert "Not a medical device" in page
    assert "test was read once" in page
    assert "What the network looks at" not in page
    assert f"<code>{data.folder / 'audit.html'}</code>" in page


def test_names_of_files_origins_and_runs_are_escaped_in_html(dataset, tmp_path):
    data = dataset()
    script = "<script>alert(1)</script>"
    columns = {name: pa.array([f"{script}{n % 2}.png" for n in range(len(SCORES))]) for name in ("source", "origin")}
    table = pa.table({name: columns.get(name, SCORES[name]) for name in SCORES.column_names} | columns)
    data = replace(data, manifest=data.manifest.model_copy(update={"alarms": [script], "split_reason": script}))
    evaluations = evaluate_run(table, data, 0.5)
    operating_point = OPERATING_POINT.model_copy(update={"rule": script})
    report = Report(script, data, operating_point, evaluations, HISTORY, 1, {script: script}, [script])
    write_report(storage_path(tmp_path), report, table)
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 7


def test_the_report_on_another_dataset_has_a_gallery_and_no_training(dataset, tmp_path):
    data = dataset()
    evaluations = evaluate_run(SCORES, data, 0.5)
    own = evaluations["val"]
    example = Example(path="<b>.png", label="normal", probability=0.7, radiograph="data:,a", explained="data:,b")
    groups = {name: [example] if name == "false positives" else [] for name in GROUPS}
    gallery = Gallery(groups=groups, similarity=[0.1, 0.6])
    report = Report("x elsewhere", data, OPERATING_POINT, evaluations, [], 0, {}, [], own, gallery=gallery)
    write_report(storage_path(tmp_path), report, SCORES)
    page = (tmp_path / "report.html").read_text()
    assert "<h2>What the network looks at</h2>" in page
    assert [page.count(f"<h3>{name.capitalize()}: ") for name in GROUPS] == [1] * 4
    assert "<br>&lt;b&gt;.png" in page
    assert '<div class="notice bad">SANITY CHECK FAILED: do not rely on these maps. At least one of 2 copies' in page
    assert "AUC per radiograph 1.000 on its own test, 0.500 on these" in page
    assert "These were chosen when the model was trained, on its own validation split." in page
    assert not any(words in page for words in ("test was read once", "fracture evaluate", "best was epoch"))
    assert not (tmp_path / "curves.png").exists()


def test_synthetic_data_and_leaks_are_caveats(dataset):
    manifest = dataset().manifest
    assert list_caveats(manifest)[0].startswith("SYNTHETIC: generated sample radiographs")
    leakage = {
        "val": Leak(images=16, by_kind={"bytes": 0, "copy": 3}),
        "test": Leak(images=16, by_kind={"bytes": 9, "copy": 1}),
    }
    real = manifest.model_copy(update={"synthetic": False, "leakage": leakage, "groups": {}})
    assert list_caveats(real) == [
        "LEAKAGE: 10 of 16 test images (9 byte for byte) show a radiograph or patient that training has too; 3 of 16 "
        "val images (0 byte for byte) show a radiograph or patient that training has too."
    ]
    leakage["test"] = Leak(images=16, by_kind={"bytes": 15, "copy": 1})
    assert list_caveats(real)[0].endswith(
        "No other test image is left: split the data with --split group to get a test without leaks."
    )


def test_a_source_that_is_not_tested_is_a_caveat(dataset):
    update = {"synthetic": False, "groups": {}, "untested": ["source 'east' has ..."]}
    assert list_caveats(dataset().manifest.model_copy(update=update)) == ["NOT TESTED: source 'east' has ...."]


def test_shortcuts_are_caveats(dataset):
    manifest = dataset().manifest
    real = manifest.model_copy(update={"synthetic": False, "groups": {}, "shortcuts": {"size": 0.926, "aspect": 0.85}})
    assert list_caveats(real) == [
        "SHORTCUTS: in this data, size (AUC 0.93), aspect (AUC 0.85) alone predict the class; a model may use them too."
    ]
    one = real.model_copy(update={"shortcuts": {"file size": 0.65}})
    assert list_caveats(one) == [
        "SHORTCUTS: in this data, file size (AUC 0.65) alone predicts the class; a model may use it too."
    ]


def test_a_test_of_few_groups_is_a_caveat(dataset):
    def caveats(groups: dict[str, dict[str, int]], folds: list[str]) -> list[str]:
        return list_caveats(manifest.model_copy(update={"synthetic": False, "groups": groups, "folds": folds}))

    manifest, many, few = dataset().manifest, {"fracture": 10, "normal": 10}, {"fracture": 9, "normal": 1200}
    assert caveats({"train": few, "test": many}, []) == []
    assert caveats({"train": many, "test": few}, []) == [
        "FEW: the test has groups (patients, or radiographs that belong together) of 9 fracture and 1,200 normal, "
        "fewer than 10 of a class: its figures are rough, and their intervals too."
    ]
    five = {"fracture": 5, "normal": 5}
    assert caveats({"fold-1": five, "fold-2": five}, ["1", "2"]) == [], "each group is tested once"
    assert len(caveats({"fold-1": five, "fold-2": few | {"fracture": 4}}, ["1", "2"])) == 1
    sources = {"fold-1": five, "fold-1-val": {"fracture": 4, "normal": 4}, "untested": many}
    assert caveats(sources, ["north", "south"])[0].startswith(
        "FEW: the test has groups (patients, or radiographs that belong together) of 9 fracture and 9 normal"
    ), "what trains in every fold is not tested"


def test_the_result_lines_say_what_was_found_and_missed(dataset):
    data = dataset()
    lines = format_results(evaluate_run(SCORES, data, 0.5))
    assert lines[0].startswith("test       3 radiographs: AUC 0.500 [0.000, 1.000], sensitivity 0.000 [")
    assert lines[1].startswith("           4 images: AUC 0.333 [")
    assert lines[2].endswith(": 0 fractures found, 1 missed · 1 normals cleared, 2 called fractures")
