"""Compare two views: align the second with the first, then correlate their texture.

Two wrists look similar from afar. In two copies of one radiograph, trabeculae, edges and scratches coincide.
"""

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

from fracture.preparation.duplicates.signature import ANGLES, CENTRE, RING_AREA, SIDE, sample_circles

SCALES = (1.0, 0.9, 0.8, 0.72, 0.64)  # a square image rotated by 45° on a larger canvas is scaled by 0.71
_TRIED = (*(1 / scale for scale in SCALES), *SCALES[1:])  # scales of the second view relative to the first
_y, _x = np.mgrid[:SIDE, :SIDE] - CENTRE
_DISC = (np.hypot(_x, _y) < SIDE / 2 - 4).astype(np.uint8)
_STRETCH = (0.6, 1.7)  # range of the singular values of the transform
_SQUASH = 1.3  # their largest ratio: margins of 10 % cut from two sides only make a square image 1.25 times as wide
_LEAST_OVERLAP = 0.4  # as a share of the disc
_PROMISING = 0.7  # correlation of the discs after rotation, below which no alignment is tried
_SHIFTED = 0.8  # correlation of the views after a shift, below which no alignment is tried
_CLEAR = 0.9  # texture correlation above which no second alignment is tried
# Grey correlations, at half and at full size, below which two views are not similar. Copies have 0.95 and more, except
# one in six thousand.
_LEAST_AT_HALF, _LEAST_AT_FULL = 0.88, 0.92
_LEEWAY_AT_HALF = 1.1  # factor on the limits of distortion after alignment at half the size
_CACHED_VIEWS = 1024  # in the memory of each process, 120 kB each
_AFFINE = cv2.MOTION_AFFINE
_HALF = SIDE // 2
_HALF_DISC = cv2.resize(_DISC, (_HALF, _HALF), interpolation=cv2.INTER_NEAREST)
_window = np.hanning(_HALF).astype(np.float32)
_WINDOW = np.outer(_window, _window)


@dataclass(frozen=True)
class Similarity:
    """The result of aligning one view with another."""

    texture: float  # correlation of edges and texture in [-1, 1]
    detail: float  # correlation of the finest texture alone, equally strong everywhere
    flipped: bool
    inverted: bool
    degrees: float  # of rotation, counter-clockwise, as seen on the first view


NOT_SIMILAR = Similarity(0.0, 0.0, False, False, 0.0)


@dataclass(frozen=True)
class _Guess:
    """A first estimate of the transform between two views."""

    correlation: float
    inverted: bool
    flipped: bool
    turn: float  # radians
    scale: float


@dataclass(frozen=True)
class _PreparedView:
    """A view with everything that each comparison with it needs."""

    grey: np.ndarray  # [SIDE, SIDE] uint8
    half: np.ndarray  # [SIDE / 2, SIDE / 2] float32, smooth
    spectrum: np.ndarray  # [SIDE / 2, SIDE / 4 + 1] complex64 of `half`, windowed, of norm 1
    rings: np.ndarray  # [scales, ANGLES / 2 + 1, RINGS] complex64 along the angle; zeros for a blank disc


def compare_pairs(views: np.ndarray, pairs: np.ndarray) -> list[Similarity]:
    """Align the second view of each pair with the first by flip, inversion, rotation, scale, shift and stretch.

    Args:
        views: [N, SIDE, SIDE] uint8, as `signature.shrink` makes them.
        pairs: [M, 2] int64, numbers of views.
    """
    return [_compare(_prepare(views[a].tobytes()), _prepare(views[b].tobytes())) for a, b in pairs.tolist()]


@lru_cache(_CACHED_VIEWS)  # a view is compared with a dozen others, in as many calls
def _prepare(pixels: bytes) -> _PreparedView:
    view = np.frombuffer(pixels, np.uint8).reshape(SIDE, SIDE)
    half = cv2.resize(view, (_HALF, _HALF), interpolation=cv2.INTER_AREA).astype(np.float32)
    half = cv2.GaussianBlur(half, (0, 0), 1.0)
    windowed = (half - (half * _WINDOW).sum() / _WINDOW.sum()) * _WINDOW
    windowed /= max(float(np.linalg.norm(windowed)), 1e-3)
    rings = np.fft.rfft(sample_circles(view, SCALES) * np.sqrt(RING_AREA), axis=1).astype(np.complex64)
    return _PreparedView(view, half, np.fft.rfft2(windowed).astype(np.complex64), rings)


def _compare(first: _PreparedView, second: _PreparedView) -> Similarity:
    guess = _guess_rotation(first, second)
    if guess is None:
        return NOT_SIMILAR
    found = _align(first, second, guess) if guess.correlation >= _PROMISING else NOT_SIMILAR
    if found.texture < _CLEAR:  # cropping moves the centre of the guessed rotation, but rarely comes with a rotation
        shifted = _guess_shift(first, second)
        if shifted.correlation >= _SHIFTED:
            found = max(found, _align(first, second, shifted), key=lambda similarity: similarity.texture)
    return found


def _align(first: _PreparedView, second: _PreparedView, guess: _Guess) -> Similarity:
    grey, half = (255 - x if guess.inverted else x for x in (second.grey, second.half))
    matrix = _find_transform(first, grey, half, guess)
    if matrix is None:
        return NOT_SIMILAR
    shared = cv2.warpAffine(_DISC, matrix, (SIDE, SIDE), flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP) & _DISC
    if shared.sum() < _LEAST_OVERLAP * _DISC.sum():
        return NOT_SIMILAR
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    aligned = cv2.warpAffine(grey.astype(np.float32), matrix, (SIDE, SIDE), flags=flags)
    inner = cv2.erode(shared, np.ones((7, 7), np.uint8)).astype(bool)
    texture, detail = _correlate_texture(first.grey.astype(np.float32), aligned, inner)
    return Similarity(texture, detail, guess.flipped, guess.inverted, float(np.degrees(guess.turn)) % 360)


def _find_transform(first: _PreparedView, grey: np.ndarray, half: np.ndarray, guess: _Guess) -> np.ndarray | None:
    """Refine the guess to a [2, 3] transform; None if the views differ too much or the transform distorts too much.

    Evangelidis and Psarakis 2008, doi:10.1109/TPAMI.2008.113. Most pairs are rejected at half the size.
    """
    matrix = _make_matrix(guess)
    matrix[:, 2] = _halve_shift(matrix)
    try:
        correlation, matrix = cv2.findTransformECC(
            first.half, half, matrix, _AFFINE, _stop_after(15), _HALF_DISC * 255, 1
        )
        if correlation < _LEAST_AT_HALF or _is_distorted(matrix, _LEEWAY_AT_HALF):
            return None
        matrix[:, 2] = _double_shift(matrix)
        a, b = (cv2.GaussianBlur(image, (0, 0), 0.8).astype(np.float32) for image in (first.grey, grey))
        correlation, matrix = cv2.findTransformECC(a, b, matrix, _AFFINE, _stop_after(40), _DISC * 255, 1)
    except cv2.error:  # does not converge: the views have nothing in common
        return None
    return None if correlation < _LEAST_AT_FULL or _is_distorted(matrix) else matrix


def _correlate_texture(reference: np.ndarray, aligned: np.ndarray, inner: np.ndarray) -> tuple[float, float]:
    """Correlate texture and fine detail of two aligned [SIDE, SIDE] float32 views where `inner` is true."""
    # Both get the same distribution of grey first, which undoes gamma and other changes of exposure.
    aligned = np.interp(aligned, np.sort(aligned[inner]), np.sort(reference[inner])).astype(np.float32)
    texture = _correlate(
        _extract_texture(reference, 0.8, 4, 0.25, 0.5), _extract_texture(aligned, 0.8, 4, 0.25, 0.5), inner
    )
    detail = _correlate(
        _extract_texture(reference, 0.6, 2, 0.05, 1.0), _extract_texture(aligned, 0.6, 2, 0.05, 1.0), inner
    )
    return texture, detail


def _is_distorted(matrix: np.ndarray, leeway: float = 1.0) -> bool:
    largest, smallest = np.linalg.svd(matrix[:, :2], compute_uv=False)
    within = _STRETCH[0] <= smallest * leeway and largest <= _STRETCH[1] * leeway
    return not within or largest > _SQUASH * leeway * smallest


def _stop_after(steps: int) -> tuple[int, int, float]:
    return cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, steps, 1e-4


def _halve_shift(matrix: np.ndarray) -> np.ndarray:
    """Return the shift of the same transform between views of half the size, whose pixel 0 covers pixels 0 and 1."""
    return (matrix[:, 2] + matrix[:, :2].sum(axis=1) / 2 - 0.5) / 2


def _double_shift(matrix: np.ndarray) -> np.ndarray:
    return 2 * matrix[:, 2] - matrix[:, :2].sum(axis=1) / 2 + 0.5


def _guess_rotation(first: _PreparedView, second: _PreparedView) -> _Guess | None:
    """Find the best rotation, flip, sign and scale of discs about the two centres; None if a view is blank."""
    if not first.rings[0].any() or not second.rings[0].any():
        return None
    # The first view's disc of each size against the second's whole disc, then the reverse, without the two whole discs.
    a = np.concatenate([first.rings, np.broadcast_to(first.rings[0], first.rings[1:].shape)])
    b = np.concatenate([np.broadcast_to(second.rings[0], second.rings.shape), second.rings[1:]])
    # Mirroring reverses the direction of the circle, which conjugates its spectrum.
    products = np.stack([(a * np.conj(b)).sum(axis=2), (a * b).sum(axis=2)], axis=1).reshape(2 * len(a), -1)
    correlations = np.fft.irfft(products, n=ANGLES, axis=1) / ANGLES
    pose, at = np.unravel_index(int(np.abs(correlations).argmax()), correlations.shape)
    best = float(correlations[pose, at])
    return _Guess(abs(best), best < 0, bool(pose % 2), 2 * np.pi * float(at) / ANGLES, _TRIED[pose // 2])


def _guess_shift(first: _PreparedView, second: _PreparedView) -> _Guess:
    """Find the best sign of the views under any shift, without rotation or flip."""
    correlations = np.fft.irfft2(first.spectrum * np.conj(second.spectrum), s=(_HALF, _HALF))
    best = float(correlations.flat[int(np.abs(correlations).argmax())])
    return _Guess(abs(best), best < 0, False, 0.0, 1.0)


def _make_matrix(guess: _Guess) -> np.ndarray:
    """Return the [2, 3] float32 transform from a pixel of the first view to its counterpart in the second."""
    cos, sin = np.cos(-guess.turn), np.sin(-guess.turn)
    turn = np.array([[cos, -sin], [sin, cos]])
    if guess.flipped:
        turn = np.diag([1, -1]) @ turn
    turn *= guess.scale
    centre = np.array([CENTRE, CENTRE])
    return np.column_stack([turn, centre - turn @ centre]).astype(np.float32)


def _extract_texture(grey: np.ndarray, fine: float, coarse: float, floor: float, evenness: float) -> np.ndarray:
    """Return the texture between two scales (standard deviations in pixels), with its strength evened out.

    Args:
        floor: strength, as a share of the mean strength, below which texture is noise and stays weak.
        evenness: 0 leaves strong edges strong, 1 makes texture equally strong everywhere.
    """
    band = cv2.GaussianBlur(grey, (0, 0), fine) - cv2.GaussianBlur(grey, (0, 0), coarse)
    strength = np.sqrt(cv2.GaussianBlur(band**2, (0, 0), 6))
    return band / (strength + floor * float(strength.mean()) + 1e-3) ** evenness


def _correlate(a: np.ndarray, b: np.ndarray, where: np.ndarray) -> float:
    a, b = a[where] - a[where].mean(), b[where] - b[where].mean()
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm > 0 else 0.0
