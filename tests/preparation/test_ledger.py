import pyarrow as pa
import pytest

from fracture.config import DataConfig
from fracture.dataset.format import LEDGER, MANIFEST
from fracture.errors import UsageError
from fracture.preparation.ledger import Ledger
from fracture.preparation.split import RETIRED
from fracture.storage import StoragePath, storage_path

LOST = "Without it images that have tested a model might train the next one. Put back a copy of it; or begin a new"


def planned(*rows: tuple[str, str, int, str], patients: dict[str, str] | None = None) -> pa.Table:
    """Make the table of a split plan from (file, pixels, group, split); one letter stands for a hash."""
    of = patients or {}
    return pa.table(
        {
            "sha256": pa.array([row[0].encode() * 32 for row in rows], pa.binary(32)),
            "pixels": pa.array([row[1].encode() * 16 for row in rows], pa.binary(16)),
            "group_id": pa.array([row[2] for row in rows], pa.int64()),
            "split_used": pa.array([row[3] for row in rows], pa.string()),
            "patients": pa.array([[of[row[0]]] if row[0] in of else [] for row in rows], pa.list_(pa.string())),
            "study": pa.array([""] * len(rows)),
            "group_match": pa.array([""] * len(rows)),
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


def test_a_new_file_of_a_known_patient_is_in_the_patients_split(empty):
    """Even if the patient's earlier files are gone."""
    ledger = empty.update(planned(("a", "p", 1, "test"), ("b", "q", 2, "train"), patients={"a": "ann", "b": "ben"}))
    again = Ledger(ledger.table)
    found = again.find_splits(planned(("c", "x", 0, ""), ("d", "y", 0, ""), patients={"c": "ann", "d": "cem"}))
    assert found == {(b"c" * 32).hex(): "test"}


def test_the_ledger_of_an_earlier_version_is_read(tmp_path, empty):
    folder, config = storage_path(tmp_path), DataConfig()
    ledger = empty.update(planned(("a", "p", 1, "test"), ("b", "q", 2, "train")))
    ledger.write(folder, config)
    earlier = (folder / LEDGER).read_parquet().drop_columns(["ids"])
    (folder / LEDGER).write_parquet(earlier)
    assert splits_of(Ledger.read(folder, config)) == {"a": "test", "b": "train"}


def test_the_ledger_of_other_split_settings_is_not_used(tmp_path, empty):
    folder, config = storage_path(tmp_path), DataConfig(seed=3)
    empty.update(planned(("a", "p", 1, "test"))).write(folder, config)
    assert splits_of(Ledger.read(folder, config.model_copy(update={"image_size": 64}))) == {"a": "test"}
    assert splits_of(Ledger.read(folder, config.model_copy(update={"seed": 4}))) == {}


def write_older(folder: StoragePath, ledger: Ledger, config: DataConfig) -> None:
    """Write a ledger whose settings are in the manifest alone, as earlier versions did."""
    (folder / LEDGER).write_parquet(ledger.table)
    (folder / MANIFEST).write_json({"parameters": config.model_dump(mode="json")})


def test_an_older_ledger_has_the_settings_of_its_manifest(tmp_path, empty):
    folder, config = storage_path(tmp_path), DataConfig(seed=3)
    write_older(folder, empty.update(planned(("a", "p", 1, "test"))), config)
    assert splits_of(Ledger.read(folder, config)) == {"a": "test"}
    assert splits_of(Ledger.read(folder, config.model_copy(update={"seed": 4}))) == {}
    (folder / MANIFEST).delete()  # a kill of the first writing leaves this
    assert splits_of(Ledger.read(folder, config)) == {}


@pytest.mark.parametrize("text", [b'{"parameters": {"se', b"[]", b"{}", b'{"parameters": 3}', b"\x80"])
def test_an_older_ledger_beside_a_damaged_manifest(tmp_path, empty, text: bytes):
    folder = storage_path(tmp_path)
    write_older(folder, empty.update(planned(("a", "p", 1, "test"))), DataConfig())
    (folder / MANIFEST).write_bytes(text)
    with pytest.raises(UsageError, match=rf"dataset.json cannot be read, and has the settings of the split. {LOST}"):
        Ledger.read(folder, DataConfig())


def test_a_ledger_needs_no_manifest(tmp_path, empty):
    folder = storage_path(tmp_path)
    empty.update(planned(("a", "p", 1, "test"))).write(folder, DataConfig())
    assert splits_of(Ledger.read(folder, DataConfig())) == {"a": "test"}
    (folder / MANIFEST).write_bytes(b"damaged")
    assert splits_of(Ledger.read(folder, DataConfig())) == {"a": "test"}


def test_a_ledger_that_is_missing_beside_a_manifest(tmp_path):
    (storage_path(tmp_path) / MANIFEST).write_json({})
    with pytest.raises(UsageError, match=rf"ledger.parquet is missing. {LOST}"):
        Ledger.read(storage_path(tmp_path), DataConfig())


def test_a_damaged_ledger(tmp_path, empty):
    folder, file = storage_path(tmp_path), tmp_path / LEDGER
    empty.update(planned(*((letter, letter, 1, "test") for letter in "abcdef"))).write(folder, DataConfig())
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[60] ^= 255
    for damaged in (b"", b"hello", whole[: len(whole) // 2], whole[:-9] + b"\xff" * 9, bytes(flipped)):
        file.write_bytes(damaged)
        with pytest.raises(UsageError, match=rf"^[^\n]*ledger.parquet cannot be read: [^\n]+\. {LOST}[^\n]+$"):
            Ledger.read(folder, DataConfig())


def test_another_table_in_the_place_of_the_ledger(tmp_path):
    (storage_path(tmp_path) / LEDGER).write_parquet(pa.table({"sha256": [b"a"]}))
    with pytest.raises(UsageError, match=rf"ledger.parquet cannot be read: its columns are sha256. {LOST}"):
        Ledger.read(storage_path(tmp_path), DataConfig())
