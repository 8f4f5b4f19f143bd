"""Real searches: Ray Tune, with a run of Ray Train for each trial."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from fracture.config import load_config
from fracture.dataset.format import Dataset, Manifest
from fracture.storage import StoragePath, storage_path
from fracture.training.checks import with_data_of
from fracture.tuning.space import Result, read_results, sample_trials, trial_run
from tests.conftest import TINY, shell
from tests.integration.conftest import wait_for_epochs

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

SEARCH = (
    *TINY,
    "training.epochs=8",
    "training.patience=8",
    "compute.workers=1",
    "tune.trials=3",
    "tune.grace_epochs=2",
    "tune.reduction_factor=2",
    "training.seed=1",  # which samples 1e38 for the second trial, and 1e-6 for the third
    "training.learning_rate=0.01",
    "tune.space={training.learning_rate: {choice: [1e-6, 1e+38]}}",
)


def wait_until_free() -> float:
    """CPUs that nothing holds, at the latest ten seconds from now: Ray counts them with a delay."""
    deadline = time.monotonic() + 10
    while (free := ray.available_resources().get("CPU", 0)) < ray.cluster_resources()["CPU"]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return free


def test_a_trial_that_is_done_only_reports_and_a_worse_one_is_stopped(data, tmp_path: Path, capsys):
    from fracture.tuning.trials import run_trials

    shards, manifest = data
    one_rate = ["tune.trials=2", "tune.grace_epochs=1", "tune.space={training.learning_rate: {choice: [1e-6]}}"]
    config = with_data_of(load_config(None, [*SEARCH, *one_rate]), manifest)
    run, history = storage_path(tmp_path / "x"), [{"epoch": n, "val_loss": 0.001, "val_auc": 1.0} for n in (1, 2, 3)]
    log = trial_run(run, 1) / "metrics.jsonl"
    log.write_bytes("".join(json.dumps(record) + "\n" for record in history).encode())
    done = Result.from_history(1, sample_trials(config)[0], "ended", history)
    results = {1: done}
    run_trials(config, Dataset(shards, manifest), run, results, at_once=1)
    assert results[1] == done
    assert (results[2].state, results[2].epochs, results[2].best_epoch) == ("stopped early", 1, 1)
    assert read_results(run, config, manifest) == results
    left = {path.name for path in (tmp_path / "x").rglob("*") if path.is_file()}
    assert not any(name.endswith((".npz", ".safetensors", ".pkl", ".parquet")) for name in left), (
        "no checkpoints, notes, scores of test"
    )
    assert wait_until_free() == ray.cluster_resources()["CPU"], "no run keeps its CPUs"
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "trial   2  learning_rate 1e-06"
    assert shown[1].startswith("trial   2  epoch   1  loss 0.")
    assert shown[2:] == ["trial   2  stopped early after 1 epoch"]


# Workers go on for some seconds after their driver was killed, and must not come to the end in that time.
EPOCHS = 100


def command(data: tuple[StoragePath, Manifest], storage: Path) -> list[str]:
    settings = (*SEARCH, f"training.epochs={EPOCHS}", f"training.patience={EPOCHS}")
    command = [sys.executable, "job/tune.py", "--shards", str(data[0]), "--storage", str(storage), "--run", "x"]
    return [*command, "--concurrent", "1", *(part for setting in settings for part in ("--set", setting))]


def finish(data: tuple[StoragePath, Manifest], storage: Path) -> tuple[str, dict[str, Any]]:
    """Run the search to its end; return its output and its file of results."""
    done = subprocess.run(command(data, storage), env=shell(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert not [*(storage / "runs/x").rglob("*.parquet"), *(storage / "runs/x").rglob("bundle")], (
        "test is not looked at"
    )
    return done.stdout, json.loads((storage / "runs/x/trials.json").read_text())


@pytest.fixture(scope="module")
def undisturbed_search(data, tmp_path_factory) -> dict[str, Any]:
    return finish(data, tmp_path_factory.mktemp("undisturbed"))[1]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_search_that_is_ended_goes_on_to_the_same_results(data, undisturbed_search, tmp_path: Path, how: int):
    trials = [(trial["state"], trial["epochs"]) for trial in undisturbed_search["trials"]]
    assert trials == [("ended", EPOCHS), ("diverged", 0), ("stopped early", 2)]
    first = subprocess.Popen(
        command(data, tmp_path), env=shell(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    wait_for_epochs(tmp_path / "runs/x/trial-00001", 2)
    started = psutil.Process(first.pid).children(recursive=True)
    started = [process for process in started if "Agent" not in process.name()]  # Ray's own, which end a minute later
    first.send_signal(how)
    _, error = first.communicate(timeout=60)
    assert first.returncode == (1 if how == signal.SIGTERM else -9)
    stopped = "stopped by Ctrl-C or SIGTERM; every finished epoch is kept. Go on with: the same command with --run x"
    assert how == signal.SIGKILL or error.strip().startswith(stopped)
    psutil.wait_procs(started, timeout=60)
    assert not [process for process in started if process.is_running() and process.status() != "zombie"]

    shown, found = finish(data, tmp_path)
    assert "trial   1  resuming after epoch" in shown
    assert found["settings"] == undisturbed_search["settings"]
    for ours, expected in zip(found["trials"], undisturbed_search["trials"], strict=True):
        for figure in ("val_loss", "val_auc"):
            assert (ours.pop(figure) or 0) == pytest.approx(expected[figure] or 0, rel=1e-4)
        assert ours.items() <= expected.items()
    assert load_config(tmp_path / "runs/x/best.yaml").training.learning_rate == 0.01
    assert "starting" not in finish(data, tmp_path)[0], "all of it is done"


def test_trials_share_the_weights_of_their_backbone(data, tmp_path: Path):
    from fracture.models.transfer import build_backbone
    from fracture.tuning.trials import run_trials

    shards, manifest = data
    file = tmp_path / "weights.h5"
    few = ["model.name=mobilenetv2", f"transfer.weights={file}", "transfer.head_epochs=2", "tune.trials=2"]
    few += ["tune.space={training.learning_rate: {choice: [0.001]}}"]
    config = with_data_of(load_config(None, [*SEARCH, *few]), manifest)
    build_backbone(config).save(file)
    run, results = storage_path(tmp_path / "x"), {}
    run_trials(config, Dataset(shards, manifest), run, results, at_once=1)
    assert [results[number].epochs for number in (1, 2)] == [2, 2]
    assert not [*(tmp_path / "x").rglob("backbone.*"), *(tmp_path / "x").rglob("*.parquet")]


def test_one_name_is_one_search_or_one_run(data, tmp_path: Path):
    (tmp_path / "runs/x").mkdir(parents=True)
    (tmp_path / "runs/x/run.json").write_text("{}")
    refused = subprocess.run(command(data, tmp_path), env=shell(), capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert f"error: {tmp_path}/runs/x holds other things than a search. Give another --run name." in refused.stderr
