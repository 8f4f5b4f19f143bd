from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from fracture.errors import UsageError
from fracture.labels import FRACTURE, NORMAL
from fracture.preparation.audit import (
    Audit,
    count_leakage,
    describe_support,
    format_audit,
    list_alarms,
    make_audit,
)
from fracture.preparation.audit_page import render_audit_page
from fracture.preparation.duplicates.grouping import LINKS
from fracture.preparation.facts import FACTS, scan_file
from fracture.preparation.output import read_audit
from fracture.preparation.source import ImageFile, Source
from fracture.storage import storage_path


def facts_of(folder: Path, *files: tuple[str, int, bytes]) -> pa.Table:
    """Scan files, given as (path, label, content); the split is the path's first folder."""
    rows = []
    for path, label, data in files:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
        file = ImageFile(path, label, path.split("/")[0], len(data), 0)
        rows.append(scan_file(file, storage_path(folder / path), 64)[0])
    return pa.Table.from_pylist(rows, schema=FACTS)


def links_of(*links: tuple[int, int, str]) -> pa.Table:
    rows = [
        {"first": a, "second": b, "kind": kind} | ({"texture": 0.97, "degrees": 350.0} if kind == "copy" else {})
        for a, b, kind in links
    ]
    return pa.Table.from_pylist([dict.fromkeys(LINKS.names) | row for row in rows], schema=LINKS)


@pytest.fixture(scope="module")
def facts(sample_images: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    images = list(sample_images.values())
    return facts_of(
        tmp_path_factory.mktemp("audit"),
        ("train/fracture/a.jpg", FRACTURE, images[0]),
        ("train/fracture/b.jpg", FRACTURE, images[1]),
        ("train/normal/c.png", NORMAL, images[2]),
        ("val/fracture/d.jpg", FRACTURE, images[3]),
        ("val/normal/e.jpg", NORMAL, images[4]),
        ("test/fracture/f.jpg", FRACTURE, images[5]),
        ("test/fracture/g.jpg", FRACTURE, images[0]),
        ("test/normal/h.jpg", NORMAL, images[7]),
        ("test/normal/i.jpg", NORMAL, b"no image"),
    )


LEAKY = links_of((0, 6, "bytes"), (0, 6, "pixels"), (1, 5, "copy"), (2, 7, "patient"), (3, 5, "name"), (1, 2, "copy"))


def test_each_leaking_image_counts_once_under_its_strongest_link(facts):
    audit = make_audit(facts, LEAKY)
    assert audit.leakage["test"].images == 3
    assert audit.leakage["test"].by_kind == {"bytes": 1, "pixels": 0, "object": 0, "copy": 1, "name": 0, "patient": 1}
    assert audit.leakage["val"].by_kind == {"bytes": 0, "pixels": 0, "object": 0, "copy": 0, "name": 1, "patient": 0}
    assert audit.leaks
    assert count_leakage(np.array(["fold-1"] * 9), LEAKY) == {}


def test_what_test_shares_with_validation_alone_leaks_too(facts):
    leak = make_audit(facts, links_of((3, 5, "copy"), (4, 7, "copy"), (0, 6, "bytes"))).leakage
    assert (leak["test"].by_kind["bytes"], leak["test"].in_validation, leak["test"].leaking) == (1, 2, 3)
    assert leak["test"].where == "training or validation"
    assert leak["val"].leaking == 0


def test_one_group_that_holds_much_of_the_data_is_an_alarm(facts):
    assert any(line.startswith("One group holds 5 of 8 images") for line in list_alarms(make_audit(facts, LEAKY)))
    assert not any(line.startswith("One group") for line in list_alarms(make_audit(facts, links_of())))


def test_counts_are_of_readable_images_and_of_radiographs(facts):
    audit = make_audit(facts, LEAKY)
    assert (audit.files, audit.images) == (9, {"normal": 3, "fracture": 5})
    assert audit.distinct_images == {"normal": 3, "fracture": 4}
    assert audit.radiographs == {"normal": 3, "fracture": 2}  # a g; b c d f, which are under both labels; e; h
    assert audit.groups == 3  # h belongs to c's patient
    assert audit.largest_groups == [5, 2, 1]
    assert audit.splits["test"] == {"normal": 1, "fracture": 2}
    assert [(r.path, r.reason) for r in audit.rejected] == [("test/normal/i.jpg", "not an image")]
    assert audit.conflicts == [
        ["train/fracture/b.jpg", "train/normal/c.png", "val/fracture/d.jpg", "test/fracture/f.jpg"]
    ]


def test_the_precision_of_a_test_follows_from_the_number_of_radiographs(facts):
    """Hanley and McNeil at AUC .9: standard errors of .0452 (38 and 10 in a test of 15 %) and .0171 (253 and 67)."""
    audit = make_audit(facts, LEAKY)
    many = audit.model_copy(update={"radiographs": {"normal": 67, "fracture": 253}})
    assert describe_support(many) == (
        "an AUC of 0.90 to within ±0.09 in a test of 15% of the radiographs (38 fracture, 10 normal), ±0.03 in folds "
        "that test each one"
    )
    assert describe_support(audit) == (
        "no firm figure: 2 fracture of 5 radiographs, and a test of 15% needs at least 2 of each class; --folds uses "
        "each one"
    )


def test_extensions_that_do_not_match_the_content(facts):
    audit = make_audit(facts, LEAKY)
    by_format = dict(zip(facts["path"].to_pylist(), facts["format"].to_pylist(), strict=True))
    wrong = [p for p, f in by_format.items() if f and (f == "PNG") != p.endswith(".png")]
    assert audit.wrong_extension == wrong
    assert wrong


def test_each_kind_of_link_shows_its_pairs_one_a_radiograph(facts):
    pairs = make_audit(facts, LEAKY).examples
    assert [(p.path, p.training_path, p.kind) for p in pairs] == [
        ("test/fracture/g.jpg", "train/fracture/a.jpg", "bytes"),
        ("test/fracture/f.jpg", "train/fracture/b.jpg", "copy"),
        ("test/normal/h.jpg", "train/normal/c.png", "patient"),
    ]


def test_a_part_of_the_cross_validation_may_have_one_class_only():
    """One group holds nearly all fractures."""
    labels = [0] * 3 + [1] * 30 + [0] * 8 + [1] + [0] * 24
    groups = [0] * 3 + [1] * 30 + [2] * 9 + [3] * 20 + [4] * 3 + [5]
    rows = []
    for number, label in enumerate(labels):
        row = dict.fromkeys(FACTS.names) | {"path": f"{number}.jpg", "label": label, "split": "", "traits": []}
        row |= {"origin": "", "bytes": 9000 + number, "sha256": bytes([number] * 32), "pixels": bytes([number] * 16)}
        row |= {
            "format": "JPEG",
            "mode": "L",
            "width": 200,
            "height": 300,
            "mean": 60.0,
            "deviation": 1.0,
            "border": 0.0,
        }
        rows.append(row)
    same = [(a, a + 1, "patient") for a in range(len(groups) - 1) if groups[a] == groups[a + 1]]
    audit = make_audit(pa.Table.from_pylist(rows, schema=FACTS), links_of(*same))
    assert all(0 <= shortcut.auc <= 1 for shortcut in audit.shortcuts.values())


def shortcut_audit(size_predicts: bool) -> Audit:
    """Audit 80 images of 40 groups; fractures are larger by half, or not."""
    generator = np.random.default_rng(0)
    rows = []
    for number in range(80):
        label = number // 2 % 2
        side = int(generator.integers(200, 300) * (1.5 if label and size_predicts else 1))
        row = dict.fromkeys(FACTS.names) | {"path": f"{number}.jpg", "label": label, "split": "", "traits": []}
        row |= {"origin": "", "bytes": int(generator.integers(9000, 20000)), "sha256": bytes([number] * 32)}
        row |= {"pixels": bytes([number] * 16), "format": "JPEG", "mode": "L", "width": side, "height": side}
        row |= {"mean": generator.uniform(60, 90), "deviation": 40.0, "border": generator.uniform(0, 30)}
        rows.append(row)
    links = links_of(*[(n, n + 1, "patient") for n in range(0, 80, 2)])
    return make_audit(pa.Table.from_pylist(rows, schema=FACTS), links)


def test_a_shortcut_is_found_and_chance_is_not_one():
    audit = shortcut_audit(size_predicts=True)
    assert audit.shortcuts["size"].auc > 0.9
    assert audit.shortcuts["size"].is_alarming
    assert 0.3 < audit.shortcuts["border"].auc < 0.7
    assert list_alarms(audit)[-1].startswith("Things beside the anatomy predict the label (AUC, chance is 0.50): size ")
    fair = shortcut_audit(size_predicts=False)
    assert not any(s.is_alarming for s in fair.shortcuts.values())
    assert list_alarms(fair) == []


def test_sharpness_and_compression_are_shortcuts_too_and_the_unknown_is_left_out():
    """Fractures are sharper. Compression is known of every other radiograph, and is higher in fractures."""
    generator = np.random.default_rng(0)
    rows = []
    for number in range(80):
        label = number % 2
        row = dict.fromkeys(FACTS.names) | {"path": f"{number}.jpg", "label": label, "split": "", "traits": []}
        row |= {"origin": "", "bytes": 9000, "sha256": bytes([number] * 32), "pixels": bytes([number] * 16)}
        row |= {"format": "JPEG", "mode": "L", "width": 200, "height": 200, "mean": 60.0, "deviation": 40.0}
        row |= {"border": 9.0, "sharpness": 0.02 + 0.02 * label + generator.uniform(0, 0.01)}
        rows.append(row | {"compression": 1.5 + label + generator.uniform(0, 0.1) if number % 4 < 2 else None})
    audit = make_audit(pa.Table.from_pylist(rows, schema=FACTS), links_of())
    assert audit.shortcuts["sharpness"].auc == 1
    compression = audit.shortcuts["compression"]
    assert (compression.auc, compression.is_alarming) == (1, True)
    assert list_alarms(audit) == [
        "Things beside the anatomy predict the label (AUC, chance is 0.50): sharpness 1.00, compression 1.00."
    ]
    unknown = [row | {"compression": None} for row in rows]
    audit = make_audit(pa.Table.from_pylist(unknown, schema=FACTS), links_of())
    assert "compression" not in audit.shortcuts
    assert "sharpness 1.00" in "\n".join(format_audit(audit))


def test_what_is_left_is_measured_between_images_of_one_detector():
    """Fractures are of detector B but for one in five, and B's images are larger; within a detector nothing differs."""
    generator = np.random.default_rng(0)
    rows = []
    for number in range(200):
        label = number % 2
        maker = "AB"[label if number % 10 > 1 else 1 - label]
        side = int(generator.integers(200, 300)) + 200 * (maker == "B")
        row = dict.fromkeys(FACTS.names) | {"path": f"{number}.jpg", "label": label, "split": "", "origin": ""}
        row |= {"traits": [("manufacturer", maker), ("sex", "M")], "bytes": 9000, "sha256": bytes([number] * 32)}
        row |= {"pixels": bytes([number] * 16), "format": "DICOM", "mode": "L", "width": side, "height": side}
        rows.append(row | {"mean": 60.0, "deviation": 40.0, "border": 9.0})
    audit = make_audit(pa.Table.from_pylist(rows, schema=FACTS), links_of())
    assert audit.shortcuts["manufacturer"].auc == pytest.approx(0.8, abs=0.02)
    assert "sex" not in audit.shortcuts, "it has one value"
    assert audit.matched_on == "manufacturer"
    assert 0.35 < audit.matched.auc < 0.65
    lines = "\n".join(format_audit(audit))
    assert "manufacturer 0.80" in lines
    assert f"matched    AUC of the label from all of these {audit.matched.auc:.2f} between images of one manu" in lines


def test_negatives_among_positives_are_an_alarm():
    rows = []
    for number in range(40):
        row = dict.fromkeys(FACTS.names) | {"path": f"{number}.jpg", "label": number % 2, "split": "", "traits": []}
        row |= {"origin": "", "bytes": 9000, "sha256": bytes([number] * 32), "pixels": bytes([number] * 16)}
        row |= {"format": "JPEG", "mode": "L", "width": 200, "height": 200, "mean": 60.0, "deviation": 40.0}
        rows.append(row | {"border": 20.0 if number < 37 else 200.0})
    audit = make_audit(pa.Table.from_pylist(rows, schema=FACTS), links_of())
    assert audit.inverted == ["37.jpg", "38.jpg", "39.jpg"]
    [alarm] = list_alarms(audit)
    assert alarm.startswith(
        "3 of 40 images (8%) look inverted, bone dark on a bright ground, for example '37.jpg': turn"
    )
    few = make_audit(pa.Table.from_pylist(rows[:38], schema=FACTS), links_of())
    assert (few.inverted, list_alarms(few)) == (["37.jpg"], [])


def test_the_interval_counts_groups_not_images():
    """Hanley and McNeil at AUC .5 with 20 groups a class: a standard error of .092."""
    shortcut = shortcut_audit(size_predicts=False).shortcuts["aspect"]
    assert shortcut.auc == 0.5
    assert (shortcut.high - shortcut.low) / 2 == pytest.approx(1.96 * 0.0924, abs=0.002)


def test_the_audit_takes_ten_lines_on_a_screen_and_one_for_each_alarm(facts):
    lines = format_audit(make_audit(facts, LEAKY))
    assert len([line for line in lines if not line.startswith("ALARM")]) <= 10
    assert not any("no split was found" in line for line in lines)
    assert (
        "leakage    3 of 3 test images are in training too (1 the same bytes, 1 the same radiograph, edited, 1 the "
        in ("\n".join(lines))
    )
    assert "conflicts  radiographs under both labels: 1" in lines
    assert sum(line.startswith("ALARM") for line in lines) >= 3


def test_data_without_a_split_cannot_leak():
    lines = format_audit(shortcut_audit(size_predicts=False))
    assert "leakage    no split was found that could leak; training makes one of whole groups" in lines


def test_names_of_files_are_text_and_no_html(facts):
    script = "<script>alert(1)</script>"
    names = [f"{script}/{path}" for path in facts["path"].to_pylist()]
    facts = facts.set_column(facts.schema.get_field_index("path"), facts.schema.field("path"), pa.array(names))
    source = Source({"": storage_path(f"/data/{script}")}, (), {"fracture": [script]}, True, "")
    page = render_audit_page(source, facts, make_audit(facts, LEAKY)).decode()
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;/") > 7


def test_the_page_embeds_images_and_escapes_names(facts):
    source = Source({"": storage_path("/data/<wrists>")}, (), {}, True, "")
    page = render_audit_page(source, facts, make_audit(facts, LEAKY)).decode()
    assert page.count("data:image/png;base64,") == 10  # two pairs, and four of the conflict
    assert "&lt;wrists&gt;" in page
    assert "<wrists>" not in page
    assert "SYNTHETIC" in page
    assert "rotated by -10°" in page
    assert "http" not in page.replace("data:image", ""), "nothing is fetched"


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "audit.json is damaged: not a JSON object"), ("{}", "audit.json is damaged at 'files'")],
)
def test_a_damaged_audit_is_named_with_what_to_do(tmp_path: Path, text: str, message: str):
    (tmp_path / "audit.json").write_text(text)
    with pytest.raises(
        UsageError, match=rf"{message}. Delete .*/input.json, and run the same command again: it writes"
    ):
        read_audit(storage_path(tmp_path))


def test_what_the_labels_file_left_and_traits_that_tell_nothing_are_named(facts, tmp_path):
    traits = [{"view": "AP", "sex": "", "kvp": "60"}, {"view": "AP", "sex": "", "kvp": "65"}]
    columns = pa.array([list(traits[row % 2].items()) for row in range(len(facts))], facts.schema.field("traits").type)
    facts = facts.set_column(facts.column_names.index("traits"), "traits", columns)
    audit = make_audit(facts, links_of())
    assert (audit.constant_traits, audit.absent_traits) == (["view"], ["sex"])
    assert "not tried  the same in all images: view; in no image: sex" in format_audit(audit)
    listing = {"labelled": "9 files by <b>", "repeated_rows": [7], "ignored_columns": ["<i>"]}
    source = Source({"": storage_path(tmp_path)}, (), {}, False, "")
    page = render_audit_page(source, facts, audit.model_copy(update=listing)).decode()
    assert "<p>Labels: 9 files by &lt;b&gt;.</p>" in page
    assert "1 rows of the labels file that say what an earlier one says" in page
    assert "Columns of the labels file that were not read: &lt;i&gt;." in page
    assert "it: the same in all images: view; in no image: sex." in page
