import numpy as np
import pytest
import tensorflow as tf

from fracture.config import AugmentConfig
from fracture.dataset.augment import draw_exposures, draw_transforms, expose, transform

STILL = {
    "horizontal_flip": False,
    "vertical_flip": False,
    "rotation_degrees": 0,
    "zoom": 0,
    "stretch": 0,
    "shift": 0,
    "exposure": 0,
}


def drawn(count: int = 400, size: int = 33, **change) -> np.ndarray:
    return draw_transforms(np.random.default_rng(0), count, AugmentConfig(**(STILL | change)), size)


def applied(image: np.ndarray, transforms: np.ndarray) -> np.ndarray:
    images = np.repeat(image[None, :, :, None], len(transforms), axis=0)
    return transform(tf.constant(images), tf.constant(transforms)).numpy()[..., 0]


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (33, 33), np.uint8)


def test_nothing_asked_changes_nothing(image):
    assert np.array_equal(applied(image, drawn(2)), np.stack([image] * 2))


@pytest.mark.parametrize(("flag", "flipped"), [("horizontal_flip", np.fliplr), ("vertical_flip", np.flipud)])
def test_a_flip_is_exact_and_happens_to_half(image, flag: str, flipped):
    results = applied(image, drawn(**{flag: True}))
    changed = np.array([np.array_equal(r, flipped(image)) for r in results])
    same = np.array([np.array_equal(r, image) for r in results])
    assert (changed ^ same).all()
    assert 0.4 < changed.mean() < 0.6


def test_a_quarter_turn_is_exact(image):
    quarter = np.array([[0, -1, 32, 1, 0, 0, 0, 0]], np.float32)
    assert np.array_equal(applied(image, quarter)[0], np.rot90(image))


def test_rotation_and_zoom_stay_in_range_and_keep_the_centre():
    turned, zoomed = drawn(rotation_degrees=20), drawn(zoom=0.1)
    angles = np.degrees(np.arctan2(turned[:, 3], turned[:, 4]))
    assert -20 <= angles.min() < -18
    assert 18 < angles.max() <= 20
    assert 1 / 1.1 <= zoomed[:, 0].min() < 0.93
    assert 1.08 < zoomed[:, 0].max() <= 1 / 0.9
    for rows in (turned, zoomed):
        assert np.allclose(rows[:, 0] * 16 + rows[:, 1] * 16 + rows[:, 2], 16, atol=1e-4)


def test_stretch_keeps_the_area_and_changes_the_aspect():
    rows = drawn(stretch=0.2)
    assert np.allclose(rows[:, 0] * rows[:, 4], 1, atol=1e-5)
    aspects = rows[:, 4] / rows[:, 0]
    assert 0.8 <= aspects.min() < 0.82
    assert 1.18 < aspects.max() <= 1.2


def test_shift_is_a_share_of_the_side():
    rows = drawn(shift=0.1)
    assert np.allclose(rows[:, [0, 1, 3, 4]], [1, 0, 0, 1])
    for shifts in (rows[:, 2], rows[:, 5]):
        assert -3.3 <= shifts.min() < -3.1
        assert 3.1 < shifts.max() <= 3.3


def test_exposures_turn_about_mid_grey_and_are_cut_off():
    images = np.full((3, 2, 2, 1), [[[0]], [[200]]], np.uint8)
    exposures = np.array([[1, 0], [0.5, 63.75], [1.5, 10]], np.float32)
    exposed = expose(tf.constant(images), tf.constant(exposures)).numpy()
    assert exposed[:, :, 0, 0].tolist() == [[0, 200], [64, 164], [10, 255]]


def test_exposures_stay_in_range():
    drawn = draw_exposures(np.random.default_rng(0), 400, AugmentConfig(exposure=0.2))
    brightness = (drawn[:, 1] - 127.5 * (1 - drawn[:, 0])) / 255
    for values, low, high in ((drawn[:, 0], 0.8, 1.2), (brightness, -0.1, 0.1)):
        assert low <= values.min() < low + 0.02
        assert high - 0.02 < values.max() <= high + 1e-6


def test_what_comes_from_outside_is_black(image):
    shifted = np.array([[1, 0, 100, 0, 1, 0, 0, 0]], np.float32)
    assert applied(image, shifted).max() == 0


def test_it_runs_alike_inside_tf_data(image):
    transforms = drawn(4, rotation_degrees=20, zoom=0.1, horizontal_flip=True)
    images = np.repeat(image[None, :, :, None], 4, axis=0)
    inside = next(iter(tf.data.Dataset.from_tensors((images, transforms)).map(transform)))
    assert np.array_equal(inside.numpy()[..., 0], applied(image, transforms))
