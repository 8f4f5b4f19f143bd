"""Results of cross-validation: the test folds of all models pooled, so that every group is tested once."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fracture.dataset.format import Manifest
from fracture.evaluation.falls import FIGURES, Fall, compute_falls
from fracture.evaluation.metrics import Evaluation, as_json
from fracture.evaluation.operating_point import OperatingPoint
from fracture.evaluation.report import (
    NAMES,
    evaluate,
    format_difference,
    format_figure,
    format_matched,
    plot_scores,
)
from fracture.evaluation.scores import write_predictions
from fracture.page import png, render
from fracture.storage import StoragePath


@dataclass(frozen=True)
class PooledFolds:
    """The scores and metrics of all folds together."""

    folds: dict[str, Evaluation]  # title of a fold -> metrics of its test images
    whole: Evaluation  # metrics over all test folds, each at the threshold of its own model
    scores: pa.Table  # columns of predictions.parquet, and `fold` and `threshold`
    falls: dict[str, Fall]  # where the folds are sources: each one's fall from inside to outside; else empty
    mean_fall: Fall | None  # the mean over these

    def spread(self, figure: str) -> tuple[float, float] | None:
        """Return mean and standard deviation of a figure over folds, per radiograph; None if a fold lacks it."""
        values = [evaluation["radiograph"][figure] for evaluation in self.folds.values()]
        if any(value is None for value in values):
            return None
        return float(np.mean(values)), float(np.std(values, ddof=1))


def pool_folds(run: StoragePath, manifest: Manifest) -> PooledFolds:
    """Read the predictions and thresholds of all finished folds in `run`, and evaluate them together."""
    tables, folds, by_source = [], {}, {}
    for number, title in enumerate(manifest.folds, 1):
        fold = run / f"fold-{number}"
        written = (fold / "predictions.parquet").read_parquet()
        scores = written.filter(pc.equal(written["split"], "test"))
        bundle = (fold / "bundle" / "bundle.json").read_json()
        threshold = OperatingPoint.model_validate(bundle["operating_point"]).threshold
        rule = bundle["config"]["evaluation"].get("study_probability", "max")  # of an earlier version
        scores = scores.append_column("fold", pa.array([title] * len(scores), pa.string()))
        tables.append(scores.append_column("threshold", pa.array([threshold] * len(scores), pa.float64())))
        folds[title] = evaluate(scores, threshold, rule)
        by_source[title] = written.filter(pc.equal(written["split"], "val")), scores, threshold
    # A fold that an earlier version finished has no column `distance`.
    pooled = pa.concat_tables(tables, promote_options="default")
    falls, mean_fall = compute_falls(by_source) if manifest.folds_are_sources else ({}, None)
    return PooledFolds(folds, evaluate(pooled, pooled["threshold"].to_numpy(), rule), pooled, falls, mean_fall)


def write_folds(run: StoragePath, manifest: Manifest, pooled: PooledFolds, caveats: list[str]) -> None:
    """Write `predictions.parquet`, `folds.json` and `folds.html` for all folds together."""
    write_predictions(run, pooled.scores)
    (run / "folds.json").write_json(
        {
            "folds": as_json(pooled.folds),
            **as_json({"pooled": pooled.whole}),
            "mean_and_deviation": {name: pooled.spread(name) for name in NAMES},
            **falls_as_json(pooled),
        }
    )
    page = render(
        "folds.html",
        title=f"Run {run.name}: {len(pooled.folds)} {'sources' if pooled.falls else 'folds'}",
        caveats=caveats,
        manifest=manifest,
        pooled=pooled,
        names=NAMES,
        fall_names=FIGURES,
        plots=_plot_folds(pooled, "\n".join(caveats)),
    )
    (run / "folds.html").write_bytes(page)


def falls_as_json(pooled: PooledFolds) -> dict[str, Any]:
    """Return the falls from inside to outside, where the folds are sources, as values that JSON can hold."""
    if pooled.mean_fall is None:
        return {}
    falls = {title: fall.as_json() for title, fall in pooled.falls.items()}
    return {"sources": falls, "mean_over_sources": pooled.mean_fall.as_json()}


def _plot_folds(pooled: PooledFolds, caption: str) -> dict[str, dict[str, str]]:
    """Plot each source by itself; of other folds, all of them together: heading -> name -> picture."""
    parts = {"": (pooled.scores, pooled.whole)}
    if pooled.falls:  # curves over several sources would also compare these with each other
        parts = {
            title: (pooled.scores.filter(pc.equal(pooled.scores["fold"], title)), evaluation)
            for title, evaluation in pooled.folds.items()
        }
    plots = {}
    for title, (scores, evaluation) in parts.items():
        labels, probabilities = (scores[name].to_numpy() for name in ("label", "probability"))
        plotted = plot_scores(labels, probabilities, evaluation["image"], caption)
        plots[title] = {name: png(data) for name, data in plotted.items()}
    return plots


def format_folds(pooled: PooledFolds) -> list[str]:
    """Return the lines that show each fold, and then the pooled result, on the screen."""
    if pooled.mean_fall is not None:
        return [*_format_falls(pooled, pooled.mean_fall), *format_matched(pooled.whole["radiograph"])]
    lines = []
    for title, evaluation in pooled.folds.items():
        m = evaluation["radiograph"]
        lines.append(f"  {title:<20} {m.count:,} radiographs: AUC {format_figure(m.figures['auc'])}")
    if spread := pooled.spread("auc"):
        lines.append(f"mean       AUC per radiograph {spread[0]:.3f}, standard deviation over folds {spread[1]:.3f}")
    for m in reversed(pooled.whole.values()):
        lines.append(
            f"pooled     {m.counted}: AUC {format_figure(m.figures['auc'])}, "
            f"sensitivity {format_figure(m.figures['recall'])}, specificity {format_figure(m.figures['specificity'])}"
        )
    return lines + format_matched(pooled.whole["radiograph"])


def _format_falls(pooled: PooledFolds, mean_fall: Fall) -> list[str]:
    parts = [
        (f"held out   {title}: {evaluation['radiograph'].counted}", pooled.falls[title])
        for title, evaluation in pooled.folds.items()
    ]
    lines = []
    for heading, fall in [*parts, (f"mean       over {len(parts)} sources", mean_fall)]:
        lines += [heading, f"  {'per radiograph':<20}{'outside':<24}{'inside':<24}fall"]
        for name, word in FIGURES.items():
            outside, inside = (format_figure(part[name]) for part in (fall.outside, fall.inside))
            lines.append(f"  {word:<20}{outside:<24}{inside:<24}{format_difference(fall.fall[name])}")
    return lines
