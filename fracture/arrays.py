"""Numbers at rest: a list of arrays in one `.npz` file, which may come from anyone.

Reading runs no code and takes no more memory than the caller expects. NumPy alone refuses pickled objects, but believes
what a file says of its sizes: a kilobyte of zip can unfold to gigabytes, and many names can point at the same bytes.
So nothing compressed is taken (we never write it), and each array's header is held against what is expected before
memory is set aside for it.
"""

import io
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fracture.errors import UsageError

_HEADERS = 4096  # bytes of zip and npy headers that an array may add to its numbers


@dataclass(frozen=True)
class Expected:
    """An array that a file should hold."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} of shape {self.shape}"


class _Bad(ValueError):
    """What is wrong with the file."""


def save_arrays(file: Path, arrays: Sequence[np.ndarray], names: Sequence[str] | None = None) -> None:
    """Writes them in their order; without names they are called `arr_0`, `arr_1`, ... as by `numpy.savez`."""
    plain = [np.asarray(array, order="C") for array in arrays]
    np.savez(file, **dict(zip(names or _numbered(len(plain)), plain, strict=True)))


def load_arrays(file: Path | bytes, expected: Sequence[Expected] | int, where: object, fix: str) -> list[np.ndarray]:
    """The arrays in the order of `expected`, or as `arr_0`, `arr_1`, ... where that is a limit.

    Args:
        file: its path, or what is in it.
        expected: what has to be in it, no more and no less; or how many bytes of numbers there may be at most.
        where: what the file is called in an error,
        fix: and what to do then.

    Raises:
        UsageError: the file is damaged, compressed, or holds other arrays, objects, or more than the limit; names the
            array.
        OSError: the file cannot be opened.
    """
    size = len(file) if isinstance(file, bytes) else file.stat().st_size
    with open(file, "rb") if isinstance(file, Path) else io.BytesIO(file) as stream:
        try:
            with zipfile.ZipFile(stream) as archive:
                return _load(archive, size, expected)
        except _Bad as error:
            raise UsageError(f"{where} {error}. {fix}") from None
        except Exception as error:  # on a damaged file zipfile raises whatever it stumbles over
            raise UsageError(f"{where} is no whole .npz file: {error}. {fix}") from None


def _load(archive: zipfile.ZipFile, size: int, expected: Sequence[Expected] | int) -> list[np.ndarray]:
    members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    if len(members) < len(archive.infolist()):
        raise _Bad("holds two arrays of one name")
    names = [e.name for e in expected] if isinstance(expected, Sequence) else _numbered(len(members))
    _check_names(members, names)
    declared = [Expected(name, *_header(archive, members[name], name)) for name in names]
    if isinstance(expected, Sequence):
        for wanted, found in zip(expected, declared, strict=True):
            if wanted != found:
                raise _Bad(f"holds {wanted.name!r} as {found}, and {wanted} is expected")
    elif (total := sum(array.bytes for array in declared)) > expected:
        raise _Bad(f"holds {total:,} bytes of numbers, over the limit of {expected:,}")
    _check_size(size, declared)
    return [_read(archive, members[name], name) for name in names]


def file_bytes(arrays: Sequence[Expected]) -> tuple[int, int]:
    """How large a file of these arrays is, at least and at most."""
    numbers = sum(array.bytes for array in arrays)
    return numbers, numbers + _HEADERS * (len(arrays) + 1)


def _numbered(count: int) -> list[str]:
    return [f"arr_{number}" for number in range(count)]


def _check_names(members: dict[str, zipfile.ZipInfo], names: Sequence[str]) -> None:
    if missing := [name for name in names if name not in members]:
        raise _Bad(f"holds no array {missing[0]!r}, one of {len(names)} that are expected")
    if strange := sorted(members.keys() - set(names)):
        raise _Bad(f"holds an array {strange[0][:100]!r} that is not expected")


def _check_size(size: int, arrays: Sequence[Expected]) -> None:
    """Numbers stand in the file as they are, so its size says how many there are."""
    least, most = file_bytes(arrays)
    if not least <= size <= most:
        raise _Bad(f"has {size:,} bytes, and its arrays take {least:,} to {most:,}")


def _header(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """(shape, dtype), of numbers in the order of C; nothing but the header is read."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise _Bad(f"holds a compressed array {name!r}, which none of ours is")
    try:
        with archive.open(info) as stream:
            if np.lib.format.read_magic(stream) != (1, 0):
                raise ValueError("not of npy format 1.0")
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except Exception as error:  # the header is a Python literal, and may be any
        raise _Bad(f"holds an array {name!r} whose header cannot be read: {str(error)[:200]}") from None
    if dtype.hasobject:
        raise _Bad(f"holds Python objects in {name!r}, which could run code and are never loaded")
    if dtype.kind not in "biuf" or fortran or min(shape, default=0) < 0:
        raise _Bad(f"holds {name!r} as {dtype} of shape {shape}, not as plain numbers in the order of C")
    return shape, dtype


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> np.ndarray:
    try:
        with archive.open(info) as stream:
            array = np.lib.format.read_array(stream, allow_pickle=False)
            if stream.read(1):  # at the end zipfile compares the checksum, too
                raise ValueError("more bytes than numbers")
    except Exception as error:
        raise _Bad(f"holds a damaged array {name!r}: {error}") from None
    return array
