"""What identifies a patient leaves only as HMAC-SHA256 under a secret key, which is a file of the user's.

The same key gives the same bytes; without the key nobody can look up a patient's number by trying all of them (RFC
2104, doi:10.17487/RFC2104).
"""

import csv
import fcntl
import hashlib
import hmac
import os
import secrets
import stat
import tempfile
import unicodedata
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from fracture.errors import UsageError
from fracture.storage import StoragePath

_BYTES = 32  # of a key
_TRAVELS = ("dataset.json", "bundle.json", "run.json")  # their folders are copied to others


class PatientKey:
    """The secret key. Its file is made, readable by its owner alone, when something is first hidden."""

    def __init__(self, file: Path | None) -> None:
        """Take the key's file; None where nobody has named one and no folder on a disk suggests one."""
        self.file = file
        self.state = ""  # how the key was come by, for people; "" while nothing is hidden
        self._data: list[Path] = []

    @property
    def is_made(self) -> bool:
        """Whether the key's file is there: patients were hidden before."""
        return self.file is not None and self.file.exists()

    def keep_out_of(self, roots: Iterable[StoragePath]) -> None:
        """Name data folders, in which nothing is ever written."""
        self._data += [Path(root.path).resolve() for root in roots if root.is_local and root.is_dir()]

    def hide(self, kind: str, value: str) -> str:
        """Return the HMAC-SHA256 of an id, in hexadecimal; nothing for nothing.

        Args:
            kind: what is hidden, such as "patient": the same number as a study gives another HMAC.

        Raises:
            UsageError: there is no key's file, or it may be read by others, is no key, lies in a data folder, or would
                travel with a dataset, a bundle or a run.
        """
        if not value:
            return ""
        text = f"{kind}\0{value}".encode("utf-8", "surrogateescape")
        return hmac.digest(self._key, text, "sha256").hex()

    def write_paths(self, paths: Mapping[str, str]) -> Path:
        """Add HMACs of paths and the paths themselves to the private table beside the key, and return its file.

        Jobs that write at once take turns.

        Raises:
            UsageError: see `hide`; or the table cannot be read or written.
        """
        return self._add_rows("paths", ("source", "path"), paths.items())

    def write_studies(self, studies: Iterable[tuple[str, str]]) -> Path:
        """Add studies to the private table of studies beside the key, and return its file; see `write_paths`.

        Args:
            studies: StudyInstanceUID and accession number. Studies without a UID are passed over.
        """
        numbers = ((number_study(self.hide("study", uid)), uid, accession) for uid, accession in {*studies})
        rows = [(show_id(number), uid, accession) for number, uid, accession in numbers if number is not None]
        return self._add_rows("studies", ("study_id", "StudyInstanceUID", "AccessionNumber"), rows)

    def _add_rows(self, name: str, header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Path:
        file, new = self._file.with_name(f"{self._file.stem}.{name}.csv"), {*rows}
        with self._file.open("rb") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            known = _read_rows(file, header)
            if not new <= known or (known and stat.S_IMODE(file.stat().st_mode) & 0o077):
                _write_privately(file, header, known | new)
        return file

    @property
    def _file(self) -> Path:
        if self.file is None:
            raise UsageError(
                "the data holds patients' ids, which are written only as HMACs under a secret key: name a file on this "
                "machine's disk for it with --key-file FILE. It is made on first use; keep it, and keep it secret."
            )
        return self.file

    @cached_property
    def _key(self) -> bytes:
        self._check_folder()
        try:
            self.state = f"{self._file}, found"
            if not self._file.exists():
                _make_key(self._file)
                self.state = f"{self._file}, made now: keep it, and keep it secret"
            if stat.S_IMODE(self._file.stat().st_mode) & 0o077:
                raise UsageError(
                    f"--key-file {self._file}: may be read by others than its owner. Run: chmod 600 {self._file}"
                )
            key = bytes.fromhex(self._file.read_text(encoding="ascii").strip())
        except (OSError, ValueError) as error:
            raise UsageError(f"--key-file {self._file}: cannot be used as a key: {error}. Name another file.") from None
        if len(key) != _BYTES:
            raise UsageError(
                f"--key-file {self._file}: holds {len(key)} bytes, and a key of ours has {_BYTES}, in hexadecimal. "
                "Name another file, or one that does not exist yet."
            )
        return key

    def _check_folder(self) -> None:
        file = self._file.resolve()
        if root := next((root for root in self._data if file.is_relative_to(root)), None):
            raise UsageError(
                f"--key-file {self._file}: is inside --data {root}, where nothing is ever written. Name another file."
            )
        for above in file.parents:
            if held := next((name for name in _TRAVELS if (above / name).exists()), None):
                raise UsageError(
                    f"--key-file {self._file}: is in {above}, which holds {held} and is copied with it: whoever has it "
                    "could look up patients. Name a file elsewhere."
                )


def normalise_id(text: str) -> str:
    """Return a patient's number without what people and programs add or drop: case, spaces, zeros at the start.

    Where two numbers differ in no more than that, they are taken for one patient's: joining two patients costs a
    little, parting one would leak.
    """
    words = unicodedata.normalize("NFKC", text).casefold().split()
    return " ".join(word.lstrip("0") or "0" for word in words)


def number_study(study: str) -> int | None:
    """Return the int64 that stands for a study in tables; None where it is not known."""
    digest = hashlib.blake2b(study.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True) if study else None


def show_id(number: int) -> str:
    """Return an int64 of a table as the text that stands for it in CSV: `s` and its 64 bits in hexadecimal.

    A spreadsheet rounds whole numbers to 15 digits, and takes hexadecimal digits alone for a number now and then, as
    `12e5`.
    """
    return f"s{number & (2**64 - 1):016x}"


def _make_key(file: Path) -> None:
    """Write a new key, unless another job has written one meanwhile; nobody ever sees half of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=".key-")  # of mode 600
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as stream:
            stream.write(f"{secrets.token_hex(_BYTES)}\n")
        with suppress(FileExistsError):
            try:
                os.link(name, file)
            except PermissionError:  # a file system without links
                os.rename(name, file)
                return
    finally:
        Path(name).unlink(missing_ok=True)


def _read_rows(file: Path, header: tuple[str, ...]) -> set[tuple[str, ...]]:
    try:
        with file.open(encoding="utf-8", errors="surrogateescape", newline="") as stream:
            rows = {tuple(row) for row in list(csv.reader(stream))[1:]}
        if any(len(row) != len(header) for row in rows):
            raise csv.Error(f"a row has not {len(header)} values")
    except FileNotFoundError:
        return set()
    except (OSError, csv.Error) as error:
        raise UsageError(f"{file}: cannot be read: {error}. Move it away; the next run writes it anew.") from None
    return rows


def _write_privately(file: Path, header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=".private-")  # of mode 600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(header)
            writer.writerows(sorted(rows))
        os.replace(name, file)
    except OSError as error:
        raise UsageError(f"{file}: cannot be written: {error}. Name another --key-file.") from None
    finally:
        Path(name).unlink(missing_ok=True)
