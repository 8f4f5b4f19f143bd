"""Plots of the reports, as PNG bytes."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise

import matplotlib

matplotlib.use("Agg")  # no screen on a cluster

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import ConfusionMatrixDisplay, precision_recall_curve, roc_curve

from fracture.evaluation.metrics import BINS, Metrics, assign_bins
from fracture.labels import CLASS_NAMES

_TRAIN, _VAL, _INK, _GRID = "#2f6f9f", "#d1603d", "#333333", "#dddddd"
_MODELS = (_VAL, _TRAIN, "#2e7d4f", "#8e5ea2", "#b8860b", "#17a2b8", "#c2185b", "#7f7f7f")
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.edgecolor": _INK,
    "axes.grid": True,
    "grid.color": _GRID,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def plot_curves(history: Sequence[dict[str, float]], best_epoch: int, caption: str) -> bytes:
    """Plot loss, accuracy, precision, recall and AUC over the epochs, of training and validation."""
    names = ("loss", "accuracy", "precision", "recall", "auc")
    titles = ("Loss (binary cross-entropy)", "Accuracy", "Precision", "Recall (sensitivity)", "AUC")
    epochs = [record["epoch"] for record in history]
    # The last epoch with a frozen backbone, if there was such a phase.
    frozen_until = [a["epoch"] for a, b in pairwise(history) if a["phase"] < b["phase"]]
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(2, 3, figsize=(12, 6.6), layout="constrained")
        for axis, name, title in zip(axes.flat, names, titles, strict=False):
            axis.plot(epochs, [r[name] for r in history], color=_TRAIN, marker=".", label="training, augmented")
            axis.plot(epochs, [r[f"val_{name}"] for r in history], color=_VAL, marker=".", label="validation")
            axis.axvline(best_epoch, color=_INK, linewidth=0.8, linestyle=":", label=f"best epoch, {best_epoch}")
            for last in frozen_until:
                axis.axvspan(0.5, last + 0.5, color=_GRID, alpha=0.4, linewidth=0, label="backbone frozen")
            axis.set_title(title, loc="left")
            axis.set_xlabel("epoch")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.set_ylim(0, None if name == "loss" else 1.02)
        spare = axes.flat[-1]
        spare.axis("off")
        spare.legend(*axes.flat[0].get_legend_handles_labels(), loc="upper left")
        spare.text(0.02, 0.45, _wrap(caption), transform=spare.transAxes, va="top", color=_INK, fontsize=9)
        return _to_png(figure)


def plot_confusion_matrix(metrics: Metrics, caption: str) -> bytes:
    """Plot the counts of each class, and their shares of the true class."""
    m = metrics
    counts = np.array([[m.true_negatives, m.false_positives], [m.false_negatives, m.true_positives]])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    with plt.rc_context(_STYLE | {"axes.grid": False}):
        figure, axis = plt.subplots(figsize=(5.4, 5.4), layout="constrained")
        display = ConfusionMatrixDisplay(shares, display_labels=CLASS_NAMES)
        display.plot(ax=axis, cmap="Blues", colorbar=False, im_kw={"vmin": 0, "vmax": 1}, text_kw={"fontsize": 12})
        for (row, column), cell in np.ndenumerate(display.text_):
            cell.set_text(f"{counts[row, column]}\n{shares[row, column]:.1%} of {CLASS_NAMES[row]}")
        plt.setp(axis.get_yticklabels(), rotation=90, va="center")
        axis.set(xlabel="predicted class", ylabel="true class")
        axis.set_title(f"Test, per image: {m.count:,} images, {_format_threshold(m)}", loc="left")
        figure.supxlabel(_wrap(caption, 66), fontsize=9, color=_INK)
        return _to_png(figure)


def plot_roc(labels: np.ndarray, probabilities: np.ndarray, metrics: Metrics, caption: str) -> bytes:
    """Plot the ROC curve of test and the point of the threshold.

    Args:
        labels: [N] of 0 and 1, both present.
        probabilities: [N] in [0, 1].
    """
    false_rate, true_rate, _ = roc_curve(labels, probabilities)
    with plt.rc_context(_STYLE):
        figure, axis = plt.subplots(figsize=(5.4, 5.4), layout="constrained")
        axis.plot([0, 1], [0, 1], color=_INK, linewidth=0.8, linestyle=":", label="chance")
        axis.plot(false_rate, true_rate, color=_VAL, linewidth=2, label=f"test, AUC {metrics['auc']:.3f}")
        if metrics["specificity"] is not None:
            _mark_threshold(axis, 1 - metrics["specificity"], metrics["recall"], metrics)
        axis.set_xlabel("false positive rate (1 - specificity)")
        axis.set_ylabel("true positive rate (sensitivity)")
        return _finish_unit_square(figure, axis, _title(metrics), caption, "lower right")


def plot_precision_recall(labels: np.ndarray, probabilities: np.ndarray, metrics: Metrics, caption: str) -> bytes:
    """Plot the precision-recall curve of test and the point of the threshold; arguments as of `plot_roc`."""
    precision, recall, _ = precision_recall_curve(labels, probabilities)
    with plt.rc_context(_STYLE):
        figure, axis = plt.subplots(figsize=(5.4, 5.4), layout="constrained")
        axis.axhline(labels.mean(), color=_INK, linewidth=0.8, linestyle=":", label="chance")
        label = f"test, average precision {metrics['average_precision']:.3f}"
        axis.plot(recall, precision, color=_VAL, linewidth=2, drawstyle="steps-post", label=label)
        _mark_threshold(axis, metrics["recall"], metrics["precision"], metrics)
        axis.set_xlabel("recall (sensitivity)")
        axis.set_ylabel("precision (positive predictive value)")
        return _finish_unit_square(figure, axis, _title(metrics), caption, "lower left")


def plot_reliability(labels: np.ndarray, probabilities: np.ndarray, metrics: Metrics, caption: str) -> bytes:
    """Plot the share of fractures over the predicted probability; arguments as of `plot_roc`."""
    bins = assign_bins(probabilities)
    count = np.bincount(bins, minlength=BINS)
    filled = count > 0
    predicted, true = (np.bincount(bins, values, BINS)[filled] / count[filled] for values in (probabilities, labels))
    with plt.rc_context(_STYLE):
        figure, axis = plt.subplots(figsize=(5.4, 5.4), layout="constrained")
        axis.plot([0, 1], [0, 1], color=_INK, linewidth=0.8, linestyle=":", label="perfectly calibrated")
        label = f"test, calibration error {metrics['calibration_error']:.3f}"
        axis.plot(predicted, true, color=_VAL, linewidth=1, label=label)
        axis.scatter(predicted, true, s=20 + 400 * count[filled] / count.sum(), color=_VAL, clip_on=False, zorder=3)
        axis.set_xlabel("predicted probability (area of a dot: number of images)")
        axis.set_ylabel("share of fractures")
        return _finish_unit_square(figure, axis, _title(metrics), caption, "upper left")


def plot_histograms(labels: np.ndarray, probabilities: np.ndarray, metrics: Metrics, caption: str) -> bytes:
    """Plot the distribution of the probabilities of each class, and the threshold; arguments as of `plot_roc`."""
    with plt.rc_context(_STYLE):
        figure, axis = plt.subplots(figsize=(5.4, 5.4), layout="constrained")
        for label, color in ((0, _TRAIN), (1, _VAL)):
            own = probabilities[labels == label]
            axis.hist(own, np.linspace(0, 1, 21), color=color, alpha=0.6, label=f"{CLASS_NAMES[label]}, {len(own)}")
        if metrics.threshold is not None:
            axis.axvline(metrics.threshold, color=_INK, linewidth=1, label=_format_threshold(metrics))
        axis.set_xlabel("probability of a fracture")
        axis.set_ylabel("images")
        axis.legend(loc="best")
        axis.set_title(_title(metrics), loc="left")
        figure.supxlabel(_wrap(caption, 66), fontsize=9, color=_INK)
        return _to_png(figure)


def plot_rocs(labels: np.ndarray, models: Mapping[str, np.ndarray], caption: str) -> bytes:
    """Plot the ROC curves of several models on the same radiographs.

    Args:
        labels: [N] of 0 and 1, both present.
        models: name -> [N] probabilities in [0, 1].
    """
    with plt.rc_context(_STYLE):
        figure, axis = plt.subplots(figsize=(5.4, 5.4), layout="constrained")
        axis.plot([0, 1], [0, 1], color=_INK, linewidth=0.8, linestyle=":", label="chance")
        for number, (name, probabilities) in enumerate(models.items()):
            false_rate, true_rate, _ = roc_curve(labels, probabilities)
            second_round, color = divmod(number, len(_MODELS))
            style = "--" if second_round else "-"
            axis.plot(false_rate, true_rate, color=_MODELS[color], linestyle=style, linewidth=2, label=name)
        axis.set_xlabel("false positive rate (1 - specificity)")
        axis.set_ylabel("true positive rate (sensitivity)")
        return _finish_unit_square(figure, axis, f"Test, per radiograph: {len(labels):,}", caption, "lower right")


def plot_drifts(measures: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> bytes:
    """Plot the distribution of each measure before and now, as shares.

    Args:
        measures: name -> (values of the previous radiographs [N], values of the new ones [M]).
    """
    columns = 3
    rows = -(-len(measures) // columns)
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=(12, 2.9 * rows), layout="constrained", squeeze=False)
        for axis, (name, (before, now)) in zip(axes.flat, measures.items(), strict=False):
            # Quantiles, since a single outlier would stretch the axis.
            low, high = np.quantile(np.concatenate([before, now]), [0.005, 0.995])
            bins = np.linspace(low, high if high > low else low + 1, 25)
            for values, color, label in ((before, _TRAIN, "before"), (now, _VAL, "new")):
                shares = np.full(len(values), 1 / len(values))
                clipped = np.clip(values, bins[0], bins[-1])
                axis.hist(clipped, bins, weights=shares, color=color, alpha=0.6, label=f"{label}, {len(values):,}")
            axis.set_title(name, loc="left")
            axis.set_ylabel("share of radiographs")
            axis.legend(loc="best")
        for axis in axes.flat[len(measures) :]:
            axis.axis("off")
        return _to_png(figure)


def _mark_threshold(axis: Axes, x: float | None, y: float | None, metrics: Metrics) -> None:
    if x is not None and y is not None:
        axis.plot(x, y, "o", color=_INK, label=_format_threshold(metrics), clip_on=False, zorder=3)


def _finish_unit_square(figure: Figure, axis: Axes, title: str, caption: str, legend: str) -> bytes:
    """Set limits, legend, title and caption of a plot whose axes both run from 0 to 1."""
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1.01)
    axis.set_aspect("equal")
    axis.legend(loc=legend)
    axis.set_title(title, loc="left")
    figure.supxlabel(_wrap(caption, 66), fontsize=9, color=_INK)
    return _to_png(figure)


def _format_threshold(metrics: Metrics) -> str:
    return "each fold's own threshold" if metrics.threshold is None else f"threshold {metrics.threshold:.3g}"


def _title(metrics: Metrics) -> str:
    return f"Test, per image: {metrics.count:,} images of {metrics.groups:,} groups"


def _wrap(text: str, width: int = 58) -> str:
    return "\n".join(line for part in text.split("\n") for line in textwrap.wrap(part, width))


def _to_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()
