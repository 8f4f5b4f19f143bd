"""Adjusting a finished model's last layer and operating point to few local cases, judged by folds of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from scipy.special import expit

from fracture.config import EvaluationConfig
from fracture.errors import UsageError
from fracture.evaluation.metrics import Evaluation, Metrics
from fracture.evaluation.operating_point import OperatingPoint, choose_operating_point, radiograph_weights
from fracture.evaluation.report import evaluate, format_figure
from fracture.evaluation.ridge import assign_folds, fit_ridge
from fracture.evaluation.scores import calibrate_scores

FEWEST = 50  # studies, or radiographs where studies are not known
FEWEST_FOR_RIDGE = 200
_FEWEST_GROUPS = 10  # of each class: two in each fold
_CHOSEN_ON = "the local cases"
_BY_FOLDS = ("calibrated", "ridge")
_EPSILON = 1e-3  # added to variances, as batch normalisation does


@dataclass(frozen=True)
class LastLayer:
    """The layer `logit`, which maps its inputs [N, F] to logits."""

    kernel: np.ndarray  # [F]
    bias: float

    def score(self, inputs: np.ndarray) -> np.ndarray:
        """Return the probabilities of inputs [N, F]: [N] float32."""
        return expit(inputs.astype(np.float64) @ self.kernel + self.bias).astype(np.float32)


@dataclass(frozen=True)
class Head:
    """A last layer, and the operating point for its probabilities."""

    layer: LastLayer
    operating_point: OperatingPoint


@dataclass(frozen=True)
class LocalCases:
    """Local images with labels, and what the network makes of them."""

    rows: pa.Table  # as of `score_range`; the probabilities are those of `layer`
    inputs: np.ndarray  # [N, F] float32, of the layer `logit`
    layer: LastLayer  # the model's own
    config: EvaluationConfig  # of the model's training: how the threshold is chosen, and studies are joined

    def select(self, chosen: np.ndarray) -> "LocalCases":
        """Return the cases where `chosen`, [N] bool, is true."""
        return LocalCases(self.rows.filter(pa.array(chosen)), self.inputs[chosen], self.layer, self.config)

    def evaluate(self, threshold: float) -> Evaluation:
        """Compute the metrics of the model as it is."""
        return evaluate(self.rows, threshold, self.config.study_probability)


@dataclass(frozen=True)
class Judged:
    """A head that was fitted on all local cases, and the figures of heads fitted likewise without each fold."""

    head: Head
    evaluation: Evaluation  # of all cases, each by the head that was fitted without its fold, at that head's threshold
    scores: pa.Table  # columns of predictions.parquet, and `fold` and `threshold`


def largest_unit(evaluation: Evaluation) -> Metrics:
    """Return the metrics per study, or per radiograph where studies are not known."""
    return evaluation.get("study", evaluation["radiograph"])


def check_cases(cases: LocalCases, unadapted: Evaluation, left_out: int) -> None:
    """Raise UsageError where the cases are too few to adapt to.

    Args:
        left_out: number of images that the model was trained on, for the message.
    """
    metrics = largest_unit(unadapted)
    seen = f" (and {left_out:,} images that the model was trained on, which do not count)" if left_out else ""
    if metrics.count < FEWEST:
        raise UsageError(
            f"{metrics.counted}{seen} are too few to adapt to: a threshold chosen on fewer than {FEWEST} would be "
            "chance. Name more labelled local cases."
        )
    labels, groups = cases.rows["label"].to_numpy(), cases.rows["group_id"].to_numpy()
    normals, fractures = (len(np.unique(groups[labels == label])) for label in (0, 1))
    if min(normals, fractures) < _FEWEST_GROUPS:
        raise UsageError(
            f"the local cases{seen} have {fractures:,} separate fractured and {normals:,} separate normal radiographs "
            f"or patients: adapting needs {_FEWEST_GROUPS} of each, to choose on and to check. Name more of the rarer "
            "class."
        )


def calibrate_head(cases: LocalCases) -> Head:
    """Keep the model's last layer; choose calibration and threshold."""
    return Head(cases.layer, choose_operating_point(cases.rows, cases.config, _CHOSEN_ON))


def fit_head(cases: LocalCases) -> Head:
    """Replace the last layer by a ridge head on its inputs, standardised by these cases' own mean and variance.

    Calibration and threshold are chosen on what heads say of cases that they were not fitted on.
    """
    rows = cases.rows
    labels, radiograph_ids, groups = (rows[name].to_numpy() for name in ("label", "radiograph_id", "group_id"))
    mean, deviation = cases.inputs.mean(0, np.float64), np.sqrt(cases.inputs.var(0, np.float64) + _EPSILON)
    fit = fit_ridge((cases.inputs - mean) / deviation, labels, radiograph_weights(radiograph_ids), groups)
    kernel = fit.kernel / deviation
    scored = _with_probabilities(rows, expit(fit.logits).astype(np.float32))
    return Head(
        LastLayer(kernel, fit.bias - float(mean @ kernel)),
        choose_operating_point(scored, cases.config, _CHOSEN_ON),
    )


def judge_by_folds(cases: LocalCases, fit: Callable[[LocalCases], Head]) -> Judged:
    """Fit a head on all cases, and on all but each grouped fold in turn, to evaluate it on that fold."""
    folds = assign_folds(cases.rows["label"].to_numpy(), cases.rows["group_id"].to_numpy())
    tables = []
    for fold in np.unique(folds):
        head, own = fit(cases.select(folds != fold)), cases.select(folds == fold)
        scored = _with_probabilities(own.rows, head.layer.score(own.inputs))
        count, threshold = len(scored), head.operating_point.threshold
        tables.append(
            calibrate_scores(scored, head.operating_point)
            .append_column("fold", pa.array([str(fold + 1)] * count))
            .append_column("threshold", pa.array([threshold] * count, pa.float64()))
        )
    scores = pa.concat_tables(tables).combine_chunks()
    evaluation = evaluate(scores, scores["threshold"].to_numpy(), cases.config.study_probability)
    return Judged(fit(cases), evaluation, scores)


@dataclass(frozen=True)
class Choice:
    """What a model's last layer and operating point become."""

    judged: Judged
    ridge: bool  # whether the last layer is a new one
    figures: dict[str, Evaluation]  # "calibrated", and "ridge" where it was tried -> metrics by folds


def choose_head(cases: LocalCases, own: Evaluation) -> Choice:
    """Calibrate the model's own last layer, or take a ridge head where there are enough cases and it is better.

    It is better if its AUC by folds is higher than that of the model's own, which calibration does not change.

    Args:
        own: metrics of the model's own last layer on the cases.
    """
    calibrated = judge_by_folds(cases, calibrate_head)
    figures = {"calibrated": calibrated.evaluation}
    if largest_unit(own).count < FEWEST_FOR_RIDGE:
        return Choice(calibrated, ridge=False, figures=figures)
    ridge = judge_by_folds(cases, fit_head)
    figures["ridge"] = ridge.evaluation
    ridge_auc, own_auc = largest_unit(ridge.evaluation)["auc"], largest_unit(own)["auc"]
    better = ridge_auc > own_auc
    return Choice(ridge if better else calibrated, ridge=better, figures=figures)


def format_figures(figures: Mapping[str, Evaluation]) -> list[str]:
    """Return the lines that show the figures on the screen, per study or per radiograph."""
    names = {
        "AUC": "auc",
        "sensitivity": "recall",
        "specificity": "specificity",
        "calibration error": "calibration_error",
    }
    lines = []
    for name, evaluation in figures.items():
        metrics = largest_unit(evaluation)
        shown = ", ".join(f"{word} {format_figure(metrics.figures[figure])}" for word, figure in names.items())
        lines.append(f"{name:<10} {metrics.counted}{', by folds' if name in _BY_FOLDS else ''}: {shown}")
    return lines


def _with_probabilities(rows: pa.Table, probabilities: np.ndarray) -> pa.Table:
    index = rows.schema.get_field_index("probability")
    return rows.set_column(index, rows.schema.field(index), pa.array(probabilities, pa.float32()))
