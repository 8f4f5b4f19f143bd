import io
import struct
import zlib
from contextlib import suppress

import cv2
import numpy as np
import pytest
from PIL import Image

from fracture.preparation.decoding import decode as decode_module
from fracture.preparation.decoding.decode import Rejected, decode, is_blank

RAMP = np.tile(np.linspace(0, 255, 64).round().astype(np.uint8), (64, 1))  # dark left, bright right


def encoded(image: Image.Image, kind: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *[("png", mode) for mode in ("L", "LA", "P", "RGB", "RGBA")],
        *[("jpeg", mode) for mode in ("L", "RGB", "CMYK")],
        *[("tiff", mode) for mode in ("L", "P", "RGB", "RGBA", "CMYK", "F")],
        *[(kind, "RGB") for kind in ("bmp", "webp")],
        *[("gif", mode) for mode in ("L", "P")],
        *[(kind, mode) for kind in ("jpeg2000", "ppm") for mode in ("L", "RGB")],
        *[("jpeg2000", mode) for mode in ("LA", "RGBA")],
        ("avif", "RGB"),
    ],
)
def test_every_format_and_mode_gives_the_same_grey(kind: str, mode: str):
    grey = decode(encoded(Image.fromarray(RAMP).convert(mode), kind), 64).pixels
    assert grey.shape == (64, 64)
    assert grey.dtype == np.uint8
    assert np.abs(grey.astype(int) - RAMP).max() <= 6  # JPEG, palettes and CMYK round


def test_one_bit_is_black_and_white():
    half = Image.fromarray(RAMP > 127).convert("1")
    assert np.unique(decode(encoded(half), 64).pixels).tolist() == [0, 255]


@pytest.mark.parametrize("kind", ["png", "tiff"])
@pytest.mark.parametrize(("white", "grey"), [(65535, 255), (16383, 255), (4095, 255), (1023, 255), (200, 200)])
def test_16_bit_is_scaled_by_the_range_in_use(kind: str, white: int, grey: int):
    deep = Image.fromarray(np.array([[0, white]], np.uint16).repeat(32, axis=1))
    pixels = decode(encoded(deep, kind), 64).pixels
    assert (pixels[0, 0], pixels[0, -1]) == (0, grey)


def test_a_tiff_in_which_0_is_white_is_inverted():
    deep = Image.fromarray(np.array([[0, 4095]], np.uint16).repeat(32, axis=1))
    entry = struct.pack("<HHII", 262, 3, 1, 1)  # PhotometricInterpretation, one SHORT: BlackIsZero
    tiff = encoded(deep, "tiff")
    assert tiff.count(entry) == 1
    pixels = decode(tiff.replace(entry, struct.pack("<HHII", 262, 3, 1, 0)), 64).pixels
    assert (pixels[0, 0], pixels[0, -1]) == (255, 0)


def test_negative_values_are_no_grey():
    with pytest.raises(Rejected, match="grey values outside 0 to 65535"):
        decode(encoded(Image.fromarray(np.full((8, 8), -5, np.int32)), "tiff"), 64)


def test_transparent_is_black():
    transparent = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    assert decode(encoded(transparent), 32).pixels.max() == 0


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise by 90°
    turned = decode(encoded(Image.fromarray(RAMP), "jpeg", exif=exif), 64).pixels
    assert np.abs(turned.astype(int) - np.rot90(RAMP, -1)).max() <= 6


def test_the_first_frame_of_an_animation():
    frames = [Image.new("L", (8, 8), value) for value in (10, 200)]
    assert decode(encoded(frames[0], "gif", save_all=True, append_images=frames[1:]), 32).pixels.max() == 10


def test_a_large_jpeg_decoded_at_reduced_scale_looks_the_same():
    large = Image.fromarray(RAMP).resize((2048, 2048), Image.Resampling.BICUBIC)
    exact = np.asarray(large.resize((64, 64), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(decode(encoded(large, "jpeg", quality=95), 64).pixels - exact).max() <= 4


def test_the_stored_format_mode_and_size_are_reported():
    image = decode(encoded(Image.fromarray(RAMP[:32]).convert("RGBA"), "png"), 64)
    assert (image.format, image.mode, image.width, image.height) == ("PNG", "RGBA", 64, 32)


def test_files_that_are_no_images():
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (99, 99), np.uint8)), "jpeg")
    for data, reason in ((b"", "empty file"), (b"hello", "not an image"), (whole[: len(whole) // 2], "truncated")):
        with pytest.raises(Rejected, match=reason):
            decode(data, 64)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff", "gif", "bmp", "avif", "jpeg2000", "ppm"])
@pytest.mark.filterwarnings("ignore")  # Pillow warns of some damage that it tolerates
def test_damaged_files_raise_no_other_error(kind: str):
    whole = bytearray(encoded(Image.fromarray(RAMP).convert("RGB"), kind))
    generator = np.random.default_rng(0)
    for _ in range(200):
        data = whole.copy()
        for position in generator.integers(0, len(data), 4):
            data[position] = generator.integers(256)
        with suppress(Rejected):
            assert decode(bytes(data), 32).pixels.shape == (32, 32)


def test_a_decompression_bomb_is_refused_before_it_is_decompressed(monkeypatch):
    monkeypatch.setattr(decode_module, "MAX_PIXELS", 63 * 64)
    with pytest.raises(Rejected, match="64 x 64 pixels, over the limit of 4,032"):
        decode(encoded(Image.fromarray(RAMP)), 64)


def test_the_centre_keeps_the_aspect():
    wide = np.tile(np.arange(90, dtype=np.uint8), (30, 1))
    centre = decode(encoded(Image.fromarray(wide), "png"), 30).crop_centre()
    assert centre.shape == (30, 30)
    assert centre[0].tolist() == list(range(30, 60))
    assert decode(encoded(Image.fromarray(wide[:, :30]), "png"), 30).crop_centre() is None


# One radiograph in many files. A dark one: its largest value says nothing of its depth.
DARK = (RAMP * 0.6).astype(np.uint8)
DEEP = DARK.astype(np.uint16) * 16
OPAQUE = np.full_like(DEEP, 65535)


def by_opencv(kind: str, values: np.ndarray) -> bytes:
    lossless = [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000] if kind == ".jp2" else []
    return cv2.imencode(kind, values, lossless)[1].tobytes()


def deep_png(samples: np.ndarray, colour: int, *chunks: bytes) -> bytes:
    """Return a PNG of 16 bits; `colour` 4 is grey with alpha, which no library here writes."""
    height, width = samples.shape[:2]

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunk(kind, data) for kind, data in chunks) + pixels


def tiff(samples: bytes, bits: tuple[int, ...], *, order: str = "<", **tags: tuple[int, ...]) -> bytes:
    """Return an uncompressed TIFF of 64 × 64 in one strip, or a strip for each plane; `tags` are t262=(0,), ..."""
    values = {256: (64,), 257: (64,), 258: bits, 259: (1,), 262: (1,), 277: (len(bits),), 278: (64,)}
    values |= {int(name[1:]): value for name, value in tags.items()}
    strips = len(bits) if values.get(284) == (2,) else 1
    length = len(samples) // strips
    values |= {273: tuple(8 + length * n for n in range(strips)), 279: (length,) * strips}
    directory, extra = b"", b""
    after = 8 + len(samples) + 2 + 12 * len(values) + 4
    for tag, numbers in sorted(values.items()):
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        if len(packed) > 4:
            packed, extra = struct.pack(f"{order}I", after + len(extra)), extra + packed
        directory += struct.pack(f"{order}HHI", tag, 4, len(numbers)) + packed
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(samples))
    return head + samples + struct.pack(f"{order}H", len(values)) + directory + bytes(4) + extra


def twelve_bits(values: np.ndarray) -> bytes:
    pairs = values.reshape(-1, 2).astype(np.uint32)
    both = pairs[:, 0] << 12 | pairs[:, 1]
    return both.astype(">u4").view(np.uint8).reshape(-1, 4)[:, 1:].tobytes()


SAME = {
    "png, 12 of 16 bits": lambda: by_opencv(".png", DEEP),
    "png, all of 16 bits": lambda: by_opencv(".png", DARK.astype(np.uint16) * 257),
    "png, upper of 16 bits": lambda: by_opencv(".png", DARK.astype(np.uint16) * 256),
    "png, 8 of 16 bits": lambda: by_opencv(".png", DARK.astype(np.uint16)),
    "png rgb of 16 bits": lambda: by_opencv(".png", np.stack([DEEP] * 3, -1)),
    "png rgba of 16 bits": lambda: by_opencv(".png", np.stack([*[DEEP] * 3, OPAQUE], -1)),
    "png grey and alpha of 16 bits": lambda: deep_png(np.stack([DEEP, OPAQUE], -1), 4),
    "png with gamma and depth": lambda: deep_png(DEEP, 0, (b"gAMA", struct.pack(">I", 10**5)), (b"sBIT", b"\x0c")),
    "png rgb with gamma": lambda: deep_png(np.stack([DEEP] * 3, -1), 2, (b"gAMA", struct.pack(">I", 45455))),
    "tiff of 16 bits": lambda: by_opencv(".tiff", DEEP),
    "tiff rgb of 16 bits": lambda: by_opencv(".tiff", np.stack([DEEP] * 3, -1)),
    "tiff rgba of 16 bits": lambda: by_opencv(".tiff", np.stack([*[DEEP] * 3, OPAQUE], -1)),
    "tiff, big endian": lambda: tiff(DEEP.astype(">u2").tobytes(), (16,), order=">"),
    "tiff rgb, big endian": lambda: tiff(
        np.stack([DEEP] * 3, -1).astype(">u2").tobytes(), (16,) * 3, order=">", t262=(2,)
    ),
    "tiff, signed": lambda: tiff(DEEP.tobytes(), (16,), t339=(2,)),
    "tiff of 12 bits": lambda: tiff(twelve_bits(DEEP), (12,)),
    "tiff of 32 bits": lambda: tiff(DEEP.astype(np.uint32).tobytes(), (32,)),
    "tiff of floats": lambda: encoded(Image.fromarray((DARK / 255).astype(np.float32)), "tiff"),
    "tiff rgb in planes": lambda: tiff(np.stack([DARK] * 3).tobytes(), (8,) * 3, t262=(2,), t284=(2,)),
    "tiff, 0 is white, 8 bits": lambda: tiff((255 - DARK).tobytes(), (8,), t262=(0,)),
    "pgm of 16 bits": lambda: by_opencv(".pgm", DEEP),
    "pgm of 12 bits": lambda: b"P5 64 64 4095\n" + DEEP.astype(">u2").tobytes(),
    "pgm of 8 bits": lambda: b"P5 64 64 255\n" + DARK.tobytes(),
    "pgm in text": lambda: b"P2 64 64 255\n" + b" ".join(b"%d" % value for value in DARK.ravel()),
    "ppm of 16 bits": lambda: by_opencv(".ppm", np.stack([DEEP] * 3, -1)),
    "jpeg 2000 of 16 bits": lambda: by_opencv(".jp2", DEEP),
    "jpeg 2000 rgb of 16 bits": lambda: by_opencv(".jp2", np.stack([DEEP] * 3, -1)),
    "jpeg 2000 of 8 bits": lambda: by_opencv(".jp2", DARK),
    "webp, lossless": lambda: encoded(Image.fromarray(DARK).convert("RGB"), "webp", lossless=True),
    "bmp of 32 bits": lambda: encoded(Image.fromarray(DARK).convert("RGBA"), "bmp"),
    "gif": lambda: encoded(Image.fromarray(DARK), "gif"),
    "cmyk tiff": lambda: encoded(Image.fromarray(DARK).convert("CMYK"), "tiff"),
    "palette of grey": lambda: encoded(Image.fromarray(DARK).convert("P"), "png"),
    "opaque alpha": lambda: encoded(Image.fromarray(DARK).convert("RGBA"), "png"),
}


@pytest.mark.parametrize("name", SAME)
def test_one_radiograph_is_one_picture(name: str):
    assert np.abs(decode(SAME[name](), 64).pixels.astype(int) - DARK).max() <= 1


NOT_CERTAIN = {
    "a TIFF of 16 bits in separate planes": lambda: tiff(
        np.stack([DEEP] * 3).tobytes(), (16,) * 3, t262=(2,), t284=(2,)
    ),
    "a TIFF of 16 bits in separate planes or CMYK": lambda: tiff(
        np.stack([OPAQUE - DEEP] * 4, -1).tobytes(), (16,) * 4, t262=(5,)
    ),
    "or a TIFF of a kind that is not read": lambda: tiff(DEEP.astype(np.float64).tobytes(), (64,), t339=(3,)),
    "grey values outside 0 to 65535": lambda: tiff((DEEP.astype(np.uint32) << 16).tobytes(), (32,)),
    "colours in L": lambda: encoded(Image.fromarray(np.stack([DARK] * 3, -1)).convert("RGB").copy(), "tiff").replace(
        struct.pack("<HHIHH", 262, 3, 1, 2, 0), struct.pack("<HHIHH", 262, 3, 1, 8, 0)
    ),
    "colour of more than 8 bits that cannot be read whole": lambda: (
        b"P3 64 64 4095\n" + b" ".join(b"%d" % value for value in np.stack([DEEP] * 3, -1).ravel())
    ),
}


@pytest.mark.parametrize("reason", NOT_CERTAIN)
def test_grey_that_is_not_certain_is_refused(reason: str):
    with pytest.raises(Rejected, match=reason):
        decode(NOT_CERTAIN[reason](), 64)


def test_raw_values_become_their_percentiles():
    values = np.full((100, 100), 1000, np.uint16)
    values[50:] = np.linspace(1500, 2000, 100)
    values[-1, -20:] = 65535
    for data in (by_opencv(".png", values), by_opencv(".png", np.stack([values] * 3, -1)), by_opencv(".tiff", values)):
        pixels = decode(data, 100).pixels
        assert (pixels[0, 0], pixels[60, 0], pixels[60, 50], pixels[60, 99]) == (0, 128, 192, 255)


def test_deep_colour_keeps_transparency_and_orientation():
    half = np.where(np.arange(64)[:, None] < 32, OPAQUE, 0)
    clear = decode(deep_png(np.stack([*[DEEP] * 3, half], -1), 6), 64).pixels
    assert np.array_equal(clear, np.where(half > 0, DARK, 0))
    turned = Image.Exif()
    turned[0x0112] = 6
    exif = (b"eXIf", turned.tobytes().removeprefix(b"Exif\0\0"))
    assert np.array_equal(decode(deep_png(np.stack([DEEP] * 3, -1), 2, exif), 64).pixels, np.rot90(DARK, -1))


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_the_largest_page_of_a_tiff(mode: str):
    pages = [Image.fromarray(page).convert(mode) for page in (DARK[:8, :8], DARK, DARK[:16])]
    image = decode(encoded(pages[0], "tiff", save_all=True, append_images=pages[1:]), 64)
    assert (image.width, image.height) == (64, 64)
    assert np.array_equal(image.pixels, DARK)


def test_the_largest_page_of_deep_colour():
    pages = [np.stack([page] * 3, -1) for page in (DEEP[:8, :8], DEEP)]
    data = cv2.imencodemulti(".tiff", pages)[1].tobytes()
    assert np.array_equal(decode(data, 64).pixels, DARK)


def test_a_photograph_with_a_preview_is_jpeg():
    large, preview = (Image.fromarray(RAMP).resize((side, side)) for side in (64, 16))
    image = decode(encoded(large, "mpo", save_all=True, append_images=[preview]), 64)
    assert (image.format, image.width) == ("JPEG", 64)


@pytest.mark.parametrize("grey", [0, 17, 255])
def test_a_flat_image_is_blank(grey: int):
    flat = np.full((224, 224), grey, np.uint8)
    noise = np.random.default_rng(0).integers(-1, 2, flat.shape)
    assert is_blank(flat)
    assert is_blank(np.clip(flat + noise, 0, 255).astype(np.uint8))
    framed = np.pad(np.full((180, 180), 128, np.uint8), 22)
    assert is_blank(framed)
    marked = flat.copy()
    marked[5:20, 5:20] = 128  # a letter in the corner
    assert is_blank(marked)


@pytest.mark.parametrize("sigma", [1, 2, 3, 5])
def test_noise_on_a_flat_image_is_blank(sigma: int):
    noise = np.random.default_rng(sigma).normal(0, sigma, (224, 224))
    framed = np.pad(np.full((180, 180), 128.0), 22)
    for plain in (np.full((224, 224), 100.0), framed):
        assert is_blank(np.clip(plain + noise, 0, 255).round().astype(np.uint8))


@pytest.mark.parametrize("side", [32, 64, 224])
def test_a_pixel_in_the_corner_does_not_hide_a_blank_image(side: int):
    flat, framed = np.full((side, side), 100, np.uint8), np.pad(np.full((side - 8, side - 8), 128, np.uint8), 4)
    for image in (flat, framed):
        for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
            marked = image.copy()
            marked[row, column] = 255
            assert is_blank(marked)


@pytest.mark.parametrize("spread", [1, 3, 10])
@pytest.mark.parametrize("is_normal", [False, True])
def test_a_flat_exposure_of_more_than_8_bits_is_blank(spread: int, is_normal: bool):
    generator = np.random.default_rng(spread)
    noise = (
        generator.normal(0, spread, (300, 300)) if is_normal else generator.integers(-spread, spread + 1, (300, 300))
    )
    values = np.round(2000 + noise).astype(np.uint16)
    hot = values.copy()
    hot[0, 0] = 65535
    for flat in (values, values * 16, hot):
        pixels = decode(encoded(Image.fromarray(flat)), 64).pixels
        assert np.ptp(pixels[1:, 1:]) <= 5
        assert is_blank(pixels)


def test_a_radiograph_is_not_blank():
    collimated = np.zeros((224, 224), np.uint8)
    collimated[100:130, 100:130] = RAMP[:30, 17:47]  # 1.8 % of the image
    faint = np.tile(np.linspace(100, 110, 224).astype(np.uint8), (224, 1))
    for pixels in (RAMP, DARK, collimated, 255 - collimated, faint):
        assert not is_blank(pixels)


@pytest.mark.parametrize("offset", range(100, 108))
def test_a_hundredth_that_is_exposed_is_enough(offset: int):
    pixels = np.full((224, 224), 255, np.uint8)
    pixels[offset : offset + 23, offset : offset + 23] = RAMP[:23, 17:40]  # 1.05 % of the image
    assert not is_blank(pixels)


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("shape", [(32, 32), (40, 36)])
def test_an_image_of_noise_of_full_range_is_not_blank(size: int, shape: tuple[int, int]):
    for seed in range(20):
        noise = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
        assert not is_blank(decode(encoded(Image.fromarray(noise)), size).pixels)


def test_raw_values_of_a_little_more_than_a_fiftieth_of_their_depth_are_stretched():
    ramp = np.linspace(2000, 2090, 64).round().astype(np.uint16)  # 4095 / 50 = 82
    pixels = decode(encoded(Image.fromarray(np.tile(ramp, (64, 1)))), 64).pixels
    assert (pixels.min(), pixels.max()) == (0, 255)


@pytest.mark.parametrize("columns", [(0, 100), (60, 160), (0, 130), (80, 224), (75, 149)])
@pytest.mark.parametrize("rows", [(0, 224), (75, 149), (90, 130)])
def test_an_empty_field_is_blank_wherever_its_edge_is(columns: tuple[int, int], rows: tuple[int, int]):
    """As of a collimator: evenly grey on black."""
    image = np.zeros((224, 224), np.uint8)
    image[slice(*rows), slice(*columns)] = 150
    assert is_blank(image)
