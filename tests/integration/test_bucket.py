"""From images in a bucket to a model in the bucket, with a store that fails on the way."""

import json
import os
import subprocess
import sys
import time

import pytest

from fracture.storage import StoragePath, storage_path
from fracture.training.checkpoint import FILE
from fracture.training.checkpoint_folder import list_checkpoints
from tests.conftest import SECRET, TINY, official_paths

pytestmark = pytest.mark.ray


def job(name: str, *arguments: str) -> subprocess.Popen:
    """On a Ray of its own, whose workers inherit the environment."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    command = [sys.executable, f"job/{name}", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_epochs(run: StoragePath, epochs: int, job: subprocess.Popen) -> None:
    deadline = time.monotonic() + 180
    while not (run / "metrics.jsonl").is_file() or len(history(run)) < epochs:
        assert time.monotonic() < deadline
        assert job.poll() is None, job.stderr.read()
        time.sleep(0.1)


def history(run: StoragePath) -> list[int]:
    return [json.loads(line)["epoch"] for line in (run / "metrics.jsonl").read_bytes().splitlines()]


def test_a_run_in_a_bucket_survives_the_store_and_its_model_can_be_tried(
    image_folder, bucket: str, object_store, monkeypatch
):
    (storage_path(bucket) / "my radiographs").upload(image_folder(*official_paths(8)))
    train = ["--data", f"{bucket}/my radiographs", "--split", "official", "--storage", f"{bucket}/deep/storage"]
    train += ["--run", "x", "--workers", "1"]
    for assignment in (*TINY, "training.epochs=6", "training.patience=6", "recovery.max_failures=0"):
        train += ["--set", assignment]
    run = storage_path(bucket) / "deep/storage/runs/x"

    with monkeypatch.context() as impatient:
        impatient.setenv("AWS_MAX_ATTEMPTS", "2")
        first = job("train.py", *train)
        wait_for_epochs(run, 2, first)
        object_store.fail(times=10**6, status=503, code="SlowDown")
        printed, error = first.communicate(timeout=180)
    object_store.fail(times=0)
    assert first.returncode == 1, error
    assert "the store fails, also after 2 tries" in error
    assert error.startswith("stopped: s3://")
    assert error.count("\n") == 1
    assert not (run / "bundle/bundle.json").is_file()

    second = job("train.py", *train)
    resumed, error = second.communicate(timeout=300)
    assert second.returncode == 0, error
    assert error == ""
    assert ", which is dead: taking over" in resumed, "the store took no goodbye"
    assert "unchanged since they were written" in resumed
    assert "resuming   after epoch" in resumed
    assert history(run) == [1, 2, 3, 4, 5, 6]
    left = {info.path.removeprefix(f"{run.path}/") for info in run.files()}
    assert left >= {
        "bundle/bundle.json",
        "bundle/model.keras",
        "bundle/saved_model/saved_model.pb",
        "bundle/weights.safetensors",
    }
    assert left >= {"report/report.html", "predictions.parquet", "config.yaml"}
    checkpoints = {folder.name for folder in list_checkpoints(run)}
    assert len(checkpoints) == 2
    assert {f"{name}/{FILE}" for name in checkpoints} <= left
    assert any(name.startswith("tensorboard/") for name in left)

    told_of, error = job("train.py", "--status", "x", "--storage", f"{bucket}/deep/storage").communicate(timeout=60)
    assert "state      finished: 6 epochs" in told_of, error
    assert not any(name.startswith("lock/") for name in left)

    # The same images and more: those that training has seen are left out.
    (storage_path(bucket) / "others").upload(image_folder(*official_paths(12), root="others"))
    third = job("evaluate.py", "--bundle", f"{run}/bundle", "--data", f"{bucket}/others", "--out", f"{bucket}/out")
    tried, error = third.communicate(timeout=180)
    assert third.returncode == 0, error
    assert "compare    AUC per radiograph" in tried
    assert (storage_path(bucket) / "out/report.html").is_file()

    written = [(run / name).read_bytes().decode() for name in ("config.yaml", "run.json")]
    for text in (printed, resumed, tried, *written):
        assert SECRET not in text
