"""What a retraining decides before anything is trained."""

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fracture.cli import main
from fracture.config import Config
from fracture.lock import Lock, claim_of_this_process
from fracture.preparation.identity import PatientKey
from fracture.preparation.output import name_output_folder
from fracture.registry.registry import Registry, RegistryDecision, TickState
from fracture.storage import storage_path
from fracture.workflows.preprocess import find_radiographs
from fracture.workflows.retrain import find_decided_tick, name_tick
from tests.conftest import ROOT, official_paths
from tests.web_hook import Hook

NOW = datetime(2026, 11, 24, 17, 5, tzinfo=UTC)
FLAGS = ["retrain", "--data", "radiographs", "--registry", "registry"]


@pytest.mark.parametrize(
    ("every", "tick"),
    [
        ("week", "2026-w48"),
        ("minute", "20261124-1705"),
        ("hour", "20261124-17"),
        ("day", "2026-11-24"),
        ("month", "2026-11"),
    ],
)
def test_a_tick_is_named_after_the_time(every: str, tick: str):
    assert name_tick(every, NOW) == tick


def test_the_last_days_of_a_year_are_of_the_week_they_are_in():
    assert name_tick("week", datetime(2027, 1, 1, tzinfo=UTC)) == "2026-w53"


class DecidedRegistry(Registry):
    """With a history of w1, something by hand, w2 and w2-2; and ticks that were killed before their end."""

    def __init__(self, *unfinished: str) -> None:
        self._unfinished = unfinished

    def history(self) -> list[RegistryDecision]:
        decided = [("w1", "a"), ("", ""), ("w2", "a"), ("w2-2", "b")]
        facts = {"time": NOW, "who": "", "event": "rejected", "version": 1, "champion": None}
        return [
            RegistryDecision(number=number, tick=tick, request_hash=request_hash, **facts)
            for number, (tick, request_hash) in enumerate(decided, 1)
        ]

    def read_state(self, tick: str) -> TickState:
        finished = tick not in self._unfinished
        return TickState(after_decision=0, request_hash="", recipe="", shards="", notified=finished)


def decided_tick(
    tick: str, request_hash: str, *, force: bool = False, unfinished: tuple[str, ...] = ()
) -> tuple[str, int | None]:
    name, decision = find_decided_tick(DecidedRegistry(*unfinished), tick, request_hash, force)
    return name, decision and decision.number


def test_a_decided_tick_answers_for_its_own_request_and_begins_another_for_a_new_one():
    assert decided_tick("w3", "b") == ("w3", None)
    assert decided_tick("w2", "a") == ("w2", 3)
    assert decided_tick("w2", "b") == ("w2-2", 4)
    assert decided_tick("w2", "c") == ("w2-3", None)
    assert decided_tick("w1", "b") == ("w1-2", None), "also where the clock went back"
    assert decided_tick("w1", "a", force=True) == ("w1-2", None)
    assert decided_tick("w1", "a", force=True, unfinished=("w1",)) == ("w1", 1), "killed after its decision"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--tick", "week 48"],
            "error: --tick 'week 48': a tick's name is letters, digits, '.', '_' and '-', such as 2026-w48",
        ),
        (
            ["--set", "data.folds=5"],
            "error: data.folds = 5, data.split = 'auto': retraining needs training, validation",
        ),
        (
            ["--set", "data.split=test"],
            "error: data.folds = 0, data.split = 'test': retraining needs training, validation",
        ),
        (["--notify", "x"], "error: --notify, of 1 characters, is not the address of a web hook"),
        (["--set", "gate.auc_margn=1"], "error: unknown setting 'gate.auc_margn' = 1. Did you mean 'gate.auc_margin'"),
    ],
)
def test_a_mistake_is_found_before_anything_is_read(flags: list[str], message: str, capsys):
    assert main([*FLAGS, *flags]) == 2
    assert capsys.readouterr().err.startswith(message)


def test_a_second_retraining_of_a_registry_ends_at_once(tmp_path: Path, image_folder, monkeypatch, capsys):
    lock = storage_path(tmp_path) / "registry/locks/retraining"
    image_folder(*official_paths(), root="radiographs")
    monkeypatch.chdir(tmp_path)
    with Lock(lock, claim_of_this_process("fracture retrain"), "it", on_lost=lambda: None):
        assert main(FLAGS) == 0
    assert "busy       the retraining of " in capsys.readouterr().out
    assert not (tmp_path / "registry/ticks").exists()


def test_shards_that_another_job_is_writing_are_not_another_retraining(tmp_path: Path, image_folder, capsys):
    """It is a failure that a scheduler sees, since this data was not trained on by anybody."""
    radiographs, registry = image_folder(*official_paths()), tmp_path / "registry"
    source = find_radiographs([str(radiographs)], None, Config(), PatientKey(None), lambda line: None)
    lock = storage_path(registry) / "shards" / name_output_folder(source, Config().data) / "lock"
    with Lock(lock, claim_of_this_process("fracture preprocess"), "it", on_lost=lambda: None):
        small = ["--set", "training.batch_size=8"]
        assert main(["retrain", "--data", str(radiographs), "--registry", str(registry), *small]) == 2
    printed = capsys.readouterr()
    assert "is held by fracture preprocess on " in printed.err
    assert "busy" not in printed.out


def test_a_failure_is_posted_without_a_path_of_a_patient(tmp_path: Path, hook: Hook, capsys):
    (tmp_path / "data/MUELLER^HANS").mkdir(parents=True)
    (tmp_path / "data/MUELLER^HANS/1").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "data/MUELLER^HANS/2").symlink_to("/etc/passwd")
    flags = ["--data", str(tmp_path / "data"), "--registry", str(tmp_path / "registry"), "--notify", hook.url]
    assert main(["retrain", *flags]) == 2
    [event] = hook.accepted
    assert event["event"] == "failed"
    assert " is a link to a file outside, and such links are not followed." in event["reason"]
    assert "MUELLER" not in str(event) + capsys.readouterr().err
    assert "MUELLER^HANS/2" in (tmp_path / "patients.paths.csv").read_text()


def test_the_registry_may_not_lie_in_the_data(tmp_path: Path, image_folder, monkeypatch, capsys):
    folder = image_folder(*official_paths(), root="radiographs")
    monkeypatch.chdir(tmp_path)
    before = sorted(folder.rglob("*"))
    assert main(["retrain", "--data", "radiographs", "--registry", "radiographs/registry"]) == 2
    assert "may not be inside the data folder, which is never written to" in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before


def test_of_two_hosts_that_start_at_once_never_are_both_at_work(tmp_path: Path, image_folder):
    """Processes that pass for those of two hosts: neither can see whether the other lives."""
    script = """
import os, sys, time
import fracture.lock
claim_here = fracture.lock.claim_of_this_process
fracture.lock.claim_of_this_process = lambda what: claim_here(what).model_copy(update={"machine": sys.argv[1]})
from fracture.cli import main
from fracture.workflows import retrain
def work(*arguments):
    os.close(os.open(sys.argv[3], os.O_CREAT | os.O_EXCL))  # fails where the other is at work
    print("at work", flush=True)
    time.sleep(0.5)
    os.unlink(sys.argv[3])
    return retrain.RetrainResult(None, None)
retrain.run_tick = work
sys.exit(main(["retrain", "--data", sys.argv[4], "--registry", sys.argv[2]]))
"""
    paths = [str(tmp_path / "registry"), str(tmp_path / "inside"), str(image_folder(*official_paths()))]
    commands = [[sys.executable, "-c", script, host, *paths] for host in ("north", "south")]
    jobs = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for command in commands]
    printed = [job.communicate(timeout=120)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0]
    assert any("at work" in text for text in printed)
    assert all("at work" in text or "busy       " in text for text in printed)


def test_the_exit_codes_are_for_schedulers(tmp_path: Path, capsys):
    command = [sys.executable, "job/retrain.py", "--registry", str(tmp_path / "registry"), "--data"]
    wrong = subprocess.run([*command, str(tmp_path / "none")], cwd=ROOT, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: --data")
    assert not (tmp_path / "registry").exists(), "nothing is left behind"
    assert main(["retrain", "--help"]) == 0
    codes = "Exit codes: 0 promoted, or nothing new, or another is at work; 10 rejected by the gate"
    assert codes in capsys.readouterr().out
