"""Each file is decoded in a process of its own, whose additional memory is limited."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fracture.labels import NORMAL
from fracture.preparation.decoding.decode import MAX_BYTES, Rejected, decode
from fracture.preparation.facts import scan_file
from fracture.preparation.source import ImageFile
from fracture.storage import storage_path
from tests.preparation.decoding import hostile

DECODE = """
import resource, sys
from pathlib import Path
from fracture.preparation.decoding.decode import Rejected, decode

data = Path(sys.argv[1]).read_bytes()
own = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (own + int(sys.argv[2]) * 10**6,) * 2)
try:
    image = decode(data, 224)
    print("read", image.format, image.pixels.shape, image.width, image.height)
except Rejected as error:
    print("rejected:", error)
"""


def try_to_decode(tmp_path: Path, data: bytes, megabytes: int) -> str:
    (tmp_path / "file").write_bytes(data)
    command = [sys.executable, "-W", "ignore", "-c", DECODE, str(tmp_path / "file"), str(megabytes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "png of 30,000": (lambda: hostile.png(30_000, 30_000), "900000000 pixels, over the limit of 100,000,000"),
    "png without end": (lambda: hostile.png(2**31 - 1, 2**31 - 1, rows=b""), "over the limit of 100,000,000"),
    "png of one row": (lambda: hostile.png(10**8, 1), "100000000 x 1 pixels, over the limit of 65,535 a side"),
    "png with zTXt": (
        lambda: hostile.png(64, 64, hostile.text_bomb(b"zTXt", 2 * 10**8)),
        "damaged: Decompressed data too",
    ),
    "png with iTXt": (
        lambda: hostile.png(64, 64, hostile.text_bomb(b"iTXt", 2 * 10**8)),
        "damaged: Decompressed data too",
    ),
    "png with iCCP": (
        lambda: hostile.png(64, 64, hostile.text_bomb(b"iCCP", 2 * 10**8)),
        "damaged: Decompressed data too",
    ),
    "png with many zTXt": (
        lambda: hostile.png(64, 64, *[hostile.text_bomb(b"zTXt", 10**6)] * 2000),
        "damaged: Too much memory used in text chunks",
    ),
    "jpeg of 65,535": (lambda: hostile.jpeg(65_535, 65_535), "4294836225 pixels, over the limit of 100,000,000"),
    "gif of 65,535": (lambda: hostile.gif(65_535, 65_535), "over the limit of 100,000,000"),
    "gif, large frame": (lambda: hostile.gif_with_large_frame(65_535, 65_535), "over the limit of 100,000,000"),
    "webp of 2^24": (lambda: hostile.webp(2**24, 2**24), "over the limit of 100,000,000|damaged"),
    "webp of 16,384": (lambda: hostile.webp(16_384, 16_384), "over the limit of 100,000,000"),
    "tiff of 2^31": (lambda: hostile.tiff({256: (4, 2**31), 257: (4, 2**31)}), "over the limit of 100,000,000"),
    "bmp of 2^31": (lambda: hostile.bmp(2**31 - 1, 2**31 - 1), "over the limit of 100,000,000"),
    "pgm of 30,000": (lambda: b"P5 30000 30000 255\n", "over the limit of 100,000,000"),
    "pgm of one row": (lambda: b"P5 100000000 1 255\n", "over the limit of 65,535 a side"),
    "jpeg 2000 of 2^31": (lambda: hostile.jpeg_2000(2**31 - 1, 2**31 - 1), "over the limit of 100,000,000|damaged"),
    "dicom of 65,535": (lambda: hostile.dicom(65_535, 65_535), "over the limit of 100,000,000"),
    "bmp upside down": (lambda: hostile.bmp(30_000, -30_000), "over the limit of 100,000,000"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bomb_is_refused_before_it_unfolds(tmp_path: Path, name: str):
    make, reason = REFUSED[name]
    with pytest.raises(Rejected, match=reason):
        raise Rejected(try_to_decode(tmp_path, make(), megabytes=100))


READ: dict[str, tuple[Callable[[], bytes], int]] = {
    "5,000 frames of gif": (lambda: hostile.frames("gif", 5000), 100),
    "1,000 frames of tiff": (lambda: hostile.frames("tiff", 1000), 100),
    "1,000 frames of webp": (lambda: hostile.frames("webp", 1000), 100),
    "1,000 frames of png": (lambda: hostile.frames("png", 1000), 100),
    "a tiff in strips of 2^32 rows": (lambda: hostile.tiff({278: (4, 2**32 - 1)}, compression="tiff_lzw"), 100),
    "a tiff with 65,535 samples": (lambda: hostile.tiff({277: (3, 65_535)}), 100),
    "a tiff with a strip of 2^32 bytes": (lambda: hostile.tiff({279: (4, 2**32 - 1)}), 100),
    "a tiff with a description of 2^32 characters": (hostile.tiff_with_immense_tag, 100),
    "a jpeg that claims 10,000": (lambda: hostile.jpeg(10_000, 10_000), 500),
    "a jpeg in scans that claims 10,000": (lambda: hostile.jpeg(10_000, 10_000, progressive=True), 900),
    "a webp that claims 10,000": (lambda: hostile.webp(10_000, 10_000), 2000),
    "a grey png of 10,000": (lambda: hostile.png(10_000, 10_000), 800),
    "a deep png of 10,000": (lambda: hostile.png(10_000, 10_000, depth=16), 800),
    "a jpeg 2000 that claims 10,000": (lambda: hostile.jpeg_2000(10_000, 10_000), 2000),
    "a dicom of 10,000": (lambda: hostile.dicom(10_000, 10_000), 900),
    "a coloured png of 10,000": (lambda: hostile.png(10_000, 10_000, depth=16, colour=6), 800),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", READ)
def test_decoding_within_the_limits_takes_bounded_memory(tmp_path: Path, name: str):
    make, megabytes = READ[name]
    assert try_to_decode(tmp_path, make(), megabytes).startswith("read ")


@pytest.mark.parametrize(
    "data",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n(/etc/passwd) (r) file\n",
        b"%PDF-1.7\n1 0 obj <</Type /Catalog /OpenAction <</S /JavaScript /JS (app.alert\\(1\\))>>>> endobj\n",
        b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>alert(1)</script></svg>',
        b"8BPS\0\1" + bytes(100),
        b"\0\0\1\0\1\0" + bytes(100),
        bytes(128) + b"DICM" + bytes(100),
        b"\x80\x04\x95cos\nsystem\n",
        b"PK\x03\x04" + bytes(100),
    ],
    ids=["eps", "pdf", "svg", "psd", "ico", "dicom", "pickle", "zip"],
)
def test_other_formats_are_not_opened(data: bytes):
    with pytest.raises(Rejected, match="not an image"):
        decode(data, 32)


def test_a_file_of_many_bytes_is_not_read(tmp_path: Path):
    with (tmp_path / "1.png").open("wb") as file:
        file.truncate(2**40)  # a hole, which takes no room on the disk
    found = ImageFile("1.png", NORMAL, "", size=2**40, modified=0)
    row, pixels = scan_file(found, storage_path(tmp_path / "1.png"), 32)
    assert row["reason"] == f"1,099,511,627,776 bytes, over the limit of {MAX_BYTES:,}"
    assert pixels is None


def test_an_image_converted_in_bands_is_as_one_converted_whole():
    generator = np.random.default_rng(0)
    colour = Image.fromarray(generator.integers(0, 256, (2100, 2100, 4), np.uint8))
    black = Image.new("RGBA", colour.size, (0, 0, 0, 255))
    whole = np.asarray(Image.alpha_composite(black, colour).convert("L"))
    assert np.array_equal(decode(hostile.encoded(colour, "png", compress_level=0), 2100).pixels, whole)
    deep = generator.integers(0, 4096, (2100, 2100), np.uint16)
    pixels = decode(hostile.encoded(Image.fromarray(deep), "png", compress_level=0), 2100).pixels
    assert np.array_equal(pixels, np.round(deep * (255 / 4095)))


def test_transparent_colours_of_a_palette_are_black():
    palette = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("P")
    transparent = hostile.encoded(palette, "png", transparency=200)
    assert decode(transparent, 16).pixels.ravel().tolist() == [*range(200), 0, *range(201, 256)]
