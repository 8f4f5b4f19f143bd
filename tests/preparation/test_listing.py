import os
import pickle
from pathlib import Path

import pytest

from fracture.errors import UsageError
from fracture.preparation.identity import PatientKey
from fracture.preparation.listing import list_files, name_files, show_name
from fracture.storage import storage_path

LATIN = b"R\xf6ntgen_01.png"  # ö as one byte, as an old system writes it


def test_a_name_that_is_no_utf8_is_listed_read_and_shown(tmp_path: Path):
    (tmp_path / os.fsdecode(LATIN)).write_bytes(b"pixels")
    [path] = list_files(storage_path(tmp_path))
    assert os.fsencode(path) == LATIN
    file = pickle.loads(pickle.dumps(storage_path(tmp_path) / path))  # as it goes to a worker
    assert file.read_bytes() == b"pixels"
    with file.open() as stream:
        stream.seek(2)
        assert stream.read() == b"xels"
    assert show_name(path) == r"R\xf6ntgen_01.png"


NAMES = ["a b.png", " a.png ", "a\nb.png", 'q".png', "=1+1.png", "ö.png", "o\u0308.png", "ﬁ.png", "骨折.png", "x" * 250]


def test_files_of_any_name_are_listed(tmp_path: Path):
    for name in NAMES:
        (tmp_path / name).write_bytes(b"1")
    listed = list_files(storage_path(tmp_path))
    assert sorted(listed) == sorted(NAMES)
    assert {file.size for file in listed.values()} == {1}
    assert name_files(listed, PatientKey(None), is_private=False) == {name: name for name in listed}


def test_no_two_files_are_shown_alike():
    paths = [os.fsdecode(LATIN), r"R\xf6ntgen_01.png"]
    shown = name_files(paths, PatientKey(None), is_private=False)
    assert shown == {paths[0]: r"R\xf6ntgen_01.png (2)", paths[1]: r"R\xf6ntgen_01.png"}


def test_paths_of_a_private_folder_are_hidden(tmp_path: Path):
    key = PatientKey(tmp_path / "patients.key")
    shown = name_files(["MUELLER^HANS/1", "MUELLER^HANS/2"], key, is_private=True)
    assert len(set(shown.values())) == 2
    assert all(len(name) == 64 and "MUELLER" not in name for name in shown.values())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_may_not_be_read(tmp_path: Path):
    for name in ("System Volume Information", "closed"):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0)
    (tmp_path / "a.png").write_bytes(b"1")
    with pytest.raises(UsageError, match=r"'closed' cannot be read: Permission denied. Change its permissions"):
        list_files(storage_path(tmp_path))
    (tmp_path / "closed").chmod(0o700)
    assert list(list_files(storage_path(tmp_path))) == ["a.png"]
