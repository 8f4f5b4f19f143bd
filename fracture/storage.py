"""Folders and files on a disk or in a bucket (`s3://`, `gs://`), read and written one way.

Writes are atomic: a local file is written under a temporary name beside its own and renamed; an object store, which
has no rename, shows an object only when its upload is finished. Of several files that belong together, one is written
last and shows that all are there: `dataset.json`, `bundle.json`.

The stores' own libraries find credentials in the environment of each process. A StoragePath never holds any.
"""

import errno
import functools
import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from fracture.errors import RunError, UsageError

_TRIES = 7  # with random waits of up to 1, 2, 4, 8, 16 and 20 s between them: half a minute
_READS = 20  # of a file that others replace meanwhile
_LISTINGS = 20  # tries at a folder that others are emptying
_BATCH_ROWS = 65536
# A path that cannot be, or may not be written: a name of over 255 bytes, links in a loop, a file system to read only.
_PATH_ERRORS = {errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}
_BLOCK_BYTES = 2**20
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the machine's role",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or the machine's service account",
}
# Arrow reports a store's answer only in the text of an OSError.
_STORE_ERROR = re.compile(r"AWS Error|google::cloud::Status|[Bb]ucket '[^']*' not found|when resolving region", re.I)
_NO_BUCKET = re.compile(r"NO_SUCH_BUCKET|bucket '[^']*' not found|bucket does not exist", re.I)
_NO_OBJECT = re.compile(r"AWS Error \w+_NOT_FOUND during GetObject|AWS Error NO_SUCH_KEY|Status\(NOT_FOUND")
_DENIED = re.compile(
    r"AWS Error \w*(?:ACCESS_DENIED|ACCESS_KEY|SIGNATURE|TOKEN|CREDENTIALS)|HTTP status 40[013]|"
    r"PERMISSION_DENIED|UNAUTHENTICATED"
)


@dataclass(frozen=True)
class StoragePath:
    """A file or folder, which may not exist yet. It can be sent to other processes."""

    filesystem: fs.FileSystem
    path: str

    def __truediv__(self, name: str) -> "StoragePath":
        return StoragePath(self.filesystem, f"{self.path.rstrip('/')}/{name}")

    def __str__(self) -> str:
        if self.is_local:
            return self.path
        return f"{'s3' if isinstance(self.filesystem, fs.S3FileSystem) else 'gs'}://{self.path}"

    @property
    def name(self) -> str:
        return self.path.rstrip("/").rsplit("/", 1)[-1]

    @property
    def parent(self) -> "StoragePath":
        return StoragePath(self.filesystem, self.path.rpartition("/")[0] or "/")

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def is_file(self) -> bool:
        return self._info().type == fs.FileType.File

    def is_dir(self) -> bool:
        return self._info().type == fs.FileType.Directory

    def _info(self) -> fs.FileInfo:
        with self._named_in_errors("read"):
            return self.filesystem.get_file_info(self.path)

    def files(self) -> list[fs.FileInfo]:
        """Return every file at any depth, sorted by path; none where the folder does not exist."""
        found = [info for info in self._listed(recursive=True) if info.type == fs.FileType.File]
        return sorted(found, key=lambda info: info.path)

    def folders(self) -> list[str]:
        """Return the names of the folders in this one, sorted; none where it does not exist."""
        found = self._listed(recursive=False)
        return sorted(info.base_name for info in found if info.type == fs.FileType.Directory)

    def _listed(self, recursive: bool) -> list[fs.FileInfo]:
        selector = fs.FileSelector(self.path, recursive=recursive, allow_not_found=True)
        with self._named_in_errors("read"):
            for _ in range(_LISTINGS):
                with suppress(FileNotFoundError):  # a folder was there, and gone when Arrow looked into it
                    return self.filesystem.get_file_info(selector)
            return self.filesystem.get_file_info(selector)

    def read_bytes(self, most: int | None = None) -> bytes:
        """Read the whole file.

        Args:
            most: bytes that the file may have; None for a file that this program wrote.

        Raises:
            UsageError: the file is larger; nothing of it was read.
        """
        if most is not None and (size := self._info().size or 0) > most:
            raise UsageError(
                f"{self} has {size:,} bytes, over the limit of {most:,}. Name another file, or fetch it anew."
            )
        with self._store_named_in_errors("read"):
            try:
                # By default Arrow would unfold a file that is called .gz, however large it gets.
                stream = self.filesystem.open_input_stream(self.path, compression=None)
            except UnicodeEncodeError:
                stream = self._open_to_read()
            with stream:
                return stream.read()

    def read_replaced_bytes(self) -> bytes:
        """Read a small file that another process may replace at any time, as it was before or as it is after.

        Arrow asks a store for an object's length, and then for that many bytes of what is there by then. An object of
        another length would come cut or padded, so the lengths are compared after the read.

        Raises:
            RunError: the file changes its length at each of many reads.
        """
        for _ in range(_READS):
            data = self.read_bytes()
            if self.is_local or self._info().size == len(data):
                return data
        raise RunError(f"{self} is replaced all the time and cannot be read. Run the same command again.")

    def hash_bytes(self) -> str:
        """Return the SHA-256 of the file's bytes, of which only some are in memory at a time."""
        digest = hashlib.sha256()
        with self.open() as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
        return digest.hexdigest()

    @contextmanager
    def open(self) -> Iterator[pa.NativeFile]:
        """Open the file for reading at any position."""
        with self._store_named_in_errors("read"), self._open_to_read() as file:
            yield file

    def _open_to_read(self) -> pa.NativeFile:
        try:
            return self.filesystem.open_input_file(self.path)
        except UnicodeEncodeError:  # a name on a disk whose bytes are no UTF-8, which Arrow cannot open
            return pa.PythonFile(open(self.path, "rb"), mode="r")

    def read_json(self, repair: str = "Fetch or make it anew.") -> dict[str, Any]:
        """Read a file that holds a JSON object, as all of this program do.

        Args:
            repair: what to do about a damaged file, for the message.

        Raises:
            UsageError: it holds something else.
        """
        for _ in range(1 if self.is_local else _READS):  # one that was replaced and put back meanwhile may come cut
            data = self.read_replaced_bytes()
            # No JSON, no UTF-8, a number of 5,000 digits; or nested too deeply.
            with suppress(ValueError, RecursionError):
                if isinstance(content := json.loads(data), dict):
                    return content
        raise UsageError(f"{self} is damaged: not a JSON object. {repair}")

    def write_bytes(self, data: bytes | pa.Buffer) -> None:
        """Write the whole file or nothing; a file of that name is replaced.

        Raises:
            RunError: the disk is full, or the store fails.
            UsageError: the path may not be written, or a file stands where a folder is needed.
        """
        if self.is_local:
            self._write_and_rename(data)
            return
        # A stream that an exception ends is closed, and stores what it has. Ctrl-C is raised in the main thread alone.
        with self._named_in_errors("written"), ThreadPoolExecutor(1) as thread:
            thread.submit(self._put, data).result()

    def _write_and_rename(self, data: bytes | pa.Buffer) -> None:
        parent = self.path.rsplit("/", 1)[0]
        scratch = f"{parent}/.{self.name}.{uuid.uuid4().hex[:8]}.part"
        try:
            with self._named_in_errors("written"):
                self._create_folder(parent)
                with self.filesystem.open_output_stream(scratch, compression=None) as stream:
                    stream.write(data)
                os.replace(scratch, self.path)
        except OSError as error:
            with suppress(OSError):
                Path(scratch).unlink()
            raise (disk_full(error, self) or error) from error

    def _create_folder(self, folder: str) -> None:
        try:
            self.filesystem.create_dir(folder)
        except FileExistsError:
            # It is there at Arrow's first call, and gone at the second, where another process removes an empty folder.
            if any(path.is_file() or _is_broken_link(path) for path in (Path(folder), *Path(folder).parents)):
                raise
            raise FileNotFoundError(errno.ENOENT, "removed by another process", folder) from None

    def _put(self, data: bytes | pa.Buffer) -> None:
        """Upload the object, which needs no folder. Opening the stream begins the upload, and closing ends it."""
        with self.filesystem.open_output_stream(self.path, compression=None) as stream:
            stream.write(data)

    def write_json(self, value: Any) -> None:
        self.write_bytes((json.dumps(value, indent=1) + "\n").encode())

    def read_parquet(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Read the whole table.

        Raises:
            OSError: a bit has changed since it was written, or it claims more rows than a file of its size can hold.
        """
        data = self.read_bytes()
        rows = pq.read_metadata(pa.BufferReader(data)).num_rows
        if rows > max(len(data), 10**6):  # each row of ours takes several bytes
            raise OSError(f"{self} claims {rows:,} rows in {len(data):,} bytes")
        return pq.read_table(pa.BufferReader(data), columns=columns, page_checksum_verification=True)

    def parquet_columns(self) -> list[str]:
        """Return the names of a table's columns.

        Raises:
            UsageError: the file is damaged.
        """
        try:
            with self.open() as stream:
                return pq.read_schema(stream).names
        except (pa.ArrowException, OSError) as error:
            raise UsageError(f"{self} cannot be read: {error}. Fetch or make it anew.") from None

    def parquet_batches(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """Yield some columns, a few rows at a time: a small file can claim a billion rows, which never are in memory.

        Raises:
            UsageError: the file is damaged, or a column is of another type.
        """
        try:
            with self.open() as stream:
                parquet = pq.ParquetFile(stream, page_checksum_verification=True)
                found = {field.name: field.type for field in parquet.schema_arrow}
                for field in schema:  # text of any length is where a row can be immense
                    if found.get(field.name) != field.type:
                        raise pa.ArrowInvalid(f"column {field.name!r} is not {field.type}")
                yield from parquet.iter_batches(_BATCH_ROWS, columns=schema.names)
        except (pa.ArrowException, OSError) as error:
            raise UsageError(f"{self} cannot be read: {error}. Fetch or make it anew.") from None

    def write_parquet(self, table: pa.Table) -> None:
        self.write_bytes(encode_parquet(table))

    def check_writable(self) -> None:
        """Write a small file into this folder, or into the one that it would be made in, and delete it.

        Raises:
            UsageError, RunError: as of `write_bytes`.
        """
        folder = self
        while folder.is_local and folder._info().type == fs.FileType.NotFound:
            folder = folder.parent
        probe = folder / f".fracture-{uuid.uuid4().hex[:8]}"
        probe.write_bytes(b"written and deleted by fracture, to see whether it can\n")
        probe.delete()

    def upload(self, folder: Path) -> None:
        """Copy every file below the local `folder` to the same relative path below this one."""
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            (self / file.relative_to(folder).as_posix()).write_bytes(file.read_bytes())

    def delete(self) -> None:
        """Remove the file, or the folder with all it holds, if it exists."""
        kind = self._info().type
        with self._named_in_errors("removed"), suppress(FileNotFoundError):  # another process was faster
            if kind == fs.FileType.Directory:
                self.filesystem.delete_dir(self.path)
            elif kind == fs.FileType.File:
                self.filesystem.delete_file(self.path)

    @contextmanager
    def _named_in_errors(self, what: str) -> Iterator[None]:
        try:
            with self._store_named_in_errors(what):
                yield
        except (OSError, UnicodeDecodeError) as error:
            if isinstance(error, OSError) and error.errno not in _PATH_ERRORS:
                raise
            raise UsageError(f"{self} cannot be {what}: {error}. Check the path and its permissions.") from None

    @contextmanager
    def _store_named_in_errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self.is_local and _NO_OBJECT.search(str(error)) and not _NO_BUCKET.search(str(error)):
                # Arrow asks for an object's length, then for its bytes: it was removed between the two requests.
                raise FileNotFoundError(errno.ENOENT, "removed while it was read", str(self)) from None
            if clear := None if self.is_local else store_failed(error, self, what):
                raise clear from None
            raise


def _is_broken_link(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def encode_parquet(table: pa.Table) -> pa.Buffer:
    """Return the bytes of a Parquet file in which `StoragePath.read_parquet` finds a bit that has changed."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, write_page_checksum=True)
    return sink.getvalue()


class _PatientS3(fs.S3FileSystem):
    """An S3 file system that keeps its number of tries in other processes; pyarrow's own goes back to 3 there."""

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(_patient_s3, **_options(super())), ()


def _patient_s3(**options: Any) -> _PatientS3:
    return _PatientS3(**options, retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_tries()))


def _options(filesystem: Any) -> dict[str, Any]:
    """Return the options it was made with, which pyarrow only gives this way; no credentials that it found itself."""
    _, (options,) = filesystem.__reduce__()
    return options


def _tries() -> int:
    return int(os.environ.get("AWS_MAX_ATTEMPTS", _TRIES))  # https://docs.aws.amazon.com/sdkref/latest/guide


def storage_path(uri: str | Path) -> StoragePath:
    """Return the file or folder that a path or URI names; relative paths start at the current folder.

    Raises:
        UsageError: no such kind of URI, no such bucket or none named, credentials in the URI, or no such user.
        RunError: the store fails.
    """
    text = str(uri)
    scheme, colon, rest = text.partition("://")
    if not colon:
        return StoragePath(fs.LocalFileSystem(), _expand_home(text).absolute().as_posix())
    if scheme in _CREDENTIALS:
        return _in_bucket(scheme, rest)
    try:
        if scheme != "file":
            raise pa.ArrowInvalid(f"{scheme}:// is not known")
        filesystem, path = fs.FileSystem.from_uri(text)
    except pa.ArrowException as error:
        shown = re.sub(r"//.*@", "//", text)  # without credentials
        raise UsageError(f"{shown!r} cannot be reached: {error}. Use a path, s3:// or gs://.") from None
    return StoragePath(filesystem, path.rstrip("/"))


def _expand_home(text: str) -> Path:
    """Replace a first `~` or `~user` by that user's folder."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UsageError(f"{text!r}: no user's folder is known by {text.partition('/')[0]!r}. Write it out.") from None


def _in_bucket(scheme: str, rest: str) -> StoragePath:
    """Return a path in a bucket. Names are taken literally, as `aws s3` does; after a `?` come Arrow's options."""
    address, mark, options = rest.partition("?")
    bucket, _, path = address.partition("/")
    if "@" in bucket or ":" in bucket:  # a secret may well hold a slash
        raise UsageError(
            f"a {scheme}:// URI holds credentials. Take them out: they come from the environment alone "
            f"({_CREDENTIALS[scheme]})."
        )
    where = f"{scheme}://{address}"
    if not bucket:
        raise UsageError(f"{where} names no bucket. Use {scheme}://BUCKET/FOLDER.")
    try:
        filesystem, _ = fs.FileSystem.from_uri(f"{scheme}://{bucket}{mark}{options}")
        if isinstance(filesystem, fs.S3FileSystem):
            filesystem = _patient_s3(**_options(filesystem))
        else:
            filesystem = fs.GcsFileSystem(**_options(filesystem) | {"retry_time_limit": timedelta(minutes=1)})
    except (pa.ArrowException, OSError) as error:
        raise (
            store_failed(error, where, "reached")
            or UsageError(f"{where} cannot be reached: {error}. Use a path, s3:// or gs://.")
        ) from None
    return StoragePath(filesystem, f"{bucket}/{path}".rstrip("/"))


def store_failed(error: BaseException | None, where: object, what: str = "used") -> RunError | UsageError | None:
    """Return the error to show for a store that failed, if `error` or what caused it comes from one."""
    while error is not None:
        text = str(error).strip().partition("\n")[0].rstrip(".")
        if isinstance(error, OSError) and _STORE_ERROR.search(text):
            return _clear_error(text, str(where), what)
        error = error.__cause__
    return None


def _clear_error(text: str, where: str, what: str) -> RunError | UsageError:
    if _NO_BUCKET.search(text):
        return UsageError(f"{where} cannot be {what}: there is no such bucket. Make it, or name another. ({text})")
    if _DENIED.search(text):
        credentials = _CREDENTIALS.get(where.partition("://")[0], "")
        return UsageError(
            f"{where} cannot be {what}: the store denies it ({text}). Check the credentials in the environment "
            f"({credentials}; on a cluster, of every node), and what they may do."
        )
    return RunError(
        f"{where} cannot be {what}: the store fails, also after {_tries()} tries ({text}). Check the network, "
        "and AWS_ENDPOINT_URL where the store is not Amazon's; then run the same command again to go on."
    )


def disk_full(error: BaseException | None, where: object) -> RunError | None:
    """Return the error to show for a full disk, if `error` or what caused it comes from one."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return RunError(
                f"the disk is full: {where} could not be written. Free space and run the same command again."
            )
        error = error.__cause__
    return None
