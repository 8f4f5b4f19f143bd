"""One file's bytes to one grey image, or the reason why not."""

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 100_000_000  # a 10,000 × 10,000 film; larger is taken for a decompression bomb
Image.MAX_IMAGE_PIXELS = None  # our own limit below is stricter than Pillow's, and an error, not a warning


class Rejected(Exception):
    """The file is not a radiograph that can be used; the text is the reason."""


def decode(data: bytes, size: int) -> np.ndarray:
    """Decodes an image of any common format and mode, whatever its file name says.

    The first frame is used, EXIF orientation applied, transparency laid on black, 16-bit grey scaled to 8.

    Returns:
        [size, size] uint8, grey.

    Raises:
        Rejected: empty, not an image, truncated or damaged, or larger than `MAX_PIXELS`.
    """
    if not data:
        raise Rejected("empty file")
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Rejected(f"{image.width} x {image.height} pixels, over the limit of {MAX_PIXELS:,}")
            # JPEG alone honours this: decoded at 1/2, 1/4 or 1/8 where that still leaves twice the target.
            image.draft("L" if image.mode in ("L", "RGB", "YCbCr") else image.mode, (2 * size, 2 * size))
            image.load()
            grey = _to_grey(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise Rejected("not an image") from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:
        raise Rejected(_reason(error)) from None
    return np.asarray(grey.resize((size, size), Image.Resampling.BILINEAR))


def _to_grey(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_to_grey(np.asarray(image))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        colour = image.convert("RGBA")
        black = Image.new("RGBA", colour.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, colour)
    return image.convert("L")


def _deep_to_grey(values: np.ndarray) -> Image.Image:
    """Grey of more than 8 bits, to 8. X-ray detectors store 12 bits in 16-bit files, so the range decides.

    Values up to 255 stay, up to 4095 count as 12 bits, up to 65535 as 16; floats in [0, 1] are stretched.
    """
    values = values.astype(np.float64)
    top = values.max(initial=0)
    if not np.isfinite(top) or values.min(initial=0) < 0 or top > 65535:
        raise Rejected(f"grey values outside 0 to 65535 (up to {top:g})")
    white = 1 if top <= 1 else 255 if top <= 255 else 4095 if top <= 4095 else 65535
    return Image.fromarray(np.round(values * (255 / white)).astype(np.uint8))


def _reason(error: Exception) -> str:
    text = str(error).lower()
    if "truncated" in text or isinstance(error, EOFError):
        return "truncated"
    return f"damaged: {error}"
