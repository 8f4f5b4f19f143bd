"""The capture of a radiograph: a Secondary Capture of it under its Grad-CAM map."""

import math

import numpy as np
from highdicom.sc import ConversionTypeValues, SCImage
from highdicom.sr import CodedConcept
from pydicom import Dataset
from pydicom.sr.codedict import codes

from fracture.inference.dicom_answer.header import (
    NAME,
    RESEARCH_USE,
    SYNTHETIC_MODEL,
    Algorithm,
    check_source,
    complete,
    derive_uid,
    describe_equipment,
    has_several_frames,
    read_text,
    read_values,
)

SERIES_NUMBER = 9902
_DIRECTIONS = frozenset("ALPRHF")
_SIDES = ("R", "L", "U", "B")
_ROUNDING = 0.01  # of height and width, when an image is made smaller


def build_capture(source: Dataset, overlay: np.ndarray, algorithm: Algorithm, number: int) -> Dataset:
    """Build the capture of one radiograph.

    Args:
        source: the dataset of the radiograph, which needs no pixels.
        overlay: [H, W, 3] uint8, the whole radiograph under its map, turned as the radiograph is. Its height and width
            may have another ratio: then the capture says how viewers are to stretch it.
        number: of the radiograph within the study, from 1 on.

    Raises:
        UsageError: the radiograph lacks a valid UID.
    """
    assert overlay.dtype == np.uint8
    assert overlay.shape[2:] == (3,)
    check_source(source)
    study = str(source.StudyInstanceUID)
    capture = SCImage(
        pixel_array=overlay,
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=("L", "F"),  # highdicom needs one; the source's comes below
        study_instance_uid=study,
        series_instance_uid=derive_uid(algorithm, "captures", study),
        series_number=SERIES_NUMBER,
        series_description=f"{NAME}: Grad-CAM. {algorithm.warning}",
        sop_instance_uid=derive_uid(algorithm, "capture", study, str(source.SOPInstanceUID)),
        instance_number=number,
        **describe_equipment(algorithm),
    )
    del capture.DateOfSecondaryCapture, capture.TimeOfSecondaryCapture  # optional, and the clock's
    complete(capture, [source])
    _copy_image_properties(capture, source)
    capture.ConversionType = ConversionTypeValues.WSD.value
    capture.SourceImageSequence = [_refer(source)]
    synthetic = f" {SYNTHETIC_MODEL}." if algorithm.is_synthetic else ""
    capture.DerivationDescription = (
        f"Grad-CAM: where the radiograph supports the class that {NAME} {algorithm.version} predicts. "
        f"{RESEARCH_USE}.{synthetic}"
    )
    if aspect := _find_pixel_aspect(source, *overlay.shape[:2]):
        capture.PixelAspectRatio = aspect
    return capture


def _copy_image_properties(capture: Dataset, source: Dataset) -> None:
    """Copy what is true of the radiograph's pixels and so of the capture's."""
    orientation = read_values(source, "PatientOrientation")
    is_known = len(orientation) == 2 and all(way and {*way} <= _DIRECTIONS for way in orientation)
    capture.PatientOrientation = orientation if is_known else None
    laterality = read_text(source, "ImageLaterality") or read_text(source, "Laterality")
    if laterality in _SIDES:
        capture.ImageLaterality = laterality  # not of the series, whose images may show either side
    else:
        capture.Laterality = None  # unknown
    capture.BurnedInAnnotation = "YES" if read_text(source, "BurnedInAnnotation") == "YES" else "NO"
    if read_text(source, "LossyImageCompression") == "01":
        capture.LossyImageCompression = "01"
        for keyword in ("LossyImageCompressionRatio", "LossyImageCompressionMethod"):
            if text := read_text(source, keyword):
                setattr(capture, keyword, text)


def _refer(source: Dataset) -> Dataset:
    reference = Dataset()
    reference.ReferencedSOPClassUID = source.SOPClassUID
    reference.ReferencedSOPInstanceUID = source.SOPInstanceUID
    if has_several_frames(source):
        reference.ReferencedFrameNumber = 1
    purpose = CodedConcept.from_code(codes.DCM.SourceImageForImageProcessingOperation)
    reference.PurposeOfReferenceCodeSequence = [purpose]
    return reference


def _find_pixel_aspect(source: Dataset, height: int, width: int) -> list[int] | None:
    """Return the height and width of the overlay's pixels as whole numbers; None if they are square or unknown."""
    rows, columns = source.get("Rows"), source.get("Columns")
    aspect = read_values(source, "PixelAspectRatio")
    vertical, horizontal = map(int, aspect if len(aspect) == 2 and all(aspect) else (1, 1))
    tall, wide = (rows or 0) * vertical * width, (columns or 0) * horizontal * height
    if tall <= 0 or wide <= 0 or abs(tall / wide - 1) < _ROUNDING:
        return None
    divisor = math.gcd(tall, wide)
    return [tall // divisor, wide // divisor]
