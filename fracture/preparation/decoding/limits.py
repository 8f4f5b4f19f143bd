"""What a file may be before it is opened, and the refusal of one that is not."""

MAX_PIXELS = 100_000_000  # a 10,000 × 10,000 radiograph; anything larger is treated as a decompression bomb
MAX_SIDE = 65_535  # JPEG's own limit; resizing a longer side would need a gigabyte of weights
MAX_BYTES = 1_000_000_000  # of the file; the same radiograph in uncompressed 16-bit RGB has 600 MB


class Rejected(Exception):
    """The file cannot be used as a radiograph; the text is the reason."""


def check_file_size(size: int) -> None:
    """Check the size of a file, in bytes, before it is read.

    Raises:
        Rejected: larger than the limit.
    """
    if size > MAX_BYTES:
        raise Rejected(f"{size:,} bytes, over the limit of {MAX_BYTES:,}")


def check_pixels(width: int, height: int, limit: int = MAX_PIXELS) -> None:
    """Check the sides of an image before it is decompressed.

    Raises:
        Rejected: more pixels than the limit, or a side too long.
    """
    if width * height > limit:
        raise Rejected(f"{width} x {height} pixels, over the limit of {limit:,}")
    if max(width, height) > MAX_SIDE:
        raise Rejected(f"{width} x {height} pixels, over the limit of {MAX_SIDE:,} a side")
