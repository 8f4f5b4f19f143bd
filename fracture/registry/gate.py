"""Decide whether a challenger may replace the model in use: a few rules, all of which must pass.

Both models are scored on the same test radiographs. Groups that either model has seen, as the hashes of its training
files show, are left out. That alone would not find a batch of radiographs with wrong labels: a part of it is in test,
where a model that was trained on the other part scores better. So the model in use, which has seen none of the new
radiographs, is also scored on them, and must agree with their labels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fracture.config import GateConfig
from fracture.dataset.format import Dataset, Manifest
from fracture.errors import UsageError
from fracture.evaluation.metrics import (
    Evaluation,
    Metrics,
    auc_differences,
    average_by_radiograph,
    compute_metrics,
    rate_differences,
)
from fracture.evaluation.report import add_outcomes, evaluate
from fracture.inference.bundle import Bundle
from fracture.registry.data_changes import CHANCE, DataChanges
from fracture.registry.registry import Rule
from fracture.storage import StoragePath

_RESAMPLES = 2000
_AGREEMENT_RADIOGRAPHS = 2000  # new radiographs that the model in use is scored on; more would not change the result

# `score_rows` of the models, the dataset and the rows of each split
Score = Callable[[Sequence[Bundle], Dataset, Mapping[str, np.ndarray]], pa.Table]


@dataclass(frozen=True)
class Comparison:
    """The scores of the challenger, and of the champion if there is one, on the same test radiographs."""

    # row, source, origin, radiograph_id, group_id, label, challenger[, champion]: calibrated probabilities
    scores: pa.Table
    left_out: int  # test images of a group that one of the models has seen
    challenger: Evaluation
    champion: Evaluation | None
    # "auc" and "specificity" -> [resamples], per radiograph: that of the challenger minus that of the champion
    differences: dict[str, np.ndarray] | None  # None: without a champion, or test has one class only
    agreement: Metrics | None  # of the champion with the labels of the new radiographs


def compare_with_champion(
    challenger: Bundle,
    champion: Bundle | None,
    run: StoragePath,
    dataset: Dataset,
    changes: DataChanges,
    score: Score,
) -> Comparison:
    """Score the challenger and the champion on the test radiographs that neither has seen.

    Args:
        run: the challenger's run, with its scores.
        changes: since the champion was trained.
        score: gives the champion's scores.

    Raises:
        UsageError: the models take images of different sizes, or no radiograph is left to compare them on.
    """
    if champion is not None and champion.image_size != dataset.image_size:
        raise UsageError(
            f"data.image_size = {dataset.image_size}, but the champion {champion.folder} takes {champion.image_size}: "
            "they cannot be compared on the same images. Keep the size, or begin another registry."
        )
    scores = (run / "predictions.parquet").read_parquet()
    scores = scores.filter(pc.equal(scores["split"], "test")).rename_columns({"probability": "challenger"})
    seen_groups = [bundle.find_seen_groups(dataset) for bundle in (challenger, champion) if bundle is not None]
    unseen = ~np.isin(scores["group_id"].to_numpy(), list(set().union(*seen_groups)))
    if not unseen.any():
        raise UsageError(
            f"{dataset.folder}: each of the {len(unseen)} images of test has been seen by one of the models. Add "
            "radiographs of patients that are in no earlier dataset."
        )
    agreement = None
    if champion is not None:
        is_new = _find_new_rows(dataset, changes, seen_groups[-1])
        rows = is_new | {"test": np.ones(dataset.rows("test"), bool)}
        of_champion = score([champion], dataset, rows)
        in_test = pc.equal(of_champion["split"], "test")
        scores = scores.append_column("champion", of_champion.filter(in_test)["probability"])
        of_new = of_champion.filter(pa.array(np.concatenate([is_new[split][rows[split]] for split in rows])))
        agreement = _measure_agreement(of_new, champion.operating_point.threshold)
    scores = scores.filter(pa.array(unseen))
    return Comparison(
        scores=scores,
        left_out=int((~unseen).sum()),
        challenger=_evaluate(scores, "challenger", challenger),
        champion=None if champion is None else _evaluate(scores, "champion", champion),
        differences=None if champion is None else _resample_differences(scores, challenger, champion),
        agreement=agreement,
    )


def _evaluate(scores: pa.Table, name: str, bundle: Bundle) -> Evaluation:
    scores, rule = scores.append_column("probability", scores[name]), bundle.config.evaluation.study_probability
    evaluation = evaluate(scores, bundle.operating_point.threshold, rule)
    add_outcomes({"test": evaluation}, scores, bundle.operating_point, rule)
    return evaluation


def _resample_differences(scores: pa.Table, challenger: Bundle, champion: Bundle) -> dict[str, np.ndarray] | None:
    names = ("label", "radiograph_id", "group_id", "challenger", "champion")
    labels, radiograph_ids, groups, *models = (scores[name].to_numpy() for name in names)
    first, means = average_by_radiograph(labels, radiograph_ids, *models)
    if len(np.unique(labels)) < 2:
        return None
    thresholds = (bundle.operating_point.threshold for bundle in (challenger, champion))
    called = (mean >= threshold for mean, threshold in zip(means, thresholds, strict=True))
    rates = rate_differences(labels[first], *called, groups[first], _RESAMPLES)
    aucs = auc_differences(labels[first], *means, groups[first], _RESAMPLES)
    return {"auc": aucs, "specificity": rates["specificity"]}


def _find_new_rows(dataset: Dataset, changes: DataChanges, seen_groups: set[int]) -> dict[str, np.ndarray]:
    """Return split -> [rows] bool: new radiographs whose groups the champion has not seen."""
    chosen = changes.new_radiograph_ids[:_AGREEMENT_RADIOGRAPHS]  # a random sample, since the ids are hashes
    seen, found = list(seen_groups), {}
    for split in dataset.splits:
        index = dataset.read_columns(split, ["radiograph_id", "group_id"])
        is_new = np.isin(index["radiograph_id"].to_numpy(), chosen)
        found[split] = is_new & ~np.isin(index["group_id"].to_numpy(), seen)
    return found


def _measure_agreement(scores: pa.Table, threshold: float) -> Metrics | None:
    """Compare the champion's scores of new radiographs with their labels."""
    if not len(scores):
        return None
    labels, radiograph_ids, groups, values = (
        scores[name].to_numpy() for name in ("label", "radiograph_id", "group_id", "probability")
    )
    first, (means,) = average_by_radiograph(labels, radiograph_ids, values)
    return compute_metrics(labels[first], means, groups[first], threshold, "radiograph")


def apply_rules(comparison: Comparison, changes: DataChanges, manifest: Manifest, config: GateConfig) -> list[Rule]:
    """Apply every rule of `config`, in the order of the page."""
    return [*_check_challenger(comparison, config), *_check_data(comparison, changes, manifest, config)]


def _check_challenger(comparison: Comparison, config: GateConfig) -> list[Rule]:
    m = comparison.challenger["radiograph"]
    fractures, normals = m.true_positives + m.false_negatives, m.true_negatives + m.false_positives
    fewest = min(fractures, normals)
    rules = [
        Rule(
            name="size of test",
            value=fewest,
            limit=config.min_radiographs,
            passed=fewest >= config.min_radiographs,
            explanation=f"test has {fractures} fractured and {normals} normal radiographs that neither model has "
            f"seen; at least {config.min_radiographs} of each",
        ),
        _check_minimum("AUC", m["auc"], config.min_auc),
    ]
    if comparison.champion is not None:
        rules.append(_check_against_champion(comparison, "AUC", "auc", config.auc_margin, config.confidence))
    threshold = f" at its threshold of {m.threshold:.3f}"
    rules.append(_check_minimum("sensitivity", m["recall"], config.min_sensitivity, threshold))
    # A model that calls everything a fracture has the highest sensitivity, and any AUC.
    rules.append(_check_minimum("specificity", m["specificity"], config.min_specificity, threshold))
    if comparison.champion is not None:
        margin = config.specificity_margin
        rules.append(_check_against_champion(comparison, "specificity", "specificity", margin, config.confidence))
    calibration = _check_calibration(m["calibration_error"], config.max_calibration_error)
    return [*rules, calibration, _check_doubt(m, config.max_doubt)]


def _check_doubt(metrics: Metrics, most: float) -> Rule:
    assert metrics.outcomes is not None
    share = metrics.outcomes.doubt
    return Rule(
        name="doubt",
        value=share,
        limit=most,
        passed=share <= most,
        explanation=f"{share:.0%} of the radiographs are in doubt, so that a person has to decide; at most {most:.0%}",
    )


def _check_calibration(error: float | None, most: float) -> Rule:
    return Rule(
        name="calibration",
        value=error,
        limit=most,
        passed=error is not None and error <= most,
        explanation=f"expected calibration error {_format_value(error)}; at most {most:g}",
    )


def _check_minimum(name: str, value: float | None, least: float, where: str = "") -> Rule:
    explanation = f"{_format_value(value)}{where}; at least {least:g}"
    return Rule(
        name=name, value=value, limit=least, passed=value is not None and value >= least, explanation=explanation
    )


def _check_against_champion(comparison: Comparison, name: str, figure: str, margin: float, confidence: float) -> Rule:
    challenger, champion = (e["radiograph"][figure] for e in (comparison.challenger, comparison.champion))
    if comparison.differences is None or challenger is None or champion is None:
        lowest, measured = None, "undefined, since test has one class only"
    else:
        lowest = float(np.quantile(comparison.differences[figure], 1 - confidence))
        bound = f"at most {-lowest:.3f} lower" if lowest < 0 else f"at least {lowest:.3f} higher"
        measured = (
            f"{challenger:.3f}, the champion's {champion:.3f} on the same radiographs: with {confidence:.0%} "
            f"confidence {bound}"
        )
    return Rule(
        name=f"{name} against the champion",
        value=lowest,
        limit=-margin,
        passed=lowest is not None and lowest >= -margin,
        explanation=f"{measured}; at most {margin:.3f} lower is allowed",
    )


def _check_data(comparison: Comparison, changes: DataChanges, manifest: Manifest, config: GateConfig) -> list[Rule]:
    rules = [_check_leakage(manifest), _check_labels(changes, config)]
    if comparison.champion is None:
        return rules
    return [
        *rules,
        _check_test_kept(changes, config),
        _check_classes(changes, config),
        _check_drift(changes, config),
        _check_agreement(comparison, config),
    ]


def _check_leakage(manifest: Manifest) -> Rule:
    leak = manifest.leakage.get("test")
    leaking = leak.leaking if leak else 0
    return Rule(
        name="leakage",
        value=leaking,
        limit=0,
        passed=not leaking,
        explanation=f"{leaking} images of test show a radiograph or patient of training or validation; none may",
    )


def _check_labels(changes: DataChanges, config: GateConfig) -> Rule:
    share = changes.conflicting / max(changes.new_or_conflicting, 1)
    paths = changes.conflicting_paths[:2]
    examples = f", such as {' and '.join(map(repr, paths))}" if paths else ""
    return Rule(
        name="label conflicts",
        value=share,
        limit=config.max_conflicts,
        passed=share <= config.max_conflicts,
        explanation=f"{changes.conflicting} of {changes.new_or_conflicting} new or changed radiographs have both "
        f"labels, or a label other than before{examples}; at most {config.max_conflicts:.0%}",
    )


def _check_test_kept(changes: DataChanges, config: GateConfig) -> Rule:
    share = changes.lost_from_test / max(changes.test_before, 1)
    return Rule(
        name="test kept",
        value=share,
        limit=config.max_left_test,
        passed=share <= config.max_left_test,
        explanation=f"{changes.lost_from_test} of {changes.test_before} radiographs of the champion's test are no "
        f"longer in test: joined to others, under both labels, unreadable or removed; at most "
        f"{config.max_left_test:.0%}",
    )


def _check_classes(changes: DataChanges, config: GateConfig) -> Rule:
    """Fail if all new radiographs are of one class, or their share of fractures is too different."""
    share, share_before = changes.fracture_share_now, changes.fracture_share_before
    if share is None or share_before is None:
        return _pass_without_new_data("classes", config.max_drift)
    from scipy.stats import binomtest

    fractures, count = changes.new_radiographs["fracture"], changes.new_radiograph_count
    p_value = binomtest(fractures, count, share_before).pvalue if 0 < share_before < 1 else 0.0
    shift = abs(share - share_before)
    one_class = share in (0, 1)
    return Rule(
        name="classes",
        value=shift,
        limit=config.max_drift,
        passed=p_value > CHANCE or not (one_class or shift > config.max_drift),
        explanation=f"{share:.0%} of {count} new radiographs are fractured, {share_before:.0%} before"
        + ("; all are of one class, which is not chance" if one_class and p_value <= CHANCE else "")
        + f"; at most {config.max_drift:.0%} apart",
    )


def _check_drift(changes: DataChanges, config: GateConfig) -> Rule:
    name = "drift of the images"
    if not changes.drifts:
        return _pass_without_new_data(name, config.max_drift)
    worst = max(changes.drifts, key=lambda drift: (not drift.is_chance, drift.distance))
    distance = 0.0 if worst.is_chance else worst.distance
    measured = "no measure differs by more than chance" if worst.is_chance else f"{distance:.2f} in {worst.name!r}"
    return Rule(
        name=name,
        value=distance,
        limit=config.max_drift,
        passed=distance <= config.max_drift,
        explanation=f"{measured}; at most {config.max_drift:g} (Kolmogorov-Smirnov distance between new and earlier "
        "radiographs)",
    )


def _check_agreement(comparison: Comparison, config: GateConfig) -> Rule:
    """Compare the champion with the labels by AUC, or, if all new radiographs are of one class, by its accuracy."""
    name, least, m = "labels of the new radiographs", config.min_agreement, comparison.agreement
    if m is None:
        return _pass_without_new_data(name, least)
    auc = m.figures["auc"]
    if auc.value is None:
        from scipy.stats import binomtest

        right = m.true_positives + m.true_negatives
        value, high = right / m.count, binomtest(right, m.count).proportion_ci(0.95).high
        measured = f"the champion classifies {value:.0%} of {m.count} new radiographs, all of one class, as labelled"
    else:
        value, high = auc.value, auc.value if auc.high is None else auc.high
        measured = f"AUC {value:.3f} of the champion on {m.count} new radiographs, which it has not seen"
    return Rule(
        name=name,
        value=value,
        limit=least,
        passed=high >= least,  # too few radiographs to show a disagreement pass
        explanation=f"{measured} (95% confidence: at most {high:.3f}); fails if that is below {least:g}",
    )


def _pass_without_new_data(name: str, limit: float) -> Rule:
    return Rule(name=name, value=None, limit=limit, passed=True, explanation="no new radiographs to measure")


def _format_value(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"
