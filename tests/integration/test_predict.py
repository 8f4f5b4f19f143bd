"""The prediction job: a folder, its shards and a bucket in one pipeline."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from fracture.cli import main
from fracture.config import DataConfig
from fracture.dataset.format import read_dataset
from fracture.evaluation.scores import score_blocks
from fracture.inference.bundle import read_bundle
from fracture.preparation.scan import scan_source
from fracture.preparation.source import find_source
from fracture.preparation.write import write_dataset
from fracture.storage import storage_path
from tests.conftest import TINY, give_space, official_paths, quick_bundle, write_shards

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

FAULTS = {
    "train/cut.png": "truncated",
    "train/empty.png": "empty file",
    "val/README.txt": "left out: document or table",
}


@dataclass(frozen=True)
class Result:
    """The output of the job, and the scores to compare it with."""

    folder: Path
    shards: Path
    bucket: str
    out: Path
    stdout: str
    rows: list[dict[str, Any]]
    expected: dict[str, float]  # path below val -> probability of the evaluation
    threshold: float

    def rows_of(self, data: object) -> dict[str, dict[str, Any]]:
        """Return path below one `--data` -> row, in the order of the rows."""
        start = f"{data}/"
        return {row["path"].removeprefix(start): row for row in self.rows if row["path"].startswith(start)}


def test_a_folder_its_shards_and_a_bucket_in_one_pipeline(image_folder, tmp_path: Path, bucket: str):
    """Four blocks on two processes; two of the blocks are of the folder."""
    folder, shards, out = image_folder(*official_paths(12)), tmp_path / "shards", tmp_path / "out/predictions.parquet"
    bundle = read_bundle(storage_path(quick_bundle(tmp_path / "quick", *TINY)))
    data = DataConfig(image_size=32, split="test")
    source = find_source([storage_path(folder / "val")], data)
    write_dataset(scan_source(source, storage_path(shards), data, keep_pixels=True), storage_path(shards), data)
    scores = score_blocks(bundle.build_model(), read_dataset(storage_path(shards)), "test", rank=0, workers=1)
    expected = dict(zip(scores["source"].to_pylist(), scores["probability"].to_pylist(), strict=True))
    between = sorted(expected.values())[11:13]
    threshold = sum(between) / 2
    card = bundle.folder / "bundle.json"
    content = card.read_json()
    content["operating_point"]["threshold"] = threshold
    card.write_json(content)
    (folder / "train/cut.png").write_bytes((folder / "train/fractured/0.png").read_bytes()[:600])
    (folder / "train/empty.png").touch()
    (folder / "val/README.txt").write_text("about this folder")
    (storage_path(bucket) / "deep").upload(folder / "val")
    out.parent.mkdir()
    out.write_text("from before")

    data_flags = [word for one in (folder, shards, f"{bucket}/deep") for word in ("--data", str(one))]
    done = job("--bundle", str(bundle.folder), *data_flags, "--out", str(out))

    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = pq.read_table(out).to_pylist()
    result = Result(folder, shards, f"{bucket}/deep", out, done.stdout, rows, expected, threshold)
    assert len(result.rows) == 75 + 24 + 25
    assert_each_file_once_in_order(result)
    assert_readable_or_an_error(result)
    assert_equal_to_evaluation(result)
    assert_printed(result, str(bundle.folder))


def test_images_that_are_unlike_as_a_whole_are_written_as_doubt(tmp_path: Path, capsys):
    """Each lies within the limit; but together they lie farther than half of the training images do."""
    bundle = quick_bundle(tmp_path / "quick", *TINY)
    give_space(bundle)
    write_shards(storage_path(tmp_path / "shards"), {"test": 60}, hash_byte=7)
    data = ["--data", str(tmp_path / "shards"), "--out", str(tmp_path / "out.parquet")]
    assert main(["predict", "--bundle", str(bundle), *data]) == 0
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert {(row["outcome"], row["unlike"]) for row in rows} == {("doubt", False)}
    assert len(rows) == 60
    printed = capsys.readouterr().out
    assert "outcome    0 fracture, 60 doubt, 0 none; as a whole the images are unlike the training images" in printed


def job(*arguments: str) -> subprocess.CompletedProcess:
    import ray

    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, "job/predict.py", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def assert_each_file_once_in_order(result: Result) -> None:
    files = sorted(path.relative_to(result.folder).as_posix() for path in result.folder.rglob("*.*"))
    of_val = [path.removeprefix("val/") for path in files if path.startswith("val/")]
    in_shards = list(result.expected)
    paths = [f"{result.folder}/{path}" for path in files]
    paths += [f"{result.shards}/{path}" for path in in_shards] + [f"{result.bucket}/{path}" for path in of_val]
    assert [row["path"] for row in result.rows] == paths


def assert_readable_or_an_error(result: Result) -> None:
    assert {path: row["error"] for path, row in result.rows_of(result.folder).items() if row["error"]} == FAULTS
    assert {path for path, row in result.rows_of(result.bucket).items() if row["error"]} == {"README.txt"}
    for row in result.rows:
        assert (row["probability"] is None) == (row["decision"] is None) == (row["error"] is not None)
        if not row["error"]:
            assert row["decision"] == ("fracture" if row["probability"] >= result.threshold else "normal")
    assert {row["decision"] for row in result.rows} == {"fracture", "normal", None}


def assert_equal_to_evaluation(result: Result) -> None:
    """Files, shards and a bucket give the same probabilities and decisions."""
    assert len(set(result.expected.values())) > 20, "different images get different probabilities"
    found = list(probabilities_of(result))
    assert len(found) == 3 * 24
    for path, row in found:
        assert row["probability"] == pytest.approx(result.expected[path], abs=1e-6)
        assert row["decision"] == ("fracture" if result.expected[path] >= result.threshold else "normal")


def probabilities_of(result: Result) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (path below val, row) of every readable row there."""
    for data in (result.folder / "val", result.shards, result.bucket):
        yield from ((path, row) for path, row in result.rows_of(data).items() if not row["error"])


def assert_printed(result: Result, bundle: str) -> None:
    called = [row["decision"] for row in result.rows]
    for line in (
        f"model      {bundle}, threshold {result.threshold:.3f}",
        f"data       {result.folder}, {result.shards}, {result.bucket}: 124 files",
        f"called     {called.count('fracture')} fracture, {called.count('normal')} normal; a fracture from",
        "left out   2 files: document or table",
        "unreadable 2 files, named with an error each: 1 truncated, 1 empty file",
        "CAVEAT     SYNTHETIC MODEL",
        f"results    {result.out} (124 rows)",
    ):
        assert line in result.stdout
    about = pq.read_schema(result.out).metadata
    assert (about[b"bundle"], about[b"threshold"]) == (bundle.encode(), repr(result.threshold).encode())
    assert os.listdir(result.out.parent) == ["predictions.parquet"]
