import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fracture.dataset.format import (
    BOXES,
    FILES,
    MANIFEST,
    ROW_GROUP_ROWS,
    Dataset,
    Manifest,
    encode_shard,
    images_of,
    read_dataset,
    schema,
)
from fracture.errors import UsageError
from fracture.storage import StoragePath, storage_path
from tests.conftest import write_shards

DATA = {
    "label": [1, 0],
    "radiograph_id": [3, -4],
    "group_id": [3, -3],
    "study_id": [None, 7],
    "sha256": [b"a" * 32, b"b" * 32],
    "source": ["x/1.png", "x/2.png"],
    "origin": ["", "north"],
}


def test_a_shard_is_plain_arrow_that_pyarrow_alone_reads():
    images = np.arange(2 * 32 * 32, dtype=np.uint32).reshape(2, 32, 32).astype(np.uint8)
    data, _ = encode_shard(images, DATA)
    table = pq.read_table(data)
    assert table.schema.names == [
        "image",
        "label",
        "radiograph_id",
        "group_id",
        "study_id",
        "sha256",
        "source",
        "origin",
    ]
    assert [str(t) for t in table.schema.types] == [
        "fixed_size_binary[1024]",
        "uint8",
        "int64",
        "int64",
        "int64",
        "fixed_size_binary[32]",
        "string",
        "string",
    ]
    assert table["source"].to_pylist() == ["x/1.png", "x/2.png"]
    assert np.array_equal(np.frombuffer(table["image"][1].as_py(), np.uint8).reshape(32, 32), images[1])


def test_the_digest_follows_pixels_and_labels():
    images = np.zeros((2, 32, 32), np.uint8)
    data, digest = encode_shard(images, DATA)
    assert encode_shard(images, DATA) == (data, digest)
    assert encode_shard(images + 1, DATA)[1] != digest
    assert encode_shard(images, DATA | {"label": [0, 0]})[1] != digest


@pytest.mark.parametrize(("start", "stop"), [(0, 300), (0, 1), (63, 65), (99, 101), (130, 290), (299, 300), (7, 7)])
def test_any_stretch_of_rows_across_shards_and_row_groups(shard_folder, start: int, stop: int):
    folder, manifest = shard_folder(train=300, rows_per_shard=100)
    table = Dataset(folder, manifest).read("train", start, stop)
    assert table["source"].to_pylist() == [f"train/{n}.png" for n in range(start, stop)]
    assert images_of(table, 32)[:, 0, 0, 0].tolist() == [n % 256 for n in range(start, stop)]


def test_only_the_row_groups_in_the_stretch_are_read(shard_folder):
    folder, manifest = shard_folder(train=4 * ROW_GROUP_ROWS, rows_per_shard=4 * ROW_GROUP_ROWS)
    file = folder / manifest.shards["train"][0].file
    data = bytearray(file.read_bytes())
    data[100:200] = bytes(100)  # inside the first row group
    file.write_bytes(bytes(data))
    assert Dataset(folder, manifest).read("train", ROW_GROUP_ROWS, 4 * ROW_GROUP_ROWS).num_rows == 3 * ROW_GROUP_ROWS
    with pytest.raises(UsageError, match=rf"{file.name} is damaged at row group 0: .*Delete it and run preprocessing"):
        Dataset(folder, manifest).read("train", 0, 10)


def test_a_truncated_shard_is_named(shard_folder):
    folder, manifest = shard_folder()
    file = folder / manifest.shards["val"][0].file
    size = len(file.read_bytes())
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UsageError, match=rf"shard {file.name} is damaged: 1000 of {size} bytes. Run preprocessing"):
        read_dataset(folder)


def test_a_shard_of_another_run_under_the_same_name(shard_folder):
    folder, manifest = shard_folder(train=40, val=16)
    (folder / manifest.shards["val"][0].file).write_bytes((folder / manifest.shards["train"][0].file).read_bytes())
    with pytest.raises(UsageError, match=r"is not the one that dataset.json describes"):
        Dataset(folder, manifest).read("val", 0, 4)


def test_a_missing_shard(shard_folder):
    folder, manifest = shard_folder()
    (folder / manifest.shards["test"][0].file).delete()
    with pytest.raises(UsageError, match=r"shard test-00000-.* is missing. Run preprocessing again"):
        read_dataset(folder)


def test_the_table_of_files_is_the_one_that_the_manifest_describes(shard_folder):
    folder, manifest = shard_folder()
    file = folder / FILES
    assert Dataset(folder, manifest).find_files() == file, "an older manifest does not describe it"
    manifest = manifest.model_copy(update={"files_sha256": hashlib.sha256(file.read_bytes()).hexdigest()})
    assert Dataset(folder, manifest).find_files() == file
    file.write_parquet(file.read_parquet().slice(1))
    with pytest.raises(UsageError, match=r"files.parquet is not the one that dataset.json describes. Run preproc"):
        Dataset(folder, manifest).find_files()
    file.delete()
    with pytest.raises(UsageError, match=r"files.parquet is missing. Run preprocessing again"):
        Dataset(folder, manifest).find_files()


def test_no_manifest_says_how_to_make_one(shard_folder):
    folder, _ = shard_folder()
    (folder / MANIFEST).delete()
    with pytest.raises(UsageError, match=r"holds no shards: dataset.json is missing. Make them with: fracture pre"):
        read_dataset(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, "schema version 99, and this program reads version 5"),
        ({"pixel_mean": "dark"}, "damaged at 'pixel_mean'"),
        ({"extra": 1}, "damaged at 'extra'"),
        ({"parameters": {}}, "damaged at 'parameters'"),
        ({"parameters": {"image_size": 10**9}}, "damaged at 'parameters.image_size'"),
        ({"parameters": {"image_size": "224; rm"}}, "damaged at 'parameters.image_size'"),
        ({"parameters": {"image_size": 32, "hook": "os.system"}}, "damaged at 'parameters.hook'"),
    ],
)
def test_a_manifest_of_another_version_or_damaged(shard_folder, change: dict, message: str):
    folder, _ = shard_folder()
    (folder / MANIFEST).write_json((folder / MANIFEST).read_json() | change)
    with pytest.raises(UsageError, match=message):
        read_dataset(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "../x.parquet"}, "damaged at 'shards.val.0.file'"),
        ({"file": "/etc/x.parquet"}, "damaged at 'shards.val.0.file'"),
        ({"file": "a/../../x.parquet"}, "damaged at 'shards.val.0.file'"),
        ({"file": "s3://bucket/x.parquet"}, "damaged at 'shards.val.0.file'"),
        ({"file": "x.parquet\n"}, "damaged at 'shards.val.0.file'"),
        ({"file": ""}, "damaged at 'shards.val.0.file'"),
        ({"rows": -1}, "damaged at 'shards.val.0.rows'"),
        ({"bytes": 2**63}, "is damaged: .* of 9223372036854775808 bytes"),
    ],
)
def test_a_manifest_leads_nowhere_else(shard_folder, change: dict, message: str):
    folder, _ = shard_folder()
    content = (folder / MANIFEST).read_json()
    content["shards"]["val"][0] |= change
    (folder / MANIFEST).write_json(content)
    with pytest.raises(UsageError, match=message):
        read_dataset(folder)


def test_a_manifest_that_names_a_shard_a_million_times(shard_folder):
    folder, _ = shard_folder()
    content = (folder / MANIFEST).read_json()
    content["shards"]["val"] *= 10_000
    (folder / MANIFEST).write_json(content)
    with pytest.raises(UsageError, match=r"dataset.json is damaged: it names a shard twice"):
        read_dataset(folder)


@pytest.mark.parametrize("text", [b"[" * 10**6, b"\x80", b'{"schema_version": ' + b"9" * 10**6])
def test_a_manifest_that_is_not_json(shard_folder, text: bytes):
    folder, _ = shard_folder()
    (folder / MANIFEST).write_bytes(text)
    with pytest.raises(UsageError, match=r"dataset.json is damaged: not JSON"):
        read_dataset(folder)


def test_an_immense_manifest_is_not_read(shard_folder):
    folder, _ = shard_folder()
    with open((folder / MANIFEST).path, "r+b") as file:
        file.truncate(2**40)  # a hole, which takes no room on the disk
    with pytest.raises(UsageError, match=r"dataset.json has 1,099,511,627,776 bytes, over the limit of 67,108,864"):
        read_dataset(folder)


def packed(folder: StoragePath, manifest: Manifest, rows: int, **how) -> Manifest:
    """Puts a shard of so many black images in place of that of validation, under its right name."""
    names = [how.pop("source", "x")] * rows
    black = pa.array([bytes(32**2)] * rows, pa.binary(32**2))
    content = {"label": [0] * rows, "radiograph_id": [0] * rows, "group_id": [0] * rows}
    content |= {"study_id": [None] * rows, "sha256": [bytes(32)] * rows}
    content |= {"source": names, "origin": [""] * rows}
    columns = [black, *(pa.array(content[field.name], field.type) for field in list(schema(32))[1:])]
    shard = manifest.shards["val"][0]
    pq.write_table(pa.Table.from_arrays(columns, schema=schema(32)), (folder / shard.file).path, **how)
    size = len((folder / shard.file).read_bytes())
    changed = shard.model_copy(update={"rows": rows, "bytes": size})
    return manifest.model_copy(update={"shards": manifest.shards | {"val": [changed]}})


PLAIN = {"row_group_size": ROW_GROUP_ROWS, "use_dictionary": False, "compression": "lz4"}


@pytest.mark.parametrize(
    ("rows", "how", "message"),
    [
        (50_000, {"use_dictionary": True}, "claims 50,000 rows in 1 row groups"),
        (50_000, {"use_dictionary": False, "compression": "zstd"}, "claims 50,000 rows in 1 row groups"),
        (640, {"row_group_size": ROW_GROUP_ROWS, "use_dictionary": True}, "stores values as PLAIN, RLE, RLE_DICT"),
        (128, PLAIN | {"row_group_size": 100}, "has 100 rows in row group 0"),
        (64, PLAIN | {"source": "x" * 10**5}, "has 6,.* bytes in row group 0"),
    ],
    ids=["dictionary", "compressed", "packed", "uneven", "long names"],
)
def test_a_small_shard_that_would_take_much_memory_is_refused(shard_folder, rows: int, how: dict, message: str):
    folder, manifest = shard_folder()
    manifest = packed(folder, manifest, rows, **how)
    assert manifest.shards["val"][0].bytes < 200_000
    for read in (
        lambda: Dataset(folder, manifest).read("val", 0, 1),
        lambda: Dataset(folder, manifest).read_columns("val", ["radiograph_id"]),
    ):
        before = pa.total_allocated_bytes()
        with pytest.raises(
            UsageError, match=rf"shard .*val-00000-.*parquet {message}.*as no shard of ours. Run prepro"
        ):
            read()
        assert pa.total_allocated_bytes() - before < 10**6


def test_a_manifest_that_claims_a_billion_rows(shard_folder):
    folder, manifest = shard_folder()
    shard = manifest.shards["val"][0].model_copy(update={"rows": 10**9})
    manifest = manifest.model_copy(update={"shards": manifest.shards | {"val": [shard]}})
    with pytest.raises(UsageError, match=r"is not the one that dataset.json describes"):
        Dataset(folder, manifest).read_columns("val", ["radiograph_id"])


def test_half_a_manifest(shard_folder):
    folder, _ = shard_folder()
    (folder / MANIFEST).write_bytes((folder / MANIFEST).read_bytes()[:50])
    with pytest.raises(UsageError, match=r"dataset.json is damaged: not JSON"):
        read_dataset(folder)


def test_the_manifest_is_json_that_people_can_read(shard_folder):
    folder, manifest = shard_folder()
    assert json.loads((folder / MANIFEST).read_bytes())["counts"]["train"] == {"normal": 20, "fracture": 20}
    assert read_dataset(folder).manifest == manifest
    assert write_shards(folder, {"train": 40, "val": 16, "test": 16}) == manifest


def test_a_fold_is_test_the_next_validates_and_the_others_train(tmp_path):
    folder = storage_path(tmp_path)
    manifest = write_shards(folder, {"fold-1": 10, "fold-2": 20, "fold-3": 30, "fold-4": 40})
    fold = manifest.fold(4)
    assert {split: fold.rows(split) for split in ("train", "val", "test")} == {"train": 50, "val": 10, "test": 40}
    assert fold.counts["train"] == {"normal": 25, "fracture": 25}
    assert fold.pixels["train"].count == 2000
    assert fold.pixel_mean == pytest.approx(96)
    assert Dataset(folder, fold).read("train", 0, 50)["source"].to_pylist()[19:21] == ["fold-2/19.png", "fold-3/0.png"]
    assert fold.fingerprint != manifest.fold(1).fingerprint != manifest.fingerprint
    seen = [shard.file for n in range(1, 5) for shard in manifest.fold(n).shards["test"]]
    assert sorted(seen) == sorted(shard.file for shards in manifest.shards.values() for shard in shards)


def test_a_fold_by_source_tests_all_of_one_source_and_validates_on_the_others(tmp_path):
    rows = {"fold-1": 10, "fold-1-val": 2, "fold-2": 20, "fold-2-val": 4}
    manifest = write_shards(storage_path(tmp_path), rows).model_copy(update={"folds": ["north", "south"]})
    fold = manifest.fold(1)
    assert {split: fold.rows(split) for split in ("train", "val", "test")} == {"train": 20, "val": 4, "test": 12}
    assert not manifest.folds_are_sources, "by the parameters that the data set was made with"


def test_a_source_that_is_no_fold_trains_in_each(tmp_path):
    rows = {"fold-1": 10, "fold-1-val": 2, "fold-2": 20, "fold-2-val": 4, "untested": 7}
    manifest = write_shards(storage_path(tmp_path), rows)
    by_source = {"folds": ["north", "south"], "parameters": manifest.parameters | {"folds": "source"}}
    manifest = manifest.model_copy(update=by_source)
    for number, sizes in ((1, (27, 4, 12)), (2, (17, 2, 24))):
        fold = manifest.fold(number)
        assert tuple(fold.rows(split) for split in ("train", "val", "test")) == sizes
        assert fold.counts["train"]["normal"] == (14, 9)[number - 1]
    assert (manifest.folds_are_sources, fold.folds_are_sources) == (True, False)


def test_the_index_is_read_without_images(shard_folder):
    folder, manifest = shard_folder(train=130, rows_per_shard=100)
    index = Dataset(folder, manifest).read_columns("train", ["radiograph_id", "label"])
    assert index.column_names == ["radiograph_id", "label"]
    assert index["radiograph_id"].to_pylist()[10:] == list(range(10, 130))
    assert index["label"].to_pylist() == [n % 2 for n in range(130)]


def test_boxes_are_read_where_there_are_any(shard_folder):
    folder, manifest = shard_folder()
    assert Dataset(folder, manifest).read_boxes() == {}, "an earlier version has no such column"
    columns = {"path": ["a", "b"], "boxes": pa.array([[(0.25, 0.5, 0.75, 1.0), (0, 0, 0.5, 0.5)], None], BOXES)}
    (folder / FILES).write_parquet(pa.table(columns))
    with_boxes = Dataset(folder, manifest.model_copy(update={"boxed": 1}))
    (path,), (boxes,) = zip(*with_boxes.read_boxes().items(), strict=True)
    assert (path, boxes.tolist()) == ("a", [[0.25, 0.5, 0.75, 1.0], [0, 0, 0.5, 0.5]])
    (folder / FILES).delete()
    assert with_boxes.read_boxes() == {}, "the shards alone were copied"


def test_the_traits_of_dicom_files_are_read_where_there_are_any(shard_folder):
    folder, manifest = shard_folder()
    assert Dataset(folder, manifest).read_traits() == {}
    traits = pa.array([[("view", "AP"), ("sex", "F")], None], pa.map_(pa.string(), pa.string()))
    (folder / "files.parquet").write_parquet(pa.table({"path": ["a", "b"], "traits": traits}))
    with_traits = Dataset(folder, manifest.model_copy(update={"traits": ["sex", "view"]}))
    assert with_traits.read_traits() == {"a": {"view": "AP", "sex": "F"}}
    (folder / "files.parquet").delete()
    assert with_traits.read_traits() == {}, "the shards alone were copied"
