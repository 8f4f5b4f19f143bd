import errno
from pathlib import Path

import pytest

from fracture.errors import RunError, UsageError
from fracture.storage import disk_full, place


def test_a_write_replaces_the_whole_file_and_leaves_nothing_else(tmp_path: Path):
    file = place(tmp_path) / "deep/file.json"
    file.write_json({"a": 1})
    file.write_json({"a": 2})
    assert file.read_json() == {"a": 2}
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["file.json"]


def test_files_are_listed_at_any_depth_in_order(tmp_path: Path):
    for name in ("b/2", "a", "b/1"):
        (place(tmp_path) / name).write_bytes(b"x")
    assert [Path(info.path).relative_to(tmp_path).as_posix() for info in place(tmp_path).files()] == ["a", "b/1", "b/2"]
    assert (place(tmp_path) / "nowhere").files() == []


def test_delete_takes_files_folders_and_nothing(tmp_path: Path):
    (place(tmp_path) / "d/f").write_bytes(b"x")
    for name in ("d", "gone"):
        (place(tmp_path) / name).delete()
    assert not (place(tmp_path) / "d").is_dir()


def test_upload_copies_a_tree(tmp_path: Path):
    (tmp_path / "from/deep").mkdir(parents=True)
    (tmp_path / "from/deep/file").write_bytes(b"x")
    (place(tmp_path) / "to").upload(tmp_path / "from")
    assert (place(tmp_path) / "to/deep/file").read_bytes() == b"x"


def test_a_file_uri_and_a_path_name_the_same_place(tmp_path: Path):
    assert place(tmp_path.as_uri()).path == place(tmp_path).path


def test_a_uri_of_no_known_kind():
    with pytest.raises(UsageError, match=r"'ftp://x/y' is not a place that can be reached.*Use a path, s3:// or gs://"):
        place("ftp://x/y")


def test_a_file_in_the_way_of_a_folder(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match=r"file/run.json cannot be written: .*Check the path and its permissions"):
        (place(tmp_path) / "file/run.json").write_bytes(b"x")


def test_a_full_disk_is_one_calm_error(tmp_path: Path):
    cause = OSError(errno.ENOSPC, "No space left on device")
    wrapped = RuntimeError("task failed")
    wrapped.__cause__ = cause
    assert isinstance(disk_full(wrapped, tmp_path), RunError)
    assert "the disk is full" in str(disk_full(wrapped, tmp_path))
    assert disk_full(OSError(errno.EACCES, "no"), tmp_path) is None
