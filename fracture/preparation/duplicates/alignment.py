"""Whether two images show the same radiograph: one is laid on the other, then their texture is compared.

Two wrists look alike from afar; what tells a copy is that trabeculae, edges and scratches lie on each other.
"""

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

from fracture.preparation.duplicates.signature import ANGLES, CENTRE, RING_AREA, SIDE, circles

SCALES = (1.0, 0.9, 0.8, 0.72, 0.64)  # a square image rotated by 45° on a larger canvas is shown at 0.71
_SHOWN = (*(1 / scale for scale in SCALES), *SCALES[1:])  # scales that are tried
_y, _x = np.mgrid[:SIDE, :SIDE] - CENTRE
_DISC = (np.hypot(_x, _y) < SIDE / 2 - 4).astype(np.uint8)
_STRETCH = (0.6, 1.7)  # singular values of the transform
_SQUASH = 1.3  # and their ratio: margins of 10 % cut from two sides only make a square image 1.25 times as wide
_LEAST_OVERLAP = 0.4  # of the disc
_PROMISING = 0.7  # correlation of the discs after turning, below which no alignment is tried
_SHIFTED = 0.8  # correlation of the images after shifting, likewise
_CLEAR = 0.9  # texture that needs no second try
_COARSE, _ALIKE = 0.88, 0.92  # grey correlations, at half and at full size, below which a pair is given up; copies have
# 0.95 and more, but for one in six thousand
_COARSELY = 1.1  # how much wider the limits of distortion are after aligning at half the size
_SUBJECTS = 1024  # kept in memory by each process, 120 kB each
_AFFINE = cv2.MOTION_AFFINE
_HALF = SIDE // 2
_HALF_DISC = cv2.resize(_DISC, (_HALF, _HALF), interpolation=cv2.INTER_NEAREST)
_window = np.hanning(_HALF).astype(np.float32)
_WINDOW = np.outer(_window, _window)


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


@dataclass(frozen=True)
class _Subject:
    """An image and what every comparison with it needs again."""

    grey: np.ndarray  # [SIDE, SIDE] uint8
    half: np.ndarray  # [SIDE / 2, SIDE / 2] float32, smooth
    spectrum: np.ndarray  # [SIDE / 2, SIDE / 4 + 1] complex64 of `half`, windowed, of norm 1
    rings: np.ndarray  # [scales, ANGLES / 2 + 1, RINGS] complex64 along the angle; zeros where a disc is blank


def compare_pairs(small: np.ndarray, pairs: np.ndarray) -> list[Likeness]:
    """Finds flip, inversion, rotation, scale, shift and stretch that lay each pair's second image on its first.

    Args:
        small: [N, SIDE, SIDE] uint8, as `signature.shrink` makes them.
        pairs: [M, 2] int64.
    """
    return [_compare(_subject(small[a].tobytes()), _subject(small[b].tobytes())) for a, b in pairs.tolist()]


@lru_cache(_SUBJECTS)  # an image is compared with a dozen others, in as many calls
def _subject(pixels: bytes) -> _Subject:
    small = np.frombuffer(pixels, np.uint8).reshape(SIDE, SIDE)
    half = cv2.resize(small, (_HALF, _HALF), interpolation=cv2.INTER_AREA).astype(np.float32)
    half = cv2.GaussianBlur(half, (0, 0), 1.0)
    windowed = (half - (half * _WINDOW).sum() / _WINDOW.sum()) * _WINDOW
    windowed /= max(float(np.linalg.norm(windowed)), 1e-3)
    rings = np.fft.rfft(circles(small, SCALES) * np.sqrt(RING_AREA), axis=1).astype(np.complex64)
    return _Subject(small, half, np.fft.rfft2(windowed).astype(np.complex64), rings)


def _compare(first: _Subject, second: _Subject) -> Likeness:
    guess = _turned(first, second)
    if guess is None:
        return NONE
    found = _lay(first, second, guess) if guess.correlation >= _PROMISING else NONE
    if found.texture < _CLEAR:  # cropping moves the centre that the guess turns about, and mostly comes without a turn
        shifted = _shifted(first, second)
        if shifted.correlation >= _SHIFTED:
            found = max(found, _lay(first, second, shifted), key=lambda likeness: likeness.texture)
    return found


def _lay(first: _Subject, second: _Subject, guess: _Guess) -> Likeness:
    grey, half = (255 - x if guess.inverted else x for x in (second.grey, second.half))
    matrix = _matrix(guess)
    try:
        # Evangelidis and Psarakis 2008, doi:10.1109/TPAMI.2008.113; first at half the size, where most pairs end.
        matrix[:, 2] = _halved(matrix)
        correlation, matrix = cv2.findTransformECC(first.half, half, matrix, _AFFINE, _ends(15), _HALF_DISC * 255, 1)
        if correlation < _COARSE or _distorted(matrix, _COARSELY):
            return NONE
        matrix[:, 2] = _doubled(matrix)
        a, b = (cv2.GaussianBlur(image, (0, 0), 0.8).astype(np.float32) for image in (first.grey, grey))
        correlation, matrix = cv2.findTransformECC(a, b, matrix, _AFFINE, _ends(40), _DISC * 255, 1)
    except cv2.error:  # it does not converge: nothing in common
        return NONE
    shared = cv2.warpAffine(_DISC, matrix, (SIDE, SIDE), flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP) & _DISC
    if correlation < _ALIKE or _distorted(matrix) or shared.sum() < _LEAST_OVERLAP * _DISC.sum():
        return NONE
    laid = cv2.warpAffine(grey.astype(np.float32), matrix, (SIDE, SIDE), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    inner = cv2.erode(shared, np.ones((7, 7), np.uint8)).astype(bool)
    reference = first.grey.astype(np.float32)
    # The same exposure first: gamma and the like are undone by giving both the same distribution of grey.
    laid = np.interp(laid, np.sort(laid[inner]), np.sort(reference[inner])).astype(np.float32)
    texture = _correlation(_texture(reference, 0.8, 4, 0.25, 0.5), _texture(laid, 0.8, 4, 0.25, 0.5), inner)
    detail = _correlation(_texture(reference, 0.6, 2, 0.05, 1.0), _texture(laid, 0.6, 2, 0.05, 1.0), inner)
    return Likeness(texture, detail, guess.flipped, guess.inverted, float(np.degrees(guess.turn)) % 360)


def _distorted(matrix: np.ndarray, leeway: float = 1.0) -> bool:
    largest, smallest = np.linalg.svd(matrix[:, :2], compute_uv=False)
    within = _STRETCH[0] <= smallest * leeway and largest <= _STRETCH[1] * leeway
    return not within or largest > _SQUASH * leeway * smallest


def _ends(steps: int) -> tuple[int, int, float]:
    return cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, steps, 1e-4


def _halved(matrix: np.ndarray) -> np.ndarray:
    """The shift of the same transform between images of half the size, whose pixel 0 covers pixels 0 and 1."""
    return (matrix[:, 2] + matrix[:, :2].sum(axis=1) / 2 - 0.5) / 2


def _doubled(matrix: np.ndarray) -> np.ndarray:
    return 2 * matrix[:, 2] - matrix[:, :2].sum(axis=1) / 2 + 0.5


def _turned(first: _Subject, second: _Subject) -> _Guess | None:
    """The best rotation, flip, sign and scale of discs about the two centres."""
    if not first.rings[0].any() or not second.rings[0].any():
        return None
    # The first's disc of each size on the second's whole one, then the other way round, without the pair of whole ones.
    a = np.concatenate([first.rings, np.broadcast_to(first.rings[0], first.rings[1:].shape)])
    b = np.concatenate([np.broadcast_to(second.rings[0], second.rings.shape), second.rings[1:]])
    # Mirroring turns the circle's direction, which conjugates its spectrum.
    products = np.stack([(a * np.conj(b)).sum(axis=2), (a * b).sum(axis=2)], axis=1).reshape(2 * len(a), -1)
    correlations = np.fft.irfft(products, n=ANGLES, axis=1) / ANGLES
    pose, at = np.unravel_index(int(np.abs(correlations).argmax()), correlations.shape)
    best = float(correlations[pose, at])
    return _Guess(abs(best), best < 0, bool(pose % 2), 2 * np.pi * float(at) / ANGLES, _SHOWN[pose // 2])


def _shifted(first: _Subject, second: _Subject) -> _Guess:
    """The best shift and sign of the images as they stand."""
    correlations = np.fft.irfft2(first.spectrum * np.conj(second.spectrum), s=(_HALF, _HALF))
    best = float(correlations.flat[int(np.abs(correlations).argmax())])
    return _Guess(abs(best), best < 0, False, 0.0, 1.0)


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
