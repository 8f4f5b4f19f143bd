"""Several models trained on the same folds, side by side: what they find, how sure that is, and what they cost."""

import json
import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fracture.evaluation.folds import Pooled
from fracture.evaluation.metrics import Figure, as_json, auc_differences, by_radiograph, rate_differences
from fracture.evaluation.plots import plot_rocs
from fracture.evaluation.report import text
from fracture.evaluation.scores import AT_ONCE, score
from fracture.input.shards import Manifest
from fracture.page import png, render
from fracture.storage import Place

NAMES = {"auc": "AUC", "recall": "sensitivity", "specificity": "specificity"}
_RESAMPLES = 4000  # the tails are thin where many are compared
_ROUNDS = 5


@dataclass(frozen=True)
class Costs:
    """What a contender takes."""

    parameters: int
    trained_parameters: int  # the most in an epoch
    weights_bytes: int  # of weights.npz of one fold
    epochs: int  # of all folds together, as are
    training_seconds: float  # with validation, without the workers' start
    memory_gb: float  # the most that the first worker of a training held
    images_per_second: float  # of prediction


@dataclass(frozen=True)
class Contender:
    """One model of the comparison."""

    title: str
    folder: str  # of its folds, within the comparison's
    settings: Mapping[str, Any]  # that differ from the others'
    pooled: Pooled
    costs: Costs
    differences: Mapping[str, Figure]  # of its figures per radiograph to the baseline's; empty of the baseline

    def verdict(self, baseline: str) -> str:
        """What the difference in AUC comes to."""
        difference = self.differences["auc"]
        if difference.value is None:
            return f"not to be compared with {baseline}: test has one class only"
        if difference.low <= 0 <= difference.high:
            return f"not to be told apart from {baseline}"
        return f"surely {'better' if difference.value > 0 else 'worse'} than {baseline}"


def differences(pooled: Pooled, baseline: Pooled, others: int) -> dict[str, Figure]:
    """Of AUC, sensitivity and specificity per radiograph, this model's minus the baseline's.

    The intervals are paired: both models meet the same groups in each resample.

    Args:
        others: contenders that are compared with the baseline. The intervals of one figure hold for all of them
            together with 95 % (Bonferroni; Dunn 1961, doi:10.1080/01621459.1961.10482090).
    """
    assert pooled.scores.select(["fold", "row"]).equals(baseline.scores.select(["fold", "row"]))
    labels, groups, ours, ours_called = _radiographs(pooled)
    _, _, theirs, theirs_called = _radiographs(baseline)
    drawn = rate_differences(labels, ours_called, theirs_called, groups, _RESAMPLES)
    drawn |= {"auc": auc_differences(labels, ours, theirs, groups, _RESAMPLES)}
    found = {}
    for name in NAMES:
        values = [part.whole["radiograph"][name] for part in (pooled, baseline)]
        if None in values:
            found[name] = Figure(value=None)
            continue
        low, high = np.percentile(drawn[name], [2.5 / others, 100 - 2.5 / others]).tolist()
        found[name] = Figure(value=values[0] - values[1], low=low, high=high)
    return found


def _radiographs(pooled: Pooled) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Label, group, probability, and whether a fracture is called, of each radiograph."""
    names = ("label", "group", "film", "probability", "threshold")
    labels, groups, films, *values = (pooled.scores[name].to_numpy() for name in names)
    first, (probabilities, thresholds) = by_radiograph(labels, films, *values)
    return labels[first], groups[first], probabilities, probabilities >= thresholds


def prediction_speeds(models: Mapping[str, Any], images: np.ndarray) -> dict[str, float]:
    """Images a second of each model, the median of rounds in which all have their turn.

    Args:
        models: Keras models of images [N, H, W, 1] uint8 to probabilities [N, 1].
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        score(model, images)  # compiles
    for _ in range(_ROUNDS):
        for name, model in models.items():
            started = time.perf_counter()
            score(model, images)
            seconds[name].append(time.perf_counter() - started)
    return {name: len(images) / statistics.median(taken) for name, taken in seconds.items()}


def read_costs(run: Place, folds: int, parameters: int, images_per_second: float) -> Costs:
    """What the finished folds in `run` say of themselves, with what was measured of the model."""
    logs = [(run / f"fold-{number}" / "metrics.jsonl").read_bytes() for number in range(1, folds + 1)]
    epochs = [json.loads(line) for log in logs for line in log.splitlines()]
    weights = [info.size for info in (run / "fold-1" / "bundle").files() if info.base_name == "weights.npz"]
    return Costs(
        parameters=parameters,
        trained_parameters=max(epoch["trained_parameters"] for epoch in epochs),
        weights_bytes=sum(weights),
        epochs=len(epochs),
        training_seconds=sum(epoch["seconds"] for epoch in epochs),
        memory_gb=max(epoch["memory_gb"] for epoch in epochs),
        images_per_second=images_per_second,
    )


def write_comparison(run: Place, manifest: Manifest, contenders: Sequence[Contender], caveats: Sequence[str]) -> None:
    """`comparison.html`, `comparison.md` and `comparison.json`.

    Args:
        contenders: the baseline first, their predictions timed on this machine.
    """
    baseline = contenders[0]
    machine = f"{os.cpu_count()} CPUs ({platform.machine()}), batches of {AT_ONCE}"
    (run / "comparison.json").write_json(
        {
            "baseline": baseline.title,
            "dataset": manifest.fingerprint,
            "predicted_on": machine,
            "contenders": {contender.title: _plain(contender) for contender in contenders},
        }
    )
    (run / "comparison.md").write_bytes("".join(f"{line}\n" for line in table_lines(contenders)).encode())
    labels, *_ = _radiographs(baseline.pooled)
    curves = {contender.title: _radiographs(contender.pooled)[2] for contender in contenders}
    page = render(
        "comparison.html",
        title=f"Comparison {run.name}",
        baseline=baseline,
        contenders=contenders,
        caveats=caveats,
        manifest=manifest,
        machine=machine,
        names=NAMES,
        roc=png(plot_rocs(labels, curves, "\n".join(caveats))) if len(np.unique(labels)) == 2 else "",
    )
    (run / "comparison.html").write_bytes(page)


def _plain(contender: Contender) -> dict[str, Any]:
    return {
        "settings": contender.settings,
        **as_json({"pooled": contender.pooled.whole}),
        "differences": {name: figure.model_dump() for name, figure in contender.differences.items()},
        "auc_mean_and_deviation": contender.pooled.spread("auc"),
        "costs": asdict(contender.costs),
    }


def comparison_lines(contenders: Sequence[Contender]) -> list[str]:
    """The comparison on a screen."""
    baseline = contenders[0].title
    lines = []
    for contender in contenders:
        m = contender.pooled.whole["radiograph"]
        told = ", ".join(f"{word} {text(m, name)}" for name, word in NAMES.items())
        lines += [f"contender  {contender.title}", f"           {m.count:,} radiographs: {told}"]
        if contender.differences:
            told = ", ".join(f"{word} {signed(contender.differences[name])}" for name, word in NAMES.items())
            lines.append(f"           {contender.verdict(baseline)}: {told}")
        c = contender.costs
        lines.append(
            f"           {c.parameters:,} parameters, {c.training_seconds / 60:.1f} min of training, "
            f"{c.images_per_second:.0f} images/s predicted, {c.memory_gb:.1f} GB a worker"
        )
    return lines


def table_lines(contenders: Sequence[Contender]) -> list[str]:
    """The comparison as a table in Markdown."""
    columns = [*NAMES.values(), "AUC, difference", "parameters", "training, min", "images/s", "memory, GB"]
    lines = [f"| per radiograph | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for contender in contenders:
        c, m = contender.costs, contender.pooled.whole["radiograph"]
        cells = [contender.title.replace("|", r"\|"), *(text(m, name) for name in NAMES)]
        cells.append(signed(contender.differences["auc"]) if contender.differences else "")
        cells += [f"{c.parameters:,}", f"{c.training_seconds / 60:.1f}", f"{c.images_per_second:.0f}"]
        lines.append(f"| {' | '.join([*cells, f'{c.memory_gb:.1f}'])} |")
    return lines


def signed(difference: Figure) -> str:
    """A difference with its interval."""
    if difference.value is None:
        return "undefined"
    return f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
