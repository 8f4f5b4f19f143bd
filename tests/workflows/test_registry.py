"""The registry as a person sees and changes it."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from fracture.cli import main
from fracture.config import load_config
from fracture.dataset.format import Dataset, read_dataset
from fracture.evaluation.metrics import compute_metrics
from fracture.evaluation.operating_point import OperatingPoint
from fracture.inference.bundle import WEIGHTS, write_bundle
from fracture.registry.registry import Registry, Version
from fracture.storage import storage_path
from tests.conftest import TINY, write_shards


@pytest.fixture
def run_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """Return a function that runs `fracture registry` on one promoted and one rejected version, and gives its lines."""
    shards, run = storage_path(tmp_path / "shards"), storage_path(tmp_path / "run")
    write_shards(shards, {"train": 8, "val": 4, "test": 4})
    dataset: Dataset = read_dataset(shards)
    figures = {
        unit: compute_metrics(np.array([0, 1]), np.array([0.2, 0.9]), np.arange(2), 0.4, unit)
        for unit in ("image", "radiograph")
    }
    point = OperatingPoint(temperature=1.0, offset=0.0, threshold=0.4, rule="given: 0.4")
    about = {"name": "x", "epochs": 1}
    write_bundle(run / "bundle", load_config(None, TINY), dataset, about, point, {"val": figures, "test": figures})
    (run / "bundle" / WEIGHTS).write_bytes(b"weights")
    (run / "report/report.html").write_bytes(b"<html>")
    registry = Registry(storage_path(tmp_path / "registry"), "Ann")
    for tick, promote in (("w1", True), ("w2", False)):

        def describe(number: int, tick: str = tick) -> Version:
            return Version(
                number=number,
                tick=tick,
                made=datetime(2026, 11, 24, 17, 5, tzinfo=UTC),
                request_hash=tick,
                dataset="f" * 20,
                groups={"normal": 3, "fracture": 4},
                initial_weights="scratch",
            )

        version = registry.add_version(describe, run, dataset)
        registry.decide(version, promote=promote, compared_with=registry.champion(), reason=f"because of {tick}")

    def run_command(*words: str) -> list[str]:
        assert main(["registry", *words, "--registry", str(tmp_path / "registry")]) == 0
        return capsys.readouterr().out.splitlines()

    return run_command


def test_the_list_shows_versions_and_decisions(run_command: Callable[..., list[str]]):
    header, first, second, *_, promoted, rejected = run_command("list")
    assert header.split()[:2] == ["version", "tick"]
    assert first.split() == ["1", "w1", "1.000", "1.000", "1.000", "4", "3", "scratch", "in", "use"]
    assert second.split()[-2:] == ["scratch", "rejected"]
    assert promoted.endswith("w1           version 1 promoted, version 1 in use: because of w1 (Ann)")
    assert rejected.endswith("w2           version 2 rejected, version 1 in use: because of w2 (Ann)")


def test_the_version_in_use_is_listed_as_such_where_its_decision_was_removed(
    run_command: Callable[..., list[str]], tmp_path: Path
):
    (tmp_path / "registry/history/000001.json").unlink()
    assert run_command("list")[1].endswith("in use")


@pytest.mark.parametrize(("words", "state"), [((), "1, in use"), (("2",), "2, not in use")])
def test_one_version_is_shown_with_its_data_and_decisions(
    run_command: Callable[..., list[str]], words: tuple[str, ...], state: str
):
    lines = run_command("show", *words)
    assert lines[0] == f"version    {state}, made 2026-11-24 17:05 UTC in w{state[0]}"
    assert lines[2] == "data       4 fracture groups, 3 normal groups; fingerprint ffffffffffff"
    assert lines[3] == "began      with scratch"
    assert lines[4].startswith("test       2 radiographs: AUC 1.000")
    assert f"because of w{state[0]}" in "\n".join(lines[-2:])


def test_version_0_is_not_taken_for_the_one_in_use(
    run_command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["registry", "show", "0", "--registry", str(tmp_path / "registry")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/registry has no version 0. There are: 1, 2.\n"


def test_a_version_is_promoted_and_rolled_back_by_hand(run_command: Callable[..., list[str]]):
    [promoted] = run_command("promote", "2", "--reason", "seen in the ward")
    assert "by hand      version 2 promoted by hand, version 2 in use: seen in the ward (" in promoted
    [rolled_back] = run_command("rollback")
    assert "by hand      version 2 rolled back, version 1 in use (" in rolled_back


def test_pruning_lists_what_it_would_remove_and_removes_it(run_command: Callable[..., list[str]], tmp_path: Path):
    run_command("promote", "2")
    assert run_command("prune", "--dry-run") == run_command("prune") == []
    (tmp_path / "registry/versions/0003").mkdir()
    assert run_command("prune", "--dry-run") == [f"would go   {tmp_path}/registry/versions/0003"]
    assert (tmp_path / "registry/versions/0003").exists()
    assert run_command("prune", "--keep", "1") == [f"removed    {tmp_path}/registry/versions/0003"]
    assert not (tmp_path / "registry/versions/0003").exists()
    assert main(["registry", "prune", "--keep", "0", "--registry", str(tmp_path / "registry")]) == 2
