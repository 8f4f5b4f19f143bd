"""Batch prediction without Ray: which files are found, how they are read, and how results are written."""

import io
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydicom.uid import CTImageStorage
from ray.exceptions import RayTaskError

from fracture.config import DataConfig
from fracture.errors import RunError, UsageError
from fracture.evaluation.feature_space import FeatureSpace
from fracture.evaluation.operating_point import OperatingPoint
from fracture.inference import batch_prediction
from fracture.inference.batch_prediction import (
    RESULTS,
    BlockReader,
    Input,
    InputFile,
    are_unlike_as_a_whole,
    check_output,
    count_formula_paths,
    explain_error,
    find_inputs,
    find_seen,
    join_by_study,
    plan_blocks,
    put_in_doubt,
    read_file,
    summarize,
    write_results,
)
from fracture.inference.bundle import list_marks
from fracture.preparation.decoding import limits
from fracture.preparation.decoding.decode import Rejected, decode
from fracture.preparation.facts import scan_bytes
from fracture.preparation.identity import PatientKey, number_study
from fracture.preparation.sample_dicom import Stored, encode_dicom, make_uid
from fracture.preparation.source import ImageFile, find_source
from fracture.storage import storage_path
from tests.conftest import ROOT, without_rights_to

ROWS = [
    dict(zip(RESULTS.names, values, strict=True))
    for values in (
        ("a.png", 7, np.float32(0.1), "normal", "none", False, np.float32(0.5), True, None),
        ('b, "c"\n.png', 7, np.float32(1 / 3), "normal", "doubt", True, np.float32(1.25), True, None),
        ("=cmd.png", 7, None, None, None, None, None, None, "damaged: broken data, line 3"),
        ("ü.png", None, np.float32(0.99999994), "fracture", "fracture", False, np.float32(0.75), False, None),
        ("z.txt", None, None, None, None, None, None, None, "left out: document or table"),
        ("y.png", None, None, None, None, None, None, None, "not an image"),
        ("ct", 9, None, None, None, None, None, None, "left out: DICOM, but no radiograph: CT"),
        ("report", 7, None, None, None, None, None, None, "left out: DICOM, but no radiograph: a report"),
    )
]
RESULT = pa.Table.from_pylist(ROWS, schema=RESULTS)
AT_03 = OperatingPoint(temperature=1.0, offset=0.0, threshold=0.3, rule="given: 0.3", fracture_threshold=0.5)


def paths(*folders: Path) -> list[str]:
    found = find_inputs([storage_path(folder) for folder in folders], 32)
    return [one.prefix + path for one in found for path in one.files]


def blocks(inputs: list[Input], block_rows: int) -> list[dict]:
    return [row for block in plan_blocks(inputs, block_rows) for row in block.to_pylist()]


def test_every_file_in_any_layout_but_clutter(image_folder):
    folder = image_folder("z.png", "a/b/c/1.png", "a/README.txt", "fractured/2.png", "Thumbs.db", ".git/3.png")
    assert paths(folder) == ["a/README.txt", "a/b/c/1.png", "fractured/2.png", "z.png"]


def test_one_file_and_several_folders(image_folder):
    one, two = image_folder("1.png", root="one"), image_folder("1.png", root="two")
    assert paths(one / "1.png") == ["1.png"]
    assert paths(two, one / "1.png") == [f"{two}/1.png", f"{one}/1.png"], "whole paths, in the order of --data"


def test_rows_of_shards_are_all_splits(shard_folder):
    folder, _ = shard_folder(train=70, val=3, test=5)
    [one] = find_inputs([folder], 32)
    assert len(one) == 78
    spans = [(block["split"], block["start"], block["stop"]) for block in blocks([one], 64)]
    assert spans == [("train", 0, 64), ("train", 64, 70), ("val", 0, 3), ("test", 0, 5)]


@pytest.mark.parametrize("block_rows", [1, 3, 64])
def test_blocks_hold_every_file_once_in_order(tmp_path, block_rows: int):
    files = {f"{number:03d}": number for number in range(70)}
    inputs = [
        Input(
            storage_path(tmp_path), prefix, {name: InputFile(f"shown {name}", size, size) for name, size in of.items()}
        )
        for prefix, of in (("", files), ("x/", {"y": 9}))
    ]
    found = blocks(inputs, block_rows)
    listed = [
        (block["input"], path.decode(), size)
        for block in found
        for path, size in zip(block["paths"], block["sizes"], strict=True)
    ]
    assert [name for block in found for name in block["names"]] == [f"shown {path}" for _, path, _ in listed]
    assert listed == [*((0, name, size) for name, size in files.items()), (1, "y", 9)]
    assert max(len(block["paths"]) for block in found) <= block_rows


def test_a_folder_with_a_manifest_of_somebody_else_is_images(image_folder):
    folder = image_folder("1.png")
    (folder / "dataset.json").write_text("{}")
    assert paths(folder) == ["1.png", "dataset.json"]


@pytest.mark.parametrize(
    ("arrange", "message"),
    [
        (
            lambda folder: None,
            r"--data .*/x: no such folder. Name a folder, a file or a URI of radiographs, or",
        ),
        (lambda folder: folder.mkdir(), r"--data .*/x: the folder is empty. Name a folder, a file"),
        (lambda folder: (folder.mkdir(), (folder / ".DS_Store").touch()), "the folder is empty"),
        (
            lambda folder: (folder.mkdir(), (folder / "1.png").symlink_to("/etc/passwd")),
            "'1.png' is a link to a file",
        ),
        (lambda folder: (folder.mkdir(), (folder / "up").symlink_to("..")), "'up' is a link to a folder"),
    ],
)
def test_folders_that_are_refused(tmp_path, arrange, message: str):
    arrange(tmp_path / "x")
    with pytest.raises(UsageError, match=message):
        paths(tmp_path / "x")


def test_a_file_that_is_named_twice(image_folder):
    folder = image_folder("a/1.png")
    for other in (folder, folder / "a", folder / "a/1.png"):
        with pytest.raises(UsageError, match=r"'.*' is named twice. Name each folder once, and none inside another."):
            paths(folder, other)


def test_shards_of_another_size_or_named_twice(shard_folder):
    folder, _ = shard_folder()
    with pytest.raises(UsageError, match=r"takes images of 64 pixels; these shards have 32. Name the radiographs"):
        find_inputs([folder], 64)
    with pytest.raises(UsageError, match="shards' is named twice"):
        find_inputs([folder, folder], 32)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("x.txt", r"--out .*x.txt: the ending of the name chooses the format. Use .csv or .parquet."),
        ("x", "the ending of the name chooses the format"),
        ("folder.csv", r"folder.csv: is a folder. Name a file in it, such as .*folder.csv/predictions.csv"),
        ("data/x.csv", "is inside the data, .*, which is never written to. Name another folder."),
        ("data/deep/x.csv", "is inside the data"),
        ("link/x.csv", "is inside the data"),
    ],
)
def test_an_out_that_cannot_be(image_folder, tmp_path, out: str, message: str):
    inputs = find_inputs([storage_path(image_folder("1.png"))], 32)
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    with pytest.raises(UsageError, match=message):
        check_output(storage_path(tmp_path / out), inputs)


def test_an_out_that_cannot_be_written_is_refused_before_the_prediction(image_folder, tmp_path):
    inputs = find_inputs([storage_path(image_folder("1.png"))], 32)
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        UsageError,
        match=r"--out .*/file/x.csv: .*/file/\.fracture-\w+ cannot be written: .*Check the path and its permissions",
    ):
        check_output(storage_path(tmp_path / "file/x.csv"), inputs)
    (tmp_path / "closed").mkdir()
    with (
        without_rights_to(tmp_path / "closed", but=0o555),
        pytest.raises(UsageError, match=r"closed/\.fracture-\w+ cannot be written: .*Permission denied.* Check the"),
    ):
        check_output(storage_path(tmp_path / "closed/x.csv"), inputs)
    check_output(storage_path(tmp_path / "not/yet/there/x.csv"), inputs)
    assert {path.name for path in tmp_path.iterdir()} == {"data", "file", "closed"}, "nothing is left behind"


def test_an_out_in_a_bucket_that_is_not_there(bucket: str, image_folder):
    inputs = find_inputs([storage_path(image_folder("1.png"))], 32)
    with pytest.raises(
        UsageError,
        match=r"--out s3://no-such-bucket/x.csv: s3://no-such-bucket/\.fracture-\w+ cannot be written: there is no",
    ):
        check_output(storage_path("s3://no-such-bucket/x.csv"), inputs)
    with pytest.raises(UsageError, match=r"--out s3://bucket.csv: is a folder. Name a file in it, such as s3"):
        check_output(storage_path("s3://bucket.csv"), inputs)
    check_output(storage_path(f"{bucket}/x.csv"), inputs)
    assert storage_path(bucket).files() == []


def test_an_out_beside_the_data_or_beside_one_file_is_fine(image_folder, tmp_path):
    folder = image_folder("1.png", "2.csv")
    check_output(storage_path(tmp_path / "data.csv"), find_inputs([storage_path(folder)], 32))
    check_output(storage_path(folder / "x.CSV"), find_inputs([storage_path(folder / "1.png")], 32))
    with pytest.raises(UsageError, match="is inside the data"):
        check_output(storage_path(folder / "2.csv"), find_inputs([storage_path(folder / "2.csv")], 32))


def test_a_file_that_cannot_be_opened_is_its_own_fault_while_its_folder_can(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/folder").mkdir()
    root = storage_path(tmp_path / "data")
    for name in ("gone.png", "folder"):
        with pytest.raises(Rejected, match="cannot be opened"):
            read_file(root, name, 9)
    with pytest.raises(Rejected, match="1,000,000,001 bytes, over the limit of 1,000,000,000"):
        read_file(root, "huge", 1_000_000_001)
    with pytest.raises(
        RunError, match=r"elsewhere does not exist any more, or not on every machine of the Ray cluster.* Mount it"
    ):
        read_file(storage_path(tmp_path / "elsewhere"), "1.png", 9)


def test_a_file_that_is_gone_or_denied_in_a_bucket_and_a_store_that_is_down(bucket: str, object_store, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    (storage_path(bucket) / "data/1.png").write_bytes(b"x")
    root = storage_path(f"{bucket}/data")
    assert read_file(root, "1.png", 1) == b"x"
    with pytest.raises(Rejected, match="cannot be opened"):
        read_file(root, "2.png", 1)
    object_store.fail(times=1, status=403, code="AccessDenied")
    with pytest.raises(Rejected, match="cannot be opened"):
        read_file(root, "1.png", 1)
    object_store.fail(times=99, status=403, code="AccessDenied")
    with pytest.raises(UsageError, match=r"data cannot be read: the store denies it .* Check the credentials"):
        read_file(root, "1.png", 1)
    object_store.fail(times=99, status=503, code="SlowDown")
    with pytest.raises(RunError, match="cannot be read: the store fails, also after 1 tries"):
        read_file(root, "1.png", 1)


def reader(folder: Path, *names: str) -> tuple[BlockReader, pa.Table]:
    files = {name: InputFile(name, (folder / name).stat().st_size, None) for name in names}
    one = Input(storage_path(folder), "", files)
    [block] = plan_blocks([one], 64)
    return BlockReader([one], 32, "job"), block


def test_unreadable_files_of_every_kind_keep_their_rows(image_folder, monkeypatch):
    folder = image_folder("0.png", "1.png", "2.png", "gone.png")
    (folder / "cut.png").write_bytes((folder / "1.png").read_bytes()[:600])
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("hello")
    buffer = io.BytesIO()
    Image.new("L", (200, 100)).save(buffer, "png")
    (folder / "wide.png").write_bytes(buffer.getvalue())
    monkeypatch.setattr(limits, "MAX_SIDE", 150)
    names = ["0.png", "cut.png", "empty.png", "gone.png", "text.png", "wide.png", "2.png"]
    read, block = reader(folder, *names)
    (folder / "gone.png").unlink()
    images = read(block)
    assert images["path"].to_pylist() == names
    assert images["error"].to_pylist() == [
        None,
        "truncated",
        "empty file",
        "cannot be opened",
        "not an image",
        "200 x 100 pixels, over the limit of 150 a side",
        None,
    ]
    for row, name in ((0, "0.png"), (6, "2.png")):
        assert images["image"][row].as_py() == decode((folder / name).read_bytes(), 32).pixels.tobytes()
    assert images["image"].null_count == 5


def test_a_file_was_seen_if_its_bytes_pixels_patient_or_study_were(image_folder):
    """By the marks that a bundle keeps of the files that were scanned for its training."""
    folder = image_folder("0.png", "1.png", "2.png")
    (folder / "cut.png").write_bytes((folder / "1.png").read_bytes()[:600])
    Image.open(folder / "1.png").save(folder / "again.png", compress_level=0)
    scanned = [scan_bytes(ImageFile("x", 0, "", 9, 0), (folder / f"{n}.png").read_bytes(), 32)[0] for n in range(2)]
    of_bytes, of_pixels, of_patient = {scanned[0]["sha256"]}, {*list_marks(scanned[1]["pixels"], (), "")}, bytes(32)
    read, block = reader(folder, "0.png", "1.png", "again.png", "2.png", "cut.png")
    table = read(block)

    def seen(trained_on: set[bytes]) -> list[bool | None]:
        return find_seen(table, trained_on)["seen"].to_pylist()

    assert seen(of_bytes) == [True, False, False, False, None]
    assert seen(of_pixels) == [False, True, True, False, None]
    files = {"2.png": InputFile("2.png", 9, None, ids=(of_patient.hex(),))}
    [block] = plan_blocks([Input(storage_path(folder), "", files)], 64)
    table = read(block)
    assert seen({of_patient}) == [True]
    assert seen({bytes(31) + b"1"}) == [False]


PIXELS = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64).astype(np.uint8)


def test_what_is_no_radiograph_is_left_out_as_in_the_audit(tmp_path: Path):
    """By its name or its DICOM header; nothing of it is decoded, and its study is known."""
    names, uid = DataConfig(fracture_labels=("a",), normal_labels=("b",)), make_uid("study", "p", "s")
    files = {
        "a/1": encode_dicom(PIXELS, "p", "s", 0, Stored()),
        "a/2": encode_dicom(PIXELS, "p", "s", 1, Stored(), SOPClassUID=CTImageStorage),
        "b/3": encode_dicom(PIXELS, "q", "s", 2, Stored(), PresentationIntentType="FOR PROCESSING"),
        "b/4": encode_dicom(PIXELS, "q", "s", 3, Stored()),
        "b/4_mask.png": b"x",
        "b/5.pdf": b"x",
    }
    for name, data in files.items():
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(data)
    folder, key = storage_path(tmp_path / "data"), PatientKey(tmp_path / "patients.key")
    [one] = find_inputs([folder], 32, key)
    left_out = {path: file.left_out for path, file in one.files.items() if file.left_out}
    assert left_out == {
        "a/2": "DICOM, but no radiograph: CT",
        "b/3": "raw detector image (FOR PROCESSING), unlike what the model will see",
        "b/4_mask.png": "mask or annotation",
        "b/5.pdf": "document or table",
    }
    assert find_source([folder], names, key=key).left_out == dict.fromkeys(left_out.values(), 1)
    study = number_study(key.hide("study", uid))
    assert {one.files[path].study_id for path in ("a/1", "a/2")} == {study}
    [block] = plan_blocks([one], 64)
    read = BlockReader([one], 32, "job")(block)
    found = dict(zip(one.files, read["error"].to_pylist(), strict=True))
    assert found == {path: f"left out: {why}" for path, why in left_out.items()} | {"a/1": None, "b/4": None}


def test_a_file_that_is_named_by_itself_is_not_judged_by_its_name(image_folder):
    [one] = find_inputs([storage_path(image_folder("1_mask.png") / "1_mask.png")], 32)
    assert one.files["1_mask.png"].left_out == ""


def test_memory_that_is_not_there_is_an_error_of_the_file(image_folder, monkeypatch):
    def greedy(data: bytes, size: int):
        raise MemoryError

    monkeypatch.setattr(batch_prediction, "decode", greedy)
    read, block = reader(image_folder("1.png"), "1.png")
    assert read(block)["error"].to_pylist() == ["needs more memory than is free"]


def test_large_files_are_not_all_read_ahead(tmp_path):
    """Nine files of 60 MB; reading one takes twice its bytes for a moment."""
    names = [f"{number}.png" for number in range(9)]
    for name in names:
        with open(tmp_path / name, "wb") as file:
            file.truncate(60_000_000)  # zeros that take no disk
    read, block = reader(tmp_path, *names)
    tracemalloc.start()
    try:
        assert read(block)["error"].to_pylist() == ["not an image"] * 9
        assert tracemalloc.get_traced_memory()[1] < 150_000_000
    finally:
        tracemalloc.stop()


DIES = """
import os, sys
from pathlib import Path
from fracture.evaluation.operating_point import OperatingPoint
from fracture.inference import batch_prediction
from fracture.inference.batch_prediction import BlockReader, Input, InputFile, plan_blocks
from fracture.storage import storage_path
decode = batch_prediction.decode
batch_prediction.decode = lambda data, size: os._exit(9) if len(data) == 5 else decode(data, size)
folder = Path(sys.argv[1])
files = {name: InputFile(name, (folder / name).stat().st_size, None) for name in ("0.png", "evil.png", "2.png")}
one = Input(storage_path(folder), "", files)
[block] = plan_blocks([one], 64)
print(BlockReader([one], 32, "job")(block)["error"].to_pylist())
"""


def test_a_file_that_crashes_the_process_is_skipped_the_third_time(image_folder, tmp_path):
    """As Ray does it: the same block again, in a new process."""
    folder = image_folder("0.png", "2.png")
    (folder / "evil.png").write_text("crash")
    notes = tmp_path / "notes"
    notes.mkdir()
    environment = os.environ | {"TMPDIR": str(notes)}
    command = [sys.executable, "-c", DIES, str(folder)]

    def begin() -> subprocess.CompletedProcess:
        return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)

    assert [begin().returncode for _ in range(2)] == [9, 9]
    third = begin()
    assert third.stdout == "[None, 'crashes the decoder', None]\n", third.stderr
    assert not any(notes.iterdir())


@pytest.mark.parametrize("kind", [RunError, UsageError])
def test_our_errors_come_through_ray_as_one_line(kind):
    raised = kind("weights.safetensors is damaged\nFailed to apply UDF transform after 1/1 attempts.")
    explained = explain_error(RayTaskError("map", "a long trace", raised).as_instanceof_cause())
    assert type(explained) is kind
    assert str(explained) == "weights.safetensors is damaged"
    assert explain_error(ValueError("a bug")) is None


def test_other_errors_of_ray_data_are_one_line_too():
    explained = explain_error(RayTaskError("map", "a long trace", OSError("a node fell over")).as_instanceof_cause())
    assert type(explained) is RunError
    assert str(explained).startswith("Ray Data gave up: ")
    assert str(explained).endswith(". Nothing was written. Run again with -v for the traces")
    assert "\n" not in str(explained)


def test_csv_and_parquet_say_the_same(tmp_path):
    for name in ("x.csv", "x.parquet"):
        write_results(storage_path(tmp_path / "new" / name), RESULT, {"threshold": "0.5"})
    types = RESULTS.set(RESULTS.get_field_index("study_id"), pa.field("study_id", pa.string()))
    options = pacsv.ConvertOptions(column_types=types, strings_can_be_null=True, quoted_strings_can_be_null=False)
    parse = pacsv.ParseOptions(newlines_in_values=True)
    as_csv = pacsv.read_csv(tmp_path / "new/x.csv", convert_options=options, parse_options=parse)
    as_parquet = pq.read_table(tmp_path / "new/x.parquet")
    assert as_csv.drop_columns("study_id").equals(as_parquet.drop_columns("study_id")), "floats to their last bit"
    seven, nine = "s0000000000000007", "s0000000000000009"
    assert as_csv["study_id"].to_pylist() == [seven, seven, seven, None, None, None, nine, seven]
    assert as_parquet.to_pylist() == ROWS
    assert as_parquet.schema.metadata[b"threshold"] == b"0.5"
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["x.csv", "x.parquet"]


def test_a_study_has_the_largest_probability_of_its_images_or_the_mean():
    first, second, unread, of_ct = join_by_study(RESULT, AT_03, "max").to_pylist()
    assert first == {
        "study_id": 7,
        "path": 'b, "c"\n.png',
        "images": 3,
        "unreadable": 1,
        "probability": pytest.approx(1 / 3),
        "decision": "fracture",
        "outcome": "doubt",
        "unlike": True,
        "seen": True,
        "error": None,
    }, "a report is no image of it"
    assert (second["path"], second["images"], second["decision"]) == ("ü.png", 1, "fracture")
    nothing = dict.fromkeys(["probability", "decision", "outcome", "unlike", "seen"])
    counts = {"images": 1, "unreadable": 1}
    assert unread == {"study_id": None, "path": "y.png", **counts, **nothing, "error": "not an image"}
    counts = {"images": 0, "unreadable": 0}
    why = "left out: DICOM, but no radiograph: CT"
    assert of_ct == {"study_id": 9, "path": "ct", **counts, **nothing, "error": why}, "a study without a radiograph"
    mean = join_by_study(RESULT, AT_03, "mean").to_pylist()[0]
    assert (mean["probability"], mean["decision"]) == (pytest.approx((0.1 + 1 / 3) / 2), "normal")
    assert (mean["outcome"], mean["unlike"]) == ("doubt", True), "an image is unlike, so the mean is doubtful"


def test_images_that_are_unlike_as_a_whole_are_all_in_doubt():
    """Those that the model was trained on do not count: they lie near."""
    space = FeatureSpace(*[np.ones(1, np.float32)] * 6, np.array([1 / 0.6], np.float32))
    many = pa.concat_tables([RESULT] * 50)
    assert are_unlike_as_a_whole(many, space)
    assert not are_unlike_as_a_whole(many.filter(pc.equal(many["seen"], True)), space)
    assert not are_unlike_as_a_whole(many, None)
    doubtful = put_in_doubt(RESULT)
    assert doubtful["outcome"].to_pylist() == ["doubt", "doubt", None, "doubt", *[None] * 4]
    assert doubtful.drop_columns("outcome").equals(RESULT.drop_columns("outcome"))
    assert doubtful.schema == RESULTS
    alike = [ROWS[0] | {"study_id": 1}, ROWS[3] | {"study_id": 1}]
    for rule in ("max", "mean"):
        assert join_by_study(put_in_doubt(RESULT), AT_03, rule)["outcome"].to_pylist() == ["doubt", "doubt", None, None]
        studies = join_by_study(put_in_doubt(pa.Table.from_pylist(alike, schema=RESULTS)), AT_03, rule)
        assert studies.select(["outcome", "unlike"]).to_pylist() == [{"outcome": "doubt", "unlike": False}]


def test_studies_that_nothing_names_are_not_joined():
    with pytest.raises(UsageError, match=r"--by study: nothing says which study an image is of. .* leave it out"):
        join_by_study(RESULT.slice(3, 2), AT_03, "max")


def test_paths_that_a_spreadsheet_would_run_are_kept_and_counted():
    assert count_formula_paths(RESULT) == 1


def test_the_summary_counts_everything():
    assert summarize(RESULT, AT_03) == [
        "called     1 fracture, 2 normal; a fracture from a probability of 0.3 on",
        "outcome    1 fracture, 1 doubt, 1 none; no doubt from 0.5 on",
        "unlike     1 of 3 images (33.3%) are unlike the training images, and in doubt; of new ones of the same kind "
        "about 1% are",
        "seen       2 files: the model was trained or validated on them, or on images of their patient or study; how "
        "it does on these says nothing about new ones",
        "left out   1 file: document or table",
        "left out   1 file: DICOM, but no radiograph: CT",
        "left out   1 file: DICOM, but no radiograph: a report",
        "unreadable 2 files, named with an error each: 1 damaged, 1 not an image",
    ]
    space = FeatureSpace(*[np.ones(1, np.float32)] * 6, np.array([1 / 0.6], np.float32))
    farther = "lie farther from the training images than half of those do"
    many = pa.concat_tables([RESULT] * 50)  # one of each is new to the model, and lies beyond 0.6
    assert summarize(many, AT_03, space)[1:4:2] == [
        "outcome    50 fracture, 50 doubt, 50 none; as a whole the images are unlike the training images",
        f"           100% {farther}: as a whole they are unlike them, so all are in doubt",
    ]
    nearer = pa.Table.from_pylist([ROWS[3] | {"distance": 0.6}] * 11 + [ROWS[3]] * 39, schema=RESULTS)
    assert summarize(nearer, AT_03, space)[3] == f"           78% {farther}: of the same kind it is at most about half"
    of_earlier = AT_03.model_copy(update={"fracture_threshold": None})
    unmeasured = pa.Table.from_pylist([ROWS[3] | {"unlike": None, "distance": None}], schema=RESULTS)
    assert summarize(unmeasured, of_earlier)[1:] == [
        "outcome    1 fracture, 0 doubt, 0 none; the bundle is of an earlier version, without doubt",
        "unlike     not measured: the bundle is of an earlier version, or had too few training images",
    ]
