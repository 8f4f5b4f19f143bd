"""Generate synthetic radiographs, so that everything can be tried without a patient's image.

Bones are hollow tubes, and their brightness is the path length of the X-ray in them: bright cortex, darker marrow with
each patient's own trabecular pattern, in soft tissue with a pattern of its own. A fracture is a jagged gap across the
shaft, with the far fragment shifted and tilted. Size, exposure, position, rotation and the distractors (growth plates,
nutrient canals, side markers) have the same distribution in both classes, so that only the gap differs.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from fracture.config import SampleConfig
from fracture.errors import UsageError
from fracture.labels import CLASS_NAMES, FRACTURE, SPLITS
from fracture.preparation.layouts.clutter import SYNTHETIC_MARKER
from fracture.storage import StoragePath

_VERSION = 2  # of the generator: the same configuration and version give the same files
_TRABECULAR, _MUSCULAR = 0.22, 0.12  # standard deviation of the density of bone and of soft tissue
_VIEWS = 3  # images of each patient
_SHARES = (0.7, 0.15, 0.15)  # of the patients, in the order of SPLITS


@dataclass(frozen=True)
class _Bone:
    """A tapered tube; lengths in units of half the image's shorter side, the image's centre at (0, 0)."""

    start: tuple[float, float]
    angle: float  # radians
    length: float
    radius: float  # at mid-shaft
    cortex: float  # wall thickness as a share of the radius


@dataclass(frozen=True)
class _Break:
    """A fracture across a bone."""

    at: float  # along the bone, 0 to 1
    width: float  # of the gap
    slope: float  # 0 is straight across
    shift: float  # of the far fragment, in radii
    tilt: float  # of the far fragment, radians
    seed: int  # of the jagged edge


def make_sample(
    folder: StoragePath, config: SampleConfig, progress: Callable[[int], None] = lambda written: None
) -> None:
    """Write `train/ val/ test/` with `fracture/` and `normal/` into `folder`. Each patient is in one split only.

    Does nothing if `folder` already holds the same sample.

    Args:
        progress: called with the number of images written so far.

    Raises:
        UsageError: the folder holds other things.
    """
    if has_sample(folder, config):
        return
    marker, file = _make_marker(config), folder / SYNTHETIC_MARKER
    if folder.files() and not file.is_file():
        raise UsageError(f"{folder} holds other things than sample radiographs. Move it, or name another --storage.")
    folder.delete()
    file.write_json(marker | {"complete": False})  # first, so that an incomplete sample is recognised
    for written, (path, data) in enumerate(draw_sample(config), 1):
        (folder / path).write_bytes(data)
        progress(written)
    file.write_json(marker | {"complete": True})


def has_sample(folder: StoragePath, config: SampleConfig) -> bool:
    """Return whether the folder holds this sample, complete."""
    file = folder / SYNTHETIC_MARKER
    return file.is_file() and file.read_json() == _make_marker(config) | {"complete": True}


def _make_marker(config: SampleConfig) -> dict[str, Any]:
    return {"synthetic": True, "version": _VERSION, **config.model_dump()}


def draw_sample(config: SampleConfig) -> Iterator[tuple[str, bytes]]:
    """Yield path and file content of each image, equally many of each class."""
    patients = config.images // _VIEWS
    for patient in range(patients):
        generator = np.random.default_rng([config.seed, patient])
        label = patient % 2  # the only difference between patients
        split = SPLITS[int(np.searchsorted(np.cumsum(_SHARES), (patient // 2 + 0.5) / (patients / 2)))]
        bones, broken, fracture = _draw_patient(generator, label == FRACTURE)
        trabeculae, muscle = _draw_pattern(generator, 1.5, 4.0), _draw_pattern(generator, 2.5, 8.0)
        for view in range(_VIEWS):
            pixels = _draw_view(generator, bones, broken, fracture, trabeculae, muscle)
            suffix = "png" if generator.random() < 0.2 else "jpg"
            name = f"patient{patient:05d}"
            if config.format == "dicom":
                suffix, data = "dcm", _encode_dicom(pixels, name, view, patient * _VIEWS + view)
            else:
                data = _encode_image(pixels, suffix)
            yield f"{split}/{CLASS_NAMES[label]}/{name}-view{view + 1}.{suffix}", data


def _encode_dicom(pixels: np.ndarray, patient: str, view: int, number: int) -> bytes:
    from fracture.preparation.sample_dicom import encode_dicom, vary_storage

    return encode_dicom(pixels, patient, "only", view, vary_storage(number))


def _encode_image(pixels: np.ndarray, suffix: str) -> bytes:
    buffer = io.BytesIO()
    if suffix == "png":
        Image.fromarray(pixels).save(buffer, "png")
    else:
        Image.fromarray(pixels).save(buffer, "jpeg", quality=90)
    return buffer.getvalue()


def _draw_patient(generator: np.random.Generator, fractured: bool) -> tuple[list[_Bone], int, _Break | None]:
    """Return the bones of one anatomy, the number of the one that may be broken, and its break if it is."""
    anatomy = generator.choice(["femur", "forearm", "finger", "metacarpals"])
    cortex = generator.uniform(0.25, 0.45)
    u = generator.uniform
    if anatomy == "femur":
        bones = [_Bone((-0.9, 0), 0, 1.8, u(0.16, 0.24), cortex)]
    elif anatomy == "forearm":
        gap = u(0.14, 0.2)
        bones = [_Bone((-0.9, y), u(-0.05, 0.05), 1.8, u(0.09, 0.13), cortex) for y in (-gap, gap)]
    elif anatomy == "finger":
        lengths = (u(0.7, 0.8), u(0.5, 0.6), u(0.35, 0.42))
        starts = np.cumsum([-0.95, *(length + 0.05 for length in lengths[:2])])
        bones = [
            _Bone((float(x), 0), u(-0.06, 0.06), length, u(0.12, 0.15) * (1 - 0.12 * i), cortex)
            for i, (x, length) in enumerate(zip(starts, lengths, strict=True))
        ]
    else:
        bones = [
            _Bone((-0.7, (i - 1.5) * 0.26), (i - 1.5) * u(0.06, 0.12), u(1.1, 1.35), u(0.07, 0.095), cortex)
            for i in range(4)
        ]
    broken = int(generator.integers(len(bones)))
    # For both classes, so that both take the same numbers from the generator.
    side = generator.choice([-1, 1])
    shift, tilt = side * u(0.4, 1.0), side * u(0.05, 0.35)
    drawn = _Break(u(0.3, 0.7), u(0.05, 0.1), u(-0.8, 0.8), shift, tilt, int(u(0, 2**31)))
    return bones, broken, drawn if fractured else None


def _draw_pattern(generator: np.random.Generator, fine: float, coarse: float) -> np.ndarray:
    """Return structure at two scales: [512, 512] float32 of mean 0 and standard deviation 1."""
    noise = generator.standard_normal((512, 512), np.float32)
    small, large = (gaussian_filter(noise, sigma, mode="wrap") for sigma in (fine, coarse))
    pattern = small / small.std() + large / large.std()
    return pattern / pattern.std()


def _draw_view(
    generator: np.random.Generator,
    bones: list[_Bone],
    broken: int,
    fracture: _Break | None,
    trabeculae: np.ndarray,
    muscle: np.ndarray,
) -> np.ndarray:
    """Return one radiograph: [H, W] uint8."""
    u = generator.uniform
    short = int(generator.integers(180, 420))
    height, width = short, int(short * u(1.0, 1.4))
    if generator.random() < 0.5:
        height, width = width, height
    x, y = _view_coordinates(generator, height, width)

    at = [(256 + 128 * axis).astype(np.float32) for axis in (x, y)]
    bony, soft = (
        1 + strength * cv2.remap(pattern, *at, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
        for strength, pattern in ((_TRABECULAR, trabeculae), (_MUSCULAR, muscle))
    )
    density = 0.55 * _chord(np.abs(y), u(0.5, 0.75)) * u(0.4, 0.8) * soft  # soft tissue around the limb
    for number, bone in enumerate(bones):
        tube = _bone_density(generator, bone, x, y, fracture if number == broken else None)
        density = density + tube * bony
    density += _side_marker(generator, height, width)
    exposed = 1 - np.exp(-density * u(0.8, 1.5))
    image = u(0.0, 0.12) + exposed * u(0.6, 0.95)
    image *= 1 - u(0, 0.25) * (x**2 + y**2) / 2  # beam falls off towards the corners
    image += generator.normal(0, u(0.01, 0.03), image.shape)
    return np.round(np.clip(image, 0, 1) ** u(0.8, 1.25) * 255).astype(np.uint8)


def _view_coordinates(generator: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y of each pixel in the limb's coordinates, with a random rotation, shift, scale and mirroring."""
    u = generator.uniform
    half = min(height, width) / 2
    columns, rows = np.meshgrid((np.arange(width) - width / 2) / half, (np.arange(height) - height / 2) / half)
    angle, scale = u(-0.4, 0.4), u(0.9, 1.2)
    columns, rows = (columns - u(-0.12, 0.12)) / scale, (rows - u(-0.12, 0.12)) / scale
    x = columns * np.cos(angle) + rows * np.sin(angle)
    y = rows * np.cos(angle) - columns * np.sin(angle)
    return x, y * (1 if generator.random() < 0.5 else -1)


def _chord(distance: np.ndarray, radius: np.ndarray | float) -> np.ndarray:
    """Return the path length of a ray through a cylinder of this radius, as a share of its diameter."""
    return np.sqrt(np.clip(1 - (distance / radius) ** 2, 0, 1))


def _bone_density(
    generator: np.random.Generator, bone: _Bone, x: np.ndarray, y: np.ndarray, fracture: _Break | None
) -> np.ndarray:
    cos, sin = np.cos(bone.angle), np.sin(bone.angle)
    dx, dy = x - bone.start[0], y - bone.start[1]
    along, across = (dx * cos + dy * sin) / bone.length, dy * cos - dx * sin  # 0 to 1, and in image units
    gap = np.zeros_like(x)
    if fracture is not None:
        edge = _jagged(across / bone.radius, fracture) * bone.radius / bone.length
        beyond = along - fracture.at - edge
        far = beyond > 0
        turned = (along - fracture.at) * bone.length * np.tan(fracture.tilt)
        across = np.where(far, across - fracture.shift * bone.radius - turned, across)
        gap = np.exp(-((beyond * bone.length / fracture.width) ** 2))
    radius = bone.radius * (1 + 0.45 * np.abs(2 * along - 1) ** 4)  # flared ends
    ends = np.clip(np.minimum(along, 1 - along) * bone.length / (0.35 * bone.radius), 0, 1)
    radius = radius * np.sqrt(np.clip(1 - (1 - ends) ** 2, 0, 1)) + 1e-6
    marrow = radius * (1 - bone.cortex)
    density = 1.5 * _chord(across, radius) - 1.0 * (1 - bone.cortex) * _chord(across, marrow)
    density *= (along > 0) & (along < 1)
    density *= 1 - generator.uniform(0.8, 1.0) * gap
    return density * _distractors(generator, bone, along, across)


def _jagged(position: np.ndarray, fracture: _Break) -> np.ndarray:
    """Return the position of the jagged edge along the bone, in radii, at each position across it."""
    generator = np.random.default_rng(fracture.seed)
    knots = np.linspace(-1.6, 1.6, 9)
    return np.interp(position, knots, fracture.slope * knots + generator.uniform(-0.22, 0.22, len(knots)))


def _distractors(generator: np.random.Generator, bone: _Bone, along: np.ndarray, across: np.ndarray) -> np.ndarray:
    """Return the factor of dark lines that are no fracture: a growth plate near an end, a canal within the marrow."""
    u = generator.uniform
    plate_at, plate_depth = (0.09 if generator.random() < 0.5 else 0.91), u(0.1, 0.4) * (generator.random() < 0.5)
    plate = plate_depth * np.exp(-(((along - plate_at) * bone.length / 0.012) ** 2))
    at, slope, depth = u(0.25, 0.75), u(2.5, 5) * generator.choice([-1, 1]), u(0.1, 0.35) * (generator.random() < 0.6)
    inside = np.abs(across) < 0.5 * bone.radius
    canal = depth * inside * np.exp(-((((along - at) * bone.length - slope * across) / 0.02) ** 2))
    return 1 - plate - canal


def _side_marker(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return the density of a bright L in a corner of every second image, like burnt-in side markers."""
    density = np.zeros((height, width))
    size = max(6, min(height, width) // 18)
    top = size if generator.random() < 0.5 else height - 2 * size
    left = size if generator.random() < 0.5 else width - 2 * size
    if generator.random() < 0.5:
        density[top : top + size, left : left + size // 3] = 2.0
        density[top + size - size // 3 : top + size, left : left + size] = 2.0
    return density
