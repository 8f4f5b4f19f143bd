import shutil
from dataclasses import replace
from functools import cache

import numpy as np
import pyarrow as pa
import pytest

from fracture.config import GateConfig, load_config
from fracture.dataset.format import FILES, Dataset, Leak, Manifest
from fracture.errors import UsageError
from fracture.evaluation.metrics import Evaluation, auc_differences
from fracture.evaluation.operating_point import OperatingPoint
from fracture.evaluation.report import evaluate
from fracture.evaluation.scores import score_blocks, write_predictions
from fracture.inference.bundle import export_model, read_bundle, write_bundle
from fracture.models import build_model
from fracture.registry.data_changes import DataChanges, Drift
from fracture.registry.gate import Comparison, Rule, compare, judge
from fracture.registry.retraining_page import Retraining, retraining_page
from fracture.storage import StoragePath, storage_path
from tests.conftest import TINY, write_shards

NOTHING = DataChanges(
    images={"normal": 0, "fracture": 0},
    radiographs={"normal": 0, "fracture": 0},
    unreadable=0,
    gone=0,
    origins={},
    conflicts=0,
    conflicting=[],
    left_test=0,
    test_before=80,
    share_before=0.5,
    share_now=None,
)
LABELS = np.arange(80) % 2
GOOD = np.where(LABELS == 1, 0.9, 0.1)
POOR = np.random.default_rng(0).uniform(size=80)


def scores(**models: np.ndarray) -> pa.Table:
    numbers = np.arange(80)
    columns = {"row": numbers, "radiograph_id": numbers, "group_id": numbers, "label": LABELS.astype(np.uint8)}
    return pa.table(columns | models | {"source": [f"{i}.png" for i in numbers], "origin": [""] * 80})


@cache
def figures_of(probabilities: tuple[float, ...]) -> Evaluation:
    """A second of resampling, for the few models of these tests."""
    return evaluate(scores(probability=np.array(probabilities)), 0.5)


def figures(probabilities: np.ndarray) -> Evaluation:
    return figures_of(tuple(probabilities))


def compared(challenger: np.ndarray, champion: np.ndarray | None = None, agreement: np.ndarray | None = None):
    table = scores(challenger=challenger, **({} if champion is None else {"champion": champion}))

    return Comparison(
        scores=table,
        left_out=0,
        challenger=figures(challenger),
        champion=None if champion is None else figures(champion),
        differences=None if champion is None else auc_differences(LABELS, challenger, champion, np.arange(80), 500),
        agreement=None if agreement is None else figures(agreement)["radiograph"],
    )


@pytest.fixture
def manifest(shard_folder) -> Manifest:
    return shard_folder()[1]


def failed(rules: list[Rule]) -> list[str]:
    return [rule.name for rule in rules if not rule.passed]


def test_a_first_model_must_meet_the_floors(manifest):
    rules = judge(compared(GOOD), NOTHING, manifest, GateConfig())
    assert [rule.name for rule in rules] == [
        *("enough to test on", "AUC", "sensitivity", "calibration", "leakage", "label conflicts")
    ]
    assert failed(rules) == []
    assert failed(judge(compared(POOR), NOTHING, manifest, GateConfig())) == ["AUC", "sensitivity", "calibration"]
    assert failed(judge(compared(GOOD), NOTHING, manifest, GateConfig(min_radiographs=41))) == ["enough to test on"]


def test_a_challenger_must_not_be_further_below_the_champion_than_the_margin(manifest):
    """One of 40 fractures ranked last costs 1/40 of the AUC."""
    slipped = GOOD.copy()
    slipped[1] = 0.05
    pair = compared(slipped, GOOD)
    assert failed(judge(pair, NOTHING, manifest, GateConfig(auc_margin=0.01))) == ["AUC beside the champion's"]
    (rule,) = (rule for rule in judge(pair, NOTHING, manifest, GateConfig()) if "beside" in rule.name)
    assert rule.told.startswith(
        "0.975, and the champion's 1.000 on the same radiographs: with 90% confidence at most 0.0"
    )
    assert rule.value == pytest.approx(-0.05, abs=0.02), "two of such cases may be drawn"
    assert failed(judge(pair, NOTHING, manifest, GateConfig(auc_margin=0.1))) == []
    assert failed(judge(compared(GOOD, POOR), NOTHING, manifest, GateConfig())) == []


def test_it_must_be_more_surely_not_worse_where_more_confidence_is_asked(manifest):
    slipped = np.where(np.arange(80) % 20 == 1, 0.05, GOOD)
    pair = compared(slipped, GOOD)
    request_hash = [judge(pair, NOTHING, manifest, GateConfig(confidence=sure)) for sure in (0.8, 0.9, 0.99)]
    values = [next(rule.value for rule in rules if "beside" in rule.name) for rules in request_hash]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    ("new", "name", "told"),
    [
        ({"left_test": 9}, "test stays", "9 of 80 radiographs that tested the champion do no longer"),
        (
            {"conflicts": 3, "conflicting": ["a.png", "b.png"], "changed": 100},
            "label conflicts",
            "3 of 100 new or changed radiographs stand under both labels, or another than before, such as 'a.png'",
        ),
        (
            {"share_now": 1.0, "radiographs": {"normal": 0, "fracture": 30}},
            "classes",
            "100% of 30 new radiographs are fractured, 50% before; all of one class, and not by chance",
        ),
        (
            {"share_now": 0.95, "radiographs": {"normal": 2, "fracture": 38}},
            "classes",
            "95% of 40 new radiographs are fractured, 50% before; at most 40% apart",
        ),
        (
            {"drifts": [Drift("mean", np.arange(90.0), np.arange(90.0) + 45), Drift("side", np.ones(9), np.ones(9))]},
            "drift of the images",
            "0.50 in 'mean', the most; at most 0.4",
        ),
    ],
)
def test_new_data_of_another_kind_fails(manifest, new: dict, name: str, told: str):
    arrived = replace(NOTHING, **new)
    rules = judge(compared(GOOD, GOOD), arrived, manifest, GateConfig())
    assert failed(rules) == [name]
    assert told in next(rule.told for rule in rules if rule.name == name)


@pytest.mark.parametrize(
    "new",
    [
        {"share_now": 1.0, "radiographs": {"normal": 0, "fracture": 5}},  # by chance 1 in 32
        {"drifts": [Drift("mean", np.arange(9.0), np.arange(9.0) + 3)]},  # 0.33, of nine
        {"conflicts": 1, "changed": 100},
    ],
)
def test_what_may_be_chance_is_no_alarm(manifest, new: dict):
    assert failed(judge(compared(GOOD, GOOD), replace(NOTHING, **new), manifest, GateConfig())) == []


def test_labels_that_the_champion_cannot_follow_fail_unless_they_are_few(manifest):
    rules = judge(compared(GOOD, GOOD, agreement=1 - GOOD), NOTHING, manifest, GateConfig())
    assert failed(rules) == ["labels of the new radiographs"]
    assert failed(judge(compared(GOOD, GOOD, agreement=POOR), NOTHING, manifest, GateConfig())) == []  # 0.5 to 0.7


def test_new_radiographs_of_one_class_that_the_champion_calls_the_other_fail(manifest):
    """Normals that were filed as fractures: there is no AUC of one class."""
    fractures = scores(probability=1 - GOOD).filter(pa.array(LABELS == 1))
    pair = replace(compared(GOOD, GOOD), agreement=evaluate(fractures, 0.5)["radiograph"])
    (rule,) = (rule for rule in judge(pair, NOTHING, manifest, GateConfig()) if not rule.passed)
    assert rule.told.startswith("the champion calls 0% of the 40 new radiographs as they are labelled, all of one")
    few = replace(pair, agreement=evaluate(fractures.slice(0, 2), 0.5)["radiograph"])
    assert failed(judge(few, NOTHING, manifest, GateConfig())) == []


def test_a_test_that_leaks_fails(manifest):
    leaky = manifest.model_copy(update={"leakage": {"test": Leak(images=16, by_kind={"bytes": 2}, in_validation=1)}})
    rules = judge(compared(GOOD), NOTHING, leaky, GateConfig())
    assert failed(rules) == ["leakage"]
    assert next(rule.told for rule in rules if rule.name == "leakage").startswith("3 images of test show a radiograph")


def test_what_cannot_be_measured_fails(manifest):
    one_class = scores(challenger=GOOD).filter(pa.array(LABELS == 1))
    figures = evaluate(one_class.append_column("probability", one_class["challenger"]), 0.5)
    alone = Comparison(one_class, 0, figures, figures, None, None)
    told = {rule.name: rule for rule in judge(alone, NOTHING, manifest, GateConfig(min_radiographs=1))}
    assert not told["AUC"].passed
    assert told["AUC beside the champion's"].told.startswith("undefined, since test has one class only")
    assert not told["AUC beside the champion's"].passed


DECISION = OperatingPoint(temperature=1.0, offset=0.0, threshold=0.5, rule="given: 0.5")


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[StoragePath, StoragePath, Manifest]:
    """A run with its bundle, and its shards; row i of each split has the hash of i and the split."""
    folder = storage_path(tmp_path_factory.mktemp("judged"))
    shards, run = folder / "shards", folder / "run"
    manifest = write_shards(shards, {"train": 40, "val": 16, "test": 24})
    config = load_config(None, TINY)
    model = build_model(config, manifest.pixel_mean, manifest.pixel_std)
    test = score_blocks(model, Dataset(shards, manifest), "test", 0, 1)
    write_predictions(run, test)
    export_model(model, DECISION, run / "bundle")
    figures = {split: evaluate(test, 0.5) for split in ("val", "test")}
    write_bundle(run / "bundle", config, Dataset(shards, manifest), {"name": "x"}, DECISION, figures)
    return run, shards, manifest


def knows(bundle: StoragePath, to: StoragePath, hashes: list[bytes]) -> StoragePath:
    """A copy of the bundle that has seen these files."""
    shutil.copytree(bundle.path, to.path)
    (to / "trained_on.parquet").write_parquet(pa.table({"sha256": pa.array(hashes, pa.binary(32))}))
    return to


def renamed(shards: StoragePath, to: StoragePath, hash_of: dict[int, bytes]) -> StoragePath:
    """The shards, with hashes of files by group."""
    shutil.copytree(shards.path, to.path)
    files = (to / FILES).read_parquet()
    hashes = [hash_of.get(group, b"\xff" * 32) for group in files["group_id"].to_pylist()]
    (to / FILES).write_parquet(files.set_column(0, "sha256", pa.array(hashes, pa.binary(32))))
    return to


def test_both_are_scored_on_what_neither_has_seen(judged, tmp_path):
    run, shards, manifest = judged
    shards = renamed(shards, storage_path(tmp_path / "shards"), {n: bytes([n] * 32) for n in range(60)})
    ours = read_bundle(knows(run / "bundle", storage_path(tmp_path / "ours"), [bytes([3] * 32)]))
    theirs = read_bundle(knows(run / "bundle", storage_path(tmp_path / "theirs"), [bytes([5] * 32), bytes([200] * 32)]))
    fresh = replace(NOTHING, fresh=np.array([5, 7, 9, 30]))
    found = compare(ours, theirs, run, Dataset(shards, manifest), fresh)
    assert found.left_out == 2
    assert {3, 5}.isdisjoint(found.scores["group_id"].to_pylist())
    assert np.allclose(found.scores["challenger"], found.scores["champion"], atol=1e-6)
    assert np.abs(found.differences).max() == pytest.approx(0, abs=1e-9)
    assert found.agreement.count == 3, "one of the four new ones it has seen"
    assert found.agreement.groups == 3


def test_a_champion_of_another_size_is_no_measure(judged, tmp_path):
    run, shards, manifest = judged
    bundle = read_bundle(run / "bundle")
    other = replace(bundle, config=load_config(None, [*TINY, "data.image_size=64"]))
    with pytest.raises(UsageError, match=r"data.image_size = 32, and the champion .* takes 64: .*Keep the size"):
        compare(bundle, other, run, Dataset(shards, manifest), NOTHING)


def test_a_test_that_was_seen_whole_is_no_measure(judged, tmp_path):
    run, shards, manifest = judged
    bundle = read_bundle(run / "bundle")  # all files have one hash here, and training has seen it
    with pytest.raises(UsageError, match="each of the 24 images of test has been seen by one of the models"):
        compare(bundle, None, run, Dataset(shards, manifest), NOTHING)


def test_the_page_says_what_was_decided_and_why_and_holds_its_pictures(judged, tmp_path):
    run, shards, manifest = judged
    shards = renamed(shards, storage_path(tmp_path / "shards"), {})
    bundle = read_bundle(run / "bundle")
    champion = replace(bundle, operating_point=DECISION.model_copy(update={"threshold": 0.999}))
    new = replace(NOTHING, drifts=[Drift("mean", np.arange(9.0), np.arange(9.0))], origins={"Ward <3>": 4})
    found = compare(bundle, champion, run, Dataset(shards, manifest), new)
    rules = judge(found, new, manifest, GateConfig())
    about = (
        "2026-w48",
        storage_path(tmp_path),
        3,
        2,
        "scratch",
        bundle,
        champion,
        found,
        new,
        rules,
        Dataset(shards, manifest),
        ["CAVEAT"],
    )
    told = Retraining(*about)
    assert not told.promoted
    page = retraining_page(told).decode()
    assert "Retraining 2026-w48: version 3 is rejected" in page
    assert "Compared with version 2, which stays in use." in page
    for rule in rules:
        assert f"<td>{rule.name.replace(chr(39), '&#39;')}</td>" in page
    radiograph_ids, probabilities = (found.scores[name].to_numpy() for name in ("radiograph_id", "challenger"))
    apart = sum(
        probabilities[radiograph_ids == radiograph_id].mean() >= 0.5 for radiograph_id in set(radiograph_ids.tolist())
    )
    assert f"{apart} of {len(set(radiograph_ids.tolist()))} radiographs of test are called differently" in page
    assert page.count('src="data:image/png;base64,') == min(apart, 12) + 2
    assert "Ward &lt;3&gt;" in page
    assert "http" not in page, "it needs no network"
    assert told.as_json()["decision"] == "rejected"
    assert told.as_json()["rules"][0]["name"] == "enough to test on"
    first = compare(bundle, None, run, Dataset(shards, manifest), new)
    about = (
        "2026-w45",
        storage_path(tmp_path),
        1,
        None,
        "scratch",
        bundle,
        None,
        first,
        new,
        [],
        Dataset(shards, manifest),
        [],
    )
    page = retraining_page(Retraining(*about)).decode()
    assert "version 1 is promoted" in page
    assert "Compared with nothing: no version is in use yet." in page
