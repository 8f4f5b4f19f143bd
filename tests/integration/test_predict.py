"""Prediction by its job: one pipeline of a folder, its shards and a bucket, and much to be said of what it gives."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from fracture.config import DataConfig
from fracture.evaluation.scores import score_blocks
from fracture.inference.bundle import read_bundle
from fracture.preparation.scan import scan_source
from fracture.preparation.source import find_source
from fracture.preparation.write import write_dataset
from fracture.storage import storage_path
from tests.conftest import TINY, official_paths, quick_bundle

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_cluster")]

FAULTS = {"train/cut.png": "truncated", "train/empty.png": "empty file", "val/README.txt": "not an image"}


@dataclass(frozen=True)
class Done:
    """What the job did."""

    folder: Path
    shards: Path
    bucket: str
    out: Path
    stdout: str
    rows: list[dict[str, Any]]
    expected: dict[str, float]  # path below val -> probability, as evaluation has it
    threshold: float

    def of(self, data: object) -> dict[str, dict[str, Any]]:
        """Path below one `--data` -> row, in the order of the rows."""
        start = f"{data}/"
        return {row["path"].removeprefix(start): row for row in self.rows if row["path"].startswith(start)}


def test_a_folder_its_shards_and_a_bucket_in_one_pipeline(image_folder, tmp_path: Path, bucket: str):
    """Four blocks, of which two are the folder's, on two processes."""
    folder, shards, out = image_folder(*official_paths(12)), tmp_path / "shards", tmp_path / "out/predictions.parquet"
    bundle = read_bundle(storage_path(quick_bundle(tmp_path / "quick", *TINY)))
    data = DataConfig(image_size=32, split="test")
    source = find_source([storage_path(folder / "val")], data)
    scanned = scan_source(source, storage_path(shards), data, keep_pixels=True)
    manifest = write_dataset(scanned, storage_path(shards), data)
    scores = score_blocks(bundle.model(), storage_path(shards), manifest, "test", rank=0, workers=1)
    expected = dict(zip(scores["source"].to_pylist(), scores["probability"].to_pylist(), strict=True))
    between = sorted(expected.values())[11:13]
    threshold = sum(between) / 2
    card = bundle.folder / "bundle.json"
    content = card.read_json()
    content["decision"]["threshold"] = threshold
    card.write_json(content)
    (folder / "train/cut.png").write_bytes((folder / "train/fractured/0.png").read_bytes()[:600])
    (folder / "train/empty.png").touch()
    (folder / "val/README.txt").write_text("what lies here")
    (storage_path(bucket) / "deep").upload(folder / "val")
    out.parent.mkdir()
    out.write_text("of another time")

    data_flags = [word for one in (folder, shards, f"{bucket}/deep") for word in ("--data", str(one))]
    done = job("--bundle", str(bundle.folder), *data_flags, "--out", str(out))

    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = pq.read_table(out).to_pylist()
    told = Done(folder, shards, f"{bucket}/deep", out, done.stdout, rows, expected, threshold)
    assert len(told.rows) == 75 + 24 + 25
    assert_each_file_once_in_order(told)
    assert_readable_or_an_error(told)
    assert_as_evaluation(told)
    assert_said(told, str(bundle.folder))


def job(*arguments: str) -> subprocess.CompletedProcess:
    import ray

    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, "job/predict.py", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def assert_each_file_once_in_order(told: Done) -> None:
    files = sorted(path.relative_to(told.folder).as_posix() for path in told.folder.rglob("*.*"))
    of_val = [path.removeprefix("val/") for path in files if path.startswith("val/")]
    in_shards = list(told.expected)
    paths = [f"{told.folder}/{path}" for path in files]
    paths += [f"{told.shards}/{path}" for path in in_shards] + [f"{told.bucket}/{path}" for path in of_val]
    assert [row["path"] for row in told.rows] == paths


def assert_readable_or_an_error(told: Done) -> None:
    assert {path: row["error"] for path, row in told.of(told.folder).items() if row["error"]} == FAULTS
    assert {path for path, row in told.of(told.bucket).items() if row["error"]} == {"README.txt"}
    for row in told.rows:
        assert (row["probability"] is None) == (row["decision"] is None) == (row["error"] is not None)
        if not row["error"]:
            assert row["decision"] == ("fracture" if row["probability"] >= told.threshold else "normal")
    assert {row["decision"] for row in told.rows} == {"fracture", "normal", None}


def assert_as_evaluation(told: Done) -> None:
    """From files, from shards and from a bucket: the same probabilities, and the same decisions."""
    assert len(set(told.expected.values())) > 20, "the network tells them apart"
    found = list(probabilities_of(told))
    assert len(found) == 3 * 24
    for path, row in found:
        assert row["probability"] == pytest.approx(told.expected[path], abs=1e-6)
        assert row["decision"] == ("fracture" if told.expected[path] >= told.threshold else "normal")


def probabilities_of(told: Done) -> Iterator[tuple[str, dict[str, Any]]]:
    """(path below val, row) of every readable row there."""
    for data in (told.folder / "val", told.shards, told.bucket):
        yield from ((path, row) for path, row in told.of(data).items() if not row["error"])


def assert_said(told: Done, bundle: str) -> None:
    called = [row["decision"] for row in told.rows]
    for line in (
        f"model      bundle {bundle}, threshold {told.threshold!r}",
        f"data       {told.folder}, {told.shards}, {told.bucket}: 124 files",
        f"called     {called.count('fracture')} fracture, {called.count('normal')} normal; a fracture from",
        "unreadable 4 files, named with an error each: 2 not an image, 1 truncated, 1 empty file",
        "CAVEAT     SYNTHETIC MODEL",
        f"results    {told.out} (124 rows)",
    ):
        assert line in told.stdout
    about = pq.read_schema(told.out).metadata
    assert (about[b"bundle"], about[b"threshold"]) == (bundle.encode(), repr(told.threshold).encode())
    assert os.listdir(told.out.parent) == ["predictions.parquet"]
