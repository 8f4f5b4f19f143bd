"""Decode the content of a file to one grey image, or reject it with a reason."""

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageFilter, ImageOps, UnidentifiedImageError

from fracture.preparation.decoding.dicom import decode_dicom, is_dicom
from fracture.preparation.decoding.grey import choose_range, count_values, look_up, scale_to_8_bits
from fracture.preparation.decoding.limits import (
    MAX_BYTES,
    MAX_PIXELS,
    MAX_SIDE,
    Rejected,
    check_file_size,
    check_pixels,
)

__all__ = ["MAX_BYTES", "MAX_PIXELS", "MAX_SIDE", "DecodedImage", "Rejected", "check_file_size", "decode", "is_blank"]

# Decoders of others, such as EPS, run more code than we trust.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "AVIF", "JPEG2000", "PPM")
# Pillow checks this before it allocates memory for tiles, frames and canvases. It refuses twice as many pixels, and
# warns of more than this, which `decode` refuses.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS

_BAND = 2**22  # pixels converted at once; each takes up to 24 bytes during conversion

_SQUARE = 1.03  # ratio of the sides below which an image counts as square: signatures are not affected
_ORIENTATION = 0x0112  # EXIF
_BITS, _PHOTOMETRIC, _PLANAR = 258, 262, 284  # TIFF tags
_MOST_PAGES = 1000  # of a TIFF that are looked at
_SIZ = b"\xff\x4f\xff\x51"  # start of a JPEG 2000 codestream; 38 bytes later the depth of its first component
_HEADS_OF_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

_LEAST_RANGE = 4  # grey levels between the percentiles 1 and 99 of the means; a flat image has 3 with noise of sigma 5
# Grey levels between the percentiles 10 and 90 of the middle's means; noise of sigma 50 on 224 pixels has less.
_PLAIN_RANGE = 16
_BETWEEN = 0.3  # of these means; where a straight edge crosses them twice, it is in 0.2 of them
_MEANS = 28  # of an image's side at least, so that its content remains
_LONGEST_MEAN = 8  # pixels a side; the mean of 64 has an eighth of their noise


@dataclass(frozen=True)
class DecodedImage:
    """A decoded file, and how it was stored."""

    grey: Image.Image  # at its own size, or a half, a quarter or an eighth of it
    pixels: np.ndarray  # [size, size] uint8
    format: str  # from the content, not from the file name: JPEG, PNG, ...
    mode: str  # Pillow's mode: L, RGB, I;16, ...
    width: int  # as stored, before EXIF orientation
    height: int
    traits: Mapping[str, str] = field(default_factory=dict)  # of a DICOM file: manufacturer, view, ...; else none

    def crop_centre(self) -> np.ndarray | None:
        """Return the square in the middle, resized to the shape of `pixels`; None if the whole image is nearly square.

        If a radiograph that is not square is first rotated and then resized to a square, only this part stays similar,
        because its aspect is kept.
        """
        (width, height), side = self.grey.size, min(self.grey.size)
        if max(width, height) < _SQUARE * side:
            return None
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
        return np.asarray(self.grey.resize(self.pixels.shape, Image.Resampling.BILINEAR, box=box))


def decode(data: bytes, size: int) -> DecodedImage:
    """Decode an image of any common format and mode, or a radiograph in DICOM; the format is found from the content.

    The first frame is used, of a TIFF the largest page. EXIF orientation is applied, transparency becomes black, more
    than 8 bits are reduced to 8 by `grey.choose_range`. Gamma and colour profiles are not applied: they are about
    screens, and the same grey values shall give the same picture.

    Args:
        size: side of the square image, pixels.

    Raises:
        Rejected: empty, not an image, no radiograph, truncated or damaged, of a kind whose grey is not certain, or
            larger than the limits.
    """
    if not data:
        raise Rejected("empty file")
    check_file_size(len(data))
    if is_dicom(data[:132]):
        grey, mode, width, height, traits = decode_dicom(data)
        stored = {"format": "DICOM", "mode": mode, "width": width, "height": height, "traits": traits}
    else:
        grey, stored = _decode_by_pillow(data, size)
    return DecodedImage(grey, np.asarray(grey.resize((size, size), Image.Resampling.BILINEAR)), **stored)


def is_blank(pixels: np.ndarray) -> bool:
    """Say whether an image has hardly any grey range, as a whole or within its border: it shows nothing.

    Means over 8 x 8 pixels count (fewer in images below 224 pixels), so noise does not. A collimated radiograph is not
    blank, as long as what is exposed takes a hundredth of the image.

    Args:
        pixels: [H, W] uint8.
    """
    side = min(_LONGEST_MEAN, max(1, min(pixels.shape) // _MEANS))
    image = Image.fromarray(pixels)
    if _is_contrasty(image.reduce(side)):
        return False
    means = np.asarray(image.filter(ImageFilter.BoxBlur((side - 1) / 2)))
    return _measure_range(means) < _LEAST_RANGE or _measure_range(_crop_border(means, side)) < _LEAST_RANGE


def _is_contrasty(means: Image.Image) -> bool:
    """Say whether the middle of an image, by means that do not overlap, has far more range than a blank image.

    So it is with nearly all radiographs; for these the exact test, which takes ten times as long, is left out. Many
    means must lie between the dark and the bright ones, as they do not where the edge of an empty field crosses the
    middle.
    """
    height, width = means.height, means.width
    middle = np.sort(np.asarray(means)[height // 4 : -(height // 4), width // 4 : -(width // 4)], axis=None).astype(int)
    low, high = middle[len(middle) // 10], middle[-1 - len(middle) // 10]
    if high - low < _PLAIN_RANGE:
        return False
    between = np.searchsorted(middle, [low + _LEAST_RANGE, high - _LEAST_RANGE])
    return between[1] - between[0] >= _BETWEEN * len(middle)


def _measure_range(pixels: np.ndarray) -> int:
    """Return the difference of the percentiles 99 and 1, by counting: sorting would take ten times as long."""
    ranks = np.rint(np.array([0.01, 0.99]) * (pixels.size - 1))
    low, high = np.searchsorted(np.bincount(pixels.ravel()).cumsum(), ranks, side="right")
    return int(high - low)


def _crop_border(means: np.ndarray, side: int) -> np.ndarray:
    """Return the box of all that differs from the outermost pixels, less what the border has mixed with.

    A single pixel of noise, whose grey is in `side` + 1 means of a row, is no content.
    """
    border = np.median(np.concatenate([means[0], means[-1], means[:, 0], means[:, -1]]))
    differs = np.abs(means - border) >= _LEAST_RANGE
    rows, columns = (np.flatnonzero(differs.sum(axis) > side + 1) for axis in (1, 0))
    if not len(rows) or not len(columns):
        return means
    box = means[rows[0] + side : rows[-1] + 1 - side, columns[0] + side : columns[-1] + 1 - side]
    return box if box.size else means


def _decode_by_pillow(data: bytes, size: int) -> tuple[Image.Image, dict[str, Any]]:
    """Return the grey image, and how it was stored: format, mode, width and height."""
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            page = _seek_largest_page(image)
            check_pixels(image.width, image.height, MAX_PIXELS)
            # A photograph with a preview inside is JPEG too.
            kind = "JPEG" if image.format == "MPO" else image.format or ""
            stored = {"format": kind, "mode": image.mode, "width": image.width, "height": image.height}
            return _load_grey(image, size, data, page), stored
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        count = re.search(r"\d+ pixels", str(error))  # of the image, or of one of its tiles, frames or canvases
        raise Rejected(f"{count[0] if count else 'more pixels'}, over the limit of {MAX_PIXELS:,}") from None
    except UnidentifiedImageError:
        if data.startswith(_HEADS_OF_TIFF):
            raise Rejected("damaged, or a TIFF of a kind that is not read: save it as grey of 8 or 16 bits") from None
        raise Rejected("not an image") from None
    except (Rejected, MemoryError):
        raise
    except Exception as error:  # on a damaged file the decoders raise errors of many types
        raise Rejected(_describe_damage(error)) from None


def _seek_largest_page(image: Image.Image) -> int:
    """Go to the largest page of a TIFF, the first of equals; return its number."""
    if image.format != "TIFF" or not getattr(image, "is_animated", False):
        return 0
    areas = []
    for page in range(min(image.n_frames, _MOST_PAGES)):
        image.seek(page)
        areas.append(image.width * image.height)
    page = areas.index(max(areas))
    image.seek(page)
    return page


def _load_grey(image: Image.Image, size: int, data: bytes, page: int) -> Image.Image:
    is_deep_colour, scale = _is_deep_colour(image, data), _get_scale(image)
    # Only JPEG supports this: it is decoded at 1/2, 1/4 or 1/8 if that still leaves twice the target size.
    image.draft("L" if image.mode in ("L", "RGB", "YCbCr") else image.mode, (2 * size, 2 * size))
    image.load()
    if is_deep_colour:
        return _load_deep_colour(image, data, page)
    if scale < 1:
        return _scale_to_8_bits(_round_to_16_bits(np.asarray(image), scale), white_is_zero=False)
    white_is_zero = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0
    ImageOps.exif_transpose(image, in_place=True)
    return _convert_to_grey(image, white_is_zero)


def _is_deep_colour(image: Image.Image, data: bytes) -> bool:
    """Say whether the file has colour or transparency of more than 8 bits, of which Pillow keeps the upper 8.

    Raises:
        Rejected: in an arrangement that cannot be read whole.
    """
    if image.mode not in ("RGB", "RGBA", "RGBX", "LA", "CMYK"):
        return False
    if image.format == "PNG":
        return data[24] == 16  # the depth in IHDR, which comes first
    if image.format == "JPEG2000":
        at = data.find(_SIZ)
        return at >= 0 and (data[at + 42] & 0x7F) + 1 > 8
    if image.format == "PPM":
        return image.tile[0].args[-1] > 255 if isinstance(image.tile[0].args, tuple) else False
    if image.format != "TIFF" or max(image.tag_v2.get(_BITS, (8,))) <= 8:
        return False
    if image.tag_v2.get(_PLANAR) == 2 or image.mode == "CMYK":
        raise Rejected("a TIFF of 16 bits in separate planes or CMYK: save it as grey of 8 or 16 bits")
    return True


def _get_scale(image: Image.Image) -> float:
    """Return what undoes Pillow's stretching of a deep PGM to 65535, which leaves no step between values as it was."""
    if image.format != "PPM" or image.mode != "I" or not isinstance(image.tile[0].args, tuple):
        return 1
    return image.tile[0].args[-1] / 65535


def _load_deep_colour(image: Image.Image, data: bytes, page: int) -> Image.Image:
    """Read by OpenCV what Pillow has loaded to 8 bits: by then the file is known to be whole and within the limits."""
    alpha = image.getchannel("A") if image.mode in ("RGBA", "LA") else None
    size, orientation = image.size, image.getexif().get(_ORIENTATION, 1)
    image.close()  # the pixels' memory
    if alpha is not None and alpha.getextrema() == (0, 0):
        return alpha  # nothing can be seen: black
    if alpha is not None and alpha.getextrema() == (255, 255):
        alpha = None
    grey = _scale_to_8_bits(_decode_by_opencv(data, page), white_is_zero=False)
    if grey.size != size:
        raise Rejected("damaged: pixels of other sides than the header's")
    if alpha is not None:
        grey = ImageChops.multiply(grey, alpha)
    grey.getexif()[_ORIENTATION] = orientation
    ImageOps.exif_transpose(grey, in_place=True)
    return grey


def _decode_by_opencv(data: bytes, page: int) -> np.ndarray:
    """Return one page as grey of the depth that the file has, [H, W]."""
    import cv2  # its threads take memory that most files do not need

    flags = cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
    buffer = np.frombuffer(data, np.uint8)
    with _quiet_opencv():
        if page:
            _, pages = cv2.imdecodemulti(buffer, flags, range=(page, page + 1))
        else:
            pages = [cv2.imdecode(buffer, flags)]
    if not len(pages) or pages[0] is None or pages[0].dtype == np.uint8:
        raise Rejected("colour of more than 8 bits that cannot be read whole: save it as grey of 8 or 16 bits")
    return pages[0]


@contextmanager
def _quiet_opencv() -> Iterator[None]:
    """Keep OpenCV from writing to the screen what is wrong with a file."""
    import cv2

    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        cv2.utils.logging.setLogLevel(level)


def _convert_to_grey(image: Image.Image, white_is_zero: bool) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _scale_to_8_bits(np.asarray(image), white_is_zero)
    if image.mode == "LAB":
        raise Rejected("colours in L*a*b*: save it as grey of 8 or 16 bits")
    if image.mode not in ("LA", "La", "PA", "RGBA", "RGBa") and "transparency" not in image.info:
        return image.convert("L")
    grey = Image.new("L", image.size)
    rows = max(1, _BAND // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        black = Image.new("RGBA", band.size, (0, 0, 0, 255))
        grey.paste(Image.alpha_composite(black, band).convert("L"), (0, top))
    return grey


def _scale_to_8_bits(values: np.ndarray, white_is_zero: bool) -> Image.Image:
    """Scale grey of more than 8 bits to 8 bits, by `grey.choose_range`. Floats in [0, 1] are scaled as they are.

    Args:
        white_is_zero: a TIFF in which 0 is white; Pillow handles that for 8 bits only.
    """
    top = float(values.max(initial=0))
    if not np.isfinite(top) or values.min(initial=0) < 0 or top > 65535:
        raise Rejected(f"grey values outside 0 to 65535 (up to {top:g})")
    is_fraction = values.dtype.kind == "f" and top <= 1
    whole = values if values.dtype == np.uint16 else _round_to_16_bits(values, 65535 if is_fraction else 1)
    levels = np.arange(2**16)
    black, white = (0, 65535) if is_fraction else choose_range(levels, count_values(whole))
    table = scale_to_8_bits(levels, black, white)
    return Image.fromarray(look_up(whole, 255 - table if white_is_zero else table))


def _round_to_16_bits(values: np.ndarray, scale: float) -> np.ndarray:
    whole = np.empty(values.shape, np.uint16)
    rows = max(1, _BAND // values.shape[1])
    for start in range(0, len(values), rows):
        whole[start : start + rows] = np.round(values[start : start + rows].astype(np.float64) * scale)
    return whole


def _describe_damage(error: Exception) -> str:
    text = str(error).lower()
    if "truncated" in text or isinstance(error, EOFError):
        return "truncated"
    return f"damaged: {error}"
