"""Reduce grey of up to 16 bits to 8 bits, once, by a table over the values that a pixel can have."""

from collections.abc import Iterator

import numpy as np

_BAND = 2**22  # pixels counted or reduced at once; each takes 8 bytes meanwhile
_DEPTHS = (8, 10, 12, 14, 16)  # bits of X-ray detectors and of the files that hold their values
# What 8-bit grey is multiplied by in a deeper file: shifted to 10, 12, 14 or 16 bits, or 255 made 65535.
_STEPS = (257, 256, 64, 16, 4)
_LEVELS_OF_A_PICTURE = 32  # fewer may be multiples of a step by chance
_LOW, _HIGH = 0.005, 0.995  # percentiles that become black and white
_DARKEST, _BRIGHTEST = 0.05, 0.75  # of the depth; values whose percentiles are outside fill it
_FLATTEST = 1 / 50  # of the depth, 5 of 256 grey levels, between the percentiles; less is noise of an empty exposure


def choose_range(levels: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Choose which values become black and white, where the file says neither, from how often each value occurs.

    All files share this rule, so that the same values give the same picture: DICOM without a window, 16-bit PNG, TIFF,
    PGM, JPEG 2000. It does not trust what a file says of its depth, since files with the same values say different
    things. In order:

    1. Values up to 255, and multiples of 4, 16, 64, 256 or 257 that are one of at most 256 steps, are 8-bit grey in a
       deeper file: the picture is that of the 8-bit file.
    2. Values that fill their depth, the smallest of 8, 10, 12, 14 and 16 bits that holds the largest, are grey values
       of that depth. Its ends are black and white, as in the same picture with 8 bits.
    3. Values whose percentiles 0.5 and 99.5 are closer than 1/50 of the depth that holds the latter are flat, an
       exposure of nothing. They are not stretched, which would make a picture of their noise: that depth's ends are
       black and white. Values that are negative or no whole numbers are counted in steps, the smallest difference
       between two of them.
    4. Other values are raw: a part of the range, or outliers far above the rest. The percentiles 0.5 and 99.5 are black
       and white.

    Args:
        levels: [N] values that a pixel can have, in any order.
        counts: [N] pixels of each value; 0 for padding.
    """
    used = np.flatnonzero(counts)
    used = used[np.argsort(levels[used], kind="stable")]
    values, cumulative = levels[used], np.cumsum(counts[used])
    if not len(values):
        return 0.0, 1.0
    low, high = (float(values[np.searchsorted(cumulative, share * cumulative[-1])]) for share in (_LOW, _HIGH))
    top = float(values[-1])
    if values[0] >= 0 and top < 2**16 and np.all(values == np.floor(values)):
        if step := _find_8_bit_step(values.astype(np.int64)):
            return 0.0, 255.0 * step
        white = _find_white(top)
        if low <= _DARKEST * white and high >= _BRIGHTEST * white:
            return 0.0, white
        black, step = 0.0, 1.0
    else:
        black, step = low, float(np.diff(np.unique(values)).min()) if values[0] < top else 1.0
    white = black + step * _find_white(min(max(abs(low), abs(high)) // step, 2**16 - 1))
    return (low, high) if high - low >= _FLATTEST * (white - black) else (black, white)


def _find_white(top: float) -> float:
    """Return the largest value of the depth that holds a whole number below 2**16."""
    return 1.0 if top <= 1 else float(next(2**bits - 1 for bits in _DEPTHS if top < 2**bits))


def _find_8_bit_step(values: np.ndarray) -> int:
    """Return what all values are multiples of, up to 255 times; 0 if they are more than 8-bit grey."""
    if 1 < values[-1] <= 255:
        return 1
    if len(values) < _LEVELS_OF_A_PICTURE:
        return 0
    return next((step for step in _STEPS if values[-1] <= 255 * step and not np.any(values % step)), 0)


def scale_to_8_bits(levels: np.ndarray, black: float, white: float) -> np.ndarray:
    """Return the 8-bit grey of each level, [N] uint8."""
    return np.round(np.clip((levels - black) / (white - black), 0, 1) * 255).astype(np.uint8)


def count_values(values: np.ndarray) -> np.ndarray:
    """Count how often each value occurs in an image, [H, W] uint8 or uint16: [2**8 or 2**16] int64."""
    counts = np.zeros(2 ** (8 * values.dtype.itemsize), np.int64)
    for rows in _list_bands(values):
        counts += np.bincount(values[rows].ravel(), minlength=len(counts))
    return counts


def look_up(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Return the table's uint8 at each pixel of an image, [H, W] uint8 or uint16."""
    grey = np.empty(values.shape, np.uint8)
    for rows in _list_bands(values):
        grey[rows] = table[values[rows]]
    return grey


def _list_bands(values: np.ndarray) -> Iterator[slice]:
    rows = max(1, _BAND // max(1, values.shape[1]))
    return (slice(start, start + rows) for start in range(0, len(values), rows))
