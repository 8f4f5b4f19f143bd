"""Write the predictions of DICOM studies back as DICOM, and send them to an archive."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fracture.errors import UsageError
from fracture.preparation.decoding.limits import Rejected
from fracture.progress.bars import ProgressBars
from fracture.storage import StoragePath, storage_path

if TYPE_CHECKING:
    from pyarrow import Table
    from pydicom.dataset import Dataset

    from fracture.evaluation.operating_point import OperatingPoint
    from fracture.inference.batch_prediction import Input
    from fracture.inference.bundle import Bundle
    from fracture.inference.dicom_answer.header import Algorithm


@dataclass(frozen=True, kw_only=True)
class AnswerArguments:
    """Where answers go.

    Raises:
        UsageError: they are to be sent, and not to be written.
    """

    out: str | None = None  # folder or URI for DICOM files; None: no answers
    secondary_capture: bool = False  # whether to write each image under its Grad-CAM map, too
    stow: str | None = None  # URL of a DICOMweb service
    store: str | None = None  # AET@HOST:PORT of an archive that takes C-STORE

    def __post_init__(self) -> None:
        flags = {
            "--secondary-capture": self.secondary_capture,
            "--stow": self.stow,
            "--store": self.store,
        }
        if not self.out and (given := next((flag for flag, value in flags.items() if value), None)):
            raise UsageError(f"{given} is about answers in DICOM: name a folder for them with --dicom-out DIR")

    def check(self, inputs: Sequence[Input], bundle: Bundle) -> None:
        """Check addresses, folder, inputs and the model's maps before the prediction.

        Raises:
            UsageError: an address is wrong, a library is missing, nothing is DICOM, the folder is inside the data, or
                captures would show maps that failed the sanity check.
        """
        if self.secondary_capture:
            _check_maps(bundle)
        if self.out:
            _check_inputs(inputs, storage_path(self.out))
            from fracture.inference.dicom_answer.send import find_web_service, parse_peer

            if self.stow:
                find_web_service(self.stow)
            if self.store:
                parse_peer(self.store)


@dataclass(frozen=True)
class AnswerResult:
    studies: int  # with a report
    captures: int
    without: dict[str, int]  # why -> images or studies that got none
    sent: list[str]  # one line for each archive


@dataclass(frozen=True)
class _Predicted:
    """A DICOM file and its row of the results."""

    file: StoragePath
    row: dict[str, Any]


def write_answers(
    arguments: AnswerArguments, out: StoragePath, inputs: Sequence[Input], rows: Table, bundle: Bundle
) -> AnswerResult:
    """Write a report of each study, and captures of its images on request, and send them.

    Raises:
        RunError: an archive refuses a file, or does not answer.
    """
    from fracture.inference.dicom_answer.header import Algorithm

    studies = _collect_studies(inputs, rows)
    if out.is_local:  # the answers carry their patients' names
        Path(out.path).mkdir(mode=0o700, parents=True, exist_ok=True)
    fingerprint = bundle.hash_weights()
    point = bundle.operating_point
    surely = point.threshold if point.fracture_threshold is None else point.fracture_threshold
    algorithm = Algorithm(version("fracture"), fingerprint, point.threshold, surely, bundle.synthetic)
    model = bundle.build_model() if arguments.secondary_capture else None
    files: list[StoragePath] = []
    without = Counter[str]()
    captures = 0
    with ProgressBars() as bars:
        for number, images in enumerate(studies, 1):
            try:
                written = _answer_study(images, out, bundle, algorithm, model)
            except (UsageError, Rejected) as error:  # of one study; its text repeats no value of the file
                without[str(error)] += 1
            else:
                files += written
                captures += len(written) - bool(written)
            bars.show("answer", number, len(studies))
    reports = len(files) - captures
    return AnswerResult(reports, captures, dict(without), _send(arguments, files))


def _collect_studies(inputs: Sequence[Input], rows: Table) -> list[list[_Predicted]]:
    """Collect the files of each study, in the order of the results, which is that of the inputs' files."""
    named = ((one, path, file) for one in inputs for path, file in one.files.items())
    listed = [one.root / path if file.study_id is not None and not file.left_out else None for one, path, file in named]
    studies: dict[int, list[_Predicted]] = {}
    for file, row in zip(listed, rows.to_pylist(), strict=True):
        if file is not None:
            studies.setdefault(row["study_id"], []).append(_Predicted(file, row))
    return list(studies.values())


def _check_inputs(inputs: Sequence[Input], out: StoragePath) -> None:
    from fracture.inference.batch_prediction import check_outside

    if any(one.dataset for one in inputs):
        raise UsageError("--dicom-out: shards hold no DICOM files to answer. Name the folder that they were made from.")
    if all(file.study_id is None or file.left_out for one in inputs for file in one.files.values()):
        raise UsageError("--dicom-out: no file is a DICOM image of a study that can be answered. Leave the flag out.")
    check_outside("--dicom-out", out, inputs)


def _check_maps(bundle: Bundle) -> None:
    from fracture.evaluation.gallery import MAX_SIMILARITY

    if (most := max(bundle.map_similarity, default=0.0)) >= MAX_SIMILARITY:
        raise UsageError(
            f"--secondary-capture: the Grad-CAM maps of {bundle.folder} failed their sanity check after training. They "
            f"are like those of networks of random weights (similarity {most:.2f}, the limit is {MAX_SIMILARITY}) and "
            "may show the image and not what the model has learned. Leave the flag out: the reports need no maps."
        )


def _answer_study(
    images: list[_Predicted], out: StoragePath, bundle: Bundle, algorithm: Algorithm, model: Any
) -> list[StoragePath]:
    from fracture.inference.batch_prediction import join_study
    from fracture.inference.dicom_answer.header import write_dicom
    from fracture.inference.dicom_answer.report import Answer, build_report

    rule = bundle.config.evaluation.study_probability
    readable = [image for image in images if image.row["error"] is None]
    if not readable:
        return []
    joined = join_study([image.row for image in images], bundle.operating_point, rule)
    sources = [_read_source(image.file) for image in readable]
    answers = [Answer(image.row["probability"], image.row["outcome"]) for image in readable]
    study = Answer(joined["probability"], joined["outcome"])
    unread = len(images) - len(readable)
    answered = list(zip(sources, answers, strict=True))
    notes = explain_doubt([image.row for image in readable], bundle.operating_point)
    report = build_report(answered, study, algorithm, study_rule=rule, unread=unread, notes=notes)
    files = [write_dicom(out, report)]
    if model is not None:
        files += _write_captures(readable, sources, out, bundle, algorithm, model)
    return files


def explain_doubt(rows: list[dict[str, Any]], operating_point: OperatingPoint) -> list[str]:
    """Say why outcomes of images are doubt whatever their probability."""
    from fracture.evaluation.outcomes import name_outcomes

    probabilities = np.array([row["probability"] for row in rows], np.float32)
    unlike = np.array([row["unlike"] is True for row in rows])
    alone = name_outcomes(probabilities, operating_point, unlike).tolist()
    notes = []
    if unlike.any():
        notes.append(f"{unlike.sum()} of {len(rows)} images are unlike the training images, and so undetermined.")
    if alone != [row["outcome"] for row in rows]:
        notes.append("As a whole the images of the prediction are unlike the training images, so each is undetermined.")
    return notes


def _write_captures(
    images: list[_Predicted],
    sources: list[Dataset],
    out: StoragePath,
    bundle: Bundle,
    algorithm: Algorithm,
    model: Any,
) -> list[StoragePath]:
    from fracture.evaluation.gallery import overlay
    from fracture.evaluation.gradcam import compute_maps
    from fracture.inference.dicom_answer.capture import build_capture
    from fracture.inference.dicom_answer.header import write_dicom
    from fracture.preparation.decoding.decode import decode

    pixels = np.stack([decode(image.file.read_bytes(), bundle.image_size).pixels for image in images])
    called = np.array([image.row["decision"] == "fracture" for image in images])
    maps = compute_maps(model, pixels[..., None], called)
    captures = (
        build_capture(source, overlay(grey, heat_map), algorithm, number)
        for number, (source, grey, heat_map) in enumerate(zip(sources, pixels, maps, strict=True), 1)
    )
    return [write_dicom(out, capture) for capture in captures]


def _read_source(file: StoragePath) -> Dataset:
    from pydicom import dcmread

    with file.open() as stream:
        return dcmread(stream, stop_before_pixels=True)


def _send(arguments: AnswerArguments, files: list[StoragePath]) -> list[str]:
    from fracture.inference.dicom_answer.send import find_web_service, parse_peer, send_cstore, send_stow

    lines = []
    if arguments.stow:
        service = find_web_service(arguments.stow)
        lines.append(_describe_sent(len(files), service.host, send_stow(service, files)))
    if arguments.store:
        peer = parse_peer(arguments.store)
        lines.append(_describe_sent(len(files), f"{peer.ae_title} on {peer.host}", send_cstore(peer, files)))
    return lines


def _describe_sent(files: int, archive: str, warnings: int) -> str:
    return f"{files:,} files to {archive}{f', {warnings:,} stored with a warning' if warnings else ''}"
