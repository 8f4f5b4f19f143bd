"""Write a generated radiograph as a DICOM file, in the ways in which hospitals' machines write them."""

import hashlib
import io
from typing import Any, NamedTuple

import numpy as np
import openjpeg
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)

TRANSFER_SYNTAXES = (ExplicitVRLittleEndian, RLELossless, JPEG2000Lossless, DeflatedExplicitVRLittleEndian)
_VIEW_POSITIONS = ("AP", "LL", "RLO")


class Stored(NamedTuple):
    """How the pixels of a file are stored."""

    bits: int = 12  # up to 16
    photometric: str = "MONOCHROME2"  # or MONOCHROME1, in which the largest value is black
    transfer_syntax: UID = ExplicitVRLittleEndian


def vary_storage(number: int) -> Stored:
    """Return one of 16 ways to store pixels, by turns."""
    bits, photometric = (12, 16)[number % 2], ("MONOCHROME2", "MONOCHROME1")[number // 2 % 2]
    return Stored(bits, photometric, TRANSFER_SYNTAXES[number // 4 % 4])


def make_uid(*parts: object) -> UID:
    """Return a UID that is the same for the same parts (PS3.5, B.2: under 2.25, a number of 128 bits)."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return UID(f"2.25.{int.from_bytes(digest[:16])}")


def encode_dicom(pixels: np.ndarray, patient: str, study: str, view: int, stored: Stored, **elements: Any) -> bytes:
    """Return a DX image for presentation whose window shows the given grey values.

    Args:
        pixels: [H, W] uint8.
        patient: PatientID.
        study: another text for each study of the patient.
        view: number of the image within the study, from 0.
        elements: more elements, by keyword, or others in place of those written here; None for none.
    """
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = DigitalXRayImageStorageForPresentation
    dataset.StudyInstanceUID = make_uid("study", patient, study)
    dataset.SeriesInstanceUID = make_uid("series", patient, study)
    dataset.SOPInstanceUID = make_uid("image", patient, study, view)
    dataset.PatientID, dataset.PatientName = patient, f"SYNTHETIC^{patient.upper()}"
    dataset.PatientBirthDate, dataset.PatientSex, dataset.PatientAge = "19600101", "O", "060Y"
    dataset.StudyDate, dataset.StudyTime, dataset.StudyID = "20200101", "120000", "1"
    dataset.AccessionNumber, dataset.ReferringPhysicianName = f"A{patient}"[:16], ""
    dataset.Modality, dataset.PresentationIntentType = "DX", "FOR PRESENTATION"
    dataset.SeriesNumber, dataset.InstanceNumber = 1, view + 1
    dataset.ImageType = ["ORIGINAL", "PRIMARY"]
    dataset.Manufacturer, dataset.ManufacturerModelName = "Synthetic", "Sample"
    dataset.BodyPartExamined, dataset.ViewPosition = "EXTREMITY", _VIEW_POSITIONS[view % len(_VIEW_POSITIONS)]
    dataset.BurnedInAnnotation, dataset.KVP = "NO", 55
    _set_pixels(dataset, pixels, stored)
    for name, value in elements.items():
        setattr(dataset, name, value)
    if stored.transfer_syntax == RLELossless:
        dataset.compress(RLELossless, generate_instance_uid=False)
    elif stored.transfer_syntax == JPEG2000Lossless:  # pydicom's encoder needs a package more
        codestream = openjpeg.encode(dataset.pixel_array, bits_stored=stored.bits, photometric_interpretation=2)
        dataset.PixelData = encapsulate([codestream])
        dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True
    dataset.file_meta.TransferSyntaxUID = stored.transfer_syntax
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _set_pixels(dataset: Dataset, pixels: np.ndarray, stored: Stored) -> None:
    """Store grey values in all bits, with the window that shows them again."""
    largest = 2**stored.bits - 1
    values = np.round(pixels.astype(np.float64) * (largest / 255)).astype(np.uint16)
    values = largest - values if stored.photometric == "MONOCHROME1" else values
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, stored.photometric
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, stored.bits, stored.bits - 1
    dataset.PixelRepresentation = 0
    dataset.PresentationLUTShape = "INVERSE" if stored.photometric == "MONOCHROME1" else "IDENTITY"
    dataset.WindowCenter, dataset.WindowWidth = (largest + 1) / 2, largest + 1
    dataset.PixelData = values.astype("<u2").tobytes()
