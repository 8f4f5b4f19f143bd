"""What the report and the captures of a study have in common: UIDs, patient, study, equipment, times, and the file.

The same images and the same model give the same bytes under the same UIDs, so a second run replaces the first in an
archive. Of a source only the patient and the study are copied. All else that may name somebody (institution, operator,
station, serial numbers, private elements) is not.
"""

import io
import unicodedata
import uuid
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, time

from pydicom import DataElement, Dataset, config
from pydicom.datadict import dictionary_VR
from pydicom.multival import MultiValue
from pydicom.uid import UID
from pydicom.valuerep import DA, TM

from fracture.errors import UsageError
from fracture.storage import StoragePath

NAME = "fracture"
RESEARCH_USE = "Research use only, not for diagnosis"
SYNTHETIC_MODEL = "SYNTHETIC MODEL: its answers mean nothing"
# A UUID as a UID needs no registered root: PS3.5, B.2.
_NAMESPACE = uuid.UUID("6d0f6a0e-3c3f-4c58-9c0e-5b8f3a1f7a52")
_UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID")
_REQUIRED = (  # may be empty, but not missing
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex"),
    *("StudyDate", "StudyTime", "ReferringPhysicianName", "StudyID", "AccessionNumber"),
)
_OPTIONAL = ("IssuerOfPatientID", "PatientAge", "StudyDescription")
_SEXES = ("M", "F", "O", "")
_TIMES = ("Study", "Series", "Acquisition", "Content")
_UNKNOWN_TIME = datetime(1970, 1, 1)


@dataclass(frozen=True)
class Algorithm:
    """The model that answers. Another version, fingerprint or threshold is another algorithm, with UIDs of its own."""

    version: str  # of the program, at most 64 characters
    fingerprint: str  # of the bundle, such as the SHA-256 of its weights
    threshold: float  # of the operating point: below it a fracture is absent
    fracture_threshold: float  # from it on one is present
    is_synthetic: bool = False  # trained on generated radiographs

    @property
    def warning(self) -> str:
        """What the name of a series says of the use of its objects, at most 43 characters."""
        return SYNTHETIC_MODEL if self.is_synthetic else RESEARCH_USE


def derive_uid(algorithm: Algorithm, kind: str, *sources: str) -> UID:
    """Derive a UID from the algorithm, what it is for, and the UIDs and settings that it stands for."""
    thresholds = map(repr, (algorithm.threshold, algorithm.fracture_threshold))
    name = "\0".join([kind, algorithm.version, algorithm.fingerprint, *thresholds, *sources])
    return UID(f"2.25.{uuid.uuid5(_NAMESPACE, name).int}")


def check_source(source: Dataset) -> None:
    """Check that other objects can refer to a radiograph. No message repeats its UIDs, which may stand in a log.

    Raises:
        UsageError: one of its UIDs is missing or not valid.
    """
    for keyword in _UIDS:
        if not read_text(source, keyword):
            raise UsageError(
                f"a radiograph has no valid {keyword}, so no report can refer to it. Leave it out, or export it again "
                "from the archive."
            )


def create_subject(source: Dataset) -> Dataset:
    """Return patient and study of a source. A value that DICOM does not allow is left out or empty."""
    subject = Dataset()
    subject.StudyInstanceUID = source.StudyInstanceUID
    for keyword in _REQUIRED:
        setattr(subject, keyword, read_text(source, keyword))
    if subject.PatientSex not in _SEXES:
        subject.PatientSex = ""
    for keyword in _OPTIONAL:
        if text := read_text(source, keyword):
            setattr(subject, keyword, text)
    return subject


def read_text(source: Dataset, keyword: str) -> str:
    """Return the one value of a source as text; "" if it is missing, not single, undecodable, or against its type."""
    values = read_values(source, keyword)
    return values[0] if len(values) == 1 else ""


def read_values(source: Dataset, keyword: str) -> list[str]:
    """Return the values of a source as text; none if they are missing, or one is undecodable or against its type."""
    # Warnings and the log of pydicom quote values, which may be names.
    with warnings.catch_warnings(), config.disable_value_validation():
        warnings.simplefilter("ignore")
        try:
            value = source.get(keyword)
        except (TypeError, ValueError, OverflowError):  # pydicom's for numbers as text that are none
            return []
        values = value if isinstance(value, MultiValue) else [] if value is None else [value]
        texts = [str(text).strip() for text in values]
        if not source.get("SpecificCharacterSet"):
            texts = [_decode_undeclared(text) for text in texts]
        return texts if all(_is_valid(keyword, text) for text in texts) else []


def _decode_undeclared(text: str) -> str:
    """Return text whose character set is not declared, which pydicom reads as ISO 8859-1, as UTF-8 if it is that."""
    try:
        return text.encode("latin-1").decode()
    except UnicodeError:
        return text


def _is_valid(keyword: str, text: str) -> bool:
    vr = dictionary_VR(keyword)
    try:
        DataElement(keyword, vr, text, validation_mode=config.RAISE)
        if text and vr in ("DA", "TM"):
            _ = DA(text) if vr == "DA" else TM(text)
    except ValueError:
        return False
    # U+FFFD stands for bytes that the declared character set does not have.
    return not any(unicodedata.category(character) == "Cc" or character == "\ufffd" for character in text)


def has_several_frames(source: Dataset) -> bool:
    """Return whether a reference to a source must name the frame that the model sees, its first."""
    frames = read_text(source, "NumberOfFrames")
    return bool(frames) and int(frames) > 1


def find_latest_time(sources: Sequence[Dataset]) -> datetime:
    """Return the latest date and time that the sources have, or 1970 if they have none.

    The clock would give every run other bytes, and objects with the same UID must be the same.
    """
    times = []
    for source in sources:
        for of in _TIMES:
            if date := read_text(source, f"{of}Date"):
                clock = read_text(source, f"{of}Time")
                times.append(datetime.combine(DA(date), TM(clock) if clock else time.min))
    return max(times, default=_UNKNOWN_TIME)


def complete(dataset: Dataset, sources: Sequence[Dataset]) -> None:
    """Give a new object of highdicom the patient and study of its sources, and their latest time instead of now."""
    dataset.update(create_subject(sources[0]))
    dataset.SpecificCharacterSet = "ISO_IR 192"  # UTF-8, whatever the source has
    latest = find_latest_time(sources)
    dataset.ContentDate, dataset.ContentTime = f"{latest:%Y%m%d}", f"{latest:%H%M%S}"
    del dataset.InstanceCreationDate, dataset.InstanceCreationTime  # optional, as the next is
    for equipment in dataset.ContributingEquipmentSequence:
        del equipment.ContributionDateTime


def describe_equipment(algorithm: Algorithm) -> dict[str, str]:
    """Return highdicom's arguments for what made an object."""
    return {"manufacturer": NAME, "manufacturer_model_name": NAME, "software_versions": algorithm.version}


def write_dicom(folder: StoragePath, dataset: Dataset) -> StoragePath:
    """Write a report or capture as `UID.dcm`, and return the file; one of the same UID is replaced."""
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    file = folder / f"{dataset.SOPInstanceUID}.dcm"
    file.write_bytes(buffer.getvalue())
    return file
