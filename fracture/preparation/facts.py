"""One file's bytes to a row of facts: whether it can be read, what it was stored as, and what it looks like."""

import hashlib
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fracture.preparation.decode import Rejected, decode, too_large
from fracture.preparation.duplicates.alignment import SCALES
from fracture.preparation.duplicates.signature import HARMONICS, RINGS, SIDE, shrink, signatures
from fracture.preparation.source import ImageFile

RING_LENGTH, SPECTRUM_LENGTH = RINGS // 2 * HARMONICS, RINGS * HARMONICS

UNOPENED = "cannot be opened"

# What is known of a file before it is opened.
NAMED = pa.schema(
    [
        pa.field("path", pa.string()),
        pa.field("label", pa.uint8()),
        pa.field("split", pa.string()),  # as found; "" where the folder has none
        pa.field("patient", pa.string()),  # "" where it is not known
        pa.field("origin", pa.string()),  # hospital, scanner or collection; "" where it is not known
        pa.field("bytes", pa.int64()),
        pa.field("modified", pa.int64()),  # nanoseconds since the epoch
    ]
)
# One row a file. What comes after `reason` is null for a file that cannot be read.
FACTS = pa.schema(
    [
        *NAMED,
        pa.field("reason", pa.string()),  # why the file cannot be read; null where it can
        pa.field("sha256", pa.binary(32)),
        pa.field("pixels", pa.binary(16)),  # hash of the grey image at the size of training
        pa.field("format", pa.string()),
        pa.field("mode", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("mean", pa.float32()),  # grey, in [0, 255]
        pa.field("deviation", pa.float32()),
        pa.field("border", pa.float32()),  # mean grey of the outermost 3 %
        # Of one view, the image as training sees it, or of two: the square in its middle, too, where it is not square.
        pa.field("small", pa.list_(pa.binary(SIDE * SIDE))),  # uint8 [SIDE, SIDE]
        pa.field("rings", pa.list_(pa.list_(pa.float32(), len(SCALES) * RING_LENGTH))),  # zeros for a blank view
        pa.field("spectrum", pa.list_(pa.list_(pa.float32(), SPECTRUM_LENGTH))),
    ]
)


def examine(file: ImageFile, data: bytes | None, size: int) -> tuple[dict[str, Any], np.ndarray | None]:
    """A row of `FACTS`, and the image that training will see, [size, size] uint8; None where it cannot be read.

    Args:
        data: the file's bytes; None where it could not be opened.
    """
    row: dict[str, Any] = dict.fromkeys(FACTS.names) | named(file)
    if data is None:
        return row | {"reason": too_large(file.size) or UNOPENED}, None
    try:
        picture = decode(data, size)
    except Rejected as error:
        return row | {"reason": str(error)}, None
    pixels = picture.pixels
    views = [shrink(view) for view in (pixels, picture.centre()) if view is not None]
    rings, spectra = zip(*(signatures(view, SCALES) for view in views), strict=True)
    mean, deviation = (float(value[0, 0]) for value in cv2.meanStdDev(pixels))
    facts = {
        "sha256": hashlib.sha256(data).digest(),
        "pixels": pixels_hash(pixels),
        "format": picture.format,
        "mode": picture.mode,
        "width": picture.width,
        "height": picture.height,
        "mean": mean,
        "deviation": deviation,
        "border": _border(pixels),
        "small": [view.tobytes() for view in views],
        "rings": [scales.ravel() for scales in rings],
        "spectrum": list(spectra),
    }
    return row | facts, pixels


def pixels_hash(pixels: np.ndarray | bytes) -> bytes:
    return hashlib.blake2b(pixels, digest_size=16).digest()


def named(file: ImageFile) -> dict[str, Any]:
    """A row of `NAMED`."""
    row = {name: getattr(file, name) for name in ("path", "label", "split", "patient", "origin", "modified")}
    return row | {"bytes": file.size}


def stack_views(facts: pa.Table) -> np.ndarray:
    """[V, SIDE, SIDE] uint8: all views of all files, in order."""
    views = pc.list_flatten(facts["small"])
    stacked = np.empty((len(views), SIDE, SIDE), np.uint8)
    for number, view in enumerate(views):
        stacked[number] = np.frombuffer(view.as_buffer(), np.uint8).reshape(SIDE, SIDE)
    return stacked


def _border(pixels: np.ndarray) -> float:
    margin = max(1, round(0.03 * len(pixels)))
    inner = pixels[margin:-margin, margin:-margin]
    return (cv2.sumElems(pixels)[0] - cv2.sumElems(inner)[0]) / (pixels.size - inner.size)
