"""A hospital's export: DICOM files of generated radiographs with planted names, and a worklist of their labels."""

import io
from itertools import islice
from pathlib import Path

import numpy as np
import openpyxl
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EncapsulatedPDFStorage, ExplicitVRLittleEndian

from fracture.config import SampleConfig
from fracture.preparation.decoding.decode import decode
from fracture.preparation.sample import draw_sample
from fracture.preparation.sample_dicom import encode_dicom, make_uid, vary_storage

PLANTED = "ZYXPLANTED"  # in every element, folder and file name and column that names somebody or something
STUDIES = 60


def write_export(folder: Path, studies: int = STUDIES, seed: int = 0) -> Path:
    """Write DICOM files as exporters name them, and `worklist.xlsx` beside them.

    Every patient has one or two studies of two or three views. All but a few fractures were taken on one detector: a
    shortcut. Two reports, two CT slices, a file of another program and clutter lie among them.

    Returns:
        The worklist.
    """
    export = folder / "EXPORT"
    radiographs = draw_sample(SampleConfig(images=3 * studies, seed=seed))  # three views of a patient in a row
    rows, number = [], 0
    for study in range(studies):
        views = [decode(data, 256).pixels for _, data in islice(radiographs, 3)]
        patient, label = f"{PLANTED}{study // 4 * 2 + study % 2:05d}", study % 2
        taken_at = ("Alpha", "Beta")[label if study % 10 else 1 - label]
        accession = f"{PLANTED[:6]}{study:06d}"
        for view in range(2 + study // 2 % 2):
            data = encode_dicom(
                views[view],
                patient,
                f"study {study}",
                view,
                vary_storage(number),
                **_names(accession),
                Manufacturer=taken_at,
                ManufacturerModelName=f"{taken_at} 1",
                BodyPartExamined=("HAND", "FOREARM")[study // 2 % 2],
            )
            _write(export / f"{PLANTED}^{patient}" / f"{accession}" / f"IM{number:06d}", data)
            number += 1
        rows.append((accession, ("unauffällig", "Fraktur")[label], f"{PLANTED} finding {study}", patient))
    _write_others(export)
    return _write_worklist(folder / "worklist.xlsx", rows)


def _names(accession: str) -> dict[str, str]:
    fields = ("PatientName", "ReferringPhysicianName", "OperatorsName", "InstitutionName", "StationName")
    names = {field: f"{PLANTED}^{field}"[:16] for field in fields}
    return names | {
        "AccessionNumber": accession,
        "PatientBirthDate": "19010203",
        "DeviceSerialNumber": f"{PLANTED}-7",
        "DetectorID": f"{PLANTED}-8",
        "StudyDescription": f"{PLANTED} study",
        "PatientComments": f"{PLANTED} comments",
    }


def _write_others(export: Path) -> None:
    for number, sop_class in enumerate((EncapsulatedPDFStorage, CTImageStorage) * 2):
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.SOPClassUID = sop_class
        dataset.SOPInstanceUID = make_uid("other", number)
        dataset.PatientName = f"{PLANTED}^OTHER"
        dataset.PatientID = PLANTED
        dataset.Modality = "CT" if sop_class == CTImageStorage else "DOC"
        block = dataset.private_block(0x0099, f"{PLANTED} CREATOR", create=True)
        block.add_new(1, "LO", f"{PLANTED} private")
        if sop_class == CTImageStorage:
            dataset.Rows = dataset.Columns = 16
            dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
            dataset.BitsAllocated = dataset.BitsStored = 16
            dataset.HighBit, dataset.PixelRepresentation = 15, 0
            dataset.PixelData = np.arange(256, dtype="<u2").tobytes()
        buffer = io.BytesIO()
        dataset.save_as(buffer, enforce_file_format=True)
        _write(export / f"{PLANTED}^OTHER" / f"OT{number:06d}", buffer.getvalue())
    _write(export / "System Volume Information" / "IndexerVolumeGuid", b"\\0")
    _write(export / f"{PLANTED}.readme.txt", b"exported")


def _write_worklist(file: Path, rows: list[tuple[str, ...]]) -> Path:
    book = openpyxl.Workbook()
    for row in [("Accession Number", "Befund", "Kommentar", "Patient"), *rows]:
        book.active.append(row)
    book.save(file)
    return file


def _write(file: Path, data: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
