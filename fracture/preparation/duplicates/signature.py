"""Signatures: two short vectors for each image, close to each other if two images show the same radiograph.

Both are computed from the disc inscribed in the square image, which neither a rotation about the centre nor filled
corners change. They keep only the magnitudes of Fourier coefficients along the angle: a rotation shifts their phase, a
mirroring conjugates them and an inversion of grey negates them. Standardisation removes brightness and contrast.

- The *rings* are the grey values on circles about the centre. They are invariant to rotation and to little else. Rings
  of smaller discs find a copy that was rotated on a larger canvas.
- The *spectrum* is the magnitude of the windowed image's own Fourier transform, which ignores small shifts: it finds
  a copy whose margins were cropped (Reddy and Chatterji 1996, doi:10.1109/83.506761).
"""

from collections.abc import Sequence

import cv2
import numpy as np

SIDE = 112  # pixels; all signatures and alignments are computed on views of this size
RINGS, ANGLES, HARMONICS = 32, 128, 8
RING_LENGTH, SPECTRUM_LENGTH = RINGS // 2 * HARMONICS, RINGS * HARMONICS
CENTRE = (SIDE - 1) / 2
RADIUS = SIDE / 2 - 2  # the outermost pixels mix with filled corners when an image is resampled
_BLANK = 2.0  # standard deviation in grey levels; a disc with less is blank

_y, _x = np.mgrid[:SIDE, :SIDE] - CENTRE
_window = np.clip(np.hypot(_x, _y) / RADIUS, 0, 1)
_window = ((1 + np.cos(np.pi * _window)) / 2).astype(np.float32)
RING_AREA = (np.arange(RINGS) + 0.5) / RINGS
RING_AREA = (RING_AREA / RING_AREA.sum()).astype(np.float32)


def shrink(image: np.ndarray) -> np.ndarray:
    """Resize a [H, W] uint8 image to a view, [SIDE, SIDE] uint8."""
    return cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA)


def sample_circles(view: np.ndarray, scales: Sequence[float]) -> np.ndarray:
    """Sample grey values on circles about the centre, and standardise them over the disc that they fill.

    Args:
        view: [SIDE, SIDE] uint8.
        scales: radii of the discs, as shares of the inscribed one.

    Returns:
        [len(scales), ANGLES, RINGS] float32; zeros for a blank disc.
    """
    return _sample_circles(_smooth(view), scales)


def compute_signatures(view: np.ndarray, scales: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return the rings [len(scales), RING_LENGTH] and the spectrum [SPECTRUM_LENGTH] of a view, float32.

    Each vector has norm 1, or is zeros if the disc is blank.

    Args:
        view: [SIDE, SIDE] uint8.
        scales: radii of the discs for the rings, as shares of the inscribed one.
    """
    smooth = _smooth(view)
    circles = _sample_circles(smooth, scales)
    rings = _compute_rings(circles)
    return rings, _compute_spectrum(smooth) if circles[0].any() else np.zeros(SPECTRUM_LENGTH, np.float32)


def _smooth(view: np.ndarray) -> np.ndarray:
    return cv2.GaussianBlur(view, (0, 0), 0.7).astype(np.float32)


def _sample_circles(smooth: np.ndarray, scales: Sequence[float]) -> np.ndarray:
    centre, size = (CENTRE, CENTRE), (RINGS, ANGLES)
    found = np.stack([cv2.warpPolar(smooth, size, centre, RADIUS * scale, cv2.INTER_LINEAR) for scale in scales])
    found -= (found.mean(axis=1) @ RING_AREA)[:, np.newaxis, np.newaxis]
    deviation = np.sqrt((found**2).mean(axis=1) @ RING_AREA)
    found *= np.where(deviation < _BLANK, 0, 1 / np.maximum(deviation, _BLANK))[:, np.newaxis, np.newaxis]
    return found


def _compute_rings(circles: np.ndarray) -> np.ndarray:
    pairs = circles.reshape(len(circles), ANGLES, RINGS // 2, 2).mean(axis=3) * np.sqrt(RING_AREA[::2])
    magnitudes = np.abs(np.fft.rfft(pairs, axis=1))[:, :HARMONICS]
    magnitudes[:, 0] /= np.sqrt(2)
    return np.stack([_normalise(scale) for scale in magnitudes])


def _compute_spectrum(smooth: np.ndarray) -> np.ndarray:
    grey = (smooth - (smooth * _window).sum() / _window.sum()) * _window
    transformed = cv2.dft(grey / np.linalg.norm(grey), flags=cv2.DFT_COMPLEX_OUTPUT)
    spectrum = np.log1p(200 * np.fft.fftshift(cv2.magnitude(transformed[..., 0], transformed[..., 1])))
    circles = cv2.warpPolar(spectrum, (RINGS, ANGLES), (SIDE / 2, SIDE / 2), SIDE / 4, cv2.INTER_LINEAR)
    magnitudes = np.abs(np.fft.rfft(circles, axis=0))[: 2 * HARMONICS : 2]  # a spectrum repeats after half a turn
    magnitudes[0] *= 0.3  # the mean over the circle hardly differs between radiographs
    return _normalise(magnitudes)


def _normalise(values: np.ndarray) -> np.ndarray:
    return (values / max(float(np.linalg.norm(values)), 1e-9)).ravel().astype(np.float32)
