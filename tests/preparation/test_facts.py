"""What is measured of each image beside what it shows."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFilter

from fracture.labels import FRACTURE
from fracture.preparation.facts import scan_bytes
from fracture.preparation.source import ImageFile

SIDE = 64


def encode(pixels: np.ndarray, kind: str = "PNG", **options: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def measure(data: bytes, name: str, size: int = SIDE) -> float | None:
    return scan_bytes(ImageFile("a.png", FRACTURE, "", len(data), 0), data, size)[0][name]


def make_waves(*waves: int, side: int = SIDE) -> np.ndarray:
    """Cosines along rows, of so many half periods and equal energy."""
    x = np.arange(side)
    row = sum(120 / len(waves) * np.cos(np.pi * (2 * x + 1) * wave / (2 * side)) for wave in waves)
    return np.tile(np.round(128 + row), (side, 1)).astype(np.uint8)


@pytest.mark.parametrize(("waves", "share"), [([5], 0), ([50], 1), ([5, 50], 0.5), ([3, 5, 9, 50], 0.25)])
def test_sharpness_is_the_share_of_energy_beyond_half_of_the_frequencies(waves: list[int], share: float):
    assert measure(encode(make_waves(*waves)), "sharpness") == pytest.approx(share, abs=0.002)
    assert measure(encode(make_waves(*waves).T), "sharpness") == pytest.approx(share, abs=0.002), "columns count alike"


def test_sharpness_is_that_of_the_image_at_the_size_of_training():
    """Of 112 half periods on 128 pixels nothing is left on 64; 24 are beyond half of the frequencies on 32 pixels."""
    assert measure(encode(make_waves(5, 112, side=128)), "sharpness", size=128) == pytest.approx(0.5, abs=0.002)
    assert measure(encode(make_waves(5, 112, side=128)), "sharpness", size=64) < 0.01
    assert measure(encode(make_waves(5, 24, side=128)), "sharpness", size=128) < 0.002
    assert measure(encode(make_waves(5, 24, side=128)), "sharpness", size=32) > 0.02
    assert measure(encode(make_waves(5, 40, side=51)), "sharpness", size=51) == pytest.approx(0.5, abs=0.1), "odd"


def test_a_blurred_radiograph_is_less_sharp(sample_images: dict[str, bytes]):
    image = Image.open(io.BytesIO(next(iter(sample_images.values())))).convert("L")
    blurred = image.filter(ImageFilter.GaussianBlur(2))
    sharp, soft = (measure(encode(np.asarray(one)), "sharpness", 224) for one in (image, blurred))
    assert 0 < soft < sharp / 2


def make_blocks(height: int, width: int, border: int) -> np.ndarray:
    """Steps of 1, and of `border` from one block of 8 pixels to the next, up and down by turns."""
    rows, columns = (np.where(at % 16 < 8, at % 8, 7 + border - at % 8) for at in map(np.arange, (height, width)))
    return (60 + rows[:, None] + columns).astype(np.uint8)


@pytest.mark.parametrize("shape", [(16, 16), (17, 40)])
def test_compression_compares_steps_across_blocks_with_those_beside(shape: tuple[int, int]):
    pixels = make_blocks(*shape, border=3)
    assert pixels[0, 5:10].tolist() == [65, 66, 67, 70, 69]
    assert measure(encode(pixels), "compression") == pytest.approx(3)
    assert measure(encode(make_blocks(*shape, border=1)), "compression") == pytest.approx(1)


def test_compression_is_that_of_the_middle_from_a_blocks_corner_on():
    pixels = make_blocks(601, 803, border=3)
    outside = np.ones(pixels.shape, bool)
    outside[40:552, 144:656] = False  # the largest multiples of 8 that leave 512 pixels in the middle
    pixels[outside] = 0
    assert measure(encode(pixels), "compression") == pytest.approx(3)


def test_compression_rises_as_the_quality_of_jpeg_falls_and_stays_in_other_formats(sample_images: dict[str, bytes]):
    image = Image.open(io.BytesIO(next(iter(sample_images.values())))).convert("L").resize((203, 301))
    files = [encode(np.asarray(image)), *(encode(np.asarray(image), "JPEG", quality=q) for q in (90, 60, 30))]
    found = [measure(data, "compression") for data in files]
    assert found == sorted(found)
    assert found[0] == pytest.approx(1, abs=0.1)
    again = encode(np.asarray(Image.open(io.BytesIO(files[-1]))))
    assert measure(again, "compression") == pytest.approx(found[-1])


def test_compression_is_unknown_where_blocks_cannot_be_seen():
    noise = np.random.default_rng(0).integers(0, 256, (4 * SIDE, 4 * SIDE), np.uint8)
    assert measure(encode(noise), "compression") == pytest.approx(1, abs=0.05)
    assert measure(encode(noise, "JPEG"), "compression") is None, "decoded at half of its sides"
    assert measure(encode(noise[:15]), "compression") is None, "it has no two blocks"
    blocks = np.kron(noise[:8, :8], np.ones((8, 8), np.uint8))
    assert measure(encode(blocks), "compression") is None, "no step beside the borders"
