"""From a finished training to its report: exact figures, pictures, and the lines a person reads last."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fracture.evaluation.metrics import Metrics, compute_metrics
from fracture.evaluation.plots import plot_confusion_matrix, plot_curves, plot_roc
from fracture.input.shards import Manifest
from fracture.storage import Place


def metrics_of(scores: pa.Table, split: str, threshold: float) -> Metrics:
    labels, probabilities = _arrays(scores, split)
    return compute_metrics(labels, probabilities, threshold)


def write_report(
    folder: Place,
    manifest: Manifest,
    history: Sequence[dict[str, float]],
    best_epoch: int,
    scores: pa.Table,
    test: Metrics,
) -> None:
    """Writes `curves.png`, `confusion_matrix.png` and `roc.png`."""
    caption = "\n".join(caveats(manifest))
    labels, probabilities = _arrays(scores, "test")
    (folder / "curves.png").write_bytes(plot_curves(history, best_epoch, caption))
    (folder / "confusion_matrix.png").write_bytes(plot_confusion_matrix(test, caption))
    (folder / "roc.png").write_bytes(plot_roc(labels, probabilities, test, caption))


def caveats(manifest: Manifest) -> list[str]:
    """What has to stand beside every figure made from this data."""
    lines = []
    if manifest.synthetic:
        lines.append("SYNTHETIC: drawn sample radiographs. Says that the job works, nothing about patients.")
    if copied := manifest.copies.test_in_train:
        lines.append(
            f"MEMORY: {copied} of {manifest.rows('test')} test images are byte-for-byte copies of training images."
        )
    return lines


def result_lines(test: Metrics) -> list[str]:
    m = test
    return [
        f"test       {m.images} images: accuracy {m.accuracy:.3f}, AUC {_figure(m.auc)}, recall {_figure(m.recall)}, "
        f"precision {_figure(m.precision)}, specificity {_figure(m.specificity)} (threshold {m.threshold:g})",
        f"           {m.true_positives} fractures found, {m.false_negatives} missed · "
        f"{m.true_negatives} normals cleared, {m.false_positives} called fractures",
    ]


def _figure(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def _arrays(scores: pa.Table, split: str) -> tuple[np.ndarray, np.ndarray]:
    rows = scores.filter(pc.equal(scores["split"], split))
    return rows["label"].to_numpy(), rows["probability"].to_numpy()
