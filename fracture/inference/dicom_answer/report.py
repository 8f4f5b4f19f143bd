"""The report of a study: a Comprehensive SR by TID 1500, with a measurement group for the study and for each image."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from highdicom import sr
from highdicom.coding_schemes import CodingSchemeIdentificationItem
from pydicom import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from fracture.errors import UsageError
from fracture.evaluation.outcomes import DOUBT, FRACTURED, NONE
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
)

SERIES_NUMBER = 9901  # far from those of modalities
SCHEME = "99FRACTURE"  # for what no public scheme has a code for
PROBABILITY = Code("PROBABILITY", SCHEME, "Probability of fracture")
ABSENT_BELOW = Code("ABSENT_BELOW", SCHEME, "Probability below which a fracture is called absent")
PRESENT_FROM = Code("PRESENT_FROM", SCHEME, "Probability from which on a fracture is called present")
FRACTURE = Code("125605004", "SCT", "Fracture of bone")
FINDINGS = {
    FRACTURED: Code("52101004", "SCT", "Present"),
    DOUBT: Code("373068000", "SCT", "Undetermined"),
    NONE: Code("2667000", "SCT", "Absent"),
}
_PROCEDURE = Code("43468-8", "LN", "XR unspecified body region")
_DERIVATIONS = {"max": codes.SCT.Maximum, "mean": codes.SCT.Mean}
_DIGITS = 6  # after the point; float32 has few more, and the last differ between machines


_Group = sr.MeasurementsAndQualitativeEvaluations


@dataclass(frozen=True)
class Answer:
    """What the model says about an image or a study."""

    probability: float  # of a fracture, calibrated
    outcome: str  # one of `OUTCOMES`


def build_report(
    images: Sequence[tuple[Dataset, Answer]],
    study: Answer,
    algorithm: Algorithm,
    *,
    study_rule: Literal["max", "mean"] = "max",
    unread: int = 0,
    notes: Sequence[str] = (),
) -> Dataset:
    """Build the report of one study. The order of its images does not matter.

    Args:
        images: the datasets of the study's radiographs, which need no pixels, with the answer for each.
        study: the answer for all of them.
        study_rule: how the study's probability follows from those of its images.
        unread: further images of the study, which could not be read. The report states their number.
        notes: further comments, such as why an outcome is doubt whatever the probability.

    Raises:
        UsageError: the images are of several studies or patients, or lack a valid UID.
    """
    images = sorted(images, key=lambda image: str(image[0].get("SOPInstanceUID")))
    sources = [source for source, _ in images]
    _check_study(sources)
    uids = [str(source.SOPInstanceUID) for source in sources]
    study_uid = str(sources[0].StudyInstanceUID)
    # They may depend on the other studies of a prediction, and another outcome is another report.
    content = [study.outcome, *(answer.outcome for _, answer in images), *notes]
    groups = [_create_study_group(sources, study, algorithm, study_rule)]
    groups += [_create_image_group(source, answer, algorithm) for source, answer in images]
    report = sr.ComprehensiveSR(
        evidence=[_create_evidence(source) for source in sources],
        content=_create_content(groups, algorithm, len(images), unread, notes),
        series_instance_uid=derive_uid(algorithm, "reports", study_uid),
        series_number=SERIES_NUMBER,
        series_description=f"{NAME}: report. {algorithm.warning}",
        sop_instance_uid=derive_uid(algorithm, "report", study_uid, study_rule, str(unread), *content, *uids),
        instance_number=1,
        is_complete=True,
        coding_schemes=[CodingSchemeIdentificationItem(SCHEME, name=f"Codes of the program {NAME}")],
        **describe_equipment(algorithm),
    )
    complete(report, sources)
    return report


def _check_study(sources: Sequence[Dataset]) -> None:
    for source in sources:
        check_source(source)
    for keyword, name in (("StudyInstanceUID", "studies"), ("PatientID", "patients")):
        if (count := len({read_text(source, keyword) for source in sources})) > 1:
            raise UsageError(
                f"the images of one report are of {count} {name} by their {keyword}, and a report is about one. "
                "Correct them in the archive, or leave them out."
            )


def _create_evidence(source: Dataset) -> Dataset:
    """Return what highdicom needs to refer to a source, with an empty patient: its warnings quote names."""
    evidence = Dataset()
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID"):
        setattr(evidence, keyword, getattr(source, keyword))
    for keyword in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex"):
        setattr(evidence, keyword, "")
    for keyword in ("AccessionNumber", "StudyID", "StudyDate", "StudyTime"):
        setattr(evidence, keyword, "")
    return evidence


def _create_content(
    groups: Sequence[_Group], algorithm: Algorithm, read: int, unread: int, notes: Sequence[str]
) -> Dataset:
    device = sr.DeviceObserverIdentifyingAttributes(
        uid=derive_uid(algorithm, "device"), name=NAME, manufacturer_name=NAME, model_name=NAME
    )
    content = sr.MeasurementReport(
        observation_context=sr.ObservationContext(
            observer_device_context=sr.ObserverContext(
                observer_type=codes.DCM.Device, observer_identifying_attributes=device
            )
        ),
        procedure_reported=_PROCEDURE,
        imaging_measurements=groups,
    )[0]
    comments = [f"{RESEARCH_USE}."]
    if algorithm.is_synthetic:
        comments.append(f"{SYNTHETIC_MODEL}. It was trained on generated radiographs, not on real ones.")
    if unread:
        comments.append(f"{unread} of {read + unread} images of the study could not be read and are left out.")
    comments += notes
    for comment in comments:
        content.ContentSequence.append(
            sr.TextContentItem(codes.DCM.Comment, comment, relationship_type=sr.RelationshipTypeValues.CONTAINS)
        )
    return content


def _create_study_group(sources: Sequence[Dataset], answer: Answer, algorithm: Algorithm, study_rule: str) -> _Group:
    limits = ((ABSENT_BELOW, algorithm.threshold), (PRESENT_FROM, algorithm.fracture_threshold))
    thresholds = [sr.Measurement(code, round(value, _DIGITS), codes.UCUM.NoUnits) for code, value in limits]
    probability = _create_measurement(answer, derivation=_DERIVATIONS[study_rule])
    tracking = ("study", str(sources[0].StudyInstanceUID))
    return _create_group(tracking, sources, answer, algorithm, [probability, *thresholds])


def _create_image_group(source: Dataset, answer: Answer, algorithm: Algorithm) -> _Group:
    tracking = ("image", str(source.SOPInstanceUID))
    return _create_group(tracking, [source], answer, algorithm, [_create_measurement(answer)])


def _create_measurement(answer: Answer, derivation: Code | None = None) -> sr.Measurement:
    probability = round(float(answer.probability), _DIGITS)
    return sr.Measurement(PROBABILITY, probability, codes.UCUM.NoUnits, derivation=derivation)


def _create_group(
    tracking: tuple[str, str],
    sources: Sequence[Dataset],
    answer: Answer,
    algorithm: Algorithm,
    measurements: Sequence[sr.Measurement],
) -> _Group:
    kind, uid = tracking
    return _Group(
        tracking_identifier=sr.TrackingIdentifier(uid=derive_uid(algorithm, f"tracking {kind}", uid), identifier=kind),
        algorithm_id=sr.AlgorithmIdentification(
            name=NAME,
            version=algorithm.version,
            parameters=[
                f"fingerprint of the model: {algorithm.fingerprint}",
                f"thresholds: {round(algorithm.threshold, _DIGITS)}, {round(algorithm.fracture_threshold, _DIGITS)}",
            ],
        ),
        measurements=measurements,
        qualitative_evaluations=[sr.QualitativeEvaluation(FRACTURE, FINDINGS[answer.outcome])],
        source_images=[_refer(source) for source in sources],
    )


def _refer(source: Dataset) -> sr.SourceImageForMeasurementGroup:
    frames = [1] if has_several_frames(source) else None
    return sr.SourceImageForMeasurementGroup(source.SOPClassUID, source.SOPInstanceUID, frames)
