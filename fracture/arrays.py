"""Arrays at rest: a `.safetensors` file, which may come from anyone, with a checksum over every byte of it.

The format holds no code, and its reader refuses a file whose header does not cover its bytes exactly once. It does not
compare the arrays with what the reader expects, and has no checksum: both are added here.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fracture.errors import UsageError

_CHECKSUM = "sha256"  # its key in the metadata
_NO_CHECKSUM = "0" * 64  # stands in the file while its checksum is computed
_HEADER_BYTES = 4096  # of the file's header, for each array


@dataclass(frozen=True)
class Expected:
    """An array that a file should hold."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def __str__(self) -> str:
        return f"{self.dtype} of shape {self.shape}"


def save_arrays(file: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write the arrays, with some text beside them, under a checksum."""
    # Order C, since the library writes an array's memory as it lies.
    plain = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    data = save(plain, {**(metadata or {}), _CHECKSUM: _NO_CHECKSUM})
    header, body = _split(data)
    checksum = _checksum(header, body).encode()
    with file.open("wb") as stream:
        stream.write(header.replace(_NO_CHECKSUM.encode(), checksum, 1))
        stream.write(body)


def parse_arrays(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the arrays of a file and its metadata. Takes twice the file's memory, whatever the header claims.

    Raises:
        ValueError: the file is not whole, a byte of it has changed, or it holds what NumPy has no type for.
    """
    try:
        arrays = load(data)
        header, body = _split(data)
        metadata = json.loads(header[8:], object_pairs_hook=_without_duplicates).get("__metadata__", {})
    except KeyError as error:
        raise ValueError(f"holds an array of type {error.args[0]}, which NumPy does not have") from None
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"is not a whole .safetensors file: {str(error)[:200]}") from None
    checksum = metadata.pop(_CHECKSUM, "")
    if not checksum:
        raise ValueError("has no checksum")
    if checksum != _checksum(header.replace(checksum.encode(), _NO_CHECKSUM.encode(), 1), body):
        raise ValueError("is damaged: a byte has changed since it was written")
    return arrays, metadata


def load_arrays(
    data: bytes,
    expected: Sequence[Expected],
    where: object,
    fix: str,
    rename: Callable[[str], str] = lambda name: name,
) -> list[np.ndarray]:
    """Return the arrays of a file in the order of `expected`. The caller reads no more than `limit_bytes` of them.

    Args:
        data: the file's content.
        expected: the arrays that it has to hold, no more and no fewer.
        where: what an error calls the file.
        fix: what an error says to do.
        rename: gives the expected name of an array of the file.

    Raises:
        UsageError: the file is damaged or holds other arrays; names the array.
    """
    try:
        arrays = {rename(name): array for name, array in parse_arrays(data)[0].items()}
        _check_arrays(arrays, expected)
    except ValueError as error:
        raise UsageError(f"{where} {error}. {fix}") from None
    return [arrays[array.name] for array in expected]


def limit_bytes(arrays: Sequence[Expected]) -> int:
    """Return the most bytes that a file of these arrays may have."""
    return sum(math.prod(array.shape) * array.dtype.itemsize + _HEADER_BYTES for array in arrays) + _HEADER_BYTES


def _check_arrays(arrays: Mapping[str, np.ndarray], expected: Sequence[Expected]) -> None:
    for array in expected:
        if array.name not in arrays:
            raise ValueError(f"holds no array {array.name!r}, one of {len(expected)} that are expected")
    if unexpected := sorted(arrays.keys() - {array.name for array in expected}):
        raise ValueError(f"holds an array {unexpected[0][:100]!r} that is not expected")
    for array in expected:
        found = Expected(array.name, arrays[array.name].shape, arrays[array.name].dtype)
        if found != array:
            raise ValueError(f"holds {array.name!r} as {found}, and {array} is expected")


def _split(data: bytes) -> tuple[bytes, memoryview]:
    """Return a file's header, with the 8 bytes that give its length, and the bytes of the arrays."""
    end = 8 + int.from_bytes(data[:8], "little")
    return data[:end], memoryview(data)[end:]


def _checksum(header: bytes, body: memoryview) -> str:
    digest = hashlib.sha256(header)
    digest.update(body)
    return digest.hexdigest()


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object of the header; the library takes the last of two arrays of one name."""
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("two arrays have one name")
    return dict(pairs)
