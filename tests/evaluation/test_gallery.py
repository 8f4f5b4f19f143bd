import keras
import numpy as np
import pyarrow as pa
import pytest

from fracture.evaluation.gallery import (
    GROUPS,
    Example,
    Gallery,
    make_gallery,
    outline,
    overlay,
    select_most_confident,
    write_gallery,
)
from fracture.evaluation.scores import score_blocks
from fracture.models import build_model
from fracture.page import render
from fracture.storage import storage_path

SCORES = pa.table(
    {
        "row": range(8),
        "radiograph_id": [1, 1, 2, 3, 4, 5, 5, 6],
        "label": pa.array([1, 1, 1, 1, 0, 0, 0, 0], pa.uint8()),
        "probability": pa.array([0.7, 0.9, 0.8, 0.1, 0.5, 0.2, 0.1, 0.4], pa.float32()),
    }
)


def rows(count: int) -> dict[str, list[int]]:
    return {name: [row["row"] for row in group] for name, group in select_most_confident(SCORES, 0.5, count).items()}


def test_each_group_begins_with_the_most_confident_and_has_a_radiograph_once():
    assert rows(3) == {
        "true positives": [1, 2],  # not 0, of the same radiograph as 1
        "false positives": [4],  # 0.5 is a fracture
        "true negatives": [6, 7],
        "false negatives": [3],
    }
    assert rows(1)["true negatives"] == [6]


@pytest.fixture
def made(tiny_config, dataset):
    """A gallery of an untrained network, whose weights are those of the third random network it is compared with."""
    data = dataset(test=30)
    model = build_model(tiny_config(), 100.0, 50.0)
    keras.utils.set_random_seed(2)
    model = keras.models.clone_model(model)
    test = score_blocks(model, data, "test", 0, 1)
    middle = float(np.median(test["probability"]))
    steps: list[int] = []
    return make_gallery(model, test, data, middle, 2, lambda: steps.append(1)), steps, middle


def test_a_gallery_holds_groups_and_a_sanity_check_that_an_untrained_network_fails(made, tmp_path):
    gallery, steps, middle = made
    assert list(gallery.groups) == list(GROUPS)
    assert sum(len(group) for group in gallery.groups.values()) >= 4
    for name, (label, fracture) in GROUPS.items():
        assert len(gallery.groups[name]) <= 2
        for example in gallery.groups[name]:
            assert int(example.path.removeprefix("test/").removesuffix(".png")) % 2 == label
            assert (example.probability >= middle) == fracture
            assert example.radiograph != example.explained
    assert gallery.similarity[2] == pytest.approx(1, abs=1e-3)
    assert not gallery.passes_sanity_check
    assert gallery.sanity_check.startswith(
        "SANITY CHECK FAILED: do not rely on these maps. At least one of 5 copies of the network with random"
    )
    assert len(steps) == 6
    write_gallery(storage_path(tmp_path), gallery)
    assert Gallery.model_validate_json((tmp_path / "gallery.json").read_bytes()) == gallery


def test_a_page_has_the_four_groups_and_names_as_text():
    script = "<script>alert(1)</script>"
    example = Example(path=script, label="fracture", probability=0.9, radiograph="data:,a", explained="data:,b")
    groups = {name: [example] if name == "true positives" else [] for name in GROUPS}
    gallery = Gallery(groups=groups, similarity=[0.1, 0.3])
    facts = {"title": script, "radiographs": 1, "images": 1, "threshold": 0.5, "caveats": [script]}
    page = render("explanations.html", gallery=gallery, **facts).decode()
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 4  # title and heading, caveat, path
    assert [page.count(f"<h2>{name.capitalize()}: ") for name in GROUPS] == [1] * 4
    assert page.count("There are none.") == 3
    assert (
        "Sanity check passed: 2 copies of the network with random weights give other maps: the mean absolute rank "
        "correlation over these 1 images is 0.10 to 0.30 (0: unrelated, 1: the same positions), below the limit of 0.5."
    ) in page


def test_boxes_are_outlined_on_the_radiograph():
    image = np.full((8, 8), 100, np.uint8)
    shown = outline(image, np.array([[0.25, 0.25, 0.75, 0.5]]))
    drawn = (shown != 100).any(-1)
    assert drawn[2, 2:7].all()
    assert drawn[4, 2:7].all()
    assert drawn.sum() == 12, "two rows of five, and one more on either side"
    assert outline(image, None) is image


def test_where_the_map_is_0_the_radiograph_is_as_it_was():
    image = np.arange(16, dtype=np.uint8).reshape(4, 4)
    heat_map = np.zeros((4, 4), np.float32)
    heat_map[0, 0] = 1
    shown = overlay(image, heat_map)
    assert (shown[1:] == image[1:, :, None]).all()
    red, green, blue = shown[0, 0].tolist()
    assert red > 50 > max(green, blue), "the most is red"
