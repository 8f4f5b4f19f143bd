"""Whether two images show the same radiograph: one is laid on the other, then their texture is compared.

Two wrists look alike from afar; what tells a copy is that trabeculae, edges and scratches lie on each other.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from fracture.preparation.signature import ANGLES, CENTRE, RING_AREA, SIDE, polar

SCALES = (1.0, 0.9, 0.8, 0.72)  # an image rotated by 45° on a larger canvas is shown at 0.71
_y, _x = np.mgrid[:SIDE, :SIDE] - CENTRE
_DISC = (np.hypot(_x, _y) < SIDE / 2 - 4).astype(np.uint8)
_STRETCH = (0.6, 1.7)  # singular values of the transform
_SQUASH = 1.3  # and their ratio: margins of 10 % cut from two sides only make a square image 1.25 times as wide
_LEAST_OVERLAP = 0.4  # of the disc
_PROMISING = 0.6  # correlation of the discs after turning, below which no alignment is tried
_CLEAR = 0.9  # texture that needs no second try
_COARSE = 0.75  # grey correlation after the first, quick alignment, below which the pair is given up


@dataclass(frozen=True)
class Likeness:
    """How well one image lies on another."""

    texture: float  # correlation of edges and texture in [-1, 1]
    detail: float  # the same of the finest texture alone, equally strong everywhere
    flipped: bool
    inverted: bool
    degrees: float  # of rotation, counter-clockwise, as seen on the first image


NONE = Likeness(0.0, 0.0, False, False, 0.0)


@dataclass(frozen=True)
class _Guess:
    correlation: float
    inverted: bool
    flipped: bool
    turn: float  # radians
    scale: float


_AS_IT_IS = _Guess(0.0, False, False, 0.0, 1.0)


def compare(first: np.ndarray, second: np.ndarray) -> Likeness:
    """Finds flip, inversion, rotation, scale, shift and stretch that lay `second` on `first`.

    Args:
        first, second: [SIDE, SIDE] uint8, as `signature.shrink` makes them.
    """
    guess = _guess(first, second)
    if guess is None:
        return NONE
    found = _lay(first, second, guess) if guess.correlation >= _PROMISING else NONE
    if found.texture < _CLEAR:  # cropping moves the centre that the guess turns about, and mostly comes without a turn
        found = max(found, _lay(first, second, _AS_IT_IS), key=lambda likeness: likeness.texture)
    return found


def _lay(first: np.ndarray, second: np.ndarray, guess: _Guess) -> Likeness:
    if guess.inverted:
        second = 255 - second
    matrix = _matrix(guess)
    try:
        for smoothing, steps in ((2.0, 15), (0.8, 40)):
            a, b = (cv2.GaussianBlur(image, (0, 0), smoothing).astype(np.float32) for image in (first, second))
            ends = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, steps, 1e-4)
            # Evangelidis and Psarakis 2008, doi:10.1109/TPAMI.2008.113
            correlation, matrix = cv2.findTransformECC(a, b, matrix, cv2.MOTION_AFFINE, ends, _DISC * 255, 1)
            if correlation < _COARSE:
                return NONE
    except cv2.error:  # it does not converge: nothing in common
        return NONE
    stretch = np.linalg.svd(matrix[:, :2], compute_uv=False)
    shared = cv2.warpAffine(_DISC, matrix, (SIDE, SIDE), flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP) & _DISC
    distorted = stretch[1] < _STRETCH[0] or stretch[0] > _STRETCH[1] or stretch[0] > _SQUASH * stretch[1]
    if distorted or shared.sum() < _LEAST_OVERLAP * _DISC.sum():
        return NONE
    laid = cv2.warpAffine(
        second.astype(np.float32), matrix, (SIDE, SIDE), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    )
    inner = cv2.erode(shared, np.ones((7, 7), np.uint8)).astype(bool)
    first = first.astype(np.float32)
    # The same exposure first: gamma and the like are undone by giving both the same distribution of grey.
    laid = np.interp(laid, np.sort(laid[inner]), np.sort(first[inner])).astype(np.float32)
    texture = _correlation(_texture(first, 0.8, 4, 0.25, 0.5), _texture(laid, 0.8, 4, 0.25, 0.5), inner)
    detail = _correlation(_texture(first, 0.6, 2, 0.05, 1.0), _texture(laid, 0.6, 2, 0.05, 1.0), inner)
    return Likeness(texture, detail, guess.flipped, guess.inverted, float(np.degrees(guess.turn)) % 360)


def _guess(first: np.ndarray, second: np.ndarray) -> _Guess | None:
    """The best rotation, flip, sign and scale of discs about the two centres."""
    best = None
    whole = polar(first), polar(second)
    if whole[0] is None or whole[1] is None:
        return None
    for scale in SCALES:
        pairs = [(polar(first, scale), whole[1], 1 / scale)] if scale < 1 else []
        for a, b, ratio in [*pairs, (whole[0], polar(second, scale), scale)]:
            if a is None or b is None:
                continue
            spectrum = np.fft.rfft(a * RING_AREA, axis=0)
            for flipped in (False, True):
                # Mirroring turns the circle's direction: row j shows what row -j showed.
                turned = np.roll(b[::-1], 1, axis=0) if flipped else b
                product = (spectrum * np.conj(np.fft.rfft(turned, axis=0))).sum(axis=1)
                correlation = np.fft.irfft(product, n=ANGLES) / ANGLES
                at = int(np.abs(correlation).argmax())
                if best is None or abs(correlation[at]) > best.correlation:
                    turn = 2 * np.pi * at / ANGLES
                    best = _Guess(abs(float(correlation[at])), bool(correlation[at] < 0), flipped, turn, ratio)
    return best


def _matrix(guess: _Guess) -> np.ndarray:
    """[2, 3] float32 from a pixel of the first image to the one of the second that shows the same."""
    cos, sin = np.cos(-guess.turn), np.sin(-guess.turn)
    turn = np.array([[cos, -sin], [sin, cos]])
    if guess.flipped:
        turn = np.diag([1, -1]) @ turn
    turn *= guess.scale
    centre = np.array([CENTRE, CENTRE])
    return np.column_stack([turn, centre - turn @ centre]).astype(np.float32)


def _texture(grey: np.ndarray, fine: float, coarse: float, floor: float, evenness: float) -> np.ndarray:
    """What lies between two scales (standard deviations in pixels), evened out.

    Args:
        floor: strength, as a share of the mean one, below which it is noise and stays weak.
        evenness: 0 leaves strong edges strong, 1 makes texture equally strong everywhere.
    """
    band = cv2.GaussianBlur(grey, (0, 0), fine) - cv2.GaussianBlur(grey, (0, 0), coarse)
    strength = np.sqrt(cv2.GaussianBlur(band**2, (0, 0), 6))
    return band / (strength + floor * float(strength.mean()) + 1e-3) ** evenness


def _correlation(a: np.ndarray, b: np.ndarray, where: np.ndarray) -> float:
    a, b = a[where] - a[where].mean(), b[where] - b[where].mean()
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm > 0 else 0.0
