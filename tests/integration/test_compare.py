"""The comparison job, run as in a shell."""

import json
import subprocess
import sys

import pytest

from fracture.storage import storage_path
from tests.conftest import TINY, shell, write_shards

pytestmark = pytest.mark.ray


def test_contenders_are_trained_on_the_same_folds_and_a_second_start_trains_nothing(tmp_path):
    shards = storage_path(tmp_path / "shards")
    write_shards(shards, {"fold-1": 24, "fold-2": 24, "fold-3": 24})
    models = tmp_path / "models.yaml"
    models.write_text("small: {}\nno dropout: {model: {dropout: 0.0}}\n")
    command = [sys.executable, "job/compare.py", "--shards", str(shards), "--storage", str(tmp_path)]
    command += ["--run", "c", "--models", str(models), "--workers", "1"]
    for assignment in (*TINY, "training.epochs=1"):
        command += ["--set", assignment]

    def run(*more: str) -> subprocess.CompletedProcess:
        done = subprocess.run([*command, *more], env=shell(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stderr == "", "no log lines"
        return done

    alone = run("--only", "no dropout").stdout
    assert "contender  no dropout" in alone
    assert "small" not in alone, "there is nothing to compare it with"
    first = run().stdout
    assert first.count("finished   earlier") == 3
    assert "CAVEAT     SYNTHETIC" in first
    found = json.loads((tmp_path / "runs/c/comparison.json").read_text())
    assert list(found["contenders"]) == ["small", "no dropout"]
    for contender in found["contenders"].values():
        assert contender["pooled"]["image"]["count"] == 72
        assert contender["costs"]["epochs"] == 3
        assert contender["costs"]["images_per_second"] > 1
    assert (tmp_path / "runs/c/no-dropout/folds.html").exists()
    assert not (tmp_path / "runs/c/lock").exists()
    assert run().stdout.count("finished   earlier") == 6
    again = run("--only", "no dropout").stdout
    assert "1 of 1: no dropout" in again
    assert "contender  small" in again, "the page has all that are finished"


def test_missing_weights_are_reported_before_anything_is_trained(tmp_path):
    shards = storage_path(tmp_path / "shards")
    write_shards(shards, {"fold-1": 24, "fold-2": 24, "fold-3": 24})
    models = tmp_path / "models.yaml"
    models.write_text("cnn: {}\npretrained: {model: {name: mobilenetv2}, transfer: {weights: nowhere.h5}}\n")
    command = [sys.executable, "job/compare.py", "--shards", str(shards), "--storage", str(tmp_path)]
    command += ["--run", "c", "--models", str(models), "--set", "training.batch_size=8"]
    done = subprocess.run(command, env=shell(), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "contender 'pretrained': transfer.weights = " in done.stderr
    assert "nowhere.h5': there is no such file, or it does not end in .h5" in done.stderr
    assert done.stdout == ""
