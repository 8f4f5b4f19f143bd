"""Pixels of scanned images, kept in temporary files beside the shards until the split is planned.

The split of an image is known only after all files have been scanned, and decoding an image twice costs a hundred times
as much as reading its pixels again.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from fracture.preparation.facts import hash_pixels
from fracture.storage import StoragePath

PENDING_PATTERN = r"pixels-\d{9}\.raw"


@dataclass(frozen=True)
class PendingPixels:
    """The position of an image in a file of pending pixels."""

    file: str
    row: int


def name_pending_file(number: int) -> str:
    """Name the file of the images from this number on, counted over all new files of the scan."""
    return f"pixels-{number:09d}.raw"


def write_pending(path: StoragePath, images: Sequence[np.ndarray | None], size: int) -> None:
    """Write [size, size] uint8 images, one after another; zeros for None."""
    blank = np.zeros((size, size), np.uint8)
    path.write_bytes(pa.py_buffer(np.stack([blank if image is None else image for image in images])))


def read_pending(
    folder: StoragePath, pending: Sequence[PendingPixels | None], hashes: Sequence[bytes], size: int
) -> dict[int, np.ndarray]:
    """Read pending pixels.

    Pixels that do not have the expected hash, because another job wrote to the same folder, are left out.

    Returns:
        Position in the sequence -> [size, size] uint8.
    """
    images: dict[int, np.ndarray] = {}
    for name in {item.file for item in pending if item}:
        with suppress(OSError), (folder / name).open() as file:
            for position, item in enumerate(pending):
                if item and item.file == name:
                    pixels = file.read_at(size**2, item.row * size**2)
                    if hash_pixels(pixels) == hashes[position]:
                        images[position] = np.frombuffer(pixels, np.uint8).reshape(size, size)
    return images


def remove_pending(folder: StoragePath) -> None:
    """Remove all files of pending pixels, also those of a job that was stopped."""
    for info in folder.files():
        if re.fullmatch(PENDING_PATTERN, info.base_name):
            (folder / info.base_name).delete()
