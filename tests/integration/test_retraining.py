"""Weeks of a hospital: the radiographs that come in, the models trained on them, and which one is in use."""

import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fracture.cli import REJECTED, main
from fracture.inference.bundle import read_bundle
from fracture.registry.registry import Registry
from fracture.storage import storage_path
from tests.conftest import TINY

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
SETTINGS = [*TINY, "training.epochs=4", "training.learning_rate=0.01", "gate.min_radiographs=5", "compute.workers=1"]
SETTINGS += ["evaluation.threshold_rule=given"]


def write_radiographs(
    folder: Path, numbers: range, *, flipped: bool = False, classes: tuple[int, ...] = (0, 1)
) -> None:
    """Grey noise, brighter where there is a fracture; each number once in each class."""
    for number in numbers:
        for label in classes:
            pixels = np.random.default_rng([number, label]).normal(100 + 40 * label, 30, (40, 40))
            file = folder / ("fracture" if label != flipped else "normal") / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file)


def retraining(folder: Path, registry: Path, tick: str, *flags: str) -> int:
    """Run one tick, and return the exit code."""
    words = ["retrain", "--data", str(folder), "--registry", str(registry), "--tick", tick, *flags]
    words += [word for setting in SETTINGS for word in ("--set", setting)]
    return main(words)


@contextmanager
def watched(registry: Path) -> Iterator[set[str]]:
    """Read the champion again and again; yield the versions that were seen."""
    over, seen, failures = threading.Event(), set(), []

    def read() -> None:
        try:
            while not over.wait(0.05):
                if Registry(storage_path(registry)).champion() is not None:
                    bundle = Registry(storage_path(registry)).champion_bundle()
                    assert bundle.load_weights()
                    seen.add(bundle.folder.name)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()
    assert failures == []


def decision(registry: Path, tick: str) -> dict:
    return json.loads((registry / "ticks" / tick / "decision.json").read_text())


def failed(registry: Path, tick: str) -> list[str]:
    return [rule["name"] for rule in decision(registry, tick)["rules"] if not rule["passed"]]


def splits(registry: Path, version: int) -> dict[bytes, str]:
    files = Registry(storage_path(registry)).dataset_folder(version) / "files.parquet"
    table = files.read_parquet(["sha256", "split_used"]).to_pydict()
    return dict(zip(table["sha256"], table["split_used"], strict=True))


@pytest.fixture(scope="module")
def first_week(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> tuple[Path, Path]:
    """A folder of radiographs, and the registry after its first training."""
    folder = tmp_path_factory.mktemp("hospital")
    write_radiographs(folder / "radiographs", range(40))
    assert retraining(folder / "radiographs", folder / "registry", "2026-w45") == 0
    return folder / "radiographs", folder / "registry"


@pytest.fixture
def hospital(first_week, tmp_path: Path) -> tuple[Path, Path]:
    """Copy the registry, with the radiographs where they were, as a schedule finds them."""
    folder, registry = first_week
    added = set(folder.rglob("*.png"))
    shutil.copytree(registry, tmp_path / "registry")
    yield folder, tmp_path / "registry"
    for file in set(folder.rglob("*.png")) - added:
        file.unlink()


def test_four_weeks(hospital, capsys):
    folder, registry = hospital
    assert decision(registry, "2026-w45")["decision"] == "promoted"
    with watched(registry) as seen:
        assert retraining(folder, registry, "2026-w46") == 0
        assert "nothing    new since version 1, which is in use" in capsys.readouterr().out
        assert not (registry / "ticks/2026-w46").exists()

        write_radiographs(folder, range(100, 125))
        assert retraining(folder, registry, "2026-w47", "--warm-start") == 0
        printed = capsys.readouterr().out
        assert "scan       50 of 50" in printed, "what was known is not decoded again"
        assert "version 2 promoted: in use from now on" in printed
        before, after = splits(registry, 1), splits(registry, 2)
        assert {digest: after[digest] for digest in before} == before
        assert len(after) == len(before) + 50
        run = json.loads((registry / "versions/0002/bundle.json").read_text())["run"]
        assert run["initial_weights"].endswith("registry/versions/0001")
        assert decision(registry, "2026-w47")["data_changes"]["new_radiographs"] == {"normal": 25, "fracture": 25}

        write_radiographs(folder, range(200, 225), flipped=True)
        assert retraining(folder, registry, "2026-w48") == REJECTED
        assert "version 3 rejected: version 2 stays in use" in capsys.readouterr().out
        assert "labels of the new radiographs" in failed(registry, "2026-w48")
        page = (registry / "ticks/2026-w48/report.html").read_text()
        assert "version 3 is rejected" in page
        assert "AUC 0.000 of the champion on 50 new radiographs, which it has not seen" in page
        assert Registry(storage_path(registry)).champion() == 2

        assert retraining(folder, registry, "2026-w48") == REJECTED, "a retry of what was decided"
        assert retraining(folder, registry, "2026-w49") == 0
        assert "nothing    new since 2026-w48, which was rejected" in capsys.readouterr().out

        Registry(storage_path(registry), "Ann").rollback("seen in the ward")
        assert Registry(storage_path(registry)).champion() == 1
        out = registry.parent / "predictions.parquet"
        assert main(["predict", "--registry", str(registry), "--data", str(folder), "--out", str(out)]) == 0
        assert "version 1" in capsys.readouterr().out
    assert seen == {"0001", "0002"}
    decisions = [(d.event, d.version, d.champion) for d in Registry(storage_path(registry)).history()]
    assert decisions == [("promoted", 1, 1), ("promoted", 2, 2), ("rejected", 3, 2), ("rolled back", 2, 1)]
    predicted = pq.read_table(out).to_pydict()
    assert len(predicted["path"]) == 180
    given = dict(zip(predicted["path"], predicted["probability"], strict=True))
    judged = pq.read_table(registry / "ticks/2026-w47/scores.parquet").to_pydict()  # there version 1 was in use
    assert [given[path] for path in judged["source"]] == pytest.approx(judged["champion"], abs=1e-6)


def copies_under_the_other_label(folder: Path, registry: Path) -> None:
    """Copy four radiographs that test the model in use into the folder of the other class."""
    files = Registry(storage_path(registry)).dataset_folder(1) / "files.parquet"
    rows = files.read_parquet(["path", "split_used", "label"]).to_pylist()
    for row in [row for row in rows if row["split_used"] == "test"][:4]:
        other = "normal" if row["label"] else "fracture"
        shutil.copy(folder / row["path"], folder / other / f"copy-of-{row['label']}-{Path(row['path']).name}")


@pytest.mark.parametrize(
    ("poison", "rule", "reason"),
    [
        (
            lambda folder, registry: write_radiographs(folder, range(300, 330), classes=(1,)),
            "classes",
            "100% of 30 new radiographs are fractured, 50% before; all are of one class, which is not chance",
        ),
        (copies_under_the_other_label, "label conflicts", "4 of 4 new or changed radiographs have both labels"),
    ],
    ids=["one class", "copies"],
)
def test_a_poisoned_week_is_rejected_and_the_page_says_why(
    hospital, poison: Callable[..., None], rule: str, reason: str
):
    folder, registry = hospital
    poison(folder, registry)
    assert retraining(folder, registry, "2026-w46", "--set", "training.epochs=1") == REJECTED
    assert rule in failed(registry, "2026-w46")
    assert reason in (registry / "ticks/2026-w46/report.html").read_text()
    assert Registry(storage_path(registry)).champion() == 1


DECISION = ("history", "champion.json")
UNDONE = {  # what a job had not written when it was killed
    "while the version was copied": ("versions/0001/bundle.json", *DECISION),
    "before the version": ("versions", *DECISION),
    "before the page": ("ticks/2026-w45/report.html", "ticks/2026-w45/decision.json", *DECISION),
    "before the decision": DECISION,
    "before the pointer": ("champion.json",),
}


@pytest.mark.parametrize("undone", UNDONE.values(), ids=UNDONE)
def test_a_retraining_that_was_killed_after_training_goes_on_to_the_same_end(hospital, undone: tuple[str, ...], capsys):
    """At every stage after training; test_killed_retraining.py kills it in each one."""
    folder, registry = hospital
    end = state_of(registry)
    for path in undone:
        storage_path(registry / path).delete()
    assert retraining(folder, registry, "2026-w45") == 0
    assert "epoch   loss" not in capsys.readouterr().out, "it was not trained again"
    assert state_of(registry) == end


def state_of(registry: Path) -> dict[str, object]:
    """Return what the registry holds, except times."""
    found: dict[str, object] = {}
    for file in sorted(path for path in registry.rglob("*") if path.is_file()):
        name = file.relative_to(registry).as_posix()
        if name.endswith(("input.json", "status.json")):
            continue
        content = file.read_bytes()
        if file.suffix == ".html":
            content = re.sub(rb"/[^ <]*/registry", b"REGISTRY", content)  # it was copied here
        found[name] = len(content) if name.startswith("runs") else content
        if file.suffix == ".json":
            times = ("time", "made", "since", "updated")
            found[name] = {k: v for k, v in json.loads(file.read_bytes()).items() if k not in times}
    return found


def test_a_run_that_is_forced_again_after_the_clock_went_back_is_one_of_its_own(hospital, capsys):
    """The earlier tick is decided already; the history is in the order of decisions, not of clocks."""
    folder, registry = hospital
    shutil.copytree(registry / "runs/2026-w45", registry / "runs/2026-w45-2")
    assert retraining(folder, registry, "2026-w45", "--force") == 0
    assert "tick       2026-w45-2" in capsys.readouterr().out
    assert [d.tick for d in Registry(storage_path(registry)).history()] == ["2026-w45", "2026-w45-2"]
    assert Registry(storage_path(registry)).champion() == 2
    assert read_bundle(Registry(storage_path(registry)).bundle_folder(2)).config.data.image_size == 32
