"""Edits of radiographs that make copies, as people and programs make them."""

import io
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image


def encoded(image: np.ndarray, kind: str = "png", **options: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


def _reencode(image: np.ndarray, quality: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded(image, "jpeg", quality=quality))))


def _resize(image: np.ndarray, side: int) -> np.ndarray:
    return cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)


def _crop(image: np.ndarray, generator: np.random.Generator, most: float) -> np.ndarray:
    size = len(image)
    top, bottom, left, right = (int(share * size) for share in generator.uniform(0, most, 4))
    return _resize(np.ascontiguousarray(image[top : size - bottom, left : size - right]), size)


def _rotate(image: np.ndarray, degrees: float, fill: int = 0, scale: float = 1.0) -> np.ndarray:
    size = len(image)
    matrix = cv2.getRotationMatrix2D(((size - 1) / 2, (size - 1) / 2), degrees, scale)
    return cv2.warpAffine(image, matrix, (size, size), borderValue=fill)


def _rotate_on_a_larger_canvas(image: np.ndarray, degrees: float) -> np.ndarray:
    angle = np.radians(degrees)
    return _rotate(image, degrees, scale=1 / (abs(np.cos(angle)) + abs(np.sin(angle))))


def _expose(image: np.ndarray, gamma: float, shift: int) -> np.ndarray:
    return np.clip(255 * (image / 255) ** gamma + shift, 0, 255).astype(np.uint8)


def _fill_corners(image: np.ndarray, value: int) -> np.ndarray:
    size = len(image)
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    return np.where(np.hypot(x, y) > size / 2, value, image).astype(np.uint8)


def _mark(image: np.ndarray) -> np.ndarray:
    return cv2.putText(image.copy(), "L", (15, 40), cv2.FONT_HERSHEY_SIMPLEX, 1.2, 255, 3)


Edit = Callable[[np.ndarray, np.random.Generator], np.ndarray]  # from and to [S, S] uint8

EDITS: dict[str, Edit] = {
    "re-encoded": lambda image, g: _reencode(image, 25),
    "resized": lambda image, g: _resize(image, 90),
    "cropped 5 %": lambda image, g: _crop(image, g, 0.05),
    "cropped 10 %": lambda image, g: _crop(image, g, 0.10),
    "brightened": lambda image, g: _expose(image, 1.0, 35),
    "gamma 0.7": lambda image, g: _expose(image, 0.7, 0),
    "gamma 1.5": lambda image, g: _expose(image, 1.5, 0),
    "inverted": lambda image, g: 255 - image,
    "flipped": lambda image, g: np.ascontiguousarray(image[:, ::-1]),
    "rotated by any angle": lambda image, g: _rotate(image, g.uniform(0, 360)),
    "rotated, white corners": lambda image, g: _rotate(image, g.uniform(0, 360), 255),
    "rotated on a larger canvas": lambda image, g: _rotate_on_a_larger_canvas(image, g.uniform(0, 360)),
    "corners filled": lambda image, g: _fill_corners(image, 255),
    "marked with a letter": lambda image, g: _mark(image),
    "rotated, flipped, inverted, re-encoded": lambda image, g: _reencode(
        255 - _rotate(np.ascontiguousarray(image[::-1]), g.uniform(0, 360)), 40
    ),
}
