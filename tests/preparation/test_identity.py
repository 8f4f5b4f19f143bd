import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fracture.errors import UsageError
from fracture.preparation.identity import PatientKey, number_study, show_id
from fracture.storage import storage_path
from tests.conftest import ROOT


def test_the_same_key_gives_the_same_hmac_and_another_key_another(tmp_path: Path):
    (tmp_path / "a.key").write_text("00" * 32)
    (tmp_path / "b.key").write_text("01" * 32)
    for file in tmp_path.iterdir():
        file.chmod(0o600)
    # hmac.new(bytes(32), b"patient\0" + b"4711", "sha256").hexdigest()
    hidden = PatientKey(tmp_path / "a.key").hide("patient", "4711")
    assert hidden == "e2896dcf5d40a879451c2eec762b61dcd4079992594554521150363d4525dc42"
    assert hidden != PatientKey(tmp_path / "b.key").hide("patient", "4711")
    assert hidden != PatientKey(tmp_path / "a.key").hide("study", "4711")
    assert PatientKey(None).hide("patient", "") == ""


def test_a_key_is_made_once_for_its_owner_alone(tmp_path: Path):
    file = tmp_path / "new" / "patients.key"
    assert not file.exists()
    with ThreadPoolExecutor(8) as threads:
        hidden = set(threads.map(lambda _: PatientKey(file).hide("patient", "4711"), range(16)))
    assert len(hidden) == 1
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert os.listdir(file.parent) == ["patients.key"]


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [
        ("00" * 32, 0o644, r"may be read by others than its owner. Run: chmod 600 .*patients.key"),
        ("00" * 8, 0o600, r"holds 8 bytes, and a key of ours has 32, in hexadecimal"),
        ("secret", 0o600, r"cannot be used as a key: non-hexadecimal"),
        ("schlüssel", 0o600, r"cannot be used as a key: .* Name another file"),
    ],
)
def test_a_file_that_is_no_key(content: str, mode: int, message: str, tmp_path: Path):
    file = tmp_path / "patients.key"
    file.write_text(content)
    file.chmod(mode)
    with pytest.raises(UsageError, match=message):
        PatientKey(file).hide("patient", "4711")


def test_without_a_key_nothing_is_hidden():
    with pytest.raises(UsageError, match=r"written only as HMACs under a secret key: name a file .* with --key-file"):
        PatientKey(None).hide("patient", "4711")


def test_paths_are_kept_beside_the_key_and_nothing_is_forgotten(tmp_path: Path):
    key = PatientKey(tmp_path / "patients.key")
    key.hide("path", "x")
    assert key.write_paths({"aa": "EXPORT/M\udcfcller/1"}) == tmp_path / "patients.paths.csv"
    file = key.write_paths({"bb": "two, with a comma"})
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.read_bytes().decode("latin-1").split("\r\n") == [
        "source,path",
        "aa,EXPORT/Müller/1",
        'bb,"two, with a comma"',
        "",
    ]
    file.write_text("source,path\n\nx\n")
    with pytest.raises(UsageError, match=r"patients.paths.csv: cannot be read: .* Move it away"):
        key.write_paths({"cc": "three"})


def test_studies_are_kept_beside_the_key_under_the_ids_of_our_tables(tmp_path: Path):
    (tmp_path / "patients.key").write_text("00" * 32)
    (tmp_path / "patients.key").chmod(0o600)
    key = PatientKey(tmp_path / "patients.key")
    study = show_id(number_study(key.hide("study", "1.2.3")))
    assert key.write_studies([("1.2.3", "A7")]) == tmp_path / "patients.studies.csv"
    file = key.write_studies([("1.2.3", "A8"), ("", "A9")])
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.read_text().splitlines() == [
        "study_id,StudyInstanceUID,AccessionNumber",
        f"{study},1.2.3,A7",
        f"{study},1.2.3,A8",
    ]
    file.write_text("study_id,StudyInstanceUID\nx,1.2\n")
    with pytest.raises(UsageError, match=r"patients.studies.csv: cannot be read: a row has not 3 values. Move it away"):
        key.write_studies([("1.2.4", "")])


def test_a_key_is_in_no_data_folder(tmp_path: Path):
    for name in ("data", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    for folder in ("data", "link"):
        key = PatientKey(tmp_path / folder / "patients.key")
        key.keep_out_of(storage_path(tmp_path / name) for name in ("other", "data"))
        with pytest.raises(UsageError, match=r"patients.key: is inside --data .*/data, where nothing is ever written."):
            key.hide("patient", "4711")
    assert not (tmp_path / "data/patients.key").exists()


@pytest.mark.parametrize("held", ["dataset.json", "bundle.json", "run.json"])
def test_a_key_does_not_travel_with_what_is_handed_on(held: str, tmp_path: Path):
    (tmp_path / "folder/deep").mkdir(parents=True)
    (tmp_path / "folder" / held).touch()
    key = PatientKey(tmp_path / "folder/deep/patients.key")
    with pytest.raises(UsageError, match=rf"is in .*/folder, which holds {held} and is copied with it.* Name a"):
        key.hide("patient", "4711")
    assert key.hide("patient", "") == "", "where nobody is hidden it does not matter"


def test_jobs_that_write_paths_at_once_lose_none(tmp_path: Path):
    key = PatientKey(tmp_path / "patients.key")
    key.hide("path", "x")
    code = (
        "import sys; from pathlib import Path; from fracture.preparation.identity import PatientKey\n"
        "key = PatientKey(Path(sys.argv[1])); name = sys.argv[2]\n"
        "for number in range(20): key.write_paths({f'{name}{number}': f'{name}/{number}'})"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "patients.key")]
    jobs = [subprocess.Popen([*command, name], cwd=ROOT) for name in "abc"]
    assert [job.wait() for job in jobs] == [0, 0, 0]
    assert len((tmp_path / "patients.paths.csv").read_text().splitlines()) == 1 + 60


def test_a_table_that_others_may_read_is_closed_to_them(tmp_path: Path):
    key = PatientKey(tmp_path / "patients.key")
    key.hide("path", "x")
    file = key.write_paths({"aa": "1"})
    file.chmod(0o644)
    key.write_paths({"aa": "1"})
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_study_has_a_number():
    assert number_study("") is None
    assert number_study("a") == number_study("a") != number_study("b")


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "s0000000000000000"),
        (-1, "sffffffffffffffff"),
        (2**63 - 1, "s7fffffffffffffff"),
        (0x12E5, "s00000000000012e5"),
    ],
)
def test_an_id_is_text_that_no_spreadsheet_takes_for_a_number(number: int, text: str):
    assert show_id(number) == text
    assert int.from_bytes(bytes.fromhex(text[1:]), "big", signed=True) == number
