import io

import cv2
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from fracture.config import DataConfig, SampleConfig
from fracture.preparation.duplicates.alignment import compare_pairs
from fracture.preparation.duplicates.grouping import COPY_KINDS, find_links, group_numbers
from fracture.preparation.facts import FACTS, examine, stack_views
from fracture.preparation.sample import draw_sample
from fracture.preparation.source import ImageFile
from tests.preparation.planted import EDITS, encoded

SIZE = 224


def table(*files: tuple[str, bytes], patients: dict[str, str] | None = None, origins: dict[str, str] | None = None):
    rows = [
        examine(
            ImageFile(path, 0, "", len(d), 0, (patients or {}).get(path, ""), (origins or {}).get(path, "")), d, SIZE
        )[0]
        for path, d in files
    ]
    return pa.Table.from_pylist(rows, schema=FACTS)


def links_of(facts: pa.Table, **config) -> pa.Table:
    views = stack_views(facts)
    return find_links(facts, DataConfig(**config), lambda pairs: compare_pairs(views, pairs))


@pytest.fixture(scope="module")
def radiograph_ids() -> list[np.ndarray]:
    """Forty radiographs of forty patients, of four anatomies: all alike, none the same. [224, 224] uint8."""
    drawn = [data for path, data in draw_sample(SampleConfig(images=120)) if "view1" in path]
    return [np.asarray(Image.open(io.BytesIO(data)).convert("L").resize((SIZE, SIZE))) for data in drawn]


@pytest.fixture(scope="module")
def planted(radiograph_ids):
    """The radiographs, and of each one copy of every third kind; links found among all of them."""
    files, originals, kinds = [], [], []
    generator = np.random.default_rng(0)
    for number, radiograph_id in enumerate(radiograph_ids):
        files.append((f"radiograph{number}.png", encoded(radiograph_id)))
        originals.append(number)
        kinds.append("")
        for position, (kind, edit) in enumerate(EDITS.items()):
            if position % 3 == number % 3:
                files.append((f"x{len(files)}.png", encoded(edit(radiograph_id, generator))))
                originals.append(number)
                kinds.append(kind)
    facts = table(*files)
    return np.array(originals), np.array(kinds), links_of(facts)


def test_different_radiographs_are_never_linked(planted):
    originals, _, links = planted
    pairs = links.select(["first", "second"]).to_pandas()
    wrong = originals[pairs["first"]] != originals[pairs["second"]]
    assert wrong.sum() == 0


@pytest.mark.parametrize("kind", EDITS)
def test_copies_are_found(planted, kind):
    originals, kinds, links = planted
    groups = group_numbers(len(originals), links)
    group_of_radiograph = {original: groups[i] for i, original in enumerate(originals) if not kinds[i]}
    copies = np.flatnonzero(kinds == kind)
    found = [groups[i] == group_of_radiograph[originals[i]] for i in copies]
    assert len(found) >= 13
    assert np.mean(found) >= 0.9, f"{np.sum(found)} of {len(found)}"


def test_each_link_says_why(radiograph_ids):
    turned = EDITS["inverted"](np.rot90(radiograph_ids[0]).copy(), None)
    facts = table(
        ("a.png", encoded(radiograph_ids[0])),
        ("b.png", encoded(radiograph_ids[0])),  # the same bytes
        ("c.bmp", encoded(radiograph_ids[0], "bmp")),  # the same pixels
        ("d.png", encoded(turned)),
        ("e.png", encoded(radiograph_ids[1])),
        ("f.png", b""),  # unreadable: in no link
    )
    links = links_of(facts).to_pylist()
    assert [(link["first"], link["second"], link["kind"]) for link in links] == [
        (0, 1, "bytes"),
        (0, 1, "pixels"),
        (0, 2, "pixels"),
        (0, 3, "copy"),
    ]
    assert links[-1]["texture"] > 0.95
    assert links[-1]["inverted"]
    assert not links[-1]["flipped"]
    assert links[-1]["degrees"] == pytest.approx(90, abs=3)


def test_patients_are_groups_but_not_copies(radiograph_ids):
    files = [(f"p{i}.png", encoded(radiograph_ids[i])) for i in range(4)]
    facts = table(*files, patients={"p0.png": "ann", "p2.png": "ann"})
    links = links_of(facts)
    assert group_numbers(4, links).tolist() == [0, 1, 0, 2]
    assert len(set(group_numbers(4, links, COPY_KINDS).tolist())) == 4


def test_number_seven_of_two_hospitals_is_two_patients(radiograph_ids):
    files = [(f"p{i}.png", encoded(radiograph_ids[i])) for i in range(4)]
    patients, origins = dict.fromkeys(dict(files), "7"), {"p0.png": "north", "p1.png": "north"}
    assert group_numbers(4, links_of(table(*files, patients=patients, origins=origins))).tolist() == [0, 0, 1, 1]


def test_a_pattern_that_captures_nothing_joins_nothing(radiograph_ids):
    files = [(f"{name}.png", encoded(radiograph_ids[i])) for i, name in enumerate(("s1-a", "s1-b", "other", "more"))]
    links = links_of(table(*files), group_pattern=r"(?:s(\d+))?")
    assert group_numbers(4, links).tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize("degrees", [25, 40, 90])
def test_a_radiograph_that_is_not_square_is_known_when_turned(radiograph_ids, degrees):
    """Turned first, made square afterwards: what was a circle is an ellipse, but in the middle, its aspect kept."""
    long = cv2.resize(radiograph_ids[5], (300, 220), interpolation=cv2.INTER_AREA)
    turn = cv2.getRotationMatrix2D((149.5, 109.5), degrees, 1)
    files = [("a.png", long), ("b.png", cv2.warpAffine(long, turn, (300, 220))), ("c.png", radiograph_ids[6])]
    facts = table(*[(path, encoded(image)) for path, image in files])
    assert [len(views) for views in facts["small"].to_pylist()] == [2, 2, 1]
    assert group_numbers(3, links_of(facts)).tolist() == [0, 0, 1]


def test_two_large_families_of_one_radiograph_are_joined(radiograph_ids):
    """Each image's nearest neighbours are all of its own family."""
    turned = EDITS["gamma 0.7"](radiograph_ids[3], None)
    files = [
        (f"{n}-{q}.jpg", encoded(f, "jpeg", quality=q))
        for n, f in enumerate((radiograph_ids[3], turned))
        for q in range(60, 90, 3)
    ]
    facts = table(*files)
    assert len(set(group_numbers(len(facts), links_of(facts)).tolist())) == 1


def test_a_pattern_on_the_path_names_the_patient(radiograph_ids):
    files = [(f"{name}.png", encoded(radiograph_ids[i])) for i, name in enumerate(("s1-a", "s2-a", "s1-b", "other"))]
    links = links_of(table(*files), group_pattern=r"s\d+")
    assert group_numbers(4, links).tolist() == [0, 1, 0, 2]


def test_a_name_alone_joins_nothing(radiograph_ids):
    names = ("1.png", "1 (1).png", "1-rotated2.png", "1 - Copy.png")
    links = links_of(table(*[(name, encoded(radiograph_ids[i])) for i, name in enumerate(names)]))
    assert links.num_rows == 0


def test_blank_images_are_like_nothing():
    blank = np.zeros((SIZE, SIZE), np.uint8)
    facts = table(("a.png", encoded(blank)), ("b.png", encoded(blank + 1)), ("c.png", encoded(blank + 200)))
    assert links_of(facts).num_rows == 0
