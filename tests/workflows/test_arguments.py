from dataclasses import replace
from pathlib import Path

import pytest

from fracture.config import Config
from fracture.dataset.format import Dataset
from fracture.errors import UsageError
from fracture.evaluation.operating_point import OperatingPoint
from fracture.inference.batch_prediction import Input, InputFile
from fracture.inference.bundle import Bundle
from fracture.storage import storage_path
from fracture.workflows.answer import AnswerArguments
from fracture.workflows.arguments import patient_key

BUNDLE = Bundle(
    folder=storage_path("b"),
    config=Config(),
    pixel_mean=0.0,
    pixel_std=1.0,
    synthetic=False,
    operating_point=OperatingPoint(temperature=1.0, offset=0.0, threshold=0.5, rule="given: 0.5"),
    evaluations={},
    caveats=(),
    map_similarity=(0.31, 0.49),
)


def test_the_key_is_beside_what_is_written_or_where_it_is_named(tmp_path: Path, bucket: str):
    assert patient_key(None, storage_path(tmp_path)).file == tmp_path / "patients.key"
    assert patient_key(str(tmp_path / "mine"), storage_path(bucket)).file == tmp_path / "mine"
    assert patient_key(None, storage_path(bucket)).file is None


def test_a_key_stays_on_the_disk(tmp_path: Path):
    with pytest.raises(UsageError, match=r"--key-file s3://b/k: a secret key stays on this machine's disk. Name"):
        patient_key("s3://b/k", storage_path(tmp_path))


@pytest.mark.parametrize("flags", [{"stow": "https://a"}, {"store": "A@b:104"}, {"secondary_capture": True}])
def test_answers_need_a_folder(flags: dict):
    flag = f"--{next(iter(flags)).replace('_', '-')}"
    with pytest.raises(UsageError, match=f"{flag} is about answers in DICOM: name a folder for them with --dicom"):
        AnswerArguments(**flags)


def test_a_wrong_address_is_found_before_the_prediction(tmp_path: Path):
    (tmp_path / "data").mkdir()
    dicom = [Input(storage_path(tmp_path / "data"), "", {"1": InputFile("ab", 9, 7)})]
    out = str(tmp_path / "answers")
    with pytest.raises(UsageError, match="is not the address of a DICOMweb service"):
        AnswerArguments(out=out, stow="ftp://archive").check(dicom, BUNDLE)
    AnswerArguments(out=out, stow="https://archive/dicom-web", store="ARCHIVE@host:104").check(dicom, BUNDLE)
    with pytest.raises(UsageError, match=r"--dicom-out .*/data/x: is inside the data, .* which is never written to."):
        AnswerArguments(out=str(tmp_path / "data/x")).check(dicom, BUNDLE)
    with pytest.raises(UsageError, match="--dicom-out: no file is a DICOM image of a study"):
        AnswerArguments(out=out).check([Input(storage_path(tmp_path), "", {"1": InputFile("1.png", 9, None)})], BUNDLE)
    AnswerArguments().check([], BUNDLE)


def test_maps_that_failed_their_sanity_check_go_into_no_archive(tmp_path: Path):
    dicom = [Input(storage_path(tmp_path / "data"), "", {"1": InputFile("ab", 9, 7)})]
    arguments = AnswerArguments(out=str(tmp_path / "answers"), secondary_capture=True)
    failed = replace(BUNDLE, map_similarity=(0.31, 0.5))
    with pytest.raises(
        UsageError, match=r"maps of .*b failed .* \(similarity 0.50, the limit is 0.5\).* Leave the flag"
    ):
        arguments.check(dicom, failed)
    arguments.check(dicom, BUNDLE)
    arguments.check(dicom, replace(BUNDLE, map_similarity=()))
    AnswerArguments(out=arguments.out).check(dicom, failed)


def test_shards_have_no_dicom_to_answer(shard_folder, tmp_path: Path):
    shards = [Input(shard_folder()[0], "", dataset=Dataset(*shard_folder()))]
    with pytest.raises(UsageError, match=r"--dicom-out: shards hold no DICOM files to answer. Name the"):
        AnswerArguments(out=str(tmp_path / "answers")).check(shards, BUNDLE)
