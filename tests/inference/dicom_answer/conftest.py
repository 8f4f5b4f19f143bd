"""Radiographs without pixels, and the answers to them."""

import io
from typing import Any

import numpy as np
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian

from fracture.inference.dicom_answer.capture import build_capture
from fracture.inference.dicom_answer.header import Algorithm, write_dicom
from fracture.inference.dicom_answer.report import Answer, build_report
from fracture.storage import StoragePath

ALGORITHM = Algorithm(version="0.1.0", fingerprint="ab" * 32, threshold=0.4, fracture_threshold=0.7)
STUDY = "1.2.826.0.1.3680043.10.1"
PATIENT = {
    "PatientName": "Doe^Jane",
    "PatientID": "P-17",
    "PatientBirthDate": "19500101",
    "PatientSex": "F",
    "StudyDate": "20240102",
    "StudyTime": "101112.5",
    "AccessionNumber": "A-4711",
    "StudyID": "77",
    "StudyDescription": "Wrist",
    "ReferringPhysicianName": "Who^Doctor",
}


def radiograph(number: int = 1, **values: Any) -> Dataset:
    """A radiograph as it is read from a file, with the least that a reference needs, and the values given."""
    source = Dataset()
    source.file_meta = FileMetaDataset()
    source.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    source.SOPClassUID = ComputedRadiographyImageStorage
    source.StudyInstanceUID = STUDY
    source.SeriesInstanceUID = f"{STUDY}.2"
    source.SOPInstanceUID = f"{STUDY}.2.{number}"
    for keyword, value in values.items():
        setattr(source, keyword, value)
    return dcmread(io.BytesIO(encode(source)))


def encode(dataset: Dataset) -> bytes:
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def radiograph_named(raw: bytes, character_set: str | list[str] | None) -> Dataset:
    """A radiograph whose patient's name has these bytes, whatever the character set says."""
    placeholder = "X" * (len(raw) + len(raw) % 2)
    declared = {} if character_set is None else {"SpecificCharacterSet": character_set}
    source = radiograph(PatientName=placeholder, **declared)
    data = encode(source)
    assert data.count(placeholder.encode()) == 1
    return dcmread(io.BytesIO(data.replace(placeholder.encode(), raw.ljust(len(placeholder)))))


def answers(**values: Any) -> list[tuple[Dataset, Answer]]:
    """Two radiographs of one study, the first with a fracture."""
    return [(radiograph(1, **values), Answer(0.875, "fracture")), (radiograph(2, **values), Answer(0.125, "none"))]


def overlay(height: int = 40, width: int = 30) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def write_answer(folder: StoragePath, **values: Any) -> list[StoragePath]:
    """Write a report and a capture of the study of `answers`."""
    images = answers(**values)
    report = build_report(images, Answer(0.875, "fracture"), ALGORITHM)
    capture = build_capture(images[0][0], overlay(), ALGORITHM, number=1)
    return [write_dicom(folder, report), write_dicom(folder, capture)]
