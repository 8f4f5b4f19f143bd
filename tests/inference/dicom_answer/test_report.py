import io
import subprocess
import sys
from dataclasses import replace

import pytest
from highdicom.sr import ComprehensiveSR, srread
from highdicom.sr.utils import find_content_items
from pydicom import Dataset, dcmread
from pydicom.multival import MultiValue
from pydicom.sr.codedict import codes
from pydicom.uid import UID

from fracture.errors import UsageError
from fracture.inference.dicom_answer.header import write_dicom
from fracture.inference.dicom_answer.report import (
    ABSENT_BELOW,
    FINDINGS,
    FRACTURE,
    PRESENT_FROM,
    PROBABILITY,
    Answer,
    build_report,
)
from fracture.storage import storage_path
from tests.inference.dicom_answer.conftest import (
    ALGORITHM,
    PATIENT,
    STUDY,
    answers,
    encode,
    radiograph,
    radiograph_named,
)

WHOLE = Answer(0.875, "fracture")


def read_back(report: Dataset) -> ComprehensiveSR:
    return srread(io.BytesIO(encode(report)))


def texts(report: ComprehensiveSR, name: object) -> list[str]:
    return [item.value for item in find_content_items(report, name=name, recursive=True)]


def test_the_report_has_a_group_for_the_study_and_for_each_image():
    report = read_back(build_report(answers(**PATIENT), WHOLE, ALGORITHM))
    study, first, second = report.content.get_image_measurement_groups()
    probability, *thresholds = study.get_measurements()
    assert (probability.name, probability.value, probability.unit) == (PROBABILITY, 0.875, codes.UCUM.NoUnits)
    assert probability.derivation == codes.SCT.Maximum
    assert [(item.name, item.value) for item in thresholds] == [(ABSENT_BELOW, 0.4), (PRESENT_FROM, 0.7)]
    assert [group.get_measurements()[0].value for group in (first, second)] == [0.875, 0.125]
    decisions = [group.get_qualitative_evaluations()[0] for group in (study, first, second)]
    assert [(item.name, item.value) for item in decisions] == [
        (FRACTURE, FINDINGS["fracture"]),
        (FRACTURE, FINDINGS["fracture"]),
        (FRACTURE, FINDINGS["none"]),
    ]
    sources = [[image.referenced_sop_instance_uid for image in group.source_images] for group in (study, first, second)]
    assert sources == [[f"{STUDY}.2.1", f"{STUDY}.2.2"], [f"{STUDY}.2.1"], [f"{STUDY}.2.2"]]


def test_the_report_names_the_model_the_device_and_the_use():
    report = read_back(build_report(answers(), WHOLE, ALGORITHM))
    assert set(texts(report, codes.DCM.AlgorithmName)) == {"fracture"}
    assert set(texts(report, codes.DCM.AlgorithmVersion)) == {"0.1.0"}
    parameters = {f"fingerprint of the model: {'ab' * 32}", "thresholds: 0.4, 0.7"}
    assert set(texts(report, codes.DCM.AlgorithmParameters)) == parameters
    [device] = report.content.get_observer_contexts()
    assert device.observer_identifying_attributes.name == "fracture"
    assert texts(report, codes.DCM.Comment) == ["Research use only, not for diagnosis."]
    assert report.SeriesDescription == "fracture: report. Research use only, not for diagnosis"
    assert (report.CompletionFlag, report.VerificationFlag, report.PreliminaryFlag) == (
        *("COMPLETE", "UNVERIFIED"),
        "PRELIMINARY",
    )
    assert report.CodingSchemeIdentificationSequence[0].CodingSchemeDesignator == "99FRACTURE"


def test_the_report_of_a_synthetic_model_says_so():
    report = build_report(answers(), WHOLE, replace(ALGORITHM, is_synthetic=True))
    assert report.SeriesDescription == "fracture: report. SYNTHETIC MODEL: its answers mean nothing"
    assert texts(read_back(report), codes.DCM.Comment) == [
        "Research use only, not for diagnosis.",
        "SYNTHETIC MODEL: its answers mean nothing. It was trained on generated radiographs, not on real ones.",
    ]


def test_the_report_lies_in_the_study_and_names_its_images_as_evidence():
    report = read_back(build_report(answers(**PATIENT), WHOLE, ALGORITHM))
    assert report.StudyInstanceUID == STUDY
    sop_class = radiograph().SOPClassUID
    series = f"{STUDY}.2"
    assert report.get_evidence() == [(STUDY, series, f"{series}.{number}", sop_class) for number in (1, 2)]
    assert {keyword: str(report[keyword].value) for keyword in PATIENT} == PATIENT
    assert (report.ContentDate, report.ContentTime) == ("20240102", "101112")


def test_the_same_images_and_model_give_the_same_bytes_in_any_order(tmp_path):
    folder = storage_path(tmp_path)
    first = write_dicom(folder, build_report(answers(**PATIENT), WHOLE, ALGORITHM))
    data = first.read_bytes()
    second = write_dicom(folder, build_report(answers(**PATIENT)[::-1], WHOLE, ALGORITHM))
    assert (first, data) == (second, second.read_bytes())
    assert [file.name for file in tmp_path.iterdir()] == [first.name]
    script = (
        "import sys; from tests.inference.dicom_answer.conftest import *; "
        "sys.stdout.buffer.write(encode(build_report(answers(**PATIENT), Answer(0.875, 'fracture'), ALGORITHM)))"
    )
    elsewhere = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert elsewhere.stdout == data, "in another process, at another time"


def test_other_images_models_and_settings_have_other_uids():
    images = answers()
    reports = [
        build_report(images, WHOLE, ALGORITHM),
        build_report(images[:1], WHOLE, ALGORITHM),
        build_report(images, WHOLE, ALGORITHM, study_rule="mean"),
        build_report(images, WHOLE, ALGORITHM, unread=1),
        build_report(images, WHOLE, replace(ALGORITHM, fingerprint="cd" * 32)),
        build_report(images, WHOLE, replace(ALGORITHM, version="0.2.0")),
        build_report(images, WHOLE, replace(ALGORITHM, threshold=0.5)),
        build_report(images, WHOLE, replace(ALGORITHM, fracture_threshold=0.5)),
    ]
    uids = [report.SOPInstanceUID for report in reports]
    assert len(set(uids)) == 8
    assert len({report.SeriesInstanceUID for report in reports}) == 5, "one for each model and operating point"
    assert all(UID(uid).is_valid and uid.startswith("2.25.") for uid in uids)


def test_the_mean_of_the_images_and_those_that_could_not_be_read():
    report = read_back(build_report(answers(), Answer(0.5, "fracture"), ALGORITHM, study_rule="mean", unread=1))
    study = report.content.get_image_measurement_groups()[0]
    assert study.get_measurements()[0].derivation == codes.SCT.Mean
    assert texts(report, codes.DCM.Comment)[1] == "1 of 3 images of the study could not be read and are left out."


def test_doubt_is_undetermined_and_a_report_of_its_own():
    """Whether an image is in doubt may depend on other studies, so the same images do not give the same report."""
    doubtful = build_report([(radiograph(), Answer(0.875, "doubt"))], Answer(0.875, "doubt"), ALGORITHM)
    certain = build_report([(radiograph(), WHOLE)], WHOLE, ALGORITHM)
    for group in read_back(doubtful).content.get_image_measurement_groups():
        (item,) = group.get_qualitative_evaluations()
        assert (item.name, item.value) == (FRACTURE, codes.CID240.Undetermined)
    assert doubtful.SOPInstanceUID != certain.SOPInstanceUID
    explained = build_report([(radiograph(), WHOLE)], WHOLE, ALGORITHM, notes=["Why."])
    assert texts(read_back(explained), codes.DCM.Comment)[1:] == ["Why."]
    assert explained.SOPInstanceUID != certain.SOPInstanceUID
    assert doubtful.SeriesInstanceUID == certain.SeriesInstanceUID


def test_a_probability_has_six_digits():
    report = read_back(build_report([(radiograph(), Answer(1 / 3, "none"))], Answer(1e-9, "none"), ALGORITHM))
    study, image = report.content.get_image_measurement_groups()
    assert (study.get_measurements()[0].value, image.get_measurements()[0].value) == (0.0, 0.333333)


def test_of_several_frames_the_first_is_referred_to():
    report = read_back(build_report([(radiograph(NumberOfFrames=3), WHOLE)], WHOLE, ALGORITHM))
    [image] = report.content.get_image_measurement_groups()[1].source_images
    assert image.referenced_frame_numbers == [1]


def test_nothing_but_patient_and_study_is_copied():
    planted = {
        "InstitutionName": "PLANTED-1",
        "OperatorsName": "PLANTED-2",
        "StationName": "PLANTED-3",
        "DeviceSerialNumber": "PLANTED-4",
        "PatientComments": "PLANTED-5",
        "Manufacturer": "PLANTED-6",
        "SeriesDescription": "PLANTED-7",
    }
    source = radiograph(**PATIENT, **planted)
    source.private_block(0x0011, "PLANTED-8", create=True).add_new(1, "LO", "PLANTED-9")
    data = encode(build_report([(source, WHOLE)], WHOLE, ALGORITHM))
    assert b"Doe^Jane" in data
    assert b"PLANTED" not in data


POOR = {
    "nothing": {},
    "empty values": dict.fromkeys(PATIENT.keys() - {"StudyDescription"}, ""),
    "one part of a name": {"PatientName": "Doe"},
    "an age and an issuer": {"PatientAge": "074Y", "IssuerOfPatientID": "HOSPITAL"},
}


@pytest.mark.parametrize("values", POOR.values(), ids=POOR)
def test_what_a_source_lacks_is_empty(values: dict[str, str]):
    report = read_back(build_report(answers(**values), WHOLE, ALGORITHM))
    assert {keyword: str(report[keyword].value or "") for keyword in values} == values
    for keyword in PATIENT.keys() - values.keys() - {"StudyDescription"}:
        assert not report[keyword].value, keyword
    assert (report.ContentDate, report.ContentTime) == ("19700101", "000000")


@pytest.mark.filterwarnings(
    "ignore:(Invalid value for VR|The value length|The number of PN)"
)  # of the sources made here
@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("PatientBirthDate", "unknown"),
        ("PatientBirthDate", "19501332"),
        ("PatientSex", "W"),
        ("StudyTime", "25:61"),
        ("StudyTime", "1000-1200"),
        ("StudyDate", "yesterday"),
        ("StudyDate", "2024.01.02"),
        ("PatientName", "A=B=C=D"),
        ("AccessionNumber", "A" * 17),
        ("PatientID", "P" * 65),
        ("PatientID", ["P", "Q"]),
        ("StudyID", "4\x0711"),
    ],
)
def test_what_breaks_its_type_is_left_empty(keyword: str, value: object):
    source = radiograph(**(PATIENT | {keyword: value}))
    report = read_back(build_report([(source, WHOLE)], WHOLE, ALGORITHM))
    assert not report[keyword].value
    assert not isinstance(report[keyword].value, MultiValue)


@pytest.mark.filterwarnings("ignore:(Invalid value for VR|The value length)")
@pytest.mark.parametrize("keyword", ["PatientAge", "IssuerOfPatientID", "StudyDescription"])
def test_what_is_optional_and_breaks_its_type_is_left_out(keyword: str):
    source = radiograph(**{keyword: "x" * 70})
    assert keyword not in build_report([(source, WHOLE)], WHOLE, ALGORITHM)


@pytest.mark.parametrize(
    ("raw", "character_set", "name"),
    [
        ("Müller^Jörg".encode("latin-1"), "ISO_IR 100", "Müller^Jörg"),
        ("Müller^Jörg".encode(), "ISO_IR 192", "Müller^Jörg"),
        ("Müller^Jörg".encode("latin-1"), None, "Müller^Jörg"),
        ("Müller^Jörg".encode(), None, "Müller^Jörg"),
        ("Люкceмбypг".encode("iso8859_5"), "ISO_IR 144", "Люкceмбypг"),
        (
            b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B",
            ["", "ISO 2022 IR 87"],
            "Yamada^Tarou=山田^太郎",
        ),
        ("Müller^Jörg".encode("latin-1"), "ISO_IR 192", ""),  # a declaration that is wrong
    ],
)
def test_names_in_any_character_set_are_written_in_utf_8(raw: bytes, character_set: str | list[str] | None, name: str):
    source = radiograph_named(raw, character_set)
    report = dcmread(io.BytesIO(encode(build_report([(source, WHOLE)], WHOLE, ALGORITHM))))
    assert report.SpecificCharacterSet == "ISO_IR 192"
    assert str(report.PatientName) == name


@pytest.mark.filterwarnings("ignore:Unknown encoding")  # as the source is read
def test_a_character_set_that_does_not_exist():
    data = encode(radiograph_named(b"M\xfcller", "ISO_IR 100"))
    source = dcmread(io.BytesIO(data.replace(b"ISO_IR 100", b"ISO_IR 999")))
    assert build_report([(source, WHOLE)], WHOLE, ALGORITHM).PatientName == "Müller"


def test_no_value_of_a_patient_is_logged(caplog):
    data = encode(radiograph(PatientName="Planted", PatientBirthDate="19500101", NumberOfFrames=1234567))
    source = dcmread(io.BytesIO(data.replace(b"19500101", b"Planted ").replace(b"1234567", b"Planted")))
    report = build_report([(source, WHOLE)], WHOLE, ALGORITHM)
    assert (report.PatientName, report.PatientBirthDate) == ("Planted", "")
    assert "Planted" not in caplog.text


def test_a_number_that_is_none():
    data = encode(radiograph(NumberOfFrames=123))
    source = dcmread(io.BytesIO(data.replace(b"123 ", b"1.5 ")))
    [image] = read_back(build_report([(source, WHOLE)], WHOLE, ALGORITHM)).content.get_image_measurement_groups()[1:]
    assert image.source_images[0].referenced_frame_numbers is None


def test_the_time_is_the_latest_of_the_sources():
    first = radiograph(1, StudyDate="20240102", StudyTime="101112", ContentDate="20240102", ContentTime="1015")
    second = radiograph(2, StudyDate="20240102", StudyTime="101112", AcquisitionDate="20240102")
    report = build_report([(first, WHOLE), (second, WHOLE)], WHOLE, ALGORITHM)
    assert (report.ContentDate, report.ContentTime) == ("20240102", "101500")
    assert (report.StudyDate, report.StudyTime) == ("20240102", "101112")
    assert "InstanceCreationDate" not in report


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
@pytest.mark.parametrize("keyword", ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID"])
@pytest.mark.parametrize("value", ["", "1.2.x", "1.02"])
def test_a_radiograph_without_a_valid_uid_is_refused(keyword: str, value: str):
    source = radiograph()
    setattr(source, keyword, value)
    with pytest.raises(UsageError, match=f"a radiograph has no valid {keyword}, so no report can refer to it. Leave"):
        build_report([(source, WHOLE)], WHOLE, ALGORITHM)


@pytest.mark.parametrize(("keyword", "name"), [("StudyInstanceUID", "studies"), ("PatientID", "patients")])
def test_a_report_is_about_one_study_of_one_patient(keyword: str, name: str):
    images = [(radiograph(1, **{keyword: "1.2.1"}), WHOLE), (radiograph(2, **{keyword: "1.2.2"}), WHOLE)]
    with pytest.raises(UsageError, match=f"the images of one report are of 2 {name} by their {keyword}") as caught:
        build_report(images, WHOLE, ALGORITHM)
    assert "1.2.1" not in str(caught.value)


@pytest.mark.parametrize("package", ["highdicom", "pynetdicom", "dicomweb_client"])
def test_without_the_extra_its_name_is_in_the_error(monkeypatch, package: str):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "fracture.inference.dicom_answer")
    with pytest.raises(UsageError, match=rf"need {package}, which is not installed here: pip install 'fracture\[arch"):
        import fracture.inference.dicom_answer  # noqa: F401
