import io
import struct
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from fracture.preparation import decode as decode_module
from fracture.preparation.decode import Rejected, decode

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


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff", "gif", "bmp"])
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
