import pyarrow as pa
import pytest

from fracture.config import DataConfig
from fracture.dataset.format import LEDGER, MANIFEST
from fracture.preparation.ledger import Ledger
from fracture.preparation.split import RETIRED
from fracture.storage import storage_path


def planned(*rows: tuple[str, str, int, str]) -> pa.Table:
    """Make the table of a split plan from (file, pixels, group, split); one letter stands for a hash."""
    return pa.table(
        {
            "sha256": pa.array([row[0].encode() * 32 for row in rows], pa.binary(32)),
            "pixels": pa.array([row[1].encode() * 16 for row in rows], pa.binary(16)),
            "group_id": pa.array([row[2] for row in rows], pa.int64()),
            "split_used": pa.array([row[3] for row in rows], pa.string()),
        }
    )


def splits_of(ledger: Ledger) -> dict[str, str]:
    return {row["sha256"][:1].decode(): row["split"] for row in ledger.table.to_pylist()}


@pytest.fixture
def empty(tmp_path) -> Ledger:
    return Ledger.read(storage_path(tmp_path), DataConfig())


def test_a_file_left_out_as_a_copy_gets_the_split_of_its_group(empty):
    ledger = empty.update(planned(("a", "p", 1, "train"), ("b", "p", 1, ""), ("c", "q", 2, ""), ("d", "r", 3, "val")))
    assert splits_of(ledger) == {"a": "train", "b": "train", "d": "val"}


def test_files_that_are_gone_stay_in_the_ledger(empty):
    ledger = empty.update(planned(("a", "p", 1, "train"))).update(planned(("b", "q", 2, "test")))
    assert splits_of(ledger) == {"a": "train", "b": "test"}


def test_copies_of_a_retired_file_are_retired_for_good(empty):
    ledger = empty.update(planned(("a", "p", 1, RETIRED), ("b", "q", 1, "train"), ("c", "p", 1, "")))
    assert splits_of(ledger) == {"a": RETIRED, "b": "train", "c": RETIRED}
    later = ledger.update(planned(("d", "p", 1, "train")))
    assert splits_of(later) == {"a": RETIRED, "b": "train", "c": RETIRED, "d": RETIRED}


def test_a_test_file_that_is_left_out_stays_test_whatever_its_group_is(empty):
    """A copy under the other label and a training patient's name leaves both out, until the wrong one is removed."""
    ledger = empty.update(planned(("a", "p", 1, "test"), ("t", "q", 2, "train")))
    joined = ledger.update(planned(("a", "p", 2, ""), ("b", "p", 2, ""), ("t", "q", 2, "train"), ("u", "r", 2, "")))
    assert splits_of(joined) == {"a": "test", "b": "test", "t": "train", "u": "train"}


def test_each_file_of_a_leaky_split_that_was_kept_has_its_own_split(empty):
    ledger = empty.update(planned(("a", "p", 1, "test"), ("b", "q", 1, "train")))
    assert splits_of(ledger) == {"a": "test", "b": "train"}


def test_a_file_is_known_by_its_content_or_by_its_pixels(empty):
    ledger = empty.update(planned(("a", "p", 1, "test"), ("b", "q", 2, "train")))
    found = ledger.find_splits(planned(("a", "x", 0, ""), ("c", "q", 0, ""), ("d", "y", 0, "")))
    assert found == {(b"a" * 32).hex(): "test", (b"c" * 32).hex(): "train"}


def test_the_ledger_of_other_split_settings_is_not_used(tmp_path, empty):
    folder, config = storage_path(tmp_path), DataConfig(seed=3)
    (folder / LEDGER).write_parquet(empty.update(planned(("a", "p", 1, "test"))).table)
    (folder / MANIFEST).write_json({"parameters": config.model_dump(mode="json")})
    assert splits_of(Ledger.read(folder, config.model_copy(update={"image_size": 64}))) == {"a": "test"}
    assert splits_of(Ledger.read(folder, config.model_copy(update={"seed": 4}))) == {}
