import _thread
import errno
import itertools
import pickle
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from fracture.dataset.format import Dataset
from fracture.errors import RunError, UsageError
from fracture.storage import StoragePath, disk_full, storage_path
from tests.conftest import SECRET, small_disk, without_rights_to, write_shards

USES: dict[str, Callable[[StoragePath], object]] = {  # every way to a store
    "read": StoragePath.read_bytes,
    "look": StoragePath.is_file,
    "list": StoragePath.files,
    "write": lambda file: file.write_bytes(b"new"),
    "delete": StoragePath.delete,
}


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path: Path) -> StoragePath:
    """What holds on a disk holds in a bucket."""
    return storage_path(tmp_path if request.param == "disk" else request.getfixturevalue("bucket")) / "folder"


def names(folder: StoragePath) -> list[str]:
    return [info.path.removeprefix(f"{folder.path}/") for info in folder.files()]


def test_a_write_replaces_the_whole_file_and_leaves_nothing_else(folder: StoragePath):
    file = folder / "deep/file.json"
    file.write_json({"a": 1, "b": 2})
    file.write_json({"a": 2})
    assert file.read_json() == {"a": 2}
    assert names(folder) == ["deep/file.json"]


def test_files_are_listed_at_any_depth_in_order(folder: StoragePath):
    for name in ("b/2", "a", "b/1"):
        (folder / name).write_bytes(b"x")
    assert names(folder) == ["a", "b/1", "b/2"]
    assert (folder / "nowhere").files() == []


def test_folders_are_listed_without_what_is_in_them(folder: StoragePath):
    for name in ("b/c/f", "a/f", "file"):
        (folder / name).write_bytes(b"x")
    assert folder.folders() == ["a", "b"]
    assert (folder / "nowhere").folders() == []


def test_files_and_folders_are_distinguished(folder: StoragePath):
    (folder / "d/f").write_bytes(b"x")
    assert [(path.is_file(), path.is_dir()) for path in (folder / "d/f", folder / "d", folder / "gone")] == [
        (True, False),
        (False, True),
        (False, False),
    ]


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff", b"1" * 5000, b"[" * 10**5], ids=lambda text: text[:4])
def test_a_damaged_json_file_is_named(folder: StoragePath, text: bytes):
    (folder / "f.json").write_bytes(text)
    with pytest.raises(UsageError, match=r"folder/f.json is damaged: not a JSON object. Fetch or make it anew.$"):
        (folder / "f.json").read_json()
    with pytest.raises(UsageError, match=r"not a JSON object. Delete it.$"):
        (folder / "f.json").read_json(repair="Delete it.")


def test_what_is_not_there_cannot_be_read(folder: StoragePath):
    with pytest.raises(FileNotFoundError):
        (folder / "gone").read_bytes()


def test_a_file_of_json_that_may_not_be_read_is_not_called_damaged(tmp_path: Path):
    file = storage_path(tmp_path / "file.json")
    file.write_json({"a": 1})
    with (
        without_rights_to(tmp_path / "file.json"),
        pytest.raises(PermissionError, match=r"file.json.*Permission denied"),
    ):
        file.read_json()
    assert file.read_json() == {"a": 1}


def test_delete_takes_files_folders_and_nothing(folder: StoragePath):
    for name in ("d/f", "d/deep/f", "file", "stays"):
        (folder / name).write_bytes(b"x")
    for name in ("d", "file", "gone"):
        (folder / name).delete()
    assert not (folder / "d").is_dir()
    assert names(folder) == ["stays"]


def test_a_tree_goes_there(folder: StoragePath, tmp_path: Path):
    (tmp_path / "from/deep").mkdir(parents=True)
    (tmp_path / "from/deep/file").write_bytes(b"x")
    (folder / "to").upload(tmp_path / "from")
    assert (folder / "to/deep/file").read_bytes() == b"x"


def test_tables_and_parts_of_files_are_read_back(folder: StoragePath):
    table = pa.table({"a": [1, 2], "b": ["x", "y"]})
    (folder / "t.parquet").write_parquet(table)
    assert (folder / "t.parquet").read_parquet(["b"]) == table.select(["b"])
    (folder / "f").write_bytes(b"0123456789")
    with (folder / "f").open() as file:
        assert file.read_at(3, 4) == b"456"


def test_a_small_table_that_claims_many_rows_is_not_read(tmp_path: Path):
    pq.write_table(pa.table({"group": pa.array(np.zeros(5 * 10**6, np.int8))}), tmp_path / "bomb.parquet")
    before = pa.total_allocated_bytes()
    with pytest.raises(OSError, match=r"bomb.parquet claims 5,000,000 rows in 1\d,\d+ bytes"):
        storage_path(tmp_path / "bomb.parquet").read_parquet()
    assert pa.total_allocated_bytes() - before < 10**5


def test_a_table_by_a_few_rows_is_of_the_types_asked_for(tmp_path: Path):
    table = storage_path(tmp_path / "a.parquet")
    table.write_parquet(pa.table({"group": pa.array(range(10**5)), "name": ["x"] * 10**5}))
    batches = list(table.parquet_batches(pa.schema([pa.field("group", pa.int64())])))
    assert [batch.num_rows for batch in batches] == [65536, 34464]
    assert batches[0].schema.names == ["group"]
    assert table.parquet_columns() == ["group", "name"]
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match=r"damaged.parquet cannot be read: .* Fetch or make it anew"):
        storage_path(tmp_path / "damaged.parquet").parquet_columns()
    for wanted in ("group", "lost"):
        with pytest.raises(UsageError, match=rf"a.parquet cannot be read: column '{wanted}' is not string. Fetch or"):
            next(table.parquet_batches(pa.schema([pa.field(wanted, pa.string())])))


def test_a_file_larger_than_it_may_be_is_not_read(folder: StoragePath):
    (folder / "a").write_bytes(b"12345")
    assert (folder / "a").read_bytes(most=5) == b"12345"
    with pytest.raises(UsageError, match=r"a has 5 bytes, over the limit of 4. Name another file, or fetch it anew"):
        (folder / "a").read_bytes(most=4)


def test_names_are_taken_literally(folder: StoragePath):
    name = "a b/c@d/x%20y & #ö+.json"
    (folder / name).write_json({"a": 1})
    assert names(folder) == [name]
    assert storage_path(str(folder / name)).read_json() == {"a": 1}


def test_a_place_travels_to_other_processes(folder: StoragePath):
    (folder / "f").write_bytes(b"x")
    packed = pickle.dumps(folder)
    assert (pickle.loads(packed) / "f").read_bytes() == b"x"
    assert SECRET.encode() not in packed


def test_a_file_uri_and_a_path_name_the_same_path(tmp_path: Path):
    assert storage_path(tmp_path.as_uri()).path == storage_path(tmp_path).path


def test_a_uri_of_no_known_kind():
    with pytest.raises(UsageError, match=r"'ftp://x/y' cannot be reached.*Use a path, s3:// or gs://"):
        storage_path("ftp://x/y")


def test_a_file_in_the_way_of_a_folder(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match=r"file/run.json cannot be written: .*Check the path and its permissions"):
        (storage_path(tmp_path) / "file/run.json").write_bytes(b"x")


@pytest.mark.parametrize("use", ["look", "list", "write", "delete"])
def test_a_name_that_is_too_long(tmp_path: Path, use: str):
    with pytest.raises(
        UsageError, match=r"a/f cannot be \w+: .*File name too long. Check the path and its permissions"
    ):
        USES[use](storage_path(tmp_path) / ("a" * 300) / "f")


@pytest.mark.parametrize(
    ("target", "name", "use", "message"),
    [
        ("link", "link/f", "list", "link/f cannot be read: .*Too many levels of symbolic links. Check the path"),
        ("link", "link/deep/f", "write", "link/deep/f cannot be written: .*Too many levels of symbolic links. Check"),
        ("link", "link/f", "write", "link/f cannot be written: .*non-directory entry exists.* Check the path"),
        ("nowhere", "link/f", "write", "link/f cannot be written: .*non-directory entry exists.* Check the path"),
    ],
)
def test_a_link_that_leads_nowhere(tmp_path: Path, target: str, name: str, use: str, message: str):
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(UsageError, match=message):
        USES[use](storage_path(tmp_path) / name)


def test_a_file_system_to_read_only(tmp_path: Path):
    with small_disk(tmp_path / "disk", kilobytes=64) as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(UsageError, match=r"disk/f cannot be written: .*Read-only file system. Check the path and"):
            (storage_path(disk) / "f").write_bytes(b"x")


@pytest.mark.parametrize("uri", ["s3://", "s3:///folder", "gs://", "gs://?region=x"])
def test_a_uri_without_a_bucket(uri: str):
    with pytest.raises(UsageError, match=r"^(s3|gs)://\S* names no bucket. Use (s3|gs)://BUCKET/FOLDER"):
        storage_path(uri)


def test_the_folder_of_a_user_who_is_not_there():
    with pytest.raises(UsageError, match=r"'~no-such-user/x': no user's folder is known by '~no-such-user'. Write it"):
        storage_path("~no-such-user/x")


def test_a_full_disk_is_one_calm_error(tmp_path: Path):
    cause = OSError(errno.ENOSPC, "No space left on device")
    wrapped = RuntimeError("task failed")
    wrapped.__cause__ = cause
    assert isinstance(disk_full(wrapped, tmp_path), RunError)
    assert "the disk is full" in str(disk_full(wrapped, tmp_path))
    assert disk_full(OSError(errno.EACCES, "no"), tmp_path) is None


def test_an_object_of_several_parts_is_whole(bucket: str):
    data = bytes(range(256)) * 50_000  # 12.8 MB; a part is 10
    (storage_path(bucket) / "large").write_bytes(data)
    assert (storage_path(bucket) / "large").read_bytes() == data


@pytest.mark.parametrize("uri", ["s3://joe:xyzzy@bucket/x", "s3://joe:xyz/zy@bucket/x", "gs://joe@bucket/x"])
def test_a_secret_in_a_uri_is_refused_and_not_shown(uri: str):
    with pytest.raises(UsageError, match=r"holds credentials. Take them out: .* from the environment alone") as raised:
        storage_path(uri)
    assert "joe" not in str(raised.value)
    assert "xyz" not in str(raised.value)


def test_a_secret_in_a_uri_of_no_known_kind_is_not_shown():
    with pytest.raises(UsageError, match=r"'ftp://host/x' cannot be reached"):
        storage_path("ftp://joe:xyz/zy@host/x")


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("status", [500, 503])
def test_a_failure_that_passes_is_not_noticed(bucket: str, object_store, use: str, status: int):
    file = storage_path(bucket) / "f"
    file.write_bytes(b"old")
    object_store.fail(times=2, status=status, code="SlowDown")
    USES[use](file)
    assert object_store.failures_left == 0


def test_an_answer_that_does_not_come_is_asked_for_again(bucket: str, object_store):
    file = storage_path(bucket) / "f"
    file.write_bytes(b"x")
    object_store.fail(times=1, seconds=20)
    assert file.read_bytes() == b"x"


@pytest.mark.parametrize("use", USES)
def test_a_failure_that_lasts_is_one_clear_error(bucket: str, object_store, monkeypatch, use: str):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    file = storage_path(bucket) / "f"
    file.write_bytes(b"old")
    object_store.fail(times=100, status=503, code="SlowDown")
    with pytest.raises(
        RunError, match=rf"^{bucket}/f cannot be \w+: the store fails, also after 2 tries .*run the same command again"
    ):
        USES[use](file)
    object_store.fail(times=0)
    assert file.read_bytes() == b"old"


def test_a_place_that_travelled_is_as_patient(bucket: str, object_store, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")  # pyarrow's own would be back at 3
    travelled = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(storage_path(bucket)))))
    object_store.fail(times=100, status=503, code="SlowDown")
    with pytest.raises(RunError):
        (travelled / "f").is_file()
    assert object_store.failures_left == 98


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("code", ["InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied"])
def test_wrong_credentials_are_one_clear_error_without_them(bucket: str, object_store, use: str, code: str):
    file = storage_path(bucket) / "f"
    object_store.fail(times=100, status=403, code=code)
    with pytest.raises(
        UsageError, match=rf"^{bucket}/f cannot be \w+: the store denies it .*Check the credentials in the environment"
    ) as raised:
        USES[use](file)
    assert SECRET not in str(raised.value)


def test_a_bucket_that_is_not_there(bucket: str):
    file = storage_path("s3://no-such-bucket") / "deep/f"
    with pytest.raises(UsageError, match=r"^s3://no-such-bucket/deep/f cannot be written: there is no such bucket"):
        file.write_bytes(b"x")
    assert not file.is_file()
    assert file.files() == []


def test_a_store_that_is_nowhere(bucket: str, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    with pytest.raises(RunError, match=rf"^{bucket}/f cannot be read: the store fails.*Check the network, and AWS"):
        (storage_path(bucket) / "f").read_bytes()


def test_a_shard_that_the_store_does_not_give_is_not_called_damaged(bucket: str, object_store, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    shards = storage_path(bucket) / "shards"
    manifest = write_shards(shards, {"train": 40})
    assert Dataset(shards, manifest).read("train", 10, 12).num_rows == 2
    object_store.fail(times=100, status=500, code="InternalError")
    with pytest.raises(RunError, match=r"the store fails"):
        Dataset(shards, manifest).read("train", 10, 12)


def test_ctrl_c_leaves_no_half_object(bucket: str, object_store):
    file = storage_path(bucket) / "f"
    file.write_bytes(b"old")
    object_store.fail(times=1, seconds=1)
    timer = threading.Timer(0.3, _thread.interrupt_main)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        file.write_bytes(b"new and whole")
    timer.join()
    assert file.read_bytes() == b"new and whole"


def test_a_bucket_of_google_is_a_path():
    """No server for it in the tests; this is as far as they go."""
    there = storage_path("gs://bucket/a b")
    assert str(there) == "gs://bucket/a b"
    assert str(pickle.loads(pickle.dumps(there)) / "c") == "gs://bucket/a b/c"


def test_a_folder_that_comes_and_goes_is_empty_or_not_but_no_error(tmp_path: Path):
    """Arrow asks whether it is there, and then looks into it."""
    folder, ended = tmp_path / "x" / "y", threading.Event()

    def come_and_go() -> None:
        while not ended.is_set():
            folder.mkdir(parents=True)
            folder.rmdir()
            folder.parent.rmdir()

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for _ in range(5000):
            assert storage_path(tmp_path / "x").files() == []
            assert storage_path(tmp_path / "x").folders() in ([], ["y"])
    finally:
        ended.set()
        thread.join()


def test_a_file_that_is_replaced_while_it_is_read_is_the_old_one_or_the_new(bucket: str):
    """Two documents of different lengths take turns; without a second look a reader gets parts of both."""
    file, documents = storage_path(bucket) / "champion.json", ({"version": 9}, {"version": 10, "reason": "x" * 3000})
    file.write_json(documents[0])
    ended = threading.Event()

    def replace() -> None:
        for number in itertools.count():
            if ended.is_set():
                return
            file.write_json(documents[number % 2])

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        for _ in range(60):
            assert file.read_json() in documents
    finally:
        ended.set()
        thread.join()


class Vanishing(fs.LocalFileSystem):
    """Says what Arrow says of a folder that is removed between the two calls with which it makes one.

    On this disk that came twice in 50,000 times beside a process that removes it, so a test cannot wait for it.
    """

    def create_dir(self, path: str, *, recursive: bool = True) -> None:
        raise FileExistsError(errno.EEXIST, "Cannot create directory: non-directory entry exists", path)


def test_a_folder_that_another_process_removes_is_missing_and_no_file_in_the_way(tmp_path: Path):
    """So a lock, which removes its empty folder, writes its claim again."""
    with pytest.raises(FileNotFoundError, match="removed by another process"):
        StoragePath(Vanishing(), str(tmp_path / "lock/claim.json")).write_bytes(b"x")
    (tmp_path / "lock").write_bytes(b"a file")
    with pytest.raises(UsageError, match=r"claim.json cannot be written: .*non-directory entry exists"):
        StoragePath(Vanishing(), str(tmp_path / "lock/claim.json")).write_bytes(b"x")
