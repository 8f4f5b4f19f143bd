import shutil
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pyarrow as pa
import pytest

from fracture.config import Config, GateConfig, load_config
from fracture.dataset.format import FILES, Dataset, Leak, Manifest
from fracture.errors import UsageError
from fracture.evaluation.metrics import Evaluation, auc_differences, rate_differences
from fracture.evaluation.operating_point import OperatingPoint
from fracture.evaluation.report import add_outcomes, evaluate
from fracture.evaluation.scores import score_blocks, write_predictions
from fracture.inference.bundle import export_model, read_bundle, write_bundle
from fracture.inference.scoring import score_rows
from fracture.models import build_model
from fracture.registry.data_changes import DataChanges, Drift
from fracture.registry.gate import Comparison, apply_rules, compare_with_champion
from fracture.registry.registry import Rule
from fracture.registry.retraining_page import Retraining, render_retraining_page
from fracture.storage import StoragePath, storage_path
from tests.conftest import TINY, write_shards

NOTHING = DataChanges(
    new_images={"normal": 0, "fracture": 0},
    new_radiographs={"normal": 0, "fracture": 0},
    unreadable_files=0,
    removed_files=0,
    origins={},
    conflicting=0,
    conflicting_paths=[],
    lost_from_test=0,
    test_before=80,
    fracture_share_before=0.5,
    fracture_share_now=None,
)
LABELS = np.arange(80) % 2
GOOD = np.where(LABELS == 1, 0.9, 0.1)
POOR = np.random.default_rng(0).uniform(size=80)


def scores(**models: np.ndarray) -> pa.Table:
    numbers = np.arange(80)
    columns = {"row": numbers, "radiograph_id": numbers, "group_id": numbers, "label": LABELS.astype(np.uint8)}
    return pa.table(columns | models | {"source": [f"{i}.png" for i in numbers], "origin": [""] * 80})


@cache
def figures_of(probabilities: tuple[float, ...], threshold: float) -> Evaluation:
    """Cached, since resampling takes a second per model."""
    return evaluate_table(scores(probability=np.array(probabilities)), threshold)


def evaluate_table(table: pa.Table, threshold: float) -> Evaluation:
    """Doubt ends at 0.85."""
    found = {"test": evaluate(table, threshold)}
    point = OperatingPoint(temperature=1.0, offset=0.0, threshold=threshold, rule="", fracture_threshold=0.85)
    add_outcomes(found, table.append_column("split", pa.array(["test"] * len(table))), point, "max")
    return found["test"]


def figures(probabilities: np.ndarray, threshold: float = 0.5) -> Evaluation:
    return figures_of(tuple(probabilities), threshold)


def compared(
    challenger: np.ndarray,
    champion: np.ndarray | None = None,
    agreement: np.ndarray | None = None,
    threshold: float = 0.5,
) -> Comparison:
    """Compare two models whose thresholds are `threshold`, and 0.5 for the champion."""
    table = scores(challenger=challenger, **({} if champion is None else {"champion": champion}))
    return Comparison(
        scores=table,
        left_out=0,
        challenger=figures(challenger, threshold),
        champion=None if champion is None else figures(champion),
        differences=None if champion is None else differences(challenger, champion, threshold),
        agreement=None if agreement is None else figures(agreement)["radiograph"],
    )


def differences(challenger: np.ndarray, champion: np.ndarray, threshold: float) -> dict[str, np.ndarray]:
    rates = rate_differences(LABELS, challenger >= threshold, champion >= 0.5, np.arange(80), 500)
    aucs = auc_differences(LABELS, challenger, champion, np.arange(80), 500)
    return {"auc": aucs, "specificity": rates["specificity"]}


@pytest.fixture
def manifest(shard_folder) -> Manifest:
    return shard_folder()[1]


def failed(rules: list[Rule]) -> list[str]:
    return [rule.name for rule in rules if not rule.passed]


def test_a_first_model_must_meet_the_floors(manifest):
    rules = apply_rules(compared(GOOD), NOTHING, manifest, GateConfig())
    assert [rule.name for rule in rules] == [
        *("size of test", "AUC", "sensitivity", "specificity", "calibration", "doubt", "leakage", "label conflicts")
    ]
    assert failed(rules) == []
    assert failed(apply_rules(compared(POOR), NOTHING, manifest, GateConfig())) == ["AUC", "sensitivity", "calibration"]
    assert failed(apply_rules(compared(GOOD), NOTHING, manifest, GateConfig(min_radiographs=41))) == ["size of test"]


def test_a_model_that_leaves_too_much_to_a_person_fails(manifest):
    """Fractures at 0.6 lie between the thresholds 0.5 and 0.85, so half of the radiographs are in doubt."""
    pair = compared(np.where(LABELS == 1, 0.6, 0.1))
    rules = {rule.name: rule for rule in apply_rules(pair, NOTHING, manifest, GateConfig(max_doubt=0.5))}
    assert rules["doubt"].passed
    rules = {rule.name: rule for rule in apply_rules(pair, NOTHING, manifest, GateConfig(max_doubt=0.49))}
    assert not rules["doubt"].passed
    assert rules["doubt"].explanation == (
        "50% of the radiographs are in doubt, so that a person has to decide; at most 49%"
    )


def test_a_challenger_must_not_be_further_below_the_champion_than_the_margin(manifest):
    """One of 40 fractures ranked last costs 1/40 of the AUC."""
    slipped = GOOD.copy()
    slipped[1] = 0.05
    pair = compared(slipped, GOOD)
    assert failed(apply_rules(pair, NOTHING, manifest, GateConfig(auc_margin=0.01))) == ["AUC against the champion"]
    rules = apply_rules(pair, NOTHING, manifest, GateConfig())
    rule = next(rule for rule in rules if rule.name == "AUC against the champion")
    assert rule.explanation.startswith(
        "0.975, the champion's 1.000 on the same radiographs: with 90% confidence at most 0.0"
    )
    assert rule.value == pytest.approx(-0.05, abs=0.02), "a resample may contain two such cases"
    assert failed(apply_rules(pair, NOTHING, manifest, GateConfig(auc_margin=0.1))) == []
    assert failed(apply_rules(compared(GOOD, POOR), NOTHING, manifest, GateConfig())) == []


def test_a_model_that_calls_every_radiograph_a_fracture_fails(manifest):
    """AUC and sensitivity are as high as can be, since only the threshold is wrong."""
    first = {rule.name: rule for rule in apply_rules(compared(GOOD, threshold=0.02), NOTHING, manifest, GateConfig())}
    assert failed(list(first.values())) == ["specificity"]
    assert first["specificity"].explanation == "0.000 at its threshold of 0.020; at least 0.1"
    pair = compared(GOOD, GOOD, threshold=0.02)
    rules = {rule.name: rule for rule in apply_rules(pair, NOTHING, manifest, GateConfig(min_specificity=0.0))}
    assert failed(list(rules.values())) == ["specificity against the champion"]
    assert rules["specificity against the champion"].explanation == (
        "0.000, the champion's 1.000 on the same radiographs: with 90% confidence at most 1.000 lower; "
        "at most 0.200 lower is allowed"
    )


def test_a_challenger_may_clear_somewhat_fewer_normals_than_the_champion(manifest):
    """Four of 40 normals are called fractures, 0.1 of the specificity; with 90 % confidence at most 0.16."""
    pair = compared(np.where(np.arange(80) % 20 == 0, 0.6, GOOD), GOOD)
    assert failed(apply_rules(pair, NOTHING, manifest, GateConfig())) == []
    rules = apply_rules(pair, NOTHING, manifest, GateConfig(specificity_margin=0.1))
    assert failed(rules) == ["specificity against the champion"]
    assert next(rule.value for rule in rules if not rule.passed) == pytest.approx(-0.16, abs=0.02)


def test_more_confidence_requires_a_wider_bound(manifest):
    slipped = np.where(np.arange(80) % 20 == 1, 0.05, GOOD)
    pair = compared(slipped, GOOD)
    results = [apply_rules(pair, NOTHING, manifest, GateConfig(confidence=sure)) for sure in (0.8, 0.9, 0.99)]
    values = [next(rule.value for rule in rules if rule.name == "AUC against the champion") for rules in results]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    ("new", "name", "explanation"),
    [
        ({"lost_from_test": 9}, "test kept", "9 of 80 radiographs of the champion's test are no longer in test"),
        (
            {"conflicting": 3, "conflicting_paths": ["a.png", "b.png"], "new_or_conflicting": 100},
            "label conflicts",
            "3 of 100 new or changed radiographs have both labels, or a label other than before, such as 'a.png'",
        ),
        (
            {"fracture_share_now": 1.0, "new_radiographs": {"normal": 0, "fracture": 30}},
            "classes",
            "100% of 30 new radiographs are fractured, 50% before; all are of one class, which is not chance",
        ),
        (
            {"fracture_share_now": 0.95, "new_radiographs": {"normal": 2, "fracture": 38}},
            "classes",
            "95% of 40 new radiographs are fractured, 50% before; at most 40% apart",
        ),
        (
            {"drifts": [Drift("mean", np.arange(90.0), np.arange(90.0) + 45), Drift("side", np.ones(9), np.ones(9))]},
            "drift of the images",
            "0.50 in 'mean'; at most 0.4",
        ),
    ],
)
def test_new_data_of_another_kind_fails(manifest, new: dict, name: str, explanation: str):
    changes = replace(NOTHING, **new)
    rules = apply_rules(compared(GOOD, GOOD), changes, manifest, GateConfig())
    assert failed(rules) == [name]
    assert explanation in next(rule.explanation for rule in rules if rule.name == name)


@pytest.mark.parametrize(
    "new",
    [
        {"fracture_share_now": 1.0, "new_radiographs": {"normal": 0, "fracture": 5}},  # by chance 1 in 32
        {"drifts": [Drift("mean", np.arange(9.0), np.arange(9.0) + 3)]},  # 0.33, of nine
        {"conflicting": 1, "new_or_conflicting": 100},
    ],
)
def test_a_difference_within_chance_passes(manifest, new: dict):
    assert failed(apply_rules(compared(GOOD, GOOD), replace(NOTHING, **new), manifest, GateConfig())) == []


def test_labels_that_the_champion_cannot_follow_fail_unless_they_are_few(manifest):
    rules = apply_rules(compared(GOOD, GOOD, agreement=1 - GOOD), NOTHING, manifest, GateConfig())
    assert failed(rules) == ["labels of the new radiographs"]
    assert (
        failed(apply_rules(compared(GOOD, GOOD, agreement=POOR), NOTHING, manifest, GateConfig())) == []
    )  # 0.5 to 0.7


def test_new_radiographs_of_one_class_that_the_champion_calls_the_other_fail(manifest):
    """Normal radiographs labelled as fractures: one class has no AUC."""
    fractures = scores(probability=1 - GOOD).filter(pa.array(LABELS == 1))
    pair = replace(compared(GOOD, GOOD), agreement=evaluate(fractures, 0.5)["radiograph"])
    (rule,) = (rule for rule in apply_rules(pair, NOTHING, manifest, GateConfig()) if not rule.passed)
    assert rule.explanation.startswith(
        "the champion classifies 0% of 40 new radiographs, all of one class, as labelled"
    )
    few = replace(pair, agreement=evaluate(fractures.slice(0, 2), 0.5)["radiograph"])
    assert failed(apply_rules(few, NOTHING, manifest, GateConfig())) == []


def test_a_test_that_leaks_fails(manifest):
    leaky = manifest.model_copy(update={"leakage": {"test": Leak(images=16, by_kind={"bytes": 2}, in_validation=1)}})
    rules = apply_rules(compared(GOOD), NOTHING, leaky, GateConfig())
    assert failed(rules) == ["leakage"]
    assert next(rule.explanation for rule in rules if rule.name == "leakage").startswith(
        "3 images of test show a radiograph"
    )


def test_an_undefined_figure_fails(manifest):
    one_class = scores(challenger=GOOD).filter(pa.array(LABELS == 1))
    figures = evaluate_table(one_class.append_column("probability", one_class["challenger"]), 0.5)
    alone = Comparison(one_class, 0, figures, figures, None, None)
    rules = {rule.name: rule for rule in apply_rules(alone, NOTHING, manifest, GateConfig(min_radiographs=1))}
    assert not rules["AUC"].passed
    assert rules["AUC against the champion"].explanation.startswith("undefined, since test has one class only")
    assert not rules["AUC against the champion"].passed
    assert not rules["specificity"].passed
    assert not rules["specificity against the champion"].passed


score_here = partial(score_rows, config=Config(), start=pytest.fail)
OPERATING_POINT = OperatingPoint(temperature=1.0, offset=0.0, threshold=0.5, rule="given: 0.5")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[StoragePath, StoragePath, Manifest]:
    """A run with its bundle, and its dataset; row i of each split has the hash of i and the split."""
    folder = storage_path(tmp_path_factory.mktemp("finished"))
    shards, run = folder / "shards", folder / "run"
    manifest = write_shards(shards, {"train": 40, "val": 16, "test": 24})
    config = load_config(None, TINY)
    model = build_model(config, manifest.pixel_mean, manifest.pixel_std)
    test = score_blocks(model, Dataset(shards, manifest), "test", 0, 1)
    write_predictions(run, test)
    export_model(model, OPERATING_POINT, run / "bundle")
    figures = {split: evaluate(test, 0.5) for split in ("val", "test")}
    write_bundle(run / "bundle", config, Dataset(shards, manifest), {"name": "x"}, OPERATING_POINT, figures)
    return run, shards, manifest


def copy_with_seen_files(bundle: StoragePath, to: StoragePath, hashes: list[bytes]) -> StoragePath:
    """Copy the bundle as if it had been trained on these files."""
    shutil.copytree(bundle.path, to.path)
    (to / "trained_on.parquet").write_parquet(pa.table({"sha256": pa.array(hashes, pa.binary(32))}))
    return to


def renamed(shards: StoragePath, to: StoragePath, hash_of: dict[int, bytes]) -> StoragePath:
    """Copy the dataset with the given hash for each group."""
    shutil.copytree(shards.path, to.path)
    files = (to / FILES).read_parquet()
    hashes = [hash_of.get(group, b"\xff" * 32) for group in files["group_id"].to_pylist()]
    files = files.set_column(0, "sha256", pa.array(hashes, pa.binary(32)))
    pixels = pa.array([digest[:16] for digest in hashes], pa.binary(16))
    (to / FILES).write_parquet(files.set_column(files.column_names.index("pixels"), "pixels", pixels))
    return to


def test_both_are_scored_on_what_neither_has_seen(finished, tmp_path):
    run, shards, manifest = finished
    shards = renamed(shards, storage_path(tmp_path / "shards"), {n: bytes([n] * 32) for n in range(60)})
    ours = read_bundle(copy_with_seen_files(run / "bundle", storage_path(tmp_path / "ours"), [bytes([3] * 32)]))
    theirs = read_bundle(
        copy_with_seen_files(run / "bundle", storage_path(tmp_path / "theirs"), [bytes([5] * 32), bytes([200] * 32)])
    )
    fresh = replace(NOTHING, new_radiograph_ids=np.array([5, 7, 9, 30]))
    found = compare_with_champion(ours, theirs, run, Dataset(shards, manifest), fresh, score_here)
    assert found.left_out == 2
    assert {3, 5}.isdisjoint(found.scores["group_id"].to_pylist())
    assert np.allclose(found.scores["challenger"], found.scores["champion"], atol=1e-6)
    assert np.abs(found.differences["auc"]).max() == pytest.approx(0, abs=1e-9)
    assert np.abs(found.differences["specificity"]).max() == 0
    assert found.agreement.count == 3, "one of the four new ones it has seen"
    assert found.agreement.groups == 3


def test_specificity_is_compared_at_the_threshold_of_each_model(finished, tmp_path):
    run, shards, manifest = finished
    dataset = Dataset(renamed(shards, storage_path(tmp_path / "shards"), {}), manifest)
    points = (OPERATING_POINT.model_copy(update={"threshold": threshold}) for threshold in (0.0, 1.0))
    calls_all, calls_none = (replace(read_bundle(run / "bundle"), operating_point=point) for point in points)
    found = compare_with_champion(calls_all, calls_none, run, dataset, NOTHING, score_here)
    assert set(found.differences["specificity"]) == {-1.0}


def test_models_of_different_image_sizes_are_not_compared(finished, tmp_path):
    run, shards, manifest = finished
    bundle = read_bundle(run / "bundle")
    other = replace(bundle, config=load_config(None, [*TINY, "data.image_size=64"]))
    with pytest.raises(UsageError, match=r"data.image_size = 32, but the champion .* takes 64: .*Keep the size"):
        compare_with_champion(bundle, other, run, Dataset(shards, manifest), NOTHING, score_here)


def test_a_test_split_that_was_seen_completely_is_refused(finished, tmp_path):
    run, shards, manifest = finished
    bundle = read_bundle(run / "bundle")  # all files have one hash here, and training has seen it
    with pytest.raises(UsageError, match="each of the 24 images of test has been seen by one of the models"):
        compare_with_champion(bundle, None, run, Dataset(shards, manifest), NOTHING, score_here)


def test_the_page_shows_the_decision_its_reasons_and_pictures(finished, tmp_path):
    run, shards, manifest = finished
    shards = renamed(shards, storage_path(tmp_path / "shards"), {})
    bundle = read_bundle(run / "bundle")
    champion = replace(bundle, operating_point=OPERATING_POINT.model_copy(update={"threshold": 0.999}))
    new = replace(NOTHING, drifts=[Drift("mean", np.arange(9.0), np.arange(9.0))], origins={"Ward <3>": 4})
    found = compare_with_champion(bundle, champion, run, Dataset(shards, manifest), new, score_here)
    rules = apply_rules(found, new, manifest, GateConfig())
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
    retraining = Retraining(*about)
    assert not retraining.promoted
    page = render_retraining_page(retraining).decode()
    assert "Retraining 2026-w48: version 3 is rejected" in page
    assert "Compared with version 2, which stays in use." in page
    for rule in rules:
        assert f"<td>{rule.name.replace(chr(39), '&#39;')}</td>" in page
    radiograph_ids, probabilities = (found.scores[name].to_numpy() for name in ("radiograph_id", "challenger"))
    apart = sum(
        probabilities[radiograph_ids == radiograph_id].mean() >= 0.5 for radiograph_id in set(radiograph_ids.tolist())
    )
    assert f"{apart} of {len(set(radiograph_ids.tolist()))} radiographs of test are classified differently" in page
    assert page.count('src="data:image/png;base64,') == min(apart, 12) + 2
    assert "Ward &lt;3&gt;" in page
    assert "http" not in page, "it needs no network"
    assert retraining.as_json()["decision"] == "rejected"
    assert retraining.as_json()["rules"][0]["name"] == "size of test"
    first = compare_with_champion(bundle, None, run, Dataset(shards, manifest), new, score_here)
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
    page = render_retraining_page(Retraining(*about)).decode()
    assert "version 1 is promoted" in page
    assert "There was no version in use to compare with." in page
