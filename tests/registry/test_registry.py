import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from fracture.config import load_config
from fracture.dataset.format import Dataset
from fracture.errors import RunError, UsageError
from fracture.evaluation.metrics import compute_metrics
from fracture.evaluation.operating_point import OperatingPoint
from fracture.inference.bundle import WEIGHTS, write_bundle
from fracture.registry.registry import ChampionChanged, Registry, RegistryDecision, Rule, TickState, Version
from fracture.storage import StoragePath, storage_path
from tests.conftest import ROOT, TINY, small_disk, without_rights_to, write_shards

OPERATING_POINT = OperatingPoint(temperature=1.0, offset=0.0, threshold=0.4, rule="given: 0.4")
FIGURES = {
    unit: compute_metrics(np.array([0, 1]), np.array([0.2, 0.9]), np.arange(2), 0.4, unit)
    for unit in ("image", "radiograph")
}


@pytest.fixture(params=["disk", "bucket"])
def anywhere(request, tmp_path: Path) -> Registry:
    where = tmp_path if request.param == "disk" else request.getfixturevalue("bucket")
    return Registry(storage_path(where) / "registry", "Ann")


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(storage_path(tmp_path) / "registry", "Ann")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> StoragePath:
    return storage_path(tmp_path_factory.mktemp("made")) / "shards"


@pytest.fixture(scope="module")
def run(shards: StoragePath) -> StoragePath:
    """A finished run, except for the files of its model."""
    manifest = write_shards(shards, {"train": 8, "val": 4, "test": 4})
    made, about = shards / "../run", {"name": "x", "epochs": 1}
    evaluations = {"val": FIGURES, "test": FIGURES}
    write_bundle(
        made / "bundle", load_config(None, TINY), Dataset(shards, manifest), about, OPERATING_POINT, evaluations
    )
    (made / f"bundle/{WEIGHTS}").write_bytes(b"weights")
    (made / "report/report.html").write_bytes(b"<html>")
    return made


@pytest.fixture
def trained(run: StoragePath, shards: StoragePath) -> Callable[[Registry, str], Version]:
    """A function that adds the run as the result of a tick."""
    from fracture.dataset.format import read_dataset

    def add(registry: Registry, tick: str, request_hash: str = "a", run: StoragePath = run) -> Version:
        def version(number: int) -> Version:
            groups = {"normal": 3, "fracture": 4}
            facts = {
                "tick": tick,
                "request_hash": request_hash,
                "dataset": "f",
                "groups": groups,
                "initial_weights": "scratch",
            }
            return Version(number=number, made=datetime.now(UTC), **facts)

        return registry.add_version(version, run, read_dataset(shards))

    return add


def decide(registry: Registry, version: Version, promote: bool) -> RegistryDecision:
    return registry.decide(version, promote=promote, compared_with=registry.champion(), reason="why")


def test_a_version_is_promoted_rejected_promoted_by_hand_and_rolled_back(anywhere: Registry, trained):
    assert anywhere.champion() is None
    decide(anywhere, trained(anywhere, "w1"), promote=True)
    decide(anywhere, trained(anywhere, "w2"), promote=False)
    decide(anywhere, trained(anywhere, "w3"), promote=True)
    assert anywhere.champion() == 3
    assert anywhere.champion_bundle().folder.path == anywhere.bundle_folder(3).path
    anywhere.promote(2, "looked at it")
    anywhere.rollback()
    anywhere.rollback("worse in the ward")
    assert anywhere.champion() == 1
    with pytest.raises(UsageError, match="has no previous champion, so there is nothing to roll back to"):
        anywhere.rollback()
    decisions = [
        (decision.number, decision.event, decision.version, decision.champion, decision.tick)
        for decision in anywhere.history()
    ]
    assert decisions == [
        (1, "promoted", 1, 1, "w1"),
        (2, "rejected", 2, 1, "w2"),
        (3, "promoted", 3, 3, "w3"),
        (4, "promoted by hand", 2, 2, ""),
        (5, "rolled back", 2, 3, ""),
        (6, "rolled back", 3, 1, ""),
    ]
    assert {decision.who for decision in anywhere.history()} == {"Ann"}
    assert anywhere.history()[0].figures["auc"] == 1
    assert [version.number for version in anywhere.versions()] == [1, 2, 3]


def test_a_version_holds_all_that_it_was_made_from(registry: Registry, trained):
    version = trained(registry, "w1")
    left = {info.path[len(registry.bundle_folder(1).path) + 1 :] for info in registry.bundle_folder(1).files()}
    assert left == {
        *("bundle.json", WEIGHTS, "trained_on.parquet", "version.json", "report.html"),
        *("dataset/dataset.json", "dataset/files.parquet", "dataset/ledger.parquet"),
    }
    assert registry.version(1) == version


def test_the_model_of_a_tick_becomes_one_version_even_if_it_is_added_twice(registry: Registry, trained):
    assert trained(registry, "w1") == trained(registry, "w1")
    assert trained(registry, "w1", request_hash="b").number == 2


def test_a_run_that_was_deleted_and_trained_anew_is_another_version(registry: Registry, trained, run, tmp_path: Path):
    """The gate scores the run's model, so the version that it promotes must hold that model."""
    trained(registry, "w1")
    again = storage_path(shutil.copytree(run.path, tmp_path / "again"))
    (again / f"bundle/{WEIGHTS}").write_bytes(b"other weights")
    assert trained(registry, "w1", run=again).number == 2
    assert (registry.bundle_folder(2) / WEIGHTS).read_bytes() == b"other weights"
    assert trained(registry, "w1", run=again).number == 2
    (registry.bundle_folder(2) / WEIGHTS).delete()
    assert trained(registry, "w1", run=again).number == 3, "version 2 has lost its weights"


def test_a_tick_is_decided_once(registry: Registry, trained):
    version = trained(registry, "w1")
    first = decide(registry, version, promote=True)
    assert registry.decide(version, promote=False, compared_with=1, reason="") == first
    assert len(registry.history()) == 1


def test_nothing_is_decided_on_a_champion_that_was_not_compared_with(registry: Registry, trained):
    decide(registry, trained(registry, "w1"), promote=True)
    decide(registry, trained(registry, "w2"), promote=True)
    with pytest.raises(ChampionChanged, match="the champion was changed from version 1 to 2"):
        registry.decide(trained(registry, "w3"), promote=True, compared_with=1, reason="")
    assert registry.champion() == 2


def test_an_interrupted_decision_is_completed_by_the_next_process(registry: Registry, trained):
    decide(registry, trained(registry, "w1"), promote=True)
    earlier = (registry.folder / "champion.json").read_bytes()
    decide(registry, trained(registry, "w2"), promote=True)
    (registry.folder / "champion.json").write_bytes(earlier)  # as if it had been killed before writing this
    assert registry.champion() == 1
    registry.finish_pending_decision()
    assert registry.champion() == 2
    with pytest.raises(UsageError, match="version 2 is the champion already"):
        registry.promote(2)


def test_a_decision_whose_record_was_removed_is_not_undone(registry: Registry, trained):
    """Without its newest file the history would name the champion before; its number is not given again."""
    decide(registry, trained(registry, "w1"), promote=True)
    decide(registry, trained(registry, "w2"), promote=True)
    (registry.folder / "history/000002.json").delete()
    registry.finish_pending_decision()
    assert registry.champion() == 2
    assert decide(registry, trained(registry, "w3"), promote=True).number == 3
    assert registry.champion() == 3


@pytest.mark.parametrize("lost", [(1,), (2,), (3,), (1, 2, 3, 4), (4,)])
def test_nothing_is_rolled_back_by_a_history_with_a_gap(registry: Registry, trained, lost: tuple[int, ...]):
    """Whichever is lost: promotions, or that one was taken back."""
    for tick in ("w1", "w2", "w3"):
        decide(registry, trained(registry, tick), promote=True)
    registry.rollback()
    for number in lost:
        (registry.folder / f"history/{number:06d}.json").delete()
    message = (
        rf"history/00000{lost[0]}.json is missing, so the previous champion is not known. Restore it from a copy. "
        r"Or name the version: fracture registry promote VERSION --registry .*registry$"
    )
    with pytest.raises(UsageError, match=message):
        registry.rollback()
    assert registry.champion() == 2
    assert registry.promote(1).number == 5


def test_a_champion_is_put_in_use_again_when_the_history_is_lost_and_its_file_damaged(registry: Registry, trained):
    decide(registry, trained(registry, "w1"), promote=True)
    (registry.folder / "history").delete()
    (registry.folder / "champion.json").write_bytes(b"{")
    assert registry.promote(1).champion == registry.champion() == 1


def test_no_version_that_was_deleted_is_rolled_back_to(registry: Registry, trained):
    decide(registry, trained(registry, "w1"), promote=True)
    decide(registry, trained(registry, "w2"), promote=True)
    registry.bundle_folder(1).delete()
    with pytest.raises(UsageError, match=r"has no version 1. There are: 2\."):
        registry.rollback()
    assert registry.champion() == 2


def test_a_rejection_that_was_killed_is_completed_too(registry: Registry, trained):
    decide(registry, trained(registry, "w1"), promote=True)
    earlier = (registry.folder / "champion.json").read_bytes()
    decide(registry, trained(registry, "w2"), promote=False)
    after = (registry.folder / "champion.json").read_bytes()
    (registry.folder / "champion.json").write_bytes(earlier)
    registry.finish_pending_decision()
    assert (registry.folder / "champion.json").read_bytes() == after


def test_an_incomplete_version_is_ignored_and_made_again(registry: Registry, trained):
    decide(registry, trained(registry, "w1"), promote=True)
    (registry.bundle_folder(2) / WEIGHTS).write_bytes(b"half")
    (registry.bundle_folder(2) / "stray").write_bytes(b"")
    assert [version.number for version in registry.versions()] == [1]
    assert trained(registry, "w2").number == 2
    assert (registry.bundle_folder(2) / WEIGHTS).read_bytes() == b"weights"
    assert not (registry.bundle_folder(2) / "stray").is_file()


def test_the_number_of_a_version_that_was_removed_is_not_given_again(registry: Registry, trained):
    decide(registry, trained(registry, "w1"), promote=True)
    decide(registry, trained(registry, "w2"), promote=False)
    registry.bundle_folder(2).delete()
    assert trained(registry, "w3").number == 3


@pytest.mark.parametrize("content", ["", "{}", '{"format_version": 2, "version": "x"}', '{"format_version": 2'])
def test_a_damaged_champion_file_is_reported_and_repaired(registry: Registry, trained, content: str):
    decide(registry, trained(registry, "w1"), promote=True)
    trained(registry, "w2")
    (registry.folder / "champion.json").write_bytes(content.encode())
    with pytest.raises(
        UsageError, match=r"champion.json is damaged: .*fracture registry promote VERSION --registry .* writes it again"
    ):
        registry.champion()
    registry.promote(2)
    registry.rollback()
    assert registry.champion() == 1


def test_a_missing_champion_or_version_is_reported(registry: Registry, trained):
    with pytest.raises(UsageError, match=r"has no champion yet. Train one with: fracture retrain --data DIR --reg"):
        registry.champion_bundle()
    trained(registry, "w1")
    with pytest.raises(UsageError, match=r"has no version 7. There are: 1\."):
        registry.promote(7)


def test_readers_always_find_a_whole_champion(anywhere: Registry, trained):
    decide(anywhere, trained(anywhere, "w1"), promote=True)
    decide(anywhere, trained(anywhere, "w2"), promote=True)
    over, seen = threading.Event(), set()

    def read() -> None:
        while not over.is_set():
            seen.add(Registry(anywhere.folder).champion_bundle().folder.name)

    with ThreadPoolExecutor(2) as threads:
        reading = [threads.submit(read) for _ in range(2)]
        anywhere.rollback()
        anywhere.promote(2)
        over.set()
        for reader in reading:
            reader.result()
    assert seen <= {"0001", "0002"}


def test_concurrent_changes_of_the_champion_are_all_recorded(registry: Registry, trained):
    decide(registry, trained(registry, "w1"), promote=True)
    trained(registry, "w2")
    script = "import sys; from fracture.registry.registry import Registry; from fracture.storage import storage_path\n"
    script += "registry = Registry(storage_path(sys.argv[1]), sys.argv[2])\n"
    script += "for _ in range(2):\n    registry.promote(2); registry.rollback()"
    commands = [[sys.executable, "-c", script, str(registry.folder), who] for who in ("Ben", "Cleo")]
    jobs = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for command in commands]
    errors = [job.communicate(timeout=120)[1] for job in jobs]
    entries = registry.history()
    assert [decision.number for decision in entries] == list(range(1, len(entries) + 1))
    if not any(errors):  # otherwise one process found that the other had just promoted version 2
        assert len(entries) == 9
    assert all("is the champion already" in text or "nothing to roll back" in text for text in errors if text)
    assert registry.champion() == entries[-1].champion


def test_a_change_that_is_killed_leaves_the_old_champion_or_the_new(registry: Registry, trained):
    """The process is killed at each of its writes in turn, and the next change starts from the result."""
    decide(registry, trained(registry, "w1"), promote=True)
    trained(registry, "w2")
    script = """
import os, signal, sys
from fracture.registry.registry import Registry
from fracture.storage import StoragePath, storage_path
left, write = int(sys.argv[2]), StoragePath.write_bytes
def dying(self, data):
    global left
    if "locks" not in self.path:
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
    write(self, data)
StoragePath.write_bytes = dying
Registry(storage_path(sys.argv[1]), "Ben").promote(2)
"""
    for writes, then in ((0, 1), (1, 1), (2, 2)):
        command = [sys.executable, "-c", script, str(registry.folder), str(writes)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == (-signal.SIGKILL if writes < 2 else 0), done.stderr
        assert registry.champion() == then
        if registry.history()[-1].champion == 2:
            registry.rollback()
    assert [decision.event for decision in registry.history()] == ["promoted", *["promoted by hand", "rolled back"] * 2]


def test_a_full_disk_leaves_the_champion_as_it_is(tmp_path: Path, trained):
    with small_disk(tmp_path / "small", kilobytes=4096) as disk:
        registry = Registry(storage_path(disk) / "registry", "Ann")
        decide(registry, trained(registry, "w1"), promote=True)
        version_bytes = sum(info.size for info in registry.bundle_folder(1).files())
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        (disk / "filler").write_bytes(bytes(free - version_bytes // 2))  # a second version fits in half
        with pytest.raises(RunError, match="the disk is full"):
            trained(registry, "w2")
        assert registry.champion() == 1
        assert registry.champion_bundle().operating_point == OPERATING_POINT
        (disk / "filler").unlink()
        decide(registry, trained(registry, "w2"), promote=True)
        assert registry.champion() == 2


def begun(registry: Registry, tick: str, shards: str = "s") -> None:
    state = TickState(
        after_decision=registry.last_decision_number(), request_hash=f"hash of {tick}", recipe="r", shards=shards
    )
    registry.write_state(tick, state)
    (registry.run_folder(tick) / "run.json").write_json({})
    (registry.shards_folder(shards) / "dataset.json").write_json({})


def names(folders: list[StoragePath]) -> list[str]:
    return ["/".join(folder.path.split("/")[-2:]) for folder in folders]


def test_retention_keeps_the_newest_and_all_that_were_champions(registry: Registry, trained):
    for number, promoted in enumerate([True, False, True, False, False, False], 1):
        begun(registry, f"w{number}", f"s{1 + number // 3}")
        decide(registry, trained(registry, f"w{number}"), promoted)
    registry.rollback()
    (registry.bundle_folder(9) / WEIGHTS).write_bytes(b"half of a copy")
    (registry.run_folder("not-ours") / "run.json").write_json({})
    assert names(registry.find_prunable(keep=2)) == [
        *("versions/0002", "versions/0004", "versions/0009"),
        *("runs/w1", "runs/w2", "runs/w3", "runs/w4"),
        *("shards/s1", "shards/s2"),
    ]
    assert names(registry.find_prunable(keep=2, current="w1")) == [
        *("versions/0002", "versions/0004", "versions/0009", "runs/w2", "runs/w3", "runs/w4", "shards/s2"),
    ]


def test_retention_keeps_what_may_resume(registry: Registry, trained):
    """A retraining that was killed may resume until another one is decided."""
    begun(registry, "w1", "s1")
    decide(registry, trained(registry, "w1"), promote=True)
    begun(registry, "w2", "s2")
    assert names(registry.find_prunable(keep=1)) == []
    assert registry.find_unfinished_tick("hash of w2") == "w2"
    registry.promote(trained(registry, "by hand").number)
    registry.rollback()
    assert registry.find_unfinished_tick("hash of w2") == "w2", "a decision by hand does not end it"
    begun(registry, "w3", "s3")
    decide(registry, trained(registry, "w3"), promote=False)
    assert registry.find_unfinished_tick("hash of w2") is None
    assert names(registry.prune(keep=1)) == ["runs/w1", "runs/w2", "shards/s1", "shards/s2"]
    assert (registry.folder / "runs").folders() == ["w3"]
    assert (registry.folder / "shards").folders() == ["s3"]


def test_a_state_that_cannot_be_read_keeps_its_run(registry: Registry, trained):
    begun(registry, "w1", "s1")
    (registry.tick_folder("w1") / "state.json").write_bytes(b"")
    decide(registry, trained(registry, "w2"), promote=True)
    assert registry.read_state("w1") is None
    assert names(registry.find_prunable(keep=1)) == []


def test_a_version_that_lost_its_weights_is_not_promoted(registry: Registry, trained):
    decide(registry, trained(registry, "w1"), promote=True)
    trained(registry, "w2")
    (registry.bundle_folder(2) / WEIGHTS).delete()
    with pytest.raises(UsageError, match=r"version 2 has lost its weights\.\w+, so it cannot be used. Name another"):
        registry.promote(2)
    assert registry.champion() == 1


def test_a_damaged_record_is_named(registry: Registry, trained):
    decide(registry, trained(registry, "w1"), promote=True)
    (registry.folder / "history/000001.json").write_bytes(b"")
    with pytest.raises(UsageError, match=r"history/000001.json is damaged: .*Restore it from a copy\.$"):
        registry.promote(1)


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b'{"rules": [{}]}', b"\xff"])
def test_damaged_rules_are_named(registry: Registry, trained, content: bytes):
    decide(registry, trained(registry, "w1"), promote=True)
    file = registry.tick_folder("w1") / "decision.json"
    assert registry.read_rules("w1") == []
    file.write_bytes(content)
    with pytest.raises(UsageError, match=r"w1/decision.json is damaged: .*Restore it from a copy, or delete it: the"):
        registry.read_rules("w1")
    rule = Rule(name="AUC", value=0.9, limit=0.75, passed=True, explanation="0.900; at least 0.75")
    file.write_json({"tick": "w1", "rules": [rule.model_dump()]})
    assert registry.read_rules("w1") == [rule]


READS = {
    "champion.json": Registry.champion,
    "versions/0001/version.json": lambda registry: registry.version(1),
    "history/000001.json": Registry.history,
    "ticks/w1/state.json": lambda registry: registry.read_state("w1"),
    "ticks/w1/decision.json": lambda registry: registry.read_rules("w1"),
}


@pytest.mark.parametrize("file", READS)
def test_a_file_that_may_not_be_read_is_named(registry: Registry, trained, file: str):
    """A state that may not be read is not taken for a damaged one, whose run is removed."""
    begun(registry, "w1")
    decide(registry, trained(registry, "w1"), promote=True)
    (registry.tick_folder("w1") / "decision.json").write_json({"rules": []})
    path = Path((registry.folder / file).path)
    with without_rights_to(path), pytest.raises(PermissionError, match=rf"{path}.*Permission denied"):
        READS[file](registry)


@pytest.mark.parametrize("state", ["damaged", "missing"])
def test_a_version_without_its_facts_is_named_and_the_registry_goes_on_without_it(
    registry: Registry, trained, state: str
):
    """The message says how: another version is put in use first, then the folder is deleted."""
    decide(registry, trained(registry, "w1"), promote=True)
    decide(registry, trained(registry, "w2"), promote=True)
    file = registry.bundle_folder(2) / "version.json"
    file.delete() if state == "missing" else file.write_bytes(b"{")
    message = (
        rf"0002/version.json is {state}\W.*Restore it from a copy. Or delete .*0002, once another version is in use"
    )
    for command in (registry.versions, lambda: registry.promote(2), registry.champion_bundle):
        with pytest.raises(UsageError, match=message):
            command()
    registry.promote(1)
    registry.bundle_folder(2).delete()
    assert [version.number for version in registry.versions()] == [1]
    assert decide(registry, trained(registry, "w3"), promote=True).version == 3


def test_the_history_is_plain_json(registry: Registry, trained):
    decide(registry, trained(registry, "w1"), promote=True)
    decision = json.loads((registry.folder / "history/000001.json").read_bytes())
    assert decision["event"] == "promoted"
    assert decision["reason"] == "why"
    champion = json.loads((registry.folder / "champion.json").read_bytes())
    assert (champion["version"], champion["bundle"], champion["decision"]) == (1, "versions/0001", 1)
    files = ["champion.json", "history/000001.json", "versions/0001/version.json"]
    assert [(registry.folder / file).read_json()["format_version"] for file in files] == [2, 2, 2]


OLDER = {
    "champion.json": (lambda registry: registry.champion_bundle(), {"format_version": 1}),
    "history/000001.json": (lambda registry: registry.finish_pending_decision(), {}),
    "versions/0001/version.json": (lambda registry: registry.versions(), {}),
    "ticks/w1/state.json": (lambda registry: registry.read_state("w1"), {}),
}


@pytest.mark.parametrize("file", OLDER)
def test_a_registry_of_an_earlier_format_is_refused_with_what_to_do(registry: Registry, trained, file: str):
    begun(registry, "w1")
    decide(registry, trained(registry, "w1"), promote=True)
    content = (registry.folder / file).read_json()
    del content["format_version"]
    read, named = OLDER[file]
    (registry.folder / file).write_json(content | named)
    before = {info.path: info.mtime for info in registry.folder.files()}
    with pytest.raises(UsageError, match=r"is a registry of format 1, and this program reads format 2: begin another"):
        read(registry)
    assert {info.path: info.mtime for info in registry.folder.files()} == before
