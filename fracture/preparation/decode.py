"""One file's bytes to one grey image, or the reason why not."""

import io
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 100_000_000  # a 10,000 × 10,000 radiograph; larger is taken for a decompression bomb
MAX_SIDE = 65_535  # JPEG's own; what shrinks a longer side would need a gigabyte of weights
MAX_BYTES = 1_000_000_000  # of the file; that radiograph in 16-bit RGB, not compressed, has 600 MB
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")  # others, such as EPS, run more code than we trust
# Decoders ask this before they set memory aside for tiles, frames and canvases. Pillow refuses twice as many, and warns
# of more than this, which `decode` refuses.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS

_BAND = 2**22  # pixels converted at once; in between each takes up to 24 bytes

_SQUARE = 1.03  # sides that differ by less make no difference to a signature
_PHOTOMETRIC = 262  # TIFF tag PhotometricInterpretation


class Rejected(Exception):
    """The file is not a radiograph that can be used; the text is the reason."""


@dataclass(frozen=True)
class Picture:
    """A decoded file, and what it was stored as."""

    grey: Image.Image  # as it lies, at its own size or a half, a quarter, an eighth of it
    pixels: np.ndarray  # [size, size] uint8
    format: str  # what the bytes are, whatever the name says: JPEG, PNG, ...
    mode: str  # Pillow's: L, RGB, I;16, ...
    width: int  # as stored, before EXIF orientation
    height: int

    def centre(self) -> np.ndarray | None:
        """The square in the middle, its aspect kept, as large as `pixels`; None where all of it is nearly square.

        When a radiograph that is not square is turned and then made square, this is what stays alike.
        """
        (width, height), side = self.grey.size, min(self.grey.size)
        if max(width, height) < _SQUARE * side:
            return None
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
        return np.asarray(self.grey.resize(self.pixels.shape, Image.Resampling.BILINEAR, box=box))


def decode(data: bytes, size: int) -> Picture:
    """Decodes an image of any common format and mode, whatever its file name says.

    The first frame is used, EXIF orientation applied, transparency laid on black, 16-bit grey scaled to 8.

    Raises:
        Rejected: empty, not an image, truncated or damaged, or larger than the limits.
    """
    if not data:
        raise Rejected("empty file")
    if reason := too_large(len(data)):
        raise Rejected(reason)
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Rejected(f"{image.width} x {image.height} pixels, over the limit of {MAX_PIXELS:,}")
            if max(image.size) > MAX_SIDE:
                raise Rejected(f"{image.width} x {image.height} pixels, over the limit of {MAX_SIDE:,} a side")
            stored = {"format": image.format or "", "mode": image.mode, "width": image.width, "height": image.height}
            # JPEG alone honours this: decoded at 1/2, 1/4 or 1/8 where that still leaves twice the target.
            image.draft("L" if image.mode in ("L", "RGB", "YCbCr") else image.mode, (2 * size, 2 * size))
            image.load()
            white_is_zero = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0
            ImageOps.exif_transpose(image, in_place=True)
            grey = _to_grey(image, white_is_zero)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        count = re.search(r"\d+ pixels", str(error))  # of the image, or of a tile, frame or canvas in it
        raise Rejected(f"{count[0] if count else 'more pixels'}, over the limit of {MAX_PIXELS:,}") from None
    except UnidentifiedImageError:
        raise Rejected("not an image") from None
    except (Rejected, MemoryError):
        raise
    except Exception as error:  # on a damaged file the decoders raise whatever they stumble over
        raise Rejected(_reason(error)) from None
    return Picture(grey, np.asarray(grey.resize((size, size), Image.Resampling.BILINEAR)), **stored)


def too_large(count: int) -> str:
    """Why a file of so many bytes is not read; "" where it is."""
    return f"{count:,} bytes, over the limit of {MAX_BYTES:,}" if count > MAX_BYTES else ""


def _to_grey(image: Image.Image, white_is_zero: bool) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_to_grey(np.asarray(image), white_is_zero)
    if image.mode not in ("LA", "La", "PA", "RGBA", "RGBa") and "transparency" not in image.info:
        return image.convert("L")
    grey = Image.new("L", image.size)
    rows = max(1, _BAND // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        black = Image.new("RGBA", band.size, (0, 0, 0, 255))
        grey.paste(Image.alpha_composite(black, band).convert("L"), (0, top))
    return grey


def _deep_to_grey(values: np.ndarray, white_is_zero: bool) -> Image.Image:
    """Grey of more than 8 bits, to 8. X-ray detectors store 10 to 14 bits in 16-bit files, so the range decides.

    The depth is the smallest of 8, 10, 12, 14 and 16 bits that holds the largest value; floats in [0, 1] are stretched.

    Args:
        white_is_zero: TIFF's way to say that 0 is white; Pillow heeds it for 8 bits only.
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


def _reason(error: Exception) -> str:
    text = str(error).lower()
    if "truncated" in text or isinstance(error, EOFError):
        return "truncated"
    return f"damaged: {error}"
