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
    [path] = list_files(storage_path(tmp_path), PatientKey(None))
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
    listed = list_files(storage_path(tmp_path), PatientKey(None))
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


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_link_in_a_private_folder_is_named_by_its_hidden_path(kind: str, tmp_path: Path):
    """The private table has the path."""
    folder, key = tmp_path / "data", PatientKey(tmp_path / "patients.key")
    (folder / "MUELLER^HANS").mkdir(parents=True)
    (folder / "MUELLER^HANS/1").write_bytes(bytes(128) + b"DICM")
    link = folder / "MUELLER^HANS/2"
    link.symlink_to({"file": "/etc/passwd", "folder": "/etc"}[kind])
    hidden = key.hide("path", "MUELLER^HANS/2")
    with pytest.raises(
        UsageError, match=rf": {hidden}, whose path is in patients.paths.csv .*, is a link to a {kind}"
    ) as error:
        list_files(storage_path(folder), key)
    assert "MUELLER" not in str(error.value)
    assert "/etc" not in str(error.value)
    assert f"{hidden},MUELLER^HANS/2" in (tmp_path / "patients.paths.csv").read_text()


def test_a_folder_of_which_nothing_can_be_read_is_private_where_there_is_a_key(tmp_path: Path):
    folder, key = tmp_path / "data", PatientKey(tmp_path / "patients.key")
    (folder / "MUELLER^HANS").mkdir(parents=True)
    (folder / "MUELLER^HANS/up").symlink_to("..")
    with pytest.raises(UsageError, match=r"'MUELLER\^HANS/up' is a link to a folder, .*/data, and such"):
        list_files(storage_path(folder), key)
    hidden = key.hide("path", "MUELLER^HANS/up")
    with pytest.raises(UsageError, match=hidden):
        list_files(storage_path(folder), key)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_may_not_be_read(tmp_path: Path):
    for name in ("System Volume Information", "closed"):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0)
    (tmp_path / "a.png").write_bytes(b"1")
    with pytest.raises(UsageError, match=r"'closed' cannot be read: Permission denied. Change its permissions"):
        list_files(storage_path(tmp_path), PatientKey(None))
    (tmp_path / "closed").chmod(0o700)
    assert list(list_files(storage_path(tmp_path), PatientKey(None))) == ["a.png"]
