"""Folders and files on a disk or in a bucket (`s3://`, `gs://`), read and written one way.

Writes are atomic: a local file is written beside its place and renamed; an object store shows an object only when
it is whole.
"""

import errno
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from fracture.errors import RunError, UsageError


@dataclass(frozen=True)
class Place:
    """A file or folder, which may not exist yet. Travels to other processes."""

    filesystem: fs.FileSystem
    path: str

    def __truediv__(self, name: str) -> "Place":
        return Place(self.filesystem, f"{self.path.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.path if self.is_local else f"{self.filesystem.type_name}://{self.path}"

    @property
    def name(self) -> str:
        return self.path.rstrip("/").rsplit("/", 1)[-1]

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
        """Every file at any depth, sorted by path; empty where the folder does not exist."""
        selector = fs.FileSelector(self.path, recursive=True, allow_not_found=True)
        with self._named_in_errors("read"):
            found = [info for info in self.filesystem.get_file_info(selector) if info.type == fs.FileType.File]
        return sorted(found, key=lambda info: info.path)

    def read_bytes(self) -> bytes:
        # By default Arrow would unfold a file that is called .gz, however large it gets.
        with self.filesystem.open_input_stream(self.path, compression=None) as stream:
            return stream.read()

    def read_json(self) -> Any:
        return json.loads(self.read_bytes())

    def write_bytes(self, data: bytes | pa.Buffer) -> None:
        """Writes the whole file or nothing; a file of that name is replaced.

        Raises:
            RunError: the disk is full.
            UsageError: the place may not be written, or a file is in the way.
        """
        parent = self.path.rsplit("/", 1)[0]
        scratch = f"{parent}/.{self.name}.{uuid.uuid4().hex[:8]}.part" if self.is_local else self.path
        try:
            with self._named_in_errors("written"):
                self.filesystem.create_dir(parent)
                with self.filesystem.open_output_stream(scratch, compression=None) as stream:
                    stream.write(data)
                if self.is_local:
                    os.replace(scratch, self.path)
        except OSError as error:
            if self.is_local:
                with suppress(OSError):
                    Path(scratch).unlink()
            raise (disk_full(error, self) or error) from error

    def write_json(self, value: Any) -> None:
        self.write_bytes((json.dumps(value, indent=1) + "\n").encode())

    def read_parquet(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Raises OSError where a bit has flipped since it was written."""
        return pq.read_table(pa.BufferReader(self.read_bytes()), columns=columns, page_checksum_verification=True)

    def write_parquet(self, table: pa.Table) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, write_page_checksum=True)
        self.write_bytes(sink.getvalue())

    def upload(self, folder: Path) -> None:
        """Copies every file below the local `folder` to below this place."""
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            (self / file.relative_to(folder).as_posix()).write_bytes(file.read_bytes())

    def download(self, folder: Path) -> None:
        """Copies every file below this place to below the local `folder`."""
        for info in self.files():
            file = folder / info.path[len(self.path.rstrip("/")) + 1 :]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(Place(self.filesystem, info.path).read_bytes())

    @contextmanager
    def _named_in_errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except (PermissionError, NotADirectoryError, FileExistsError, UnicodeDecodeError) as error:
            raise UsageError(f"{self} cannot be {what}: {error}. Check the path and its permissions.") from None

    def delete(self) -> None:
        """Removes the file, or the folder with all it holds; nothing there is fine."""
        kind = self._info().type
        if kind == fs.FileType.Directory:
            self.filesystem.delete_dir(self.path)
        elif kind == fs.FileType.File:
            self.filesystem.delete_file(self.path)


def place(uri: str | Path) -> Place:
    """The place that a path or URI names; relative paths start at the current folder."""
    text = str(uri)
    if "://" not in text:
        return Place(fs.LocalFileSystem(), Path(text).expanduser().absolute().as_posix())
    try:
        filesystem, path = fs.FileSystem.from_uri(text)
    except (pa.ArrowInvalid, OSError) as error:
        raise UsageError(f"{text!r} is not a place that can be reached: {error}. Use a path, s3:// or gs://.") from None
    return Place(filesystem, path.rstrip("/"))


def disk_full(error: BaseException | None, where: object) -> RunError | None:
    """The calm error for a full disk, if that is what `error`, or what caused it, says."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return RunError(
                f"the disk is full: {where} could not be written. Free space and run the same command again."
            )
        error = error.__cause__
    return None
