"""`job/preprocess.py` as a shell runs it on a running cluster."""

import csv
import json
import os
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from tests.conftest import official_paths

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def preprocess(*arguments: str) -> subprocess.CompletedProcess:
    import ray

    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, "job/preprocess.py", *arguments, "--set", "data.image_size=32"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_labels_file_gives_class_patient_and_hospital(image_folder, tmp_path):
    folder = image_folder(*(f"{i}.png" for i in range(40)))
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "patient", "source"])
        for i in range(40):
            hospital = ("north", "south")[i % 2]
            rows.writerow([f"{i}.png", ("normal", "fracture")[i // 2 % 2], f"{hospital}-{i // 4}", hospital])
    out = tmp_path / "shards"
    labels = ("--labels", str(tmp_path / "labels.csv"), "--key-file", str(tmp_path / "patients.key"))
    done = preprocess("--data", str(folder), *labels, "--folds", "source", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "40 readable (20 fracture, 20 normal)" in done.stdout
    assert json.loads((out / "dataset.json").read_text())["folds"] == ["north", "south"]
    files = pq.read_table(out / "files.parquet").to_pandas()
    assert (files.groupby(files.patients.str[0]).group_id.nunique() == 1).all()
    assert files.group_id.nunique() == 20, "two images a patient"


def test_several_folders_are_several_origins(image_folder, tmp_path):
    folders = [str(image_folder(*official_paths(8), root=name)) for name in ("north", "south")]
    out = tmp_path / "shards"
    done = preprocess("--data", folders[0], "--data", folders[1], "--split", "group", "--out", str(out))
    assert done.returncode == 0, done.stderr
    files = pq.read_table(out / "files.parquet").to_pandas()
    assert set(files.origin) == {"north", "south"}
    assert files.group_id.nunique() == 48, "the two folders hold the same 48 images"
    assert (files[files.split_used != ""].group_id.value_counts() == 1).all()
