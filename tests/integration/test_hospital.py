"""A hospital's export and its worklist, from files to a report and back, and a search for what identifies patients."""

import json
import os
from pathlib import Path

import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
import ray
from pydicom import dcmread

from fracture.cli import main
from fracture.dataset.format import read_dataset
from fracture.preparation.identity import show_id
from fracture.preparation.output import read_audit
from fracture.preparation.sample_dicom import make_uid
from fracture.storage import storage_path
from tests.conftest import TINY
from tests.preparation.hospital import PLANTED, STUDIES, write_export

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

SETTINGS = [word for setting in (*TINY, "training.epochs=1") for word in ("--set", setting)]


def test_from_an_export_to_a_report_and_back_without_an_id(tmp_path: Path, monkeypatch, capfd):
    worklist = write_export(tmp_path)
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    data = ["--data", str(tmp_path / "EXPORT")]
    labels = [*data, "--labels", str(worklist)]
    assert main(["train", *labels, "--run", "first", *SETTINGS]) == 0
    assert main(["explain", *labels, "--bundle", "runs/first/bundle", "--out", "explanations"]) == 0
    answers = ["--dicom-out", str(tmp_path / "answers"), "--secondary-capture"]
    predict = ["predict", "--bundle", "runs/first/bundle", *data]
    set_map_similarity(0.6)
    assert main([*predict, "--out", "refused.csv", *answers]) == 2
    set_map_similarity(0.4)
    assert main([*predict, "--out", "studies.csv", "--by", "study", *answers]) == 0
    assert main([*predict, "--out", "images.parquet"]) == 0
    printed = capfd.readouterr()

    [shards] = (tmp_path / "out/shards").iterdir()
    check_dataset(shards)
    card = json.loads((tmp_path / "out/runs/first/bundle/bundle.json").read_text())
    assert card["metrics"]["test"]["study"]["count"] < card["metrics"]["test"]["radiograph"]["count"]
    assert "studies: AUC" in printed.out
    assert "runs/first/bundle failed their sanity check after training." in printed.err
    for line in (
        "labels     150 files by labels file, by accession: fracture is 'Fraktur', normal is 'unauffällig'; 30",
        "not read   1 columns of the labels file: '3'",
        "left out   2 files: DICOM, but no radiograph: CT",
        "CAVEAT     SHORTCUTS: in this data, ",
        f"studies.csv ({STUDIES} rows)",
    ):
        assert line in printed.out
    check_predictions(tmp_path / "out", shards)
    check_answers(tmp_path / "answers")
    check_that_nobody_is_named(tmp_path / "out", printed.out + printed.err)


def set_map_similarity(value: float) -> None:
    """A tiny network's maps may pass the sanity check or not."""
    card = Path("runs/first/bundle/bundle.json")
    content = json.loads(card.read_text())
    assert len(content["map_similarity"]) > 0
    card.write_text(json.dumps(content | {"map_similarity": [value]}))


def check_dataset(shards: Path) -> None:
    audit = read_audit(storage_path(shards))
    assert (audit.files, len(audit.rejected)) == (150, 0)
    assert audit.left_out == {
        "DICOM, but no radiograph: CT": 2,
        "DICOM, but no radiograph: a PDF": 2,
        "document or table": 1,
        "left by a system, a camera or a program": 1,
    }
    assert audit.shortcuts["manufacturer"].is_alarming, "the detector that nearly all fractures were taken on"
    assert audit.matched_on in ("manufacturer", "model")
    files = pq.read_table(shards / "files.parquet")
    groups = dict(zip(files["path"].to_pylist(), files["group_id"].to_pylist(), strict=True))
    for name in ("patients", "study"):
        of: dict[object, set[int]] = {}
        for path, value in zip(files["path"].to_pylist(), files[name].to_pylist(), strict=True):
            of.setdefault(str(value), set()).add(groups[path])
        assert {len(found) for found in of.values()} == {1}, f"a group holds the whole of each {name}"
    dataset = read_dataset(storage_path(shards))
    studies = [set(dataset.read_columns(split, ["study_id"])["study_id"].to_pylist()) for split in dataset.splits]
    assert sum(map(len, studies)) == len(set().union(*studies)) == STUDIES


def check_predictions(out: Path, shards: Path) -> None:
    studies = pacsv.read_csv(out / "studies.csv").to_pylist()
    assert len(studies) == STUDIES, "and no row of what is left out"
    images = pq.read_table(out / "images.parquet").to_pylist()
    assert len(images) == 155
    largest: dict[str, float] = {}
    for row in images:
        if row["probability"] is not None:
            study = show_id(row["study_id"])
            largest[study] = max(row["probability"], largest.get(study, 0.0))
    assert {row["study_id"]: row["probability"] for row in studies} == pytest.approx(largest)
    files = pq.read_table(shards / "files.parquet").to_pylist()
    assert {file["path"] for file in files} < {row["path"] for row in images}, "the same key hides a path alike"
    left_out = [row for row in images if row["error"]]
    assert len(left_out) == 5
    assert all(row["error"].startswith("left out: ") and row["seen"] is None for row in left_out)
    trained_on = {file["group_id"] for file in files if file["split_used"] in ("train", "val")}
    seen = {row["path"] for row in images if row["seen"]}
    assert seen == {file["path"] for file in files if file["group_id"] in trained_on}
    assert len(seen) < len(files), "and the test's are new"
    table = pacsv.read_csv(out / "patients.studies.csv").to_pylist()
    accessions = {row["study_id"]: row["AccessionNumber"] for row in table}
    assert accessions.keys() == largest.keys(), "the hospital finds its studies again"
    assert set(accessions.values()) == {f"{PLANTED[:6]}{study:06d}" for study in range(STUDIES)}


def check_answers(answers: Path) -> None:
    written = [dcmread(file) for file in answers.iterdir()]
    reports = [dataset for dataset in written if dataset.Modality == "SR"]
    assert (len(reports), len(written) - len(reports)) == (STUDIES, 150)
    assert {str(report.StudyInstanceUID) for report in reports} == {
        str(make_uid("study", f"{PLANTED}{study // 4 * 2 + study % 2:05d}", f"study {study}"))
        for study in range(STUDIES)
    }
    assert all(PLANTED in report.PatientID for report in reports), "the archive needs its patient"


def check_that_nobody_is_named(out: Path, printed: str) -> None:
    """Search every byte that was written but the private tables beside the key; and Ray's logs, and the screen."""
    uids = [str(make_uid(kind, f"{PLANTED}00000", "study 0", *more)) for kind, more in (("study", ()), ("image", (0,)))]
    words = [PLANTED[:6], "19010203", *uids]
    logs = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", ray.get_runtime_context().get_session_name(), "logs")
    private = [out / f"patients.{name}.csv" for name in ("paths", "studies")]
    searched = 0
    for file in [*out.rglob("*"), *logs.rglob("*")]:
        if file.is_file() and file not in private:
            content = file.read_bytes()
            if file.suffix == ".parquet":  # compressed
                content += repr(pq.read_table(file).drop_columns(_images(file)).to_pydict()).encode()
            searched += 1
            assert [word for word in words if word.encode() in content or word in file.name] == [], file
    assert [word for word in words if word in printed] == []
    assert searched > 40
    for file in private:
        assert words[0] in file.read_text(), "the search would find it"
        assert file.stat().st_mode & 0o077 == 0
    assert uids[0] in private[1].read_text()


def _images(file: Path) -> list[str]:
    return [name for name in ("image", "views", "rings", "spectrum") if name in pq.read_schema(file).names]
