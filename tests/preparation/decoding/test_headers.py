import errno
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from fracture.config import DataConfig
from fracture.errors import UsageError
from fracture.preparation.decoding import headers as headers_module
from fracture.preparation.decoding.decode import Rejected
from fracture.preparation.decoding.headers import read_headers
from fracture.preparation.facts import scan_bytes
from fracture.preparation.identity import PatientKey, number_study, show_id
from fracture.preparation.sample_dicom import Stored, encode_dicom, make_uid
from fracture.preparation.source import ImageFile, Source, find_source
from fracture.storage import StoragePath, storage_path

GREY = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64).astype(np.uint8)


def dicom(patient: str = "p", study: str = "a", view: int = 0, **elements) -> bytes:
    return encode_dicom(GREY, patient, study, view, Stored(), **elements)


def write(folder: StoragePath, files: dict[str, bytes]) -> StoragePath:
    for path, data in files.items():
        (folder / path).write_bytes(data)
    return folder


@pytest.fixture(params=["disk", "bucket"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> StoragePath:
    if request.param == "disk":
        return storage_path(tmp_path / "data")
    return storage_path(f"{request.getfixturevalue('bucket')}/data")


def test_dicom_is_found_by_content_on_a_disk_and_in_a_bucket(folder: StoragePath):
    files = {f"IM{number:04d}": dicom(f"p{number}") for number in range(10)}
    files |= {"x.dcm": b"no dicom", "cut.dcm": dicom()[:200], "photo.png": dicom("p12"), "sub/y.IMA": dicom("p11")}
    steps: list[tuple[int, int]] = []
    headers = read_headers(write(folder, files), list(files), lambda name, done, total: steps.append((done, total)))
    patients = {f"IM{number:04d}": f"p{number}" for number in range(10)} | {"cut.dcm": ""}
    patients |= ({"photo.png": "p12"} if folder.is_local else {}) | {"sub/y.IMA": "p11"}  # in a bucket it is not opened
    assert {path: header.patient for path, header in headers.items()} == patients
    assert list(headers) == list(patients)
    assert headers["cut.dcm"].kind == "image", "it is rejected when it is decoded"
    assert steps[-1] == ((14, 14) if folder.is_local else (13, 13))


def test_a_header_that_the_disk_does_not_give_is_not_of_an_image_of_nobody(tmp_path: Path, monkeypatch):
    def fail(_: BinaryIO) -> None:
        raise OSError(errno.EIO, "Input/output error")

    folder = write(storage_path(tmp_path / "data"), {"IM1": dicom()})
    monkeypatch.setattr(headers_module, "read_header", fail)
    assert read_headers(folder, ["IM1"], lambda *_: None) == {}


def test_dicom_under_the_name_of_another_format_is_refused_since_its_patient_is_not_known():
    with pytest.raises(Rejected, match=r"DICOM under the name of another format: call it .dcm, so that its patient is"):
        scan_bytes(ImageFile("photo.png", 0, "", 9, 0), dicom(), 32)
    row, _ = scan_bytes(ImageFile("IM0001", 0, "", 9, 0, is_dicom=True), dicom(), 32)
    assert dict(row["traits"])["body part"] == "EXTREMITY"


def found(folder: StoragePath, tmp_path: Path, **settings) -> Source:
    return find_source([folder], DataConfig(**settings), key=PatientKey(tmp_path / "patients.key"))


def test_patient_study_and_object_of_a_file(tmp_path: Path):
    files = {
        "fracture/1": dicom("ann", "a", 0),
        "fracture/2": dicom("ann", "a", 0),
        "normal/3": dicom("ann", "b", 0),
        "normal/4": dicom("ben", "a", 0),
    }
    source = found(write(storage_path(tmp_path / "data"), files), tmp_path)
    key = PatientKey(tmp_path / "patients.key")
    of = {source.on_disk[file.path]: file for file in source.files}
    ann, ben = (key.hide("patient", name) for name in ("ann", "ben"))
    assert [of[path].patients for path in files] == [(ann,), (ann,), (ann,), (ben,)]
    assert of["fracture/1"].study == key.hide("study", make_uid("study", "ann", "a")) != of["normal/3"].study
    assert (
        of["fracture/1"].instance == of["fracture/2"].instance == key.hide("instance", make_uid("image", "ann", "a", 0))
    )
    assert of["fracture/1"].path == key.hide("path", "fracture/1")
    rows = [line.split(",") for line in (tmp_path / "patients.studies.csv").read_text().splitlines()]
    assert {row[0]: row[1] for row in rows[1:]} == {
        show_id(number_study(of[path].study)): make_uid("study", patient, name)
        for path, patient, name in (("fracture/1", "ann", "a"), ("normal/3", "ann", "b"), ("normal/4", "ben", "a"))
    }, "the ids of the shards"


def test_what_is_left_out_and_what_is_noted(tmp_path: Path):
    files = {
        "fracture/1": dicom("ann", NumberOfFrames=1),
        "fracture/2": dicom("ben", BurnedInAnnotation="YES"),
        "normal/3": dicom("cem", PresentationIntentType="FOR PROCESSING"),
        "normal/4": dicom("", study="x"),
    }
    folder = write(storage_path(tmp_path / "data"), files)
    source = found(folder, tmp_path)
    assert len(source.files) == 3
    assert source.left_out == {"raw detector image (FOR PROCESSING), unlike what the model will see": 1}
    assert source.notes == (
        "1 images say that annotations are burnt into their pixels (BurnedInAnnotation), names perhaps; "
        "data.exclude_burned_in leaves them out.",
        "1 DICOM files have no PatientID; their study alone says which belong together.",
    )
    strict = found(folder, tmp_path, exclude_burned_in=True)
    assert strict.left_out["burnt-in annotations (data.exclude_burned_in)"] == 1


def test_without_labels_no_folder_is_named(tmp_path: Path):
    folder = write(storage_path(tmp_path / "data"), {"MUELLER^HANS/1": dicom(), "MUELLER^EVA/2": dicom("b")})
    with pytest.raises(
        UsageError, match=r"its DICOM files are not in folders that name both classes; .* Give a table"
    ) as error:
        found(folder, tmp_path)
    assert "MUELLER" not in str(error.value)


def test_a_surname_alone_is_no_class(tmp_path: Path):
    """Two folders, since one alone would be refused for the class that is not there."""
    roots = [
        write(storage_path(tmp_path / name), {path: dicom(name)}) for name, path in (("a", "Bruch/1"), ("b", "ok/2"))
    ]

    def find(**settings) -> Source:
        key = PatientKey(tmp_path / "patients.key")
        return find_source(roots, DataConfig(normal_labels=("ok",), **settings), key=key)

    with pytest.raises(
        UsageError, match=r"--data .*/a: .* name both classes; one alone may be somebody's name"
    ) as error:
        find()
    assert "Bruch" not in str(error.value)
    assert [file.label for file in find(fracture_labels=("Bruch",)).files] == [1, 0]
