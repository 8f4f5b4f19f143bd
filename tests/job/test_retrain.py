"""What is decided before anything is trained."""

import argparse
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
import retrain

from fracture.errors import UsageError
from fracture.lock import Lock, claim_of_this_process
from fracture.registry.registry import Registry, RegistryDecision, TickState
from fracture.storage import storage_path
from tests.conftest import ROOT, official_paths

NOW = datetime(2026, 11, 24, 17, 5, tzinfo=UTC)


def request_hash(*flags: str) -> argparse.Namespace:
    return retrain.arguments(["--data", "radiographs", "--registry", "registry", *flags])


@pytest.mark.parametrize(
    ("flags", "tick"),
    [
        ([], "2026-w48"),
        (["--every", "minute"], "20261124-1705"),
        (["--every", "hour"], "20261124-17"),
        (["--every", "day"], "2026-11-24"),
        (["--every", "month"], "2026-11"),
        (["--tick", "fracture-29401920"], "fracture-29401920"),
    ],
)
def test_a_tick_is_named_by_the_scheduler_or_the_time(flags: list[str], tick: str):
    assert retrain._tick(request_hash(*flags), NOW) == tick


def test_the_last_days_of_a_year_are_of_the_week_they_are_in():
    assert retrain._tick(request_hash(), datetime(2027, 1, 1, tzinfo=UTC)) == "2026-w53"


class Decided(Registry):
    """With a history of w1, something by hand, w2 and w2-2; and the ticks that are not through."""

    def __init__(self, *find_unfinished_tick: str) -> None:
        self._unfinished = find_unfinished_tick

    def history(self) -> list[RegistryDecision]:
        request_hash = [("w1", "a"), ("", ""), ("w2", "a"), ("w2-2", "b")]
        facts = {"time": NOW, "who": "", "event": "rejected", "version": 1, "champion": None}
        return [
            RegistryDecision(number=n, tick=tick, request_hash=what, **facts)
            for n, (tick, what) in enumerate(request_hash, 1)
        ]

    def read_state(self, tick: str) -> TickState:
        through = tick not in self._unfinished
        return TickState(after_decision=0, request_hash="", recipe="", shards="", notified=through)


def which(
    tick: str, what: str, *, force: bool = False, find_unfinished_tick: tuple[str, ...] = ()
) -> tuple[str, int | None]:
    name, done = retrain._which(Decided(*find_unfinished_tick), tick, what, force)
    return name, done and done.number


def test_a_tick_that_was_decided_answers_for_what_it_was_asked_and_else_begins_another():
    assert which("w3", "b") == ("w3", None)
    assert which("w2", "a") == ("w2", 3)
    assert which("w2", "b") == ("w2-2", 4)
    assert which("w2", "c") == ("w2-3", None)
    assert which("w1", "b") == ("w1-2", None), "also where the clock went back"
    assert which("w1", "a", force=True) == ("w1-2", None)
    assert which("w1", "a", force=True, find_unfinished_tick=("w1",)) == ("w1", 1), "killed after its decision"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--tick", "week 48"],
            "--tick 'week 48': a tick's name is letters, digits, '.', '_' and '-', such as 2026-w48",
        ),
        (
            ["--set", "data.folds=5"],
            r"data.folds = 5, data.split = 'auto': retraining needs training, validation",
        ),
        (
            ["--set", "data.split=test"],
            r"data.folds = 0, data.split = 'test': retraining needs training, validation",
        ),
        (["--notify", "x"], "--notify, of 1 characters, is not the address of a web hook"),
        (["--set", "gate.auc_margn=1"], "unknown setting 'gate.auc_margn' = 1. Did you mean 'gate.auc_margin'"),
    ],
)
def test_a_mistake_is_told_before_anything_is_read(flags: list[str], message: str):
    with pytest.raises(UsageError, match=message):
        retrain.main(request_hash(*flags))


def test_a_second_retraining_of_a_registry_leaves_at_once(tmp_path: Path, image_folder, monkeypatch, capsys):
    lock = storage_path(tmp_path) / "registry/locks/retraining"
    image_folder(*official_paths(), root="radiographs")
    monkeypatch.chdir(tmp_path)
    with Lock(lock, claim_of_this_process("retrain.py"), "it", on_lost=lambda: None):
        assert retrain.main(request_hash()) == 0
    assert "busy       the retraining of " in capsys.readouterr().out
    assert not (tmp_path / "registry/ticks").exists()


def test_the_registry_may_not_lie_in_the_data(tmp_path: Path, image_folder, monkeypatch):
    folder = image_folder(*official_paths(), root="radiographs")
    monkeypatch.chdir(tmp_path)
    before = sorted(folder.rglob("*"))
    with pytest.raises(UsageError, match="may not lie inside the data folder, which is never written to"):
        retrain.main(retrain.arguments(["--data", "radiographs", "--registry", "radiographs/registry"]))
    assert sorted(folder.rglob("*")) == before


def test_of_two_hosts_that_start_at_once_never_are_both_at_work(tmp_path: Path, image_folder):
    """Processes that pass for those of two hosts: neither can see whether the other lives."""
    script = """
import os, sys, time
sys.path.insert(0, "job")
import fracture.lock, retrain
claim_here = fracture.lock.claim_of_this_process
fracture.lock.claim_of_this_process = lambda what: claim_here(what).model_copy(update={"machine": sys.argv[1]})
def work(*arguments):
    os.close(os.open(sys.argv[3], os.O_CREAT | os.O_EXCL))  # fails where the other is at work
    print("at work", flush=True)
    time.sleep(0.5)
    os.unlink(sys.argv[3])
    return 0
retrain._retrain = work
sys.exit(retrain.main(retrain.arguments(["--data", sys.argv[4], "--registry", sys.argv[2]])))
"""
    paths = [str(tmp_path / "registry"), str(tmp_path / "inside"), str(image_folder(*official_paths()))]
    commands = [[sys.executable, "-c", script, host, *paths] for host in ("north", "south")]
    jobs = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for command in commands]
    told = [job.communicate(timeout=120)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0]
    assert any("at work" in text for text in told)
    assert all("at work" in text or "busy       " in text for text in told)


def test_the_exit_codes_of_the_job_are_for_schedulers(tmp_path: Path):
    command = [sys.executable, "job/retrain.py", "--registry", str(tmp_path / "registry"), "--data"]
    wrong = subprocess.run([*command, str(tmp_path / "none")], cwd=ROOT, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: --data")
    assert not (tmp_path / "registry").exists(), "nothing is left behind"
    help_text = subprocess.run([*command[:2], "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "Exit codes: 0 promoted, or nothing new, or another is at work; 10 rejected by the gate" in help_text
