"""Signatures: two short vectors an image, near each other where two images show the same radiograph.

Both start from the disc inscribed in the square image, which a rotation about the centre and filled corners leave as
it is, and keep only the magnitudes of Fourier coefficients along the angle, which a rotation shifts in phase, a
mirroring conjugates and an inversion of grey negates. Brightness and contrast go with the standardisation.

- The *rings* are the grey values on circles about the centre. They hold for any rotation and for little else; taken
  from smaller discs too, they find a copy that was rotated on a larger canvas.
- The *spectrum* is the magnitude of the windowed image's own Fourier transform, which ignores small shifts: it finds
  a copy whose margins were cropped (Reddy and Chatterji 1996, doi:10.1109/83.506761).
"""

from collections.abc import Sequence

import cv2
import numpy as np

SIDE = 112  # pixels of the small image that all of this is computed on
RINGS, ANGLES, HARMONICS = 32, 128, 8
CENTRE = (SIDE - 1) / 2
RADIUS = SIDE / 2 - 2  # the outermost pixels mix with filled corners when an image is resampled
_BLANK = 2.0  # grey levels of standard deviation below which there is nothing to compare

_y, _x = np.mgrid[:SIDE, :SIDE] - CENTRE
_window = np.clip(np.hypot(_x, _y) / RADIUS, 0, 1)
_window = ((1 + np.cos(np.pi * _window)) / 2).astype(np.float32)
RING_AREA = (np.arange(RINGS) + 0.5) / RINGS
RING_AREA = (RING_AREA / RING_AREA.sum()).astype(np.float32)


def shrink(image: np.ndarray) -> np.ndarray:
    """A [H, W] uint8 image at the size that signatures and alignment work on: [SIDE, SIDE] uint8."""
    return cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA)


def circles(small: np.ndarray, scales: Sequence[float]) -> np.ndarray:
    """Grey values on circles about the centre, standardised over the disc that they fill.

    Args:
        small: [SIDE, SIDE] uint8.
        scales: the discs' radii, as shares of the inscribed one.

    Returns:
        [len(scales), ANGLES, RINGS] float32; zeros where a disc is blank.
    """
    return _circles(_smooth(small), scales)


def signatures(small: np.ndarray, scales: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Rings [len(scales), RINGS / 2 · HARMONICS] and spectrum [RINGS · HARMONICS], float32.

    Each has length 1, or is zeros where there is nothing but a blank disc.
    """
    smooth = _smooth(small)
    around = _circles(smooth, scales)
    rings = _ring_signatures(around)
    return rings, _spectrum_signature(smooth) if around[0].any() else np.zeros(RINGS * HARMONICS, np.float32)


def _smooth(small: np.ndarray) -> np.ndarray:
    return cv2.GaussianBlur(small, (0, 0), 0.7).astype(np.float32)


def _circles(smooth: np.ndarray, scales: Sequence[float]) -> np.ndarray:
    centre, size = (CENTRE, CENTRE), (RINGS, ANGLES)
    found = np.stack([cv2.warpPolar(smooth, size, centre, RADIUS * scale, cv2.INTER_LINEAR) for scale in scales])
    found -= (found.mean(axis=1) @ RING_AREA)[:, np.newaxis, np.newaxis]
    deviation = np.sqrt((found**2).mean(axis=1) @ RING_AREA)
    found *= np.where(deviation < _BLANK, 0, 1 / np.maximum(deviation, _BLANK))[:, np.newaxis, np.newaxis]
    return found


def _ring_signatures(around: np.ndarray) -> np.ndarray:
    pairs = around.reshape(len(around), ANGLES, RINGS // 2, 2).mean(axis=3) * np.sqrt(RING_AREA[::2])
    magnitudes = np.abs(np.fft.rfft(pairs, axis=1))[:, :HARMONICS]
    magnitudes[:, 0] /= np.sqrt(2)
    return np.stack([_unit(scale) for scale in magnitudes])


def _spectrum_signature(smooth: np.ndarray) -> np.ndarray:
    grey = (smooth - (smooth * _window).sum() / _window.sum()) * _window
    transformed = cv2.dft(grey / np.linalg.norm(grey), flags=cv2.DFT_COMPLEX_OUTPUT)
    spectrum = np.log1p(200 * np.fft.fftshift(cv2.magnitude(transformed[..., 0], transformed[..., 1])))
    around = cv2.warpPolar(spectrum, (RINGS, ANGLES), (SIDE / 2, SIDE / 2), SIDE / 4, cv2.INTER_LINEAR)
    magnitudes = np.abs(np.fft.rfft(around, axis=0))[: 2 * HARMONICS : 2]  # a spectrum repeats after half a turn
    magnitudes[0] *= 0.3  # the mean over the circle is much alike in all radiographs
    return _unit(magnitudes)


def _unit(values: np.ndarray) -> np.ndarray:
    return (values / max(float(np.linalg.norm(values)), 1e-9)).ravel().astype(np.float32)
