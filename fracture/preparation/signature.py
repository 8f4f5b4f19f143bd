"""Signatures: two short vectors an image, near each other where two images show the same radiograph.

Both start from the disc inscribed in the square image, which a rotation about the centre and filled corners leave as
it is, and keep only the magnitudes of Fourier coefficients along the angle, which a rotation shifts in phase, a
mirroring conjugates and an inversion of grey negates. Brightness and contrast go with the standardisation.

- The *rings* are the grey values on circles about the centre. They hold for any rotation and for little else; taken
  from smaller discs too, they find a copy that was rotated on a larger canvas.
- The *spectrum* is the magnitude of the windowed image's own Fourier transform, which ignores small shifts: it finds
  a copy whose margins were cropped (Reddy and Chatterji 1996, doi:10.1109/83.506761).
"""

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


def polar(small: np.ndarray, scale: float = 1.0) -> np.ndarray | None:
    """Grey values on circles about the centre, standardised over the disc; None where the disc is blank.

    Args:
        small: [SIDE, SIDE] uint8.
        scale: the disc's radius, as a share of the inscribed one.

    Returns:
        [ANGLES, RINGS] float32.
    """
    smooth = cv2.GaussianBlur(small, (0, 0), 0.7).astype(np.float32)
    circles = cv2.warpPolar(smooth, (RINGS, ANGLES), (CENTRE, CENTRE), RADIUS * scale, cv2.INTER_LINEAR)
    mean = circles.mean(axis=0) @ RING_AREA
    deviation = float(np.sqrt(((circles - mean) ** 2).mean(axis=0) @ RING_AREA))
    return None if deviation < _BLANK else (circles - mean) / deviation


def ring_signature(small: np.ndarray, scale: float = 1.0) -> np.ndarray | None:
    """[RINGS / 2 · HARMONICS] float32 of length 1; None where the disc is blank."""
    circles = polar(small, scale)
    if circles is None:
        return None
    circles = circles.reshape(ANGLES, RINGS // 2, 2).mean(axis=2) * np.sqrt(RING_AREA[::2])
    magnitudes = np.abs(np.fft.rfft(circles, axis=0))[:HARMONICS]
    magnitudes[0] /= np.sqrt(2)
    return _unit(magnitudes)


def spectrum_signature(small: np.ndarray) -> np.ndarray | None:
    """[RINGS · HARMONICS] float32 of length 1; None where the disc is blank."""
    if polar(small) is None:
        return None
    grey = cv2.GaussianBlur(small, (0, 0), 0.7).astype(np.float32)
    grey = (grey - (grey * _window).sum() / _window.sum()) * _window
    spectrum = np.abs(np.fft.fftshift(np.fft.fft2(grey / np.linalg.norm(grey))))
    spectrum = np.log1p(200 * spectrum).astype(np.float32)
    circles = cv2.warpPolar(spectrum, (RINGS, ANGLES), (SIDE / 2, SIDE / 2), SIDE / 4, cv2.INTER_LINEAR)
    magnitudes = np.abs(np.fft.rfft(circles, axis=0))[: 2 * HARMONICS : 2]  # a spectrum repeats after half a turn
    magnitudes[0] *= 0.3  # the mean over the circle is much alike in all radiographs
    return _unit(magnitudes)


def _unit(values: np.ndarray) -> np.ndarray:
    return (values / np.linalg.norm(values)).ravel().astype(np.float32)
