import pyarrow as pa
import pytest

from fracture.config import DataConfig
from fracture.errors import UsageError
from fracture.labels import CLASS_NAMES, FRACTURE, NORMAL, SPLITS
from fracture.preparation.audit import make_audit
from fracture.preparation.duplicates.grouping import LINKS
from fracture.preparation.facts import FACTS
from fracture.preparation.ledger import Ledger
from fracture.preparation.plan import SplitPlan, plan_split
from fracture.preparation.scan import ScannedSource
from fracture.preparation.source import Source
from fracture.storage import storage_path

NOTHING = pa.table({name: [] for name in ("sha256", "pixels", "split", "ids")})


def scanned(per_class: int, *links: tuple[int, int, str], split_fault: str = "") -> ScannedSource:
    """Make facts of files without files: `per_class` of each class in each split, and one that cannot be read."""
    rows = []
    for split in SPLITS:
        for label in (NORMAL, FRACTURE):
            for number in range(per_class):
                row = dict.fromkeys(FACTS.names) | {"path": f"{split}/{CLASS_NAMES[label]}/{number}.png"}
                digest = len(rows).to_bytes(32, "little")
                row |= {
                    "label": label,
                    "split": split,
                    "patients": [],
                    "study": "",
                    "group_match": "",
                    "traits": [],
                    "origin": "",
                    "bytes": 1000 + len(rows),
                }
                row |= {
                    "sha256": digest,
                    "pixels": digest[:16],
                    "format": "PNG",
                    "mode": "L",
                    "width": 50,
                    "height": 50,
                }
                rows.append(row | {"mean": 60.0, "deviation": 1.0, "border": 0.0})
    rows.append(dict.fromkeys(FACTS.names) | {"path": "train/normal/bad.png", "label": NORMAL, "split": "train"})
    rows[-1] |= {"patients": [], "study": "", "group_match": "", "origin": "", "reason": "not an image"}
    facts = pa.Table.from_pylist(rows, schema=FACTS)
    listed = [dict.fromkeys(LINKS.names) | {"first": a, "second": b, "kind": kind} for a, b, kind in links]
    table = pa.Table.from_pylist(listed, schema=LINKS)
    source = Source({"": storage_path("/data")}, (), {}, False, split_fault)
    return ScannedSource(source, facts, table, make_audit(facts, table), {})


def plan(source: ScannedSource, config: DataConfig, ledger: Ledger | None = None, keep_test: bool = False) -> SplitPlan:
    return plan_split(source, config, ledger or Ledger(NOTHING), keep_test=keep_test)


def test_a_clean_split_is_kept_and_unreadable_files_are_in_none():
    planned = plan(scanned(2), DataConfig())
    assert (planned.kind, planned.reason) == ("official", "as found: no radiograph is in two splits")
    assert planned.split_used.tolist() == ["train"] * 4 + ["val"] * 4 + ["test"] * 4 + [""]
    assert planned.files["split_used"].to_pylist() == planned.split_used.tolist()
    assert not {"views", "rings", "spectrum", "modified"} & set(planned.files.column_names)


def test_a_split_that_leaks_is_replaced_and_no_group_is_separated():
    planned = plan(scanned(6, (0, 24, "copy"), (1, 13, "patient")), DataConfig())
    assert planned.kind == "group"
    assert planned.reason == "ours, whole groups: 2 validation and test images of the split found leak from training"
    assert planned.split_used[0] == planned.split_used[24] != ""
    radiographs, groups = planned.files["radiograph_id"].to_pylist(), planned.group_ids.tolist()
    assert radiographs[0] == radiographs[24]
    assert (radiographs[1] == radiographs[13], groups[1] == groups[13]) == (False, True)


def test_a_radiograph_with_both_labels_is_in_no_split():
    planned = plan(scanned(6, (0, 6, "copy")), DataConfig(split="group"))
    assert planned.split_used[[0, 6]].tolist() == ["", ""]
    assert planned.left_out["the radiograph has both labels"] == 2
    with pytest.raises(UsageError, match=r"every radiograph has both labels, for example 'train/fracture/0.png' and"):
        plan(scanned(1, (0, 1, "copy"), (2, 3, "copy"), (4, 5, "copy")), DataConfig(split="group"))


def test_a_split_of_the_ledger_is_kept():
    first = plan(scanned(6), DataConfig(split="group"))
    ledger = Ledger(NOTHING).update(first.files)
    again = plan(scanned(6), DataConfig(split="group"), ledger)
    assert again.split_used.tolist() == first.split_used.tolist()


def test_a_source_of_one_class_is_planned_as_training_alone():
    """The facts' first split is north, the second south; of the third, east, only normals can be read."""
    source = scanned(6)
    origins = pa.array([("north", "south", "east")[min(row // 12, 2)] for row in range(37)])
    facts = source.facts.set_column(source.facts.schema.get_field_index("origin"), "origin", origins)
    readable = pa.array([None if row >= 30 else digest for row, digest in enumerate(facts["sha256"].to_pylist())])
    facts = facts.set_column(facts.schema.get_field_index("sha256"), "sha256", readable.cast(pa.binary(32)))
    planned = plan(ScannedSource(source.source, facts, source.links, source.audit, {}), DataConfig(folds="source"))
    assert (planned.kind, planned.folds) == ("folds", ("north", "south"))
    assert planned.splits == ("fold-1", "fold-1-val", "fold-2", "fold-2-val", "untested")
    assert (planned.split_used == "untested").tolist() == [24 <= row < 30 for row in range(37)]
    assert planned.untested[0].startswith("source 'east' has 0 separate fractured and 6 normal radiographs")


def test_a_test_file_may_not_be_found_in_another_split():
    source = scanned(6)
    swapped = source.facts["split"].to_pylist()
    swapped[0] = "test"
    moved = source.facts.set_column(source.facts.schema.get_field_index("split"), "split", pa.array(swapped))
    before = plan(ScannedSource(source.source, moved, source.links, source.audit, {}), DataConfig())
    ledger = Ledger(NOTHING).update(before.files)
    assert plan(source, DataConfig(), ledger).kind == "official"
    planned = plan(source, DataConfig(), ledger, keep_test=True)
    assert planned.reason == "ours, whole groups: 1 images that were test are in other splits as found"
    assert planned.split_used[0] == "test"
    with pytest.raises(UsageError, match=r"'train/normal/0.png' is in training or validation, and has tested"):
        plan(source, DataConfig(split="official"), ledger, keep_test=True)
