"""Files made to harm a program that opens them, in the formats that are read."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from tests.preparation.decoding import dicom_files


def png(width: int, height: int, *chunks: bytes, depth: int = 8, colour: int = 0, rows: bytes | None = None) -> bytes:
    """Return a PNG of those sides; its compressed pixels are `rows`, or black."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    if rows is None:
        samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
        rows = _compress_zeros((1 + (width * samples * depth + 7) // 8) * height)
    return b"\x89PNG\r\n\x1a\n" + b"".join([chunk(b"IHDR", header), *chunks, chunk(b"IDAT", rows), chunk(b"IEND", b"")])


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def text_bomb(kind: bytes, size: int) -> bytes:
    """Return a chunk of text or of a colour profile that decompresses to so many bytes."""
    before = {b"zTXt": b"Comment\0\0", b"iTXt": b"Comment\0\1\0\0\0", b"iCCP": b"profile\0\0"}[kind]
    return chunk(kind, before + _compress_zeros(size))


def _compress_zeros(count: int) -> bytes:
    """Return a zlib stream of so many zeros, a thousand times smaller: one compressed block, repeated."""
    full, rest = divmod(count, 2**20)
    compressor, last = (zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS) for _ in range(2))
    block = compressor.compress(bytes(2**20)) + compressor.flush(zlib.Z_FULL_FLUSH)
    checksum = struct.pack(">HH", count % 65521, 1)  # Adler-32: each zero adds 1 to the upper half
    return b"\x78\xda" + full * block + last.compress(bytes(rest)) + last.flush() + checksum


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def small(kind: str, mode: str = "L", **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    return encoded(Image.fromarray(pixels).convert(mode), kind, **options)


def jpeg(width: int, height: int, **options) -> bytes:
    """Return a small JPEG whose header claims other sides."""
    data = bytearray(small("jpeg", "RGB", **options))
    at = next(data.find(marker) for marker in (b"\xff\xc0", b"\xff\xc2") if marker in data)
    struct.pack_into(">HH", data, at + 5, height, width)
    return bytes(data)


def gif(width: int, height: int) -> bytes:
    """Return a small GIF whose screen and first frame claim other sides."""
    data = bytearray(small("gif"))
    struct.pack_into("<HH", data, 6, width, height)
    struct.pack_into("<HH", data, data.index(b"\x2c\0\0\0\0") + 5, width, height)
    return bytes(data)


def gif_with_large_frame(width: int, height: int) -> bytes:
    """Return a GIF with a small screen and a large frame."""
    data = bytearray(small("gif"))
    struct.pack_into("<HH", data, data.index(b"\x2c\0\0\0\0") + 5, width, height)
    return bytes(data)


def webp(width: int, height: int) -> bytes:
    """Return a small animation whose canvas claims other sides."""
    frames = [Image.new("RGB", (64, 64), grey) for grey in ("black", "white")]
    data = bytearray(encoded(frames[0], "webp", save_all=True, append_images=frames[1:]))
    at = data.index(b"VP8X") + 12
    data[at : at + 6] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(data)


def tiff(tags: dict[int, tuple[int, int]], data: bytes = b"", **options) -> bytes:
    """Return a small TIFF with other values: tag -> (type, value)."""
    content = bytearray(small("tiff", **options))
    (directory,) = struct.unpack_from("<I", content, 4)
    (count,) = struct.unpack_from("<H", content, directory)
    for number in range(count):
        at = directory + 2 + 12 * number
        (tag,) = struct.unpack_from("<H", content, at)
        if tag in tags:
            struct.pack_into("<HII", content, at + 2, tags[tag][0], 1, tags[tag][1])
    return bytes(content) + data


def tiff_with_immense_tag() -> bytes:
    """Return a TIFF whose description claims four billion characters."""
    content = bytearray(small("tiff", description="x" * 40))
    at = content.index(struct.pack("<HH", 270, 2))
    struct.pack_into("<I", content, at + 4, 2**32 - 1)
    return bytes(content)


def jpeg_2000(width: int, height: int) -> bytes:
    """Return a small JPEG 2000 whose headers claim other sides."""
    data = bytearray(small("jpeg2000"))
    struct.pack_into(">II", data, data.index(b"ihdr") + 4, height, width)
    struct.pack_into(">II", data, data.index(b"\xff\x4f\xff\x51") + 8, width, height)
    return bytes(data)


def dicom(width: int, height: int) -> bytes:
    """Return a DICOM file of those sides, with all its pixels if they are within the limits."""
    made = dicom_files.dataset(np.zeros((2, 2), np.uint16))
    made.Rows, made.Columns = height, width
    made.PixelData = bytes(2 * width * height if width * height <= 10**8 else 8)
    return dicom_files.encoded(made)


def bmp(width: int, height: int) -> bytes:
    data = bytearray(small("bmp"))
    struct.pack_into("<ii", data, 18, width, height)
    return bytes(data)


def frames(kind: str, count: int) -> bytes:
    """Return an animation of so many frames of 64 × 64; the first is black."""
    black, grey = Image.new("L", (64, 64), 0), Image.new("L", (64, 64), 128)
    return encoded(black, kind, save_all=True, append_images=[grey, black] * (count // 2))
