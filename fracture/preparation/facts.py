"""Scan one file: whether it can be read, how it was stored, and the hashes and signatures of its image."""

import hashlib
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from fracture.dataset.format import BOXES
from fracture.preparation.decoding.decode import DecodedImage, Rejected, check_file_size, decode, is_blank
from fracture.preparation.duplicates.alignment import SCALES
from fracture.preparation.duplicates.signature import (
    RING_LENGTH,
    SIDE,
    SPECTRUM_LENGTH,
    compute_signatures,
    shrink,
)
from fracture.preparation.source import ImageFile
from fracture.storage import StoragePath

UNOPENED = "cannot be opened"
_LINES = 28  # rows, and columns, whose spectrum is measured; of 224 every eighth
_BLOCK = 8  # pixels, the side of JPEG's blocks
_MIDDLE = 512  # pixels, the side of the square in the middle whose blocks are looked at

# Columns that are known before the file is opened.
LISTED = pa.schema(
    [
        pa.field("path", pa.string()),
        pa.field("label", pa.uint8()),
        pa.field("split", pa.string()),  # as found; "" if the folder has none
        pa.field("patients", pa.list_(pa.string())),  # files that share one are of one patient
        pa.field("group_match", pa.string()),  # files that share it belong together; "" for none
        pa.field("study", pa.string()),  # "" if unknown
        pa.field("instance", pa.string()),  # of a DICOM file: files that share it are one object; "" otherwise
        pa.field("origin", pa.string()),  # hospital, scanner or collection; "" if unknown
        pa.field("bytes", pa.int64()),
        pa.field("modified", pa.int64()),  # nanoseconds since the epoch
        pa.field("boxes", BOXES),  # drawn around its fractures; null if there are none
    ]
)
# One row a file. All columns after `reason` are null for a file that cannot be read.
FACTS = pa.schema(
    [
        *LISTED,
        pa.field("reason", pa.string()),  # why the file cannot be read; null if it can
        pa.field("sha256", pa.binary(32)),
        pa.field("pixels", pa.binary(16)),  # hash of the grey image at the size of training
        pa.field("format", pa.string()),
        pa.field("mode", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("mean", pa.float32()),  # grey, in [0, 255]
        pa.field("deviation", pa.float32()),
        pa.field("border", pa.float32()),  # mean grey of the outermost 3 %
        pa.field("sharpness", pa.float32()),  # of the image at the size of training, see `_measure_sharpness`
        pa.field("compression", pa.float32()),  # traces of JPEG, see `_measure_compression`; null if unknown
        pa.field("traits", pa.map_(pa.string(), pa.string())),  # of a DICOM file: manufacturer, view, ...; else none
        # One view, the image as training sees it, or two: also the square in its middle, if the image is not square.
        pa.field("views", pa.list_(pa.binary(SIDE * SIDE))),  # uint8 [SIDE, SIDE]
        pa.field("rings", pa.list_(pa.list_(pa.float32(), len(SCALES) * RING_LENGTH))),  # zeros for a blank view
        pa.field("spectrum", pa.list_(pa.list_(pa.float32(), SPECTRUM_LENGTH))),
    ]
)


def scan_file(file: ImageFile, path: StoragePath, size: int) -> tuple[dict[str, Any], np.ndarray | None]:
    """Read and decode a file.

    Returns:
        A row of `FACTS`, and the image that training will see, [size, size] uint8; None if the file is rejected.
    """
    try:
        return scan_bytes(file, read_image_file(path, file.size), size)
    except Rejected as error:
        return dict.fromkeys(FACTS.names) | make_listed_row(file) | {"reason": str(error)}, None


def scan_bytes(file: ImageFile, data: bytes, size: int) -> tuple[dict[str, Any], np.ndarray]:
    """Decode the content of a file; see `scan_file`.

    Raises:
        Rejected: not an image that can be used.
    """
    image = decode(data, size)
    if image.format == "DICOM" and not file.is_dicom:
        raise Rejected("DICOM under the name of another format: call it .dcm, so that its patient is found")
    if is_blank(image.pixels):
        raise Rejected("blank: hardly any range of grey")
    row = dict.fromkeys(FACTS.names) | make_listed_row(file)
    row["sha256"] = hashlib.sha256(data).digest()
    row |= {name: getattr(image, name) for name in ("format", "mode", "width", "height")}
    row["traits"] = dict(image.traits)
    row |= _measure_pixels(image.pixels) | {"compression": _measure_compression(image)}
    return row | _compute_views(image), image.pixels


def read_image_file(path: StoragePath, size: int = 0) -> bytes:
    """Read a file whose size, where it is known, is within the limit.

    Raises:
        Rejected: the file is too large, is not there or may not be read.
    """
    check_file_size(size)
    try:
        return path.read_bytes()
    except OSError:  # no such file, no right to it, a disk that fails; a store's failure is another error
        raise Rejected(UNOPENED) from None


def hash_pixels(pixels: np.ndarray | bytes) -> bytes:
    """Return a hash of 16 bytes."""
    return hashlib.blake2b(pixels, digest_size=16).digest()


def make_listed_row(file: ImageFile) -> dict[str, Any]:
    """Return a row of `LISTED`."""
    row = {name: getattr(file, "size" if name == "bytes" else name) for name in LISTED.names}
    return row | {"boxes": file.boxes or None}


def _measure_pixels(pixels: np.ndarray) -> dict[str, Any]:
    mean, deviation = (float(value[0, 0]) for value in cv2.meanStdDev(pixels))
    return {
        "pixels": hash_pixels(pixels),
        "mean": mean,
        "deviation": deviation,
        "border": _measure_border(pixels),
        "sharpness": _measure_sharpness(pixels),
    }


def _compute_views(image: DecodedImage) -> dict[str, Any]:
    views = [shrink(view) for view in (image.pixels, image.crop_centre()) if view is not None]
    rings, spectra = zip(*(compute_signatures(view, SCALES) for view in views), strict=True)
    return {
        "views": [view.tobytes() for view in views],
        "rings": [scales.ravel() for scales in rings],
        "spectrum": list(spectra),
    }


def _measure_border(pixels: np.ndarray) -> float:
    margin = max(1, round(0.03 * len(pixels)))
    inner = pixels[margin:-margin, margin:-margin]
    return (cv2.sumElems(pixels)[0] - cv2.sumElems(inner)[0]) / (pixels.size - inner.size)


def _measure_sharpness(pixels: np.ndarray) -> float:
    """Return the share of the spectral energy of rows and columns, without their means, beyond half of the frequencies.

    By cosine transform, whose ends meet; a Fourier transform would take the step from one end to the other as detail.
    """
    half, step = len(pixels) // 2, max(1, len(pixels) // _LINES)
    energy = detail = 0.0
    for lines in (pixels[::step], pixels.T[::step]):
        even = lines[:, : 2 * half].astype(np.float32, order="C")  # OpenCV transforms no odd number
        spectrum = cv2.dct(even, flags=cv2.DCT_ROWS)
        detail += cv2.norm(spectrum[:, half:]) ** 2
        energy += cv2.norm(spectrum[:, 1:]) ** 2
    return detail / energy if energy else 0.0


def _measure_compression(image: DecodedImage) -> float | None:
    """Return how much greater steps across the borders of JPEG's blocks are than those one pixel beside: 1 for none.

    The mean absolute difference of neighbours across borders, divided by that of the pairs on either side. Any format
    may show it, if the image was a JPEG before. Only the middle of a large image is looked at.

    Returns:
        None where it cannot be known: the image was reduced as it was decoded, or has no such steps.
    """
    if sorted(image.grey.size) != sorted((image.width, image.height)) or min(image.grey.size) < 2 * _BLOCK:
        return None
    # From a block's corner on; the grid begins at the image's.
    left, top = (max(0, side - _MIDDLE) // 2 // _BLOCK * _BLOCK for side in image.grey.size)
    width, height = (min(side, _MIDDLE) for side in image.grey.size)
    pixels = np.asarray(image.grey.crop((left, top, left + width, top + height)))
    border = beside = 0.0
    for first, second, axis in ((pixels[:, :-1], pixels[:, 1:], 0), (pixels[:-1], pixels[1:], 1)):
        steps = cv2.reduce(cv2.absdiff(first, second), axis, cv2.REDUCE_SUM, dtype=cv2.CV_32F).ravel()
        count = (len(steps) - 1) // _BLOCK  # borders with a pair on either side
        border += steps[_BLOCK - 1 :: _BLOCK][:count].sum()
        beside += steps[_BLOCK - 2 :: _BLOCK][:count].sum() / 2 + steps[_BLOCK::_BLOCK][:count].sum() / 2
    return float(border / beside) if beside else None
