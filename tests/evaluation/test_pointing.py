import keras
import numpy as np
import pyarrow as pa
import pytest

from fracture.dataset.format import BOXES, Dataset, images_of
from fracture.evaluation.gallery import GROUPS, Gallery, make_gallery
from fracture.evaluation.pointing import (
    MOST,
    PointingGame,
    choose_rows,
    compare_with_boxes,
    mark_positions,
    measure_cover,
    play_pointing_game,
    select_boxed,
)
from fracture.evaluation.scores import score_blocks
from fracture.page import render

QUARTER = [0.0, 0.0, 0.5, 0.5]  # upper left
NOWHERE = [0.9, 0.9, 0.95, 0.95]  # no centre of 2 × 2 positions is in it


def test_what_boxes_cover_together_counts_once():
    assert measure_cover(np.array([QUARTER])) == 0.25
    assert measure_cover(np.array([QUARTER, [0.25, 0.0, 0.75, 0.5]])) == pytest.approx(0.375)
    assert measure_cover(np.array([QUARTER, QUARTER, [0.5, 0.5, 1.0, 0.75]])) == pytest.approx(0.375)


def test_a_position_is_in_a_box_if_its_centre_is():
    """Centres of 4 positions are at 1/8, 3/8, 5/8 and 7/8."""
    marked = mark_positions(np.array([[0.3, 0.6, 0.7, 0.7], [0.0, 0.0, 0.12, 1.0]]), 2, 4)
    assert marked.tolist() == [[False] * 4, [False, False, False, False]], "rows are at 1/4 and 3/4"
    assert mark_positions(np.array([[0.3, 0.6, 0.7, 0.8]]), 2, 4).tolist() == [[False] * 4, [False, True, True, False]]


@pytest.fixture
def game() -> PointingGame:
    """Four radiographs of 2 × 2 positions: a hit, a miss, an empty map, and a box that no position is in."""
    evidence = np.array([[[3, 1], [1, 1]], [[1, 3], [1, 1]], [[-1, -2], [-2, -2]], [[3, 1], [1, 1]]], np.float32)
    images = np.zeros((4, 4, 4), np.uint8)
    images[:3, 2:, 2:] = 200  # lower right
    images[1, :2, :2] = 201
    boxes = [np.array([QUARTER]), np.array([QUARTER]), np.array([QUARTER]), np.array([NOWHERE])]
    return compare_with_boxes(evidence, images, boxes, np.arange(4), 9)


def test_hits_chance_and_the_best_that_such_maps_can_do(game):
    assert (game.radiographs, game.boxed, game.grid, game.empty) == (4, 9, (2, 2), 1)
    assert {name: pointer.hits for name, pointer in game.pointers.items()} == {
        "model": 1,
        "brightness": 1,  # the second, where the model misses
        "chance": None,
        "limit": 3,
    }
    chance = (3 * 0.25 + 0.05**2) / 4
    assert game.pointers["chance"].share.value == pytest.approx(chance)
    assert game.pointers["chance"].advantage.value == pytest.approx(0.25 - chance)
    assert game.pointers["brightness"].advantage.value == 0
    assert game.pointers["brightness"].advantage.low < 0 < game.pointers["brightness"].advantage.high
    assert game.summary.startswith(
        "maximum of the map inside a box: model 1 of 4, 0.250 [0.000, 0.750]; brightness 1, 0."
    )


def test_groups_are_resampled_together():
    """All of one group: nothing else could have been drawn; of as many groups, the interval is that of a proportion."""
    evidence, images = np.ones((40, 1, 2), np.float32), np.zeros((40, 2, 2), np.uint8)
    left, right = np.array([[0.0, 0.0, 0.5, 1.0]]), np.array([[0.5, 0.0, 1.0, 1.0]])
    boxes = [left] * 20 + [right] * 20  # of equals the first is the maximum: 20 hits
    widths = []
    for groups in (np.zeros(40, int), np.arange(40) % 4, np.arange(40)):
        share = compare_with_boxes(evidence, images, boxes, groups, 40).pointers["model"].share
        assert share.value == 0.5
        widths.append(share.high - share.low)
    assert widths[0] == widths[1] == 0, "each group has as many of both"
    assert widths[2] == pytest.approx(2 * 1.96 * (0.25 / 40) ** 0.5, rel=0.15)
    all_hit = compare_with_boxes(evidence, images, [left] * 40, np.arange(40), 40).pointers["model"].share
    assert (all_hit.low, all_hit.high) == (pytest.approx(0.025 ** (1 / 40)), 1)


def test_one_image_of_each_fracture_with_boxes_and_at_most_200_by_a_seed():
    count = 500
    test = pa.table(
        {
            "row": range(count),
            "source": [f"{n}.png" for n in range(count)],
            "radiograph_id": [n // 2 for n in range(count)],
            "label": pa.array([int(n % 4 != 3) for n in range(count)], pa.uint8()),
        }
    )
    boxes = {f"{n}.png": np.array([QUARTER]) for n in range(count) if n not in (0, 4, 5)}
    boxed = select_boxed(test, boxes)
    assert boxed["row"].to_pylist() == [1, *range(2, count, 2)][:2] + list(range(6, count, 2))
    chosen = choose_rows(boxed)["row"].to_pylist()
    assert len(set(chosen)) == MOST == 200
    assert chosen == sorted(chosen) == choose_rows(boxed)["row"].to_pylist()
    assert chosen[-1] > 450, "of the whole, not the first"


def brightness_network() -> keras.Model:
    """Its evidence for a fracture is the grey of each pixel."""
    images = keras.layers.Input((32, 32, 1), name="images")
    x = keras.layers.Conv2D(1, 1, name="conv")(images)
    logit = keras.layers.Dense(1, name="logit")(keras.layers.GlobalAveragePooling2D()(x))
    model = keras.Model(images, keras.layers.Activation("sigmoid", name="probability")(logit))
    model.set_weights([np.ones((1, 1, 1, 1)), np.zeros(1), np.full((1, 1), 0.01), np.zeros(1)])
    return model


@pytest.fixture
def boxed_dataset(dataset):
    """Writes a test split of 40 whose fractures have a box on one pixel: the brightest, or for each third another."""

    def write(boxed: int) -> Dataset:
        data = dataset(test=40)
        images = images_of(data.read("test", 0, 40), 32)[..., 0]
        paths, boxes = [], []
        for row in range(1, 2 * boxed, 2):
            y, x = np.unravel_index(images[row].argmax(), (32, 32))
            x = x if row % 3 else (x + 1) % 32
            paths.append(f"test/{row}.png")
            boxes.append([(x / 32, y / 32, (x + 1) / 32, (y + 1) / 32)])
        table = pa.table({"path": paths, "boxes": pa.array(boxes, BOXES)})
        (data.folder / "files.parquet").write_parquet(table)
        return Dataset(data.folder, data.manifest.model_copy(update={"boxed": boxed}))

    return write


def test_a_network_of_brightness_points_where_brightness_does(boxed_dataset):
    data, model = boxed_dataset(20), brightness_network()
    test = score_blocks(model, data, "test", 0, 1)
    gallery = make_gallery(model, test, data, 0.5, 1)
    game = gallery.pointing
    hits = sum(row % 3 != 0 for row in range(1, 40, 2))
    assert {name: pointer.hits for name, pointer in game.pointers.items()} == {
        "model": hits,
        "brightness": hits,
        "chance": None,
        "limit": 20,
    }
    assert (game.radiographs, game.boxed, game.empty, game.grid) == (20, 20, 0, (32, 32))
    assert game.pointers["chance"].share.value == pytest.approx(1 / 32**2)
    assert Gallery.model_validate_json(gallery.model_dump_json()) == gallery


def test_fewer_than_ten_fractures_with_boxes_are_too_few(boxed_dataset):
    data, model = boxed_dataset(9), brightness_network()
    assert len(data.read_boxes()) == 9
    assert play_pointing_game(model, score_blocks(model, data, "test", 0, 1), data, data.read_boxes()) is None


def test_the_page_has_the_table_and_says_how_many_were_chosen(game):
    gallery = Gallery(groups={name: [] for name in GROUPS}, similarity=[0.1], pointing=game)
    facts = {"title": "x", "radiographs": 1, "images": 1, "threshold": 0.5, "caveats": []}
    page = " ".join(render("explanations.html", gallery=gallery, **facts).decode().split())
    assert "<td>of the map</td><td>1 of 4</td>" in page
    assert "the most that a map of 2 × 2 positions can reach" in page
    assert "on 4, chosen by a fixed seed, of the 9 test radiographs" in page
    assert "Maps without any evidence for a fracture, which count as misses: 1." in page
