"""From scores to a report: exact figures, pictures, one page, and the lines a person reads last."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fracture.dataset.format import Dataset, Manifest, images_of
from fracture.evaluation.gallery import Gallery, surest
from fracture.evaluation.metrics import Evaluation, Figure, Metrics, by_radiograph, compute_metrics
from fracture.evaluation.operating_point import OperatingPoint
from fracture.evaluation.plots import (
    plot_confusion_matrix,
    plot_curves,
    plot_histograms,
    plot_precision_recall,
    plot_reliability,
    plot_roc,
)
from fracture.labels import CLASS_NAMES, SPLITS
from fracture.page import picture, png, render
from fracture.storage import StoragePath

NAMES = {  # figure -> what a reader calls it, in the order of the page
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
ORIGIN = "test_from:"
_WORST = 6  # mistakes of each kind that are shown


def evaluate(scores: pa.Table, threshold: float | np.ndarray) -> Evaluation:
    """Figures per image and per radiograph, at one threshold or at one for each row."""
    labels, probabilities, radiograph_ids, groups = (
        scores[name].to_numpy() for name in ("label", "probability", "radiograph_id", "group_id")
    )
    first, (means, thresholds) = by_radiograph(
        labels, radiograph_ids, probabilities, np.broadcast_to(threshold, labels.shape)
    )
    if np.ndim(threshold) == 0:
        thresholds = threshold
    return {
        "image": compute_metrics(labels, probabilities, groups, threshold),
        "radiograph": compute_metrics(labels[first], means, groups[first], thresholds, "radiograph"),
    }


def evaluate_run(scores: pa.Table, dataset: Dataset, threshold: float) -> dict[str, Evaluation]:
    """Validation and test; of several origins, test of each; where test leaks, also that part of it which does not.

    Returns:
        "val", "test", perhaps "test_from:ORIGIN" and "test_without_leaks" -> figures.
    """
    parts = {split: scores.filter(pc.equal(scores["split"], split)) for split in SPLITS[1:]}
    found = {split: evaluate(rows, threshold) for split, rows in parts.items() if len(rows)}
    origins = pc.unique(parts["test"]["origin"]).to_pylist()
    if len(origins) > 1:
        for origin in sorted(origins):
            rows = parts["test"].filter(pc.equal(parts["test"]["origin"], origin))
            found[f"{ORIGIN}{origin or 'unknown'}"] = evaluate(rows, threshold)
    leak = dataset.manifest.leakage.get("test")
    if leak is not None and leak.leaking:
        seen = dataset.read_seen("group_id").combine_chunks()
        apart = parts["test"].filter(pc.invert(pc.is_in(parts["test"]["group_id"], seen)))
        if len(apart):
            found["test_without_leaks"] = evaluate(apart, threshold)
    return found


@dataclass(frozen=True)
class Report:
    """All that a run's report tells."""

    title: str
    dataset: Dataset
    operating_point: OperatingPoint
    evaluations: Mapping[str, Evaluation]
    history: Sequence[dict[str, float]]  # empty where nothing was trained
    best_epoch: int
    facts: Mapping[str, Any]  # versions, workers, seeds: name -> value
    caveats: Sequence[str]  # what has to stand beside every figure
    own_test: Evaluation | None = None  # of the model on the data set it comes from, where this is another
    models: int = 1  # whose probabilities were averaged
    gallery: Gallery | None = None  # of test


def write_report(folder: StoragePath, report: Report, scores: pa.Table) -> None:
    """Writes the plots as PNG files and `report.html`, which holds them all.

    Args:
        scores: calibrated, of validation and test.
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
        classes=list(reversed(CLASS_NAMES)),
        origins={n.removeprefix(ORIGIN): e for n, e in report.evaluations.items() if n.startswith(ORIGIN)},
        comparison=comparison_line(report.own_test, report.evaluations["test"]) if report.own_test else "",
        plots={name: png(data) for name, data in plots.items()},
        mistakes=_mistakes(test, report),
    )
    (folder / "report.html").write_bytes(page)


def plot_scores(labels: np.ndarray, probabilities: np.ndarray, metrics: Metrics, caption: str) -> dict[str, bytes]:
    """The plots of a test, as PNG files; curves only where both classes are there."""
    plots = {"confusion_matrix": plot_confusion_matrix(metrics, caption)}
    if metrics["auc"] is not None:
        plots["roc"] = plot_roc(labels, probabilities, metrics, caption)
        plots["precision_recall"] = plot_precision_recall(labels, probabilities, metrics, caption)
    plots["reliability"] = plot_reliability(labels, probabilities, metrics, caption)
    plots["histograms"] = plot_histograms(labels, probabilities, metrics, caption)
    return plots


def _mistakes(test: pa.Table, report: Report) -> list[dict[str, Any]]:
    """The worst of each kind, one a radiograph, with their pictures."""
    worst = surest(test, report.operating_point.threshold, _WORST)
    shown = []
    for row in (*worst["false negatives"], *worst["false positives"]):
        block = report.dataset.read("test", row["row"], row["row"] + 1)
        pixels = images_of(block, report.dataset.image_size)
        what = f"{CLASS_NAMES[row['label']]}, probability of a fracture {row['probability']:.2f}"
        shown.append({"picture": picture(pixels[0, ..., 0]), "what": what, "path": row["source"]})
    return shown


def caveats(manifest: Manifest) -> list[str]:
    """What has to stand beside every figure made from this data."""
    lines = []
    if manifest.synthetic:
        lines.append("SYNTHETIC: drawn sample radiographs. Says that the job works, nothing about patients.")
    told = [
        f"{leak.leaking} of {leak.images} {split} images ({leak.by_kind['bytes']} byte for byte) show a radiograph or "
        f"patient that {leak.where} has too"
        for split, leak in sorted(manifest.leakage.items())
        if leak.leaking
    ]
    if told:
        test = manifest.leakage.get("test")
        advice = " No test image is left that does not: --split group makes one that can tell more."
        whole = test is not None and test.leaking == test.images
        lines.append(f"MEMORY: {'; '.join(told)}.{advice if whole else ''}")
    if manifest.shortcuts:
        told = [f"{name} (AUC {auc:.2f})" for name, auc in manifest.shortcuts.items()]
        lines.append(
            f"SHORTCUTS: in this data, {', '.join(told)} alone {'tells' if len(told) == 1 else 'tell'} the classes "
            f"apart; a model may use {'it' if len(told) == 1 else 'them'} too."
        )
    return lines


def result_lines(evaluations: Mapping[str, Evaluation]) -> list[str]:
    """The test result on a screen."""
    lines = []
    for unit, m in reversed(evaluations["test"].items()):
        figures = ", ".join(
            f"{word} {text(m, name)}"
            for word, name in (("AUC", "auc"), ("sensitivity", "recall"), ("specificity", "specificity"))
        )
        lines.append(f"{'test' if unit == 'radiograph' else '':<10} {m.count:,} {unit}s: {figures}")
    m = evaluations["test"]["image"]
    lines.append(
        f"           at threshold {m.threshold:.3f}, accuracy {text(m, 'accuracy')}: {m.true_positives} fractures "
        f"found, {m.false_negatives} missed · {m.true_negatives} normals cleared, {m.false_positives} called fractures"
    )
    for name, evaluation in evaluations.items():
        if name.startswith(ORIGIN):
            m = evaluation["radiograph"]
            lines.append(f"  {name.removeprefix(ORIGIN):<8} {m.count:,} radiographs: AUC {text(m, 'auc')}")
    if apart := evaluations.get("test_without_leaks"):
        m = apart["image"]
        lines.append(
            f"           on the {m.count} images that do not leak from training: AUC {text(m, 'auc')}, "
            f"accuracy {text(m, 'accuracy')}"
        )
    return lines


def text(metrics: Metrics, name: str) -> str:
    """A figure with its interval, for the screen."""
    return figure_text(metrics.figures[name])


def figure_text(figure: Figure) -> str:
    if figure.value is None:
        return "undefined"
    return f"{figure.value:.3f}" + (f" [{figure.low:.3f}, {figure.high:.3f}]" if figure.low is not None else "")


def comparison_line(own: Evaluation, here: Evaluation) -> str:
    """How far the score falls, or does not, from a model's own test to data from elsewhere."""
    before, now = (evaluation["radiograph"]["auc"] for evaluation in (own, here))
    if before is None or now is None:
        return "compare    AUC per radiograph is undefined: one class only"
    fall = before - now
    verdict = f"{fall:.3f} lower here" if fall > 0 else f"{abs(fall):.3f} higher here"
    low = here["radiograph"].figures["auc"].low
    chance = "; the AUC on these cannot be told from guessing" if low is not None and low <= 0.5 else ""
    return f"compare    AUC per radiograph {before:.3f} on its own test, {now:.3f} on these: {verdict}{chance}"
