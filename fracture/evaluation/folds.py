"""Several folds as one result: every group tested once, by a model that never saw it."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fracture.dataset.format import Manifest
from fracture.evaluation.metrics import Evaluation, as_json
from fracture.evaluation.operating_point import OperatingPoint
from fracture.evaluation.report import NAMES, evaluate, plot_scores, text
from fracture.evaluation.scores import write_predictions
from fracture.page import png, render
from fracture.storage import StoragePath


@dataclass(frozen=True)
class Pooled:
    """All folds together."""

    folds: dict[str, Evaluation]  # title -> figures of its test fold
    whole: Evaluation  # of all test folds, each at its own model's threshold
    scores: pa.Table  # as predictions.parquet, with the columns `fold` and `threshold`

    def spread(self, figure: str) -> tuple[float, float] | None:
        """Mean and standard deviation over the folds, per radiograph; None where a fold has no such figure."""
        values = [evaluation["radiograph"][figure] for evaluation in self.folds.values()]
        if any(value is None for value in values):
            return None
        return float(np.mean(values)), float(np.std(values, ddof=1))


def pool_folds(run: StoragePath, manifest: Manifest) -> Pooled:
    """Reads what each finished fold left in `run`."""
    tables, folds = [], {}
    for number, title in enumerate(manifest.folds, 1):
        fold = run / f"fold-{number}"
        scores = (fold / "predictions.parquet").read_parquet()
        scores = scores.filter(pc.equal(scores["split"], "test"))
        threshold = OperatingPoint.model_validate(
            (fold / "bundle" / "bundle.json").read_json()["operating_point"]
        ).threshold
        scores = scores.append_column("fold", pa.array([title] * len(scores), pa.string()))
        tables.append(scores.append_column("threshold", pa.array([threshold] * len(scores), pa.float64())))
        folds[title] = evaluate(tables[-1], tables[-1]["threshold"].to_numpy())
    pooled = pa.concat_tables(tables)
    return Pooled(folds, evaluate(pooled, pooled["threshold"].to_numpy()), pooled)


def write_folds(run: StoragePath, manifest: Manifest, pooled: Pooled, caveats: list[str]) -> None:
    """`predictions.parquet`, `folds.json` and `folds.html` of all folds together."""
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


def fold_lines(pooled: Pooled) -> list[str]:
    """The folds on a screen, one a line, then all of them."""
    lines = []
    for title, evaluation in pooled.folds.items():
        m = evaluation["radiograph"]
        lines.append(f"  {title:<20} {m.count:,} radiographs: AUC {text(m, 'auc')}")
    if spread := pooled.spread("auc"):
        lines.append(f"mean       AUC per radiograph {spread[0]:.3f}, standard deviation over folds {spread[1]:.3f}")
    for unit, m in reversed(pooled.whole.items()):
        lines.append(
            f"pooled     {m.count:,} {unit}s: AUC {text(m, 'auc')}, sensitivity {text(m, 'recall')}, "
            f"specificity {text(m, 'specificity')}"
        )
    return lines
