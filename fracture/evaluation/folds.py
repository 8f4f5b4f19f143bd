"""Results of cross-validation: the test folds of all models pooled, so that every group is tested once."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fracture.dataset.format import Manifest
from fracture.evaluation.metrics import Evaluation, as_json
from fracture.evaluation.operating_point import OperatingPoint
from fracture.evaluation.report import NAMES, evaluate, format_figure, format_matched, plot_scores
from fracture.evaluation.scores import write_predictions
from fracture.page import png, render
from fracture.storage import StoragePath


@dataclass(frozen=True)
class PooledFolds:
    """The scores and metrics of all folds together."""

    folds: dict[str, Evaluation]  # title of a fold -> metrics of its test images
    whole: Evaluation  # metrics over all test folds, each at the threshold of its own model
    scores: pa.Table  # columns of predictions.parquet, and `fold` and `threshold`

    def spread(self, figure: str) -> tuple[float, float] | None:
        """Return mean and standard deviation of a figure over folds, per radiograph; None if a fold lacks it."""
        values = [evaluation["radiograph"][figure] for evaluation in self.folds.values()]
        if any(value is None for value in values):
            return None
        return float(np.mean(values)), float(np.std(values, ddof=1))


def pool_folds(run: StoragePath, manifest: Manifest) -> PooledFolds:
    """Read the predictions and thresholds of all finished folds in `run`, and evaluate them together."""
    tables, folds = [], {}
    for number, title in enumerate(manifest.folds, 1):
        fold = run / f"fold-{number}"
        scores = (fold / "predictions.parquet").read_parquet()
        scores = scores.filter(pc.equal(scores["split"], "test"))
        bundle = (fold / "bundle" / "bundle.json").read_json()
        threshold = OperatingPoint.model_validate(bundle["operating_point"]).threshold
        rule = bundle["config"]["evaluation"].get("study_probability", "max")  # of an earlier version
        scores = scores.append_column("fold", pa.array([title] * len(scores), pa.string()))
        tables.append(scores.append_column("threshold", pa.array([threshold] * len(scores), pa.float64())))
        folds[title] = evaluate(tables[-1], tables[-1]["threshold"].to_numpy(), rule)
    pooled = pa.concat_tables(tables)
    return PooledFolds(folds, evaluate(pooled, pooled["threshold"].to_numpy(), rule), pooled)


def write_folds(run: StoragePath, manifest: Manifest, pooled: PooledFolds, caveats: list[str]) -> None:
    """Write `predictions.parquet`, `folds.json` and `folds.html` for all folds together."""
    write_predictions(run, pooled.scores)
    (run / "folds.json").write_json(
        {
            "folds": as_json(pooled.folds),
            **as_json({"pooled": pooled.whole}),
            "mean_and_deviation": {name: pooled.spread(name) for name in NAMES},
        }
    )
    labels, probabilities = (pooled.scores[name].to_numpy() for name in ("label", "probability"))
    plots = plot_scores(labels, probabilities, pooled.whole["image"], "\n".join(caveats))
    page = render(
        "folds.html",
        title=f"Run {run.name}: {len(pooled.folds)} folds",
        caveats=caveats,
        manifest=manifest,
        pooled=pooled,
        names=NAMES,
        plots={name: png(data) for name, data in plots.items()},
    )
    (run / "folds.html").write_bytes(page)


def format_folds(pooled: PooledFolds) -> list[str]:
    """Return the lines that show each fold, and then the pooled result, on the screen."""
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
