"""The jobs as a shell runs them: exit codes, and errors of one line."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fracture.lock import holder
from fracture.storage import storage_path
from tests.conftest import official_paths, write_shards

ROOT = Path(__file__).parents[2]


def job(name: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "job" / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


JOBS = ("train", "compare", "tune", "preprocess", "evaluate", "explain", "export", "predict", "download")


@pytest.mark.parametrize("name", [f"{job}.py" for job in JOBS])
def test_help_is_worth_reading(name: str):
    shown = job(name, "--help")
    assert shown.returncode == 0
    assert f"python job/{name}" in shown.stdout
    assert shown.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--data", "nowhere"],
            "error: --data {cwd}/nowhere: no such folder. Give the folder that holds the class folders, or train/",
        ),
        (["--shards", "nowhere"], "error: {cwd}/nowhere holds no shards: dataset.json is missing. Make them with"),
        (["--set", "training.epoch=3"], "error: unknown setting 'training.epoch' = 3. Did you mean 'training.epochs'?"),
        (["--config", "quik.yaml"], "error: --config quik.yaml: no such file."),
        (["--run", "a/b"], "error: --run 'a/b': a run's name is letters, digits"),
        (["--run", "../elsewhere"], "error: --run '../elsewhere': a run's name is letters, digits"),
        (["--run", ".."], "error: --run '..': a run's name is letters, digits"),
        (["--run", "/etc/x"], "error: --run '/etc/x': a run's name is letters, digits"),
        (["--run", "x\n"], "error: --run 'x\\n': a run's name is letters, digits"),
        (["--status", "a/b"], "error: --status 'a/b': a run's name is letters, digits"),
        (["--status", "x"], "error: there is no run 'x' in {cwd}/runs. There are none; check --storage."),
        (["--workers", "0"], "error: setting 'compute.workers' = 0 is not possible"),
        (
            ["--data", "a", "--set", "model.name=resnet50", "--set", "transfer.weights=no.h5"],
            "error: transfer.weights = 'no.h5': there is no such file, or it does not end in .h5. Name",
        ),
        (["--data", "a", "--shards", "b"], "not allowed with argument"),
        (["--labels", "a.csv", "--shards", "b"], "error: --labels belongs to --data DIR: name the folder"),
    ],
)
def test_a_mistake_is_told_in_a_line_with_exit_code_2(tmp_path: Path, arguments: list[str], message: str):
    told = job("train.py", *arguments, "--storage", str(tmp_path), cwd=tmp_path)
    assert told.returncode == 2
    assert message.format(cwd=tmp_path) in told.stderr
    assert "Traceback" not in told.stderr
    assert not any(tmp_path.iterdir()), "nothing is left behind"


def test_settings_without_effect_are_told(tmp_path: Path):
    asked = ["--set", "model.name=mobilenetv2", "--set", "training.epochs=3", "--set", "augment.zoom=0"]
    told = job("train.py", "--shards", "nowhere", *asked, "--storage", str(tmp_path), cwd=tmp_path)
    assert told.stdout == "no effect  augment.zoom, training.epochs: not on mobilenetv2 as it learns here\n"


@pytest.mark.parametrize(
    ("contenders", "arguments", "message"),
    [
        ("a: {training: {epoch: 3}}", [], "error: contender 'a': unknown setting 'training.epoch' = 3. Did you mean"),
        (
            "a: {training: {epochs: 3}}",
            ["--set", "training.epochs=1"],
            "error: contender 'a': training.epochs=1 is asked for all, and this one has its own training.epochs: it",
        ),
        (
            "a: {model: {name: cnn}}",
            ["--set", "model={dropout: 0.1}"],
            "error: contender 'a': model={dropout: 0.1} is asked for all, and this one has its own model: it would not",
        ),
        ("a: {}", ["--only", "b"], "error: --only 'b': there is no such contender. There are: 'a'."),
        ("a: {}", ["--run", "a/b"], "error: --run 'a/b': a run's name is letters, digits"),
        (
            "a: {}",
            ["--run", "trained"],
            "/runs/trained is a run of job/train.py, and no comparison. Give another --run",
        ),
        (
            "a: {}",
            ["--shards", "shards"],
            "shards has no folds to compare on: make 5, here or in job/preprocess.py, with --folds 5",
        ),
        (
            "a: {training: {batch_size: 8}}\nb: {training: {batch_size: 99}}",
            ["--shards", "folds"],
            "error: contender 'b': training.batch_size = 99 is more than the 12 training images. Use a smaller one.",
        ),
    ],
)
def test_a_comparison_that_cannot_be_made_is_told_before_anything_is_trained(
    tmp_path: Path, contenders: str, arguments: list[str], message: str
):
    (tmp_path / "models.yaml").write_text(contenders)
    (tmp_path / "runs/trained").mkdir(parents=True)
    (tmp_path / "runs/trained/run.json").write_text("{}")
    write_shards(storage_path(tmp_path / "shards"), {"train": 40, "val": 16, "test": 16})
    write_shards(storage_path(tmp_path / "folds"), {"fold-1": 12, "fold-2": 12, "fold-3": 12})
    told = job("compare.py", "--models", "models.yaml", "--storage", str(tmp_path), *arguments, cwd=tmp_path)
    assert told.returncode == 2
    assert message in told.stderr
    assert "Traceback" not in told.stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["trained"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments --bundle --registry is required"),
        (["--bundle", "b", "--registry", "r"], "not allowed with argument"),
        (["--bundle", "b"], "error: {cwd}/b is no bundle: bundle.json is missing. A finished run has one, in RUN/"),
        (["--registry", "r"], "error: {cwd}/r has no champion yet. Train one with: python job/retrain.py"),
    ],
)
def test_a_prediction_names_one_model_that_is_there(tmp_path: Path, arguments: list[str], message: str):
    told = job("predict.py", *arguments, "--data", "d", "--out", "x.csv", cwd=tmp_path)
    assert told.returncode == 2
    assert message.format(cwd=tmp_path) in told.stderr
    assert "Traceback" not in told.stderr
    assert not any(tmp_path.iterdir()), "nothing is left behind"


@pytest.mark.parametrize("how", ["taken over", "SIGTERM"])
def test_a_job_that_loses_its_run_or_is_stopped_says_so_and_leaves_no_lock(tmp_path: Path, how: str):
    command = [
        sys.executable,
        "job/train.py",
        "--storage",
        str(tmp_path),
        "--run",
        "x",
        "--set",
        "sample.images=99999",
    ]
    drawing = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while holder(storage_path(tmp_path / "runs/x/lock")) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if how == "SIGTERM":
        drawing.send_signal(signal.SIGTERM)
    else:
        for claim in (tmp_path / "runs/x/lock").iterdir():
            claim.unlink()
    _, told = drawing.communicate(timeout=60)
    assert drawing.returncode == 1
    assert ("stopped: another job took over run 'x': " if how == "taken over" else "stopped by Ctrl-C or SIGT") in told
    assert told.count("\n") <= 2
    assert not (tmp_path / "runs").exists()


def test_the_status_of_a_run_is_read_without_ray_and_tensorflow(tmp_path: Path):
    (tmp_path / "runs/x").mkdir(parents=True)
    arguments = ["train.py", "--status", "x", "--storage", str(tmp_path)]
    asked = f"sys.argv = {arguments}; runpy.run_path(sys.argv[0], None, '__main__')"
    loaded = "print({'ray', 'tensorflow', 'sklearn', 'matplotlib'} & set(sys.modules))"
    shown = subprocess.run(
        [sys.executable, "-c", f"import runpy, sys; {asked}; {loaded}"],
        capture_output=True,
        text=True,
        cwd=ROOT / "job",
        check=False,
    )
    assert shown.stderr == ""
    assert shown.stdout == f"run        {tmp_path}/runs/x\nstate      begun; no job is at work on it\nset()\n"


def test_preprocess_needs_somewhere_to_write(image_folder):
    told = job("preprocess.py", "--data", str(image_folder(*official_paths(1))))
    assert told.returncode == 2
    assert "error: --out is missing: name the folder to write the shards to, or ask for --audit-only" in told.stderr


def test_an_audit_is_not_written_into_the_data(image_folder):
    folder = image_folder(*official_paths(1))
    told = job("preprocess.py", "--audit-only", "--data", str(folder), cwd=folder)
    assert told.returncode == 2
    assert "audits/data: may not lie inside the data folder, which is never written to, or around it" in told.stderr
    assert {path.name for path in folder.iterdir()} == {"train", "val", "test"}


def test_evaluate_needs_a_bundle(tmp_path: Path):
    told = job("evaluate.py", "--bundle", str(tmp_path), "--shards", str(tmp_path), "--out", str(tmp_path / "out"))
    assert told.returncode == 2
    assert "is no bundle: bundle.json is missing. A finished run has one, in RUN/bundle." in told.stderr


@pytest.mark.integration
def test_more_workers_than_there_is_room_for_is_told_before_the_data_is_looked_at(image_folder, tmp_path: Path):
    folder = image_folder(*official_paths(1))
    wide = ["--set", "compute.cpus_per_worker=999"]
    told = job("train.py", "--data", str(folder), *wide, "--storage", str(tmp_path / "storage"))
    assert told.returncode == 2
    assert "error: 2 workers of 999 CPU each do not fit: the cluster's nodes have" in told.stderr
    assert not (tmp_path / "storage").exists()


def test_preprocess_needs_data():
    told = job("preprocess.py")
    assert told.returncode == 2
    assert "the following arguments are required: --data" in told.stderr
