"""Read the headers of the DICOM files among the files of a folder. No pixel is read."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from fracture.preparation.decoding.dicom import DicomHeader, is_dicom, read_header
from fracture.preparation.decoding.limits import Rejected
from fracture.progress import Progress
from fracture.storage import StoragePath

_HEAD = 132  # bytes: the preamble and the word DICM
_THREADS = 8  # a bucket takes some 50 ms for each file
# In a bucket, files of these names are opened when they are decoded, and refused there if they are DICOM.
_OTHER_FORMATS = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "gif", "bmp", "dib", "webp", "tif", "tiff", "avif", "jp2", "j2k", "jpx"),
    *("pgm", "ppm", "pnm"),
)
_OF_NOBODY = DicomHeader(
    "image", "", "", "", "", {}, burned_in=False, for_processing=False, frames=1, transfer_syntax=""
)


def read_headers(root: StoragePath, paths: Sequence[str], progress: Progress) -> dict[str, DicomHeader]:
    """Return the header of each DICOM file, found by content, in the order of the paths.

    On a disk every file is opened, whatever its name. A file whose header is damaged counts as an image of nobody, and
    is rejected when it is decoded. One that cannot be read is passed over, and is refused when it is decoded as DICOM
    whose patient was not found.
    """
    candidates = [path for path in paths if root.is_local or path.rsplit(".", 1)[-1].lower() not in _OTHER_FORMATS]
    headers: dict[str, DicomHeader] = {}
    with ThreadPoolExecutor(_THREADS) as threads:
        for start in range(0, len(candidates), _THREADS):
            some = candidates[start : start + _THREADS]
            # They are parsed in this thread: pydicom's warnings cannot be silenced in one thread alone.
            for path, content in zip(some, threads.map(partial(_find_dicom, root), some), strict=True):
                if content is not None and (header := _read_header(root / path, content)):
                    headers[path] = header
            progress("headers", start + len(some), len(candidates))
    return headers


def holds_dicom(root: StoragePath, paths: Iterable[str]) -> bool:
    """Return whether one of the files is DICOM, whatever it is called."""
    return any(_find_dicom(root, path) is not None for path in paths)


def _find_dicom(root: StoragePath, path: str) -> bytes | None:
    """Return the content of a DICOM file in a bucket, nothing for one on a disk, and None for another file."""
    try:
        with (root / path).open() as stream:
            if not is_dicom(stream.read(_HEAD)):
                return None
            stream.seek(0)
            return b"" if root.is_local else stream.read()
    except OSError:  # is rejected when it is decoded
        return None


def _read_header(file: StoragePath, content: bytes) -> DicomHeader | None:
    try:
        if content:
            return read_header(content)
        with file.open() as stream:
            return read_header(stream)
    except Rejected:
        return _OF_NOBODY
    except OSError:
        return None
