import io
from dataclasses import replace

import numpy as np
import pytest
from pydicom import Dataset, dcmread
from pydicom.uid import SecondaryCaptureImageStorage

from fracture.errors import UsageError
from fracture.inference.dicom_answer.capture import build_capture
from fracture.inference.dicom_answer.header import write_dicom
from fracture.storage import storage_path
from tests.inference.dicom_answer.conftest import ALGORITHM, PATIENT, STUDY, encode, overlay, radiograph


def capture_of(source: Dataset, height: int = 40, width: int = 30, number: int = 1) -> Dataset:
    """A capture as it is read from its file."""
    return dcmread(io.BytesIO(encode(build_capture(source, overlay(height, width), ALGORITHM, number))))


def test_the_capture_shows_the_overlay_pixel_by_pixel():
    capture = capture_of(radiograph())
    assert capture.SOPClassUID == SecondaryCaptureImageStorage
    assert capture.PhotometricInterpretation == "RGB"
    assert np.array_equal(capture.pixel_array, overlay())


def test_the_capture_is_derived_from_the_radiograph_in_its_study():
    source = radiograph(**PATIENT)
    capture = capture_of(source, number=2)
    assert {keyword: str(capture[keyword].value) for keyword in PATIENT} == PATIENT
    assert capture.StudyInstanceUID == STUDY
    assert capture.SeriesInstanceUID != source.SeriesInstanceUID
    assert capture.ImageType == ["DERIVED", "SECONDARY", "OTHER"]
    [reference] = capture.SourceImageSequence
    assert reference.ReferencedSOPInstanceUID == source.SOPInstanceUID
    assert reference.ReferencedSOPClassUID == source.SOPClassUID
    assert reference.PurposeOfReferenceCodeSequence[0].CodeValue == "121322"
    assert "ReferencedFrameNumber" not in reference
    assert capture.DerivationDescription == (
        "Grad-CAM: where the radiograph supports the class that fracture 0.1.0 predicts. "
        "Research use only, not for diagnosis."
    )
    assert capture.SeriesDescription == "fracture: Grad-CAM. Research use only, not for diagnosis"
    assert capture.InstanceNumber == 2
    assert (capture.ContentDate, capture.ContentTime) == ("20240102", "101112")


def test_the_capture_of_a_synthetic_model_says_so():
    capture = build_capture(radiograph(), overlay(), replace(ALGORITHM, is_synthetic=True), 1)
    assert capture.SeriesDescription == "fracture: Grad-CAM. SYNTHETIC MODEL: its answers mean nothing"
    assert capture.DerivationDescription.endswith("diagnosis. SYNTHETIC MODEL: its answers mean nothing.")


def test_the_captures_of_a_study_are_one_series_of_an_image_each():
    first, second = capture_of(radiograph(1)), capture_of(radiograph(2), number=2)
    assert first.SeriesInstanceUID == second.SeriesInstanceUID
    assert first.SOPInstanceUID != second.SOPInstanceUID


def test_a_second_run_writes_the_same_bytes_over_the_first(tmp_path):
    folder, source = storage_path(tmp_path), radiograph(**PATIENT)
    first = write_dicom(folder, build_capture(source, overlay(), ALGORITHM, 1)).read_bytes()
    second = write_dicom(folder, build_capture(source, overlay(), ALGORITHM, 1)).read_bytes()
    assert first == second
    assert len([*tmp_path.iterdir()]) == 1


def test_what_is_true_of_the_radiograph_is_true_of_the_capture():
    source = radiograph(
        PatientOrientation=["L", "F"],
        ImageLaterality="R",
        BurnedInAnnotation="YES",
        LossyImageCompression="01",
        LossyImageCompressionRatio="10",
        LossyImageCompressionMethod="ISO_10918_1",
        NumberOfFrames=2,
    )
    capture = capture_of(source)
    assert capture.PatientOrientation == ["L", "F"]
    assert capture.ImageLaterality == "R"
    assert "Laterality" not in capture
    assert capture.BurnedInAnnotation == "YES"
    assert (capture.LossyImageCompression, capture.LossyImageCompressionRatio) == ("01", 10)
    assert capture.SourceImageSequence[0].ReferencedFrameNumber == 1


@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"PatientOrientation": "L", "ImageLaterality": "X"},
        {"PatientOrientation": ["", "F"], "Laterality": ""},
        {"PatientOrientation": ["left", "F"], "BurnedInAnnotation": ""},
    ],
)
def test_what_a_source_lacks_is_empty(values: dict[str, object]):
    capture = capture_of(radiograph(**values))
    assert not capture.PatientOrientation
    assert capture["Laterality"].is_empty
    assert "ImageLaterality" not in capture
    assert capture.BurnedInAnnotation == "NO"
    assert "LossyImageCompression" not in capture
    assert not capture.PatientName


@pytest.mark.parametrize(
    ("source", "size", "aspect"),
    [
        ({"Rows": 2000, "Columns": 1500}, (40, 30), None),
        ({"Rows": 2000, "Columns": 1600}, (224, 224), [5, 4]),  # a square shows more height in each pixel
        ({"Rows": 2000, "Columns": 1500}, (448, 337), None),  # 448 × 336 would be exact
        ({"Rows": 1000, "Columns": 1000, "PixelAspectRatio": [2, 1]}, (100, 50), None),
        ({"Rows": 1000, "Columns": 1000, "PixelAspectRatio": [2, 1]}, (100, 100), [2, 1]),
        ({"Rows": 1000, "Columns": 1000, "PixelAspectRatio": [0, 1]}, (100, 100), None),
        ({"Rows": 1000, "Columns": 1000, "PixelAspectRatio": 2}, (100, 100), None),
        ({}, (224, 224), None),
    ],
)
def test_viewers_are_told_the_shape_of_a_pixel_that_is_not_square(
    source: dict[str, object], size: tuple[int, int], aspect: list[int] | None
):
    assert capture_of(radiograph(**source), *size).get("PixelAspectRatio") == aspect


def test_a_radiograph_without_a_uid_has_no_capture():
    source = radiograph()
    del source.SOPInstanceUID
    with pytest.raises(UsageError, match="a radiograph has no valid SOPInstanceUID"):
        build_capture(source, overlay(), ALGORITHM, 1)
