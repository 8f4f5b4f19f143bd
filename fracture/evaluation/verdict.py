"""Whether a model can be used on another collection, by rule, and how its images differ from those of training."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel

from fracture.config import EvaluationConfig
from fracture.dataset.format import Dataset
from fracture.dataset.properties import read_properties
from fracture.evaluation.metrics import Evaluation, Figure
from fracture.labels import CLASS_NAMES

FEW_GROUPS = 10  # of a class; with fewer, intervals by bootstrap over groups are too narrow, and of one have no width
_SENSITIVITY_MARGIN = 0.05  # below `evaluation.min_sensitivity`, which the lower limit must be above
_PERCENTILES = (5, 50, 95)
_SENTENCES = {
    "usable": "usable on these radiographs as it is",
    "adjust": "usable on these radiographs after adjusting: fracture adapt chooses calibration and operating point "
    "from 50 labelled local studies",
    "not usable": "not usable on these radiographs",
    "unknown": f"cannot be given: it takes {FEW_GROUPS} groups (patients, or radiographs that belong together) of each "
    "class",
}

Percentiles = tuple[float, float, float]  # the 5th, 50th and 95th


class Verdict(BaseModel):
    """Whether a model can be used on a collection, in a sentence, and why."""

    answer: Literal["usable", "adjust", "not usable", "unknown"]
    sentence: str
    reasons: list[str]  # one line each

    @property
    def is_good(self) -> bool:
        """Whether the model can be used as it is."""
        return self.answer == "usable"


def judge(test: Evaluation, groups: Mapping[str, int], config: EvaluationConfig, differences: Sequence[str]) -> Verdict:
    """Judge a model by its figures per radiograph on a collection.

    Args:
        test: on the collection, at the model's own threshold.
        groups: class name -> groups of the collection.
        config: of the model's training.
        differences: in which respects the collection is unlike training, see `describe_differences`.
    """
    figures = test["radiograph"].figures
    auc, sensitivity = figures["auc"], figures["recall"]
    least = round(config.min_sensitivity - _SENSITIVITY_MARGIN, 9)  # 0.95 - 0.05 is 0.8999999999999999
    ranks, finds = _is_above(auc, config.usable_auc), _is_above(sensitivity, least)
    reasons = [_explain("AUC", auc, ranks, config.usable_auc), _explain("sensitivity", sensitivity, finds, least)]
    outcomes = test["radiograph"].outcomes
    unlike, as_a_whole = (outcomes.unlike, outcomes.as_a_whole) if outcomes else (None, False)
    if unlike is not None:
        reasons.append(
            f"{unlike:.1%} of the radiographs are unlike the training images; of the same kind it is about 1%"
        )
    if is_small := min(groups.values()) < FEW_GROUPS:
        counted = " and ".join(f"{groups[name]:,} {name}" for name in reversed(CLASS_NAMES))
        reasons.append(f"there are groups of {counted}, fewer than {FEW_GROUPS} of a class: the intervals are rough")
    reasons += differences
    if is_small or auc.low is None or sensitivity.low is None:
        answer = "unknown"
    elif ranks:
        answer = "usable" if finds and not as_a_whole else "adjust"
    else:
        answer = "not usable"
    return Verdict(answer=answer, sentence=_SENTENCES[answer], reasons=reasons)


def _is_above(figure: Figure, least: float) -> bool:
    return figure.low is not None and figure.low > least


def _explain(name: str, figure: Figure, passed: bool, least: float) -> str:
    if figure.value is None or figure.low is None:
        return f"the {name} per radiograph has no interval"
    value = f"{figure.value:.3f} [{figure.low:.3f}, {figure.high:.3f}]"
    return f"the {name} per radiograph, {value}, is {'' if passed else 'not '}above {least:.2f} with its whole interval"


def format_verdict(verdict: Verdict) -> list[str]:
    """Return the lines that show a verdict on the screen."""
    return [f"verdict    {verdict.sentence}", *(f"           {reason}" for reason in verdict.reasons)]


def summarise_properties(dataset: Dataset, rows: pa.Table) -> dict[str, Percentiles]:
    """Return the percentiles of each property that is a number, over one image of each radiograph.

    Args:
        rows: the columns source and radiograph_id.

    Returns:
        Property -> percentiles; none where shards came without their table of files.
    """
    _, first = np.unique(rows["radiograph_id"].to_numpy(), return_index=True)
    properties = read_properties(dataset, rows["source"].take(pa.array(first)).to_pylist())
    known = {name: values[~np.isnan(values)] for name, values in properties.items() if values.dtype.kind == "f"}
    return {
        name: tuple(np.percentile(values, _PERCENTILES).tolist()) for name, values in known.items() if len(values) > 0
    }


def _show(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def describe_differences(here: Mapping[str, Percentiles], training: Mapping[str, Percentiles]) -> list[str]:
    """Return a line for each property whose median here lies outside of 5 to 95 % of training."""
    lines = []
    for name, (low, _, high) in training.items():
        median = here[name][1] if name in here else low
        if not low <= median <= high:
            side = "below" if median < low else "above"
            lines.append(
                f"{name}: the median is {_show(median)} here, {side} 5 to 95% of the training images, {_show(low)} to "
                f"{_show(high)}"
            )
    return lines
