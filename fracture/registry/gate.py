"""Whether a challenger may take the place of the model in use: a few rules, all of which must hold.

Both models are scored on the same radiographs of test, of which neither has seen anything, by group and by hash. That
alone would not find a batch of radiographs with wrong labels: they come into test as well, and a model that was
trained on them scores better there. So the new radiographs are judged, too, by the model that knows nothing of them.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel

from fracture.config import GateConfig
from fracture.dataset.format import Dataset, Manifest
from fracture.errors import UsageError
from fracture.evaluation.metrics import Evaluation, Metrics, auc_differences, average_by_radiograph, compute_metrics
from fracture.evaluation.report import evaluate
from fracture.evaluation.scores import score_blocks
from fracture.inference.bundle import Bundle
from fracture.registry.data_changes import CHANCE, DataChanges
from fracture.storage import StoragePath

_RESAMPLES = 2000
_MOST_JUDGED = 2000  # new radiographs that the model in use is asked about; more would tell nothing more


class Rule(BaseModel, frozen=True):
    """One rule, and what came of it."""

    name: str
    value: float | None  # None: there is nothing to measure
    limit: float
    passed: bool
    told: str  # a sentence


@dataclass(frozen=True)
class Comparison:
    """Two models, or the first one alone, on the same test."""

    scores: pa.Table  # row, source, origin, radiograph, group, label, challenger[, champion]: calibrated probabilities
    left_out: int  # images of test that one of the two had seen, or a copy of
    challenger: Evaluation
    champion: Evaluation | None
    differences: np.ndarray | None  # [resamples] of AUC per radiograph, challenger minus champion
    agreement: Metrics | None  # of the model in use with the labels of the new radiographs


def compare(
    challenger: Bundle,
    champion: Bundle | None,
    run: StoragePath,
    dataset: Dataset,
    new: DataChanges,
) -> Comparison:
    """
    Args:
        run: that made the challenger, with its scores.
        new: since the champion was trained.

    Raises:
        UsageError: the models take images of different sizes, or nothing is left to compare them on.
    """
    if champion is not None and champion.image_size != dataset.image_size:
        raise UsageError(
            f"data.image_size = {dataset.image_size}, and the champion {champion.folder} takes {champion.image_size}: "
            "they cannot be compared on the same images. Keep the size, or begin another registry."
        )
    scores = (run / "predictions.parquet").read_parquet()
    scores = scores.filter(pc.equal(scores["split"], "test")).rename_columns({"probability": "challenger"})
    seen = [bundle.find_seen_groups(dataset) for bundle in (challenger, champion) if bundle is not None]
    fresh = ~np.isin(scores["group_id"].to_numpy(), list(set().union(*seen)))
    model = None if champion is None else champion.load_model()
    if model is not None:
        theirs = score_blocks(model, dataset, "test", rank=0, workers=1)
        scores = scores.append_column("champion", theirs["probability"])
    scores = scores.filter(pa.array(fresh))
    if not len(scores):
        raise UsageError(
            f"{dataset.folder}: each of the {len(fresh)} images of test has been seen by one of the models."
        )
    return Comparison(
        scores=scores,
        left_out=int((~fresh).sum()),
        challenger=_evaluate(scores, "challenger", challenger),
        champion=None if champion is None else _evaluate(scores, "champion", champion),
        differences=None if champion is None else _differences(scores),
        agreement=None if champion is None else _agreement(model, champion, dataset, new),
    )


def _evaluate(scores: pa.Table, name: str, bundle: Bundle) -> Evaluation:
    return evaluate(scores.append_column("probability", scores[name]), bundle.operating_point.threshold)


def _differences(scores: pa.Table) -> np.ndarray | None:
    names = ("label", "radiograph_id", "group_id", "challenger", "champion")
    labels, radiograph_ids, groups, *models = (scores[name].to_numpy() for name in names)
    first, means = average_by_radiograph(labels, radiograph_ids, *models)
    if len(np.unique(labels)) < 2:
        return None
    return auc_differences(labels[first], *means, groups[first], resamples=_RESAMPLES)


def _agreement(model: object, champion: Bundle, dataset: Dataset, new: DataChanges) -> Metrics | None:
    """How the champion judges the new radiographs of all splits, of which it has seen nothing."""
    asked = new.fresh[:_MOST_JUDGED]  # ids are hashes, so that any are drawn at random
    seen, parts = list(champion.find_seen_groups(dataset)), []
    for split in dataset.splits:
        index = dataset.read_columns(split, ["radiograph_id", "group_id"])
        only = np.isin(index["radiograph_id"].to_numpy(), asked) & ~np.isin(index["group_id"].to_numpy(), seen)
        parts.append(score_blocks(model, dataset, split, rank=0, workers=1, only=only))
    scores = pa.concat_tables(parts).combine_chunks()
    if not len(scores):
        return None
    labels, radiograph_ids, groups, values = (
        scores[name].to_numpy() for name in ("label", "radiograph_id", "group_id", "probability")
    )
    first, (means,) = average_by_radiograph(labels, radiograph_ids, values)
    return compute_metrics(labels[first], means, groups[first], champion.operating_point.threshold, "radiograph")


def judge(compared: Comparison, new: DataChanges, manifest: Manifest, config: GateConfig) -> list[Rule]:
    """Every rule of `config`, in the order of the page."""
    return [*_of_the_challenger(compared, config), *_of_the_data(compared, new, manifest, config)]


def _of_the_challenger(compared: Comparison, config: GateConfig) -> list[Rule]:
    m = compared.challenger["radiograph"]
    fractures, normals = m.true_positives + m.false_negatives, m.true_negatives + m.false_positives
    few = min(fractures, normals)
    rules = [
        Rule(
            name="enough to test on",
            value=few,
            limit=config.min_radiographs,
            passed=few >= config.min_radiographs,
            told=f"{fractures} fractured and {normals} normal radiographs in test that neither model has seen; each at "
            f"least {config.min_radiographs}",
        ),
        _at_least("AUC", m["auc"], config.min_auc),
    ]
    if compared.champion is not None:
        rules.append(_against_champion(compared, config))
    error, most = m["calibration_error"], config.max_calibration_error
    return [
        *rules,
        _at_least("sensitivity", m["recall"], config.min_sensitivity, f" at its threshold of {m.threshold:.3f}"),
        Rule(
            name="calibration",
            value=error,
            limit=most,
            passed=error is not None and error <= most,
            told=f"expected calibration error {_text(error)}; at most {most:g}",
        ),
    ]


def _at_least(name: str, value: float | None, least: float, where: str = "") -> Rule:
    passed = value is not None and value >= least
    return Rule(name=name, value=value, limit=least, passed=passed, told=f"{_text(value)}{where}; at least {least:g}")


def _against_champion(compared: Comparison, config: GateConfig) -> Rule:
    ours, theirs = compared.challenger["radiograph"]["auc"], compared.champion["radiograph"]["auc"]
    sure = f"{config.confidence:.0%}"
    if compared.differences is None or ours is None or theirs is None:
        lowest, told = None, "undefined, since test has one class only"
    else:
        lowest = float(np.quantile(compared.differences, 1 - config.confidence))
        how = f"at most {-lowest:.3f} lower" if lowest < 0 else f"at least {lowest:.3f} higher"
        told = f"{ours:.3f}, and the champion's {theirs:.3f} on the same radiographs: with {sure} confidence {how}"
    return Rule(
        name="AUC beside the champion's",
        value=lowest,
        limit=-config.auc_margin,
        passed=lowest is not None and lowest >= -config.auc_margin,
        told=f"{told}; it may be {config.auc_margin:.3f} lower",
    )


def _of_the_data(compared: Comparison, new: DataChanges, manifest: Manifest, config: GateConfig) -> list[Rule]:
    leak = manifest.leakage.get("test")
    leaking = leak.leaking if leak else 0
    share = new.conflicts / max(new.changed, 1)
    named = f", such as {' and '.join(map(repr, new.conflicting[:2]))}" if new.conflicting else ""
    rules = [
        Rule(
            name="leakage",
            value=leaking,
            limit=0,
            passed=not leaking,
            told=f"{leaking} images of test show a radiograph or patient that training or validation has; none may",
        ),
        Rule(
            name="label conflicts",
            value=share,
            limit=config.max_conflicts,
            passed=share <= config.max_conflicts,
            told=f"{new.conflicts} of {new.changed} new or changed radiographs stand under both labels, "
            f"or another than before{named}; at most {config.max_conflicts:.0%}",
        ),
    ]
    if compared.champion is None:
        return rules
    return [*rules, _left_test(new, config), _classes(new, config), _drift(new, config), _agrees(compared, config)]


def _left_test(new: DataChanges, config: GateConfig) -> Rule:
    share = new.left_test / max(new.test_before, 1)
    return Rule(
        name="test stays",
        value=share,
        limit=config.max_left_test,
        passed=share <= config.max_left_test,
        told=f"{new.left_test} of {new.test_before} radiographs that tested the champion do no longer: joined to "
        f"others, under both labels, unreadable or gone; at most {config.max_left_test:.0%}",
    )


def _classes(new: DataChanges, config: GateConfig) -> Rule:
    """One class alone, or a share of fractures that is far off."""
    if new.share_now is None or new.share_before is None:
        return _nothing_new("classes", config.max_drift)
    from scipy.stats import binomtest

    fractures = new.radiographs["fracture"]
    chance = binomtest(fractures, new.count, new.share_before).pvalue if 0 < new.share_before < 1 else 0.0
    shift = abs(new.share_now - new.share_before)
    collapsed = new.share_now in (0, 1)
    return Rule(
        name="classes",
        value=shift,
        limit=config.max_drift,
        passed=chance > CHANCE or not (collapsed or shift > config.max_drift),
        told=f"{new.share_now:.0%} of {new.count} new radiographs are fractured, {new.share_before:.0%} before"
        + ("; all of one class, and not by chance" if collapsed and chance <= CHANCE else "")
        + f"; at most {config.max_drift:.0%} apart",
    )


def _drift(new: DataChanges, config: GateConfig) -> Rule:
    if not new.drifts:
        return _nothing_new("drift of the images", config.max_drift)
    worst = max(new.drifts, key=lambda drift: (not drift.by_chance, drift.distance))
    distance = 0.0 if worst.by_chance else worst.distance
    told = "none that is more than chance" if worst.by_chance else f"{worst.distance:.2f} in {worst.name!r}, the most"
    return Rule(
        name="drift of the images",
        value=distance,
        limit=config.max_drift,
        passed=distance <= config.max_drift,
        told=f"{told}; at most {config.max_drift:g} (Kolmogorov-Smirnov distance of new radiographs from those before)",
    )


def _agrees(compared: Comparison, config: GateConfig) -> Rule:
    """Of one class there is no AUC, but how many of them the champion calls so."""
    name, least, m = "labels of the new radiographs", config.min_agreement, compared.agreement
    if m is None:
        return _nothing_new(name, least)
    figure = m.figures["auc"]
    if figure.value is None:
        from scipy.stats import binomtest

        right = m.true_positives + m.true_negatives
        value, high = right / m.count, binomtest(right, m.count).proportion_ci(0.95).high
        what = f"the champion calls {value:.0%} of the {m.count} new radiographs as they are labelled, all of one class"
    else:
        value, high = figure.value, figure.value if figure.high is None else figure.high
        what = f"AUC {value:.3f} of the champion, which has not seen them, on {m.count} new radiographs"
    return Rule(
        name=name,
        value=value,
        limit=least,
        passed=high >= least,  # a few radiographs are not held against it
        told=f"{what} (95 %: up to {high:.3f}); fails where it is surely below {least:g}",
    )


def _nothing_new(name: str, limit: float) -> Rule:
    return Rule(name=name, value=None, limit=limit, passed=True, told="no new radiographs to tell by")


def _text(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"
