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
    assert main([*predict, "--out", "studies.csv", "--by", "study", *answers]) == 0
    assert main([*predict, "--out", "images.parquet"]) == 0
    printed = capfd.readouterr()

    [shards] = (tmp_path / "out/shards").iterdir()
    check_dataset(shards)
    card = json.loads((tmp_path / "out/runs/first/bundle/bundle.json").read_text())
    assert card["metrics"]["test"]["study"]["count"] < card["metrics"]["test"]["radiograph"]["count"]
    assert "studies: AUC" in printed.out
    check_predictions(tmp_path / "out", shards)
    check_answers(tmp_path / "answers")
    check_that_nobody_is_named(tmp_path / "out", printed.out + printed.err)


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
    assert len(studies) == STUDIES + 5, "and the files that are no images of a study"
    images = pq.read_table(out / "images.parquet").to_pylist()
    assert len(images) == 155
    largest: dict[int, float] = {}
    for row in images:
        if row["probability"] is not None:
            largest[row["study_id"]] = max(row["probability"], largest.get(row["study_id"], 0.0))
    found = {row["study_id"]: row["probability"] for row in studies if row["probability"] is not None}
    assert found == pytest.approx(largest)
    shown = set(pq.read_table(shards / "files.parquet")["path"].to_pylist())
    assert shown < {row["path"] for row in images}, "the same key hides a path alike"


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
    """Search every byte that was written but the private table beside the key; and Ray's logs, and the screen."""
    uids = [str(make_uid(kind, f"{PLANTED}00000", "study 0", *more)) for kind, more in (("study", ()), ("image", (0,)))]
    words = [PLANTED[:6], "19010203", *uids]
    logs = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", ray.get_runtime_context().get_session_name(), "logs")
    searched = 0
    for file in [*out.rglob("*"), *logs.rglob("*")]:
        if file.is_file() and file.name != "patients.paths.csv":
            content = file.read_bytes()
            if file.suffix == ".parquet":  # compressed
                content += repr(pq.read_table(file).drop_columns(_images(file)).to_pydict()).encode()
            searched += 1
            assert [word for word in words if word.encode() in content or word in file.name] == [], file
    assert [word for word in words if word in printed] == []
    assert searched > 40
    private = out / "patients.paths.csv"
    assert PLANTED in private.read_text(), "the search would find it"
    assert private.stat().st_mode & 0o077 == 0


def _images(file: Path) -> list[str]:
    return [name for name in ("image", "views", "rings", "spectrum") if name in pq.read_schema(file).names]
