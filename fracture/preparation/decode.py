"""Decode the content of a file to one grey image, or reject it with a reason."""

import io
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 100_000_000  # a 10,000 × 10,000 radiograph; anything larger is treated as a decompression bomb
MAX_SIDE = 65_535  # JPEG's own limit; resizing a longer side would need a gigabyte of weights
MAX_BYTES = 1_000_000_000  # of the file; the same radiograph in uncompressed 16-bit RGB has 600 MB
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")  # decoders of others, such as EPS, run more code than we trust
# Pillow checks this before it allocates memory for tiles, frames and canvases. It refuses twice as many pixels, and
# warns of more than this, which `decode` refuses.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS

_BAND = 2**22  # pixels converted at once; each takes up to 24 bytes during conversion

_SQUARE = 1.03  # ratio of the sides below which an image counts as square: signatures are not affected
_PHOTOMETRIC = 262  # TIFF tag PhotometricInterpretation


class Rejected(Exception):
    """The file cannot be used as a radiograph; the text is the reason."""


@dataclass(frozen=True)
class DecodedImage:
    """A decoded file, and how it was stored."""

    grey: Image.Image  # at its own size, or a half, a quarter or an eighth of it
    pixels: np.ndarray  # [size, size] uint8
    format: str  # from the content, not from the file name: JPEG, PNG, ...
    mode: str  # Pillow's mode: L, RGB, I;16, ...
    width: int  # as stored, before EXIF orientation
    height: int

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
    """Decode an image of any common format and mode; the format is found from the content.

    The first frame is used, EXIF orientation is applied, transparency becomes black, 16-bit grey is scaled to 8 bits.

    Args:
        size: side of the square image, pixels.

    Raises:
        Rejected: empty, not an image, truncated or damaged, or larger than the limits.
    """
    if not data:
        raise Rejected("empty file")
    check_file_size(len(data))
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            _check_pixels(image)
            stored = {"format": image.format or "", "mode": image.mode, "width": image.width, "height": image.height}
            grey = _load_grey(image, size)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        count = re.search(r"\d+ pixels", str(error))  # of the image, or of one of its tiles, frames or canvases
        raise Rejected(f"{count[0] if count else 'more pixels'}, over the limit of {MAX_PIXELS:,}") from None
    except UnidentifiedImageError:
        raise Rejected("not an image") from None
    except (Rejected, MemoryError):
        raise
    except Exception as error:  # on a damaged file the decoders raise errors of many types
        raise Rejected(_describe_damage(error)) from None
    return DecodedImage(grey, np.asarray(grey.resize((size, size), Image.Resampling.BILINEAR)), **stored)


def check_file_size(size: int) -> None:
    """Check the size of a file, in bytes, before it is read.

    Raises:
        Rejected: larger than the limit.
    """
    if size > MAX_BYTES:
        raise Rejected(f"{size:,} bytes, over the limit of {MAX_BYTES:,}")


def _check_pixels(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise Rejected(f"{image.width} x {image.height} pixels, over the limit of {MAX_PIXELS:,}")
    if max(image.size) > MAX_SIDE:
        raise Rejected(f"{image.width} x {image.height} pixels, over the limit of {MAX_SIDE:,} a side")


def _load_grey(image: Image.Image, size: int) -> Image.Image:
    # Only JPEG supports this: it is decoded at 1/2, 1/4 or 1/8 if that still leaves twice the target size.
    image.draft("L" if image.mode in ("L", "RGB", "YCbCr") else image.mode, (2 * size, 2 * size))
    image.load()
    white_is_zero = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0
    ImageOps.exif_transpose(image, in_place=True)
    return _convert_to_grey(image, white_is_zero)


def _convert_to_grey(image: Image.Image, white_is_zero: bool) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _scale_to_8_bits(np.asarray(image), white_is_zero)
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
    """Scale grey of more than 8 bits to 8 bits.

    X-ray detectors store 10 to 14 bits in 16-bit files, so the depth is the smallest of 8, 10, 12, 14 and 16 bits that
    holds the largest value. Floats in [0, 1] are scaled to the whole range.

    Args:
        white_is_zero: a TIFF in which 0 is white; Pillow handles that for 8 bits only.
    """
    top = float(values.max(initial=0))
    if not np.isfinite(top) or values.min(initial=0) < 0 or top > 65535:
        raise Rejected(f"grey values outside 0 to 65535 (up to {top:g})")
    white = 1 if top <= 1 else next(2**bits - 1 for bits in (8, 10, 12, 14, 16) if top < 2**bits)
    grey = np.empty(values.shape, np.uint8)
    rows = max(1, _BAND // values.shape[1])
    for start in range(0, len(values), rows):
        band = values[start : start + rows].astype(np.float64)
        band = white - band if white_is_zero else band
        grey[start : start + rows] = np.round(band * (255 / white))
    return Image.fromarray(grey)


def _describe_damage(error: Exception) -> str:
    text = str(error).lower()
    if "truncated" in text or isinstance(error, EOFError):
        return "truncated"
    return f"damaged: {error}"
