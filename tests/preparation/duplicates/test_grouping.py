import io
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from fracture.config import DataConfig
from fracture.preparation.decoding.decode import Rejected
from fracture.preparation.duplicates.alignment import compare_pairs
from fracture.preparation.duplicates.grouping import COPY_KINDS, find_links, number_groups, stack_views
from fracture.preparation.facts import FACTS, make_listed_row, scan_bytes
from fracture.preparation.source import ImageFile
from tests.preparation.planted import EDITS, encoded

SIZE = 224


def table(*files: tuple[str, bytes], **known: dict[str, Any]) -> pa.Table:
    """Scan files; more fields of ImageFile as `field={path: value}`."""
    rows = []
    for path, data in files:
        file = ImageFile(path, 0, "", len(data), 0, **{name: of[path] for name, of in known.items() if path in of})
        try:
            rows.append(scan_bytes(file, data, SIZE)[0])
        except Rejected as error:
            rows.append(dict.fromkeys(FACTS.names) | make_listed_row(file) | {"reason": str(error)})
    return pa.Table.from_pylist(rows, schema=FACTS)


def links_of(facts: pa.Table, **config) -> pa.Table:
    views = stack_views(facts)
    return find_links(facts, DataConfig(**config), lambda pairs: compare_pairs(views, pairs))


@pytest.fixture(scope="module")
def radiographs(sample_images) -> list[np.ndarray]:
    """Forty radiographs of forty patients, of four anatomies: all similar, none the same. [224, 224] uint8."""
    first_views = [data for path, data in sample_images.items() if "view1" in path]
    return [np.asarray(Image.open(io.BytesIO(data)).convert("L").resize((SIZE, SIZE))) for data in first_views]


@pytest.fixture(scope="module")
def planted(radiographs):
    """Find links among the radiographs and their copies: of each radiograph one copy of every third kind."""
    files, originals, kinds = [], [], []
    generator = np.random.default_rng(0)
    for number, radiograph in enumerate(radiographs):
        files.append((f"radiograph{number}.png", encoded(radiograph)))
        originals.append(number)
        kinds.append("")
        for position, (kind, edit) in enumerate(EDITS.items()):
            if position % 3 == number % 3:
                files.append((f"x{len(files)}.png", encoded(edit(radiograph, generator))))
                originals.append(number)
                kinds.append(kind)
    facts = table(*files)
    return np.array(originals), np.array(kinds), links_of(facts)


@pytest.mark.slow
def test_different_radiographs_are_never_linked(planted):
    originals, _, links = planted
    pairs = links.select(["first", "second"]).to_pandas()
    wrong = originals[pairs["first"]] != originals[pairs["second"]]
    assert wrong.sum() == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", EDITS)
def test_copies_are_found(planted, kind):
    originals, kinds, links = planted
    groups = number_groups(len(originals), links)
    group_of_radiograph = {original: groups[i] for i, original in enumerate(originals) if not kinds[i]}
    copies = np.flatnonzero(kinds == kind)
    found = [groups[i] == group_of_radiograph[originals[i]] for i in copies]
    assert len(found) >= 13
    assert np.mean(found) >= 0.9, f"{np.sum(found)} of {len(found)}"


def test_each_link_has_its_reason(radiographs):
    turned = EDITS["inverted"](np.rot90(radiographs[0]).copy(), None)
    facts = table(
        ("a.png", encoded(radiographs[0])),
        ("b.png", encoded(radiographs[0])),  # the same bytes
        ("c.bmp", encoded(radiographs[0], "bmp")),  # the same pixels
        ("d.png", encoded(turned)),
        ("e.png", encoded(radiographs[1])),
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


def test_patients_are_groups_but_not_copies(radiographs):
    files = [(f"p{i}.png", encoded(radiographs[i])) for i in range(4)]
    facts = table(*files, patients={"p0.png": ("ann",), "p2.png": ("Ann M.", "ann")})
    links = links_of(facts)
    assert number_groups(4, links).tolist() == [0, 1, 0, 2]
    assert len(set(number_groups(4, links, COPY_KINDS).tolist())) == 4


def test_a_study_is_a_group_and_the_same_dicom_object_is_one_radiograph(radiographs):
    files = [(f"p{i}.png", encoded(radiographs[i])) for i in range(4)]
    studies = {"p0.png": "s", "p1.png": "s", "p2.png": "", "p3.png": ""}
    facts = table(*files, study=studies, instance={"p2.png": "1.2.3", "p3.png": "1.2.3"})
    links = links_of(facts)
    assert number_groups(4, links).tolist() == [0, 0, 1, 1]
    assert number_groups(4, links, COPY_KINDS).tolist() == [0, 1, 2, 2]
    assert [link["kind"] for link in links.to_pylist()] == ["object", "patient"]


@pytest.mark.parametrize("degrees", [25, 40, 90])
def test_a_rotated_copy_of_a_radiograph_that_is_not_square_is_found(radiographs, degrees):
    """A radiograph that is rotated first and resized to a square afterwards: only its middle keeps its aspect."""
    long = cv2.resize(radiographs[5], (300, 220), interpolation=cv2.INTER_AREA)
    turn = cv2.getRotationMatrix2D((149.5, 109.5), degrees, 1)
    files = [("a.png", long), ("b.png", cv2.warpAffine(long, turn, (300, 220))), ("c.png", radiographs[6])]
    facts = table(*[(path, encoded(image)) for path, image in files])
    assert [len(views) for views in facts["views"].to_pylist()] == [2, 2, 1]
    assert number_groups(3, links_of(facts)).tolist() == [0, 0, 1]


def test_two_large_families_of_one_radiograph_are_joined(radiographs):
    """The nearest neighbours of each image are all of its own family."""
    turned = EDITS["gamma 0.7"](radiographs[3], None)
    files = [
        (f"{n}-{q}.jpg", encoded(f, "jpeg", quality=q))
        for n, f in enumerate((radiographs[3], turned))
        for q in range(60, 90, 3)
    ]
    facts = table(*files)
    assert len(set(number_groups(len(facts), links_of(facts)).tolist())) == 1


def test_a_name_alone_joins_nothing(radiographs):
    names = ("1.png", "1 (1).png", "1-rotated2.png", "1 - Copy.png")
    links = links_of(table(*[(name, encoded(radiographs[i])) for i, name in enumerate(names)]))
    assert links.num_rows == 0


def test_blank_images_are_rejected_and_similar_to_nothing(radiographs):
    blank = np.zeros((SIZE, SIZE), np.uint8)
    files = [("a.png", encoded(blank)), ("b.png", encoded(blank + 200)), ("c.png", encoded(radiographs[0]))]
    facts = table(*files)
    assert facts["reason"].to_pylist() == ["blank: hardly any range of grey"] * 2 + [None]
    assert links_of(facts).num_rows == 0
