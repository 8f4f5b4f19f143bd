from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fracture.registry.data_changes import find_data_changes


def table(rows: list[tuple[str, int, int, str]], **others: list[Any]) -> pa.Table:
    """`files.parquet` of (path, label, radiograph, split_used); the path stands for the bytes, "bad" cannot be read."""
    paths, labels, radiograph_ids, splits = zip(*rows, strict=True)
    columns = {"origin": [""] * len(rows), "width": [200] * len(rows), "height": [300] * len(rows)}
    columns |= {name: [100.0] * len(rows) for name in ("mean", "deviation", "border")} | others
    hashes = [None if "bad" in path else path.encode().ljust(32) for path in paths]
    return pa.table(
        {
            "path": list(paths),
            "label": pa.array(labels, pa.uint8()),
            "radiograph_id": pa.array(radiograph_ids, pa.int64()),
            "split_used": list(splits),
            "sha256": pa.array(hashes, pa.binary(32)),
            "pixels": pa.array([h and h.removeprefix(b"again-").ljust(32)[:16] for h in hashes], pa.binary(16)),
            **columns,
        }
    )


BEFORE = [("a", 1, 1, "train"), ("b", 0, 2, "test"), ("c", 1, 3, "test"), ("d", 0, 4, "val"), ("bad1", 0, 0, "")]


def test_a_radiograph_is_new_if_none_of_its_files_was_known():
    now = [*BEFORE[1:], ("a-copy", 1, 4, "val"), ("e", 1, 6, "train"), ("e-copy", 1, 6, ""), ("bad2", 1, 0, "")]
    changes = find_data_changes(table(now, origin=["", "", "", "", "", "Ward 3", "Ward 3", ""]), table(BEFORE))
    assert changes.new_images == {"normal": 0, "fracture": 3}
    assert changes.new_radiographs == {"normal": 0, "fracture": 1}
    assert (changes.new_radiograph_count, changes.new_radiograph_ids.tolist()) == (1, [6])
    assert (changes.unreadable_files, changes.removed_files) == (1, 1)
    assert changes.origins == {"Ward 3": 1}
    assert (changes.fracture_share_before, changes.fracture_share_now) == (pytest.approx(1 / 3), 1.0)


def test_without_a_model_in_use_all_radiographs_are_new():
    changes = find_data_changes(table(BEFORE), None)
    assert (
        changes.new_radiograph_count,
        changes.fracture_share_before,
        changes.fracture_share_now,
        changes.drifts,
    ) == (4, None, 0.5, [])
    assert (changes.test_before, changes.lost_from_test, changes.removed_files) == (0, 0, 0)


@pytest.mark.parametrize(
    ("now", "lost"),
    [
        ([("b", 0, 2, "retired"), ("joins", 0, 2, "val")], 1),  # joined to another split
        ([], 1),  # gone
        ([("b", 0, 2, ""), ("b-too", 1, 2, "")], 1),  # under both labels
        ([("b", 0, 2, "test"), ("joins", 0, 2, "")], 0),
        ([("again-b", 0, 9, "test")], 0),  # the same pixels in other bytes
    ],
)
def test_radiographs_lost_from_test_are_counted_for_every_reason(now: list, lost: int):
    before = [*BEFORE, ("b", 0, 2, "")]  # a copy, byte for byte
    changes = find_data_changes(table([BEFORE[0], *BEFORE[2:4], *now]), table(before))
    assert (changes.lost_from_test, changes.test_before) == (lost, 2)


def test_a_copy_under_the_other_label_is_a_conflict_and_an_old_conflict_is_not_new():
    before = [*BEFORE, ("x", 0, 7, ""), ("y", 1, 7, "")]
    now = [*before, ("copy", 0, 3, "")]
    changes = find_data_changes(table(now), table(before))
    assert changes.conflicting == 1
    assert changes.conflicting_paths == ["c", "copy"]
    assert (changes.new_radiograph_count, changes.new_or_conflicting) == (0, 1)


def test_a_changed_label_and_two_labels_of_the_same_bytes_are_conflicts():
    now = [("a", 0, 1, "train"), *BEFORE[1:]]
    assert find_data_changes(table(now), table(BEFORE)).conflicting == 1
    same = table([*BEFORE, ("c2", 0, 3, "")])
    hashes = same["sha256"].to_pylist()
    same = same.set_column(4, "sha256", pa.array([*hashes[:-1], hashes[2]], pa.binary(32)))
    changes = find_data_changes(same, table(BEFORE))
    assert (changes.conflicting, changes.conflicting_paths, changes.new_radiograph_count) == (1, ["c", "c2"], 0)


def test_drift_is_the_largest_difference_of_the_distributions():
    before = [(f"old{i}", i % 2, i, "train") for i in range(100)]
    now = [*before, *((f"new{i}", i % 2, 1000 + i, "train") for i in range(100))]
    generator = np.random.default_rng(0)
    grey = [*generator.normal(100, 10, 100), *generator.normal(100, 10, 100)]
    darker = [*np.arange(100.0), *np.arange(100.0) - 40]
    changes = find_data_changes(table(now, mean=darker, deviation=grey), table(before))
    drift = {measure.name: measure for measure in changes.drifts}
    assert drift["exposure: mean grey"].distance == pytest.approx(0.4)
    assert not drift["exposure: mean grey"].is_chance
    assert drift["contrast: deviation of grey"].is_chance
    assert drift["shorter side, pixels"].distance == 0
    assert len(drift["shorter side, pixels"].now) == 100
