"""Evaluation of a run's scores: metrics, plots, the report page, and the summary on the screen."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fracture.dataset.format import UNTESTED, Dataset, Manifest, images_of
from fracture.evaluation.gallery import Gallery, select_most_confident
from fracture.evaluation.matched import match_radiographs
from fracture.evaluation.metrics import (
    Evaluation,
    Figure,
    Metrics,
    Outcomes,
    average_by_radiograph,
    compute_metrics,
    join_studies,
)
from fracture.evaluation.operating_point import OperatingPoint
from fracture.evaluation.outcomes import OUTCOMES, count_outcomes, join_outcomes, name_outcomes
from fracture.evaluation.plots import (
    plot_confusion_matrix,
    plot_curves,
    plot_histograms,
    plot_precision_recall,
    plot_reliability,
    plot_roc,
)
from fracture.evaluation.verdict import FEW_GROUPS, Verdict
from fracture.labels import CLASS_NAMES, SPLITS
from fracture.page import picture, png, render
from fracture.storage import StoragePath

NAMES = {  # figure -> its name on pages, in their order
    "auc": "AUC (area under the ROC curve)",
    "average_precision": "average precision",
    "accuracy": "accuracy",
    "recall": "sensitivity (recall)",
    "specificity": "specificity",
    "precision": "positive predictive value (precision)",
    "npv": "negative predictive value",
    "f1": "F1",
    "sensitivity_at_90_specificity": "sensitivity at 90 % specificity",
    "sensitivity_at_95_specificity": "sensitivity at 95 % specificity",
    "specificity_at_90_sensitivity": "specificity at 90 % sensitivity",
    "specificity_at_95_sensitivity": "specificity at 95 % sensitivity",
    "brier": "Brier score",
    "calibration_error": "expected calibration error",
    "loss": "cross-entropy",
}
ORIGIN, TRAIT = "test_from:", "test_of:"  # begin the names of parts of test
_PART_TRAITS = ("body part", "view")  # of DICOM files, by whose values test is taken apart
_FEWEST = 10  # radiographs of each class in a part that is shown
_ABOUT_TEST = ("LEAKAGE: ", "NOT TESTED: ", "FEW: ")  # these caveats are about a test, not about what was trained on
_MISTAKES = 6  # of each kind on the page


def evaluate(scores: pa.Table, threshold: float | np.ndarray, study_probability: str = "max") -> Evaluation:
    """Compute metrics per image and per radiograph, at one threshold or at one for each row.

    Where a study has several radiographs, also per study.

    Args:
        study_probability: "max" or "mean", as the setting `evaluation.study_probability`.
    """
    labels, probabilities, radiograph_ids, groups = (
        scores[name].to_numpy() for name in ("label", "probability", "radiograph_id", "group_id")
    )
    first, (means, thresholds) = average_by_radiograph(
        labels, radiograph_ids, probabilities, np.broadcast_to(threshold, labels.shape)
    )
    if np.ndim(threshold) == 0:
        thresholds = threshold
    found = {
        "image": compute_metrics(labels, probabilities, groups, threshold),
        "radiograph": compute_metrics(labels[first], means, groups[first], thresholds, "radiograph"),
    }
    studies = _number_studies(scores, first)
    if len(np.unique(studies)) < len(studies):
        limits = np.broadcast_to(thresholds, means.shape)
        rows, of_study, (joined, limits) = join_studies(labels[first], studies, study_probability, means, limits)
        limits = thresholds if np.ndim(thresholds) == 0 else limits
        found["study"] = compute_metrics(of_study, joined, groups[first][rows], limits, "study")
    return found


def _number_studies(scores: pa.Table, first: np.ndarray) -> np.ndarray:
    """Return a number for the study of each radiograph: [radiographs]. One whose study is not known is its own."""
    known = scores["study_id"].take(first) if "study_id" in scores.column_names else pa.nulls(len(first), pa.int64())
    names = [("alone", row) if study is None else ("study", study) for row, study in enumerate(known.to_pylist())]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names], np.int64)


def evaluate_run(
    scores: pa.Table, dataset: Dataset, threshold: float, study_probability: str = "max"
) -> dict[str, Evaluation]:
    """Evaluate validation and test; see `evaluate`. Test per radiograph has matched figures, too.

    Returns:
        "val" and "test" -> evaluation; also "test_from:ORIGIN" for each of several origins, "test_of:TRAIT: VALUE" for
        body parts and views with enough radiographs, and "test_without_leaks" where a part of test leaks from training.
    """
    parts = {split: scores.filter(pc.equal(scores["split"], split)) for split in SPLITS[1:]}
    found = {split: evaluate(rows, threshold, study_probability) for split, rows in parts.items() if len(rows)}
    if "test" in found:
        found["test"]["radiograph"].matched = match_radiographs(parts["test"], dataset)
    origins = pc.unique(parts["test"]["origin"]).to_pylist()
    if len(origins) > 1:
        for origin in sorted(origins):
            rows = parts["test"].filter(pc.equal(parts["test"]["origin"], origin))
            found[f"{ORIGIN}{origin or 'unknown'}"] = evaluate(rows, threshold, study_probability)
    for name, rows in _split_by_trait(parts["test"], dataset):
        part = evaluate(rows, threshold, study_probability)
        if part["radiograph"].fewest >= _FEWEST:
            found[f"{TRAIT}{name}"] = part
    leak = dataset.manifest.leakage.get("test")
    if leak is not None and leak.leaking:
        seen = dataset.read_seen("group_id").combine_chunks()
        unseen = parts["test"].filter(pc.invert(pc.is_in(parts["test"]["group_id"], seen)))
        if len(unseen):
            found["test_without_leaks"] = evaluate(unseen, threshold, study_probability)
    return found


def add_outcomes(
    evaluations: Mapping[str, Evaluation],
    scores: pa.Table,
    operating_point: OperatingPoint,
    study_probability: str,
    *,
    as_a_whole: bool = False,
) -> None:
    """Add the outcomes to the evaluations of validation and test.

    Args:
        scores: calibrated, as `evaluate_run` takes them.
        study_probability: as the setting.
        as_a_whole: whether the images are unlike the training images as a whole.
    """
    for split in SPLITS[1:]:
        if split in evaluations:
            rows = scores.filter(pc.equal(scores["split"], split))
            by_study = "study" in evaluations[split]
            counted = _count_by_unit(rows, operating_point, study_probability, by_study, as_a_whole)
            for unit, outcomes in counted.items():
                evaluations[split][unit].outcomes = outcomes


def _count_by_unit(
    scores: pa.Table, operating_point: OperatingPoint, rule: str, by_study: bool, as_a_whole: bool
) -> dict[str, Outcomes]:
    labels, probabilities, radiograph_ids = (
        scores[name].to_numpy() for name in ("label", "probability", "radiograph_id")
    )
    distances = scores["distance"].to_numpy() if "distance" in scores.column_names else np.full(len(labels), np.nan)
    is_known = bool(len(labels)) and not np.isnan(distances).any()
    first, (means, mean_distances) = average_by_radiograph(labels, radiograph_ids, probabilities, distances)
    is_unlike = mean_distances > 1  # false where it is not known
    found = {}
    for unit, truth, values, unlike in (
        ("image", labels, probabilities, distances > 1),
        ("radiograph", labels[first], means, is_unlike),
    ):
        outcomes = name_outcomes(values, operating_point, unlike)
        found[unit] = count_outcomes(truth, outcomes, unlike if is_known else None, as_a_whole=as_a_whole)
    if by_study:
        studies = _number_studies(scores, first)
        _, of_study, (joined,) = join_studies(labels[first], studies, rule, means)
        unlike = np.zeros(len(joined), bool)
        np.logical_or.at(unlike, studies, is_unlike)
        outcomes = join_outcomes(outcomes, studies, joined, operating_point, unlike, rule)
        found["study"] = count_outcomes(of_study, outcomes, unlike if is_known else None, as_a_whole=as_a_whole)
    return found


def _split_by_trait(test: pa.Table, dataset: Dataset) -> Iterator[tuple[str, pa.Table]]:
    """Yield the part of test that has each value of a trait, with its name, where a trait has several values."""
    traits = dataset.read_traits()
    for trait in _PART_TRAITS:
        values = np.array([traits.get(path, {}).get(trait, "") for path in test["source"].to_pylist()], str)
        if len(np.unique(values)) > 1:
            for value in np.unique(values[values != ""]).tolist():
                yield f"{trait}: {value}", test.filter(pa.array(values == value))


@dataclass(frozen=True)
class Report:
    """The content of a run's report."""

    title: str
    dataset: Dataset
    operating_point: OperatingPoint
    evaluations: Mapping[str, Evaluation]
    history: Sequence[dict[str, float]]  # empty where nothing was trained
    best_epoch: int
    facts: Mapping[str, Any]  # versions, workers, seeds: name -> value
    caveats: Sequence[str]  # shown beside every figure
    own_test: Evaluation | None = None  # on the test split of the model's own dataset, if this dataset is another
    study_probability: str = "max"  # as the setting
    models: int = 1  # number of models whose probabilities were averaged
    gallery: Gallery | None = None  # of test radiographs
    verdict: Verdict | None = None  # whether the model can be used on this dataset, if it is another
    alignment: str = ""  # what aligned features gain on this dataset, in a line; "" where it was not tried


def write_report(folder: StoragePath, report: Report, scores: pa.Table) -> None:
    """Write the plots as PNG files, and `report.html`, which contains them all.

    Args:
        scores: calibrated scores of validation and test.
    """
    caption = "\n".join(report.caveats)
    test = scores.filter(pc.equal(scores["split"], "test"))
    labels, probabilities = test["label"].to_numpy(), test["probability"].to_numpy()
    plots = {"curves": plot_curves(report.history, report.best_epoch, caption)} if report.history else {}
    plots |= plot_scores(labels, probabilities, report.evaluations["test"]["image"], caption)
    for name, data in plots.items():
        (folder / f"{name}.png").write_bytes(data)
    page = render(
        "report.html",
        report=report,
        caveats=report.caveats,
        names=NAMES,
        outcomes=OUTCOMES,
        classes=list(reversed(CLASS_NAMES)),
        origins={n.removeprefix(ORIGIN): e for n, e in report.evaluations.items() if n.startswith(ORIGIN)},
        traits={n.removeprefix(TRAIT): e for n, e in report.evaluations.items() if n.startswith(TRAIT)},
        comparison=format_own_test_comparison(report.own_test, report.evaluations["test"]) if report.own_test else "",
        plots={name: png(data) for name, data in plots.items()},
        mistakes=_find_worst_mistakes(test, report),
    )
    (folder / "report.html").write_bytes(page)


def plot_scores(labels: np.ndarray, probabilities: np.ndarray, metrics: Metrics, caption: str) -> dict[str, bytes]:
    """Plot a test, as name -> PNG file; the curves only if both classes are present."""
    plots = {"confusion_matrix": plot_confusion_matrix(metrics, caption)}
    if metrics["auc"] is not None:
        plots["roc"] = plot_roc(labels, probabilities, metrics, caption)
        plots["precision_recall"] = plot_precision_recall(labels, probabilities, metrics, caption)
    plots["reliability"] = plot_reliability(labels, probabilities, metrics, caption)
    plots["histograms"] = plot_histograms(labels, probabilities, metrics, caption)
    return plots


def _find_worst_mistakes(test: pa.Table, report: Report) -> list[dict[str, Any]]:
    """Return the most confident mistakes of each kind, one image per radiograph."""
    worst = select_most_confident(test, report.operating_point.threshold, _MISTAKES)
    shown = []
    for row in (*worst["false negatives"], *worst["false positives"]):
        block = report.dataset.read("test", row["row"], row["row"] + 1)
        pixels = images_of(block, report.dataset.image_size)
        text = f"{CLASS_NAMES[row['label']]}, probability of a fracture {row['probability']:.2f}"
        shown.append({"picture": picture(pixels[0, ..., 0]), "text": text, "path": row["source"]})
    return shown


def list_caveats(manifest: Manifest) -> list[str]:
    """Return the warnings that belong beside every figure made from this dataset."""
    lines = []
    if manifest.synthetic:
        lines.append(
            "SYNTHETIC: generated sample radiographs. They show that the job works, and nothing about patients."
        )
    leaks = [
        f"{leak.leaking} of {leak.images} {split} images ({leak.by_kind['bytes']} byte for byte) show a radiograph or "
        f"patient that {leak.where} has too"
        for split, leak in sorted(manifest.leakage.items())
        if leak.leaking
    ]
    if leaks:
        test = manifest.leakage.get("test")
        advice = " No other test image is left: split the data with --split group to get a test without leaks."
        whole = test is not None and test.leaking == test.images
        lines.append(f"LEAKAGE: {'; '.join(leaks)}.{advice if whole else ''}")
    lines += [f"NOT TESTED: {line}." for line in manifest.untested]
    lines += manifest.notes
    if manifest.shortcuts:
        measures = [f"{name} (AUC {auc:.2f})" for name, auc in manifest.shortcuts.items()]
        verb, pronoun = ("predicts", "it") if len(measures) == 1 else ("predict", "them")
        lines.append(
            f"SHORTCUTS: in this data, {', '.join(measures)} alone {verb} the class; a model may use {pronoun} too."
        )
    # Of folds, every one is test once; what is `UNTESTED` only trains.
    tested = [
        groups for split, groups in manifest.groups.items() if split == "test" or (manifest.folds and split != UNTESTED)
    ]
    counts = {name: sum(groups[name] for groups in tested) for name in reversed(CLASS_NAMES)}
    if tested and min(counts.values()) < FEW_GROUPS:
        listed = " and ".join(f"{count:,} {name}" for name, count in counts.items())
        lines.append(
            f"FEW: the test has groups (patients, or radiographs that belong together) of {listed}, fewer than "
            f"{FEW_GROUPS} of a class: its figures are rough, and their intervals too."
        )
    return lines


def list_training_caveats(caveats: Iterable[str]) -> list[str]:
    """Return those of `list_caveats` that are about what a model was trained on, whatever tests it."""
    return [line for line in caveats if not line.startswith(_ABOUT_TEST)]


def format_results(evaluations: Mapping[str, Evaluation], has_doubt: bool = True) -> list[str]:
    """Return the lines that show the result on test on the screen.

    Args:
        has_doubt: whether the operating point has a second threshold; those of earlier versions have none.
    """
    lines = []
    for m in reversed(evaluations["test"].values()):
        figures = ", ".join(
            f"{word} {format_figure(m.figures[name])}"
            for word, name in (("AUC", "auc"), ("sensitivity", "recall"), ("specificity", "specificity"))
        )
        lines.append(f"{'' if lines else 'test':<10} {m.counted}: {figures}")
    m = evaluations["test"]["image"]
    lines.append(
        f"           at threshold {m.threshold:.3f}, accuracy {format_figure(m.figures['accuracy'])}: "
        f"{m.true_positives} fractures found, {m.false_negatives} missed · {m.true_negatives} normals cleared, "
        f"{m.false_positives} called fractures"
    )
    lines += format_outcomes(evaluations["test"], has_doubt)
    for name, evaluation in evaluations.items():
        if name.startswith((ORIGIN, TRAIT)):
            m = evaluation["radiograph"]
            auc = format_figure(m.figures["auc"])
            lines.append(f"  {name.partition(':')[2]:<8} {m.count:,} radiographs: AUC {auc}")
    lines += format_matched(evaluations["test"]["radiograph"])
    if without_leaks := evaluations.get("test_without_leaks"):
        m = without_leaks["image"]
        lines.append(
            f"           on the {m.count} images that do not leak from training: AUC {format_figure(m.figures['auc'])}"
            f", accuracy {format_figure(m.figures['accuracy'])}"
        )
    return lines


def format_outcomes(test: Evaluation, has_doubt: bool = True) -> list[str]:
    """Return the lines about the outcomes of studies, or of radiographs where studies are not known.

    Args:
        has_doubt: as for `format_results`.
    """
    m = test.get("study", test["radiograph"])
    if m.outcomes is None:
        return []
    rates = {"sensitivity": m.outcomes.sensitivity, "specificity": m.outcomes.specificity}
    listed = ", ".join(f"{name} {'undefined' if rate is None else f'{rate:.3f}'}" for name, rate in rates.items())
    lines = ["outcome    fracture or none: a model of an earlier version has no second threshold"]
    if m.outcomes.as_a_whole:
        lines = ["outcome    all in doubt: as a whole the images are unlike the training images"]
    elif has_doubt:
        lines = [f"outcome    {m.counted}: {m.outcomes.doubt:.0%} in doubt; {listed} among the others"]
    if m.outcomes.unlike is not None:
        lines.append(f"unlike     {m.outcomes.unlike:.1%} of {m.counted}: unlike the training images, so in doubt")
    return lines


def format_matched(metrics: Metrics) -> list[str]:
    """Return a line for each matched figure that is defined."""
    lines = []
    for name, figure in metrics.matched.items():
        if figure.value is not None:
            lines.append(
                f"  radiographs alike in {name}: AUC {format_figure(figure)} ({figure.plain:.3f} among all), "
                f"{figure.pairs:,} of {figure.all_pairs:,} pairs"
            )
    return lines


def format_figure(figure: Figure) -> str:
    """Return a figure with its interval as text."""
    if figure.value is None:
        return "undefined"
    return f"{figure.value:.3f}" + (f" [{figure.low:.3f}, {figure.high:.3f}]" if figure.low is not None else "")


def format_difference(difference: Figure) -> str:
    """Return a difference with its sign and interval."""
    if difference.value is None:
        return "undefined"
    interval = "" if difference.low is None else f" [{difference.low:+.3f}, {difference.high:+.3f}]"
    return f"{difference.value:+.3f}{interval}"


def format_own_test_comparison(own: Evaluation, here: Evaluation) -> str:
    """Compare a model's AUC on its own test split with its AUC on another dataset, in one line."""
    before, now = (evaluation["radiograph"]["auc"] for evaluation in (own, here))
    if before is None or now is None:
        return "compare    AUC per radiograph is undefined: one class only"
    drop = before - now
    verdict = f"{drop:.3f} lower here" if drop > 0 else f"{abs(drop):.3f} higher here"
    low = here["radiograph"].figures["auc"].low
    chance = "; the AUC on these is not distinguishable from chance" if low is not None and low <= 0.5 else ""
    return f"compare    AUC per radiograph {before:.3f} on its own test, {now:.3f} on these: {verdict}{chance}"
