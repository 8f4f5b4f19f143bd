"""Real searches: Ray Tune, with a run of Ray Train for each trial."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import ray

from fracture.config import load_config
from fracture.storage import place
from fracture.training.driver import with_data_of
from fracture.training.search import read_results, table
from tests.conftest import TINY, shell
from tests.integration.conftest import wait_for_epochs

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_cluster")]

SEARCH = (
    *TINY,
    "training.epochs=3",
    "compute.workers=1",
    "tune.trials=3",
    "tune.grace_epochs=2",
    "tune.reduction_factor=2",
    "training.seed=1",  # which draws 1e38 for the second trial, and 1e-6 for the third
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


def test_a_search_trains_stops_and_compares(data, tmp_path, capsys):
    from fracture.training.trials import run_trials

    shards, manifest = data
    config = with_data_of(load_config(None, SEARCH), manifest)
    run, results = place(tmp_path / "x"), {}
    run_trials(config, shards, manifest, run, results, at_once=1)
    print("\n".join(table([results[number] for number in sorted(results)])))
    assert read_results(run, config, manifest) == results
    told = [(number, results[number].state, results[number].epochs) for number in sorted(results)]
    assert told == [(1, "ended", 3), (2, "diverged", 0), (3, "stopped early", 2)]
    history = [json.loads(line) for line in (tmp_path / "x/trial-00001/metrics.jsonl").read_text().splitlines()]
    assert results[1].val_loss == min(record["val_loss"] for record in history)
    left = {path.name for path in (tmp_path / "x").rglob("*") if path.is_file()}
    assert not any("test" in name or name.endswith((".npz", ".pkl")) for name in left), left
    assert wait_until_free() == ray.cluster_resources()["CPU"], "no run keeps its CPUs"
    shown = capsys.readouterr().out
    assert "trial   1  learning_rate 0.01" in shown
    assert "trial   1  epoch   3  loss" in shown


@pytest.mark.long
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_search_that_is_ended_goes_on_to_the_same_results(data, tmp_path, how):
    shards, _ = data

    def command(storage: str) -> list[str]:
        told = [sys.executable, "job/tune.py", "--shards", str(shards), "--storage", str(tmp_path / storage)]
        return [*told, "--run", "x", "--concurrent", "1", *(part for a in SEARCH for part in ("--set", a))]

    run = tmp_path / "ended/runs/x"
    first = subprocess.Popen(
        command("ended"), env=shell(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    wait_for_epochs(run / "trial-00001", 2)
    started = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(how)
    _, told = first.communicate(timeout=60)
    assert first.returncode == (1 if how == signal.SIGTERM else -9)
    if how == signal.SIGTERM:
        assert told.strip().startswith(
            "stopped by Ctrl-C or SIGTERM; every finished epoch is kept. Go on with: the same"
        )
    psutil.wait_procs(started, timeout=30)
    assert not [process for process in started if process.is_running() and process.status() != "zombie"]

    for storage in ("ended", "undisturbed"):
        done = subprocess.run(command(storage), env=shell(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
    found = [json.loads((tmp_path / s / "runs/x/trials.json").read_text()) for s in ("ended", "undisturbed")]
    assert found[0]["settings"] == found[1]["settings"]
    for ours, expected in zip(*(f["trials"] for f in found), strict=True):
        figures = {"val_loss", "val_auc"}
        assert {k: v for k, v in ours.items() if k not in figures} == {
            k: v for k, v in expected.items() if k not in figures
        }
        assert [ours[k] for k in figures] == pytest.approx([expected[k] for k in figures], rel=1e-4)
    assert load_config(run / "best.yaml").training.learning_rate == 0.01
    again = subprocess.run(command("ended"), env=shell(), capture_output=True, text=True, check=True)
    assert "starting" not in again.stdout, "all of it is done"


def test_one_name_is_one_search_or_one_run(data, tmp_path: Path):
    (tmp_path / "runs/x").mkdir(parents=True)
    (tmp_path / "runs/x/run.json").write_text("{}")
    told = subprocess.run(
        [sys.executable, "job/tune.py", "--shards", str(data[0]), "--storage", str(tmp_path), "--run", "x"]
        + [part for a in SEARCH for part in ("--set", a)],
        env=shell(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 2
    assert f"error: {tmp_path}/runs/x holds other things than a search. Give another --run name." in told.stderr
