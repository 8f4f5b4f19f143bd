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

from fracture.dataset.format import Manifest
from fracture.evaluation.folds import Pooled
from fracture.evaluation.metrics import (
    Figure,
    as_json,
    auc_differences,
    auc_within_folds,
    by_radiograph,
    rate_differences,
)
from fracture.evaluation.plots import plot_rocs
from fracture.evaluation.report import figure_text
from fracture.evaluation.scores import AT_ONCE, score
from fracture.page import png, render
from fracture.storage import StoragePath

COMPARED = {"auc": "AUC", "recall": "sensitivity", "specificity": "specificity"}
_RESAMPLES = 4000  # the tails are thin where many are compared
_ROUNDS = 5


@dataclass(frozen=True)
class Costs:
    """What a contender takes."""

    parameters: int
    trained_parameters: int  # the most in an epoch
    weights_bytes: int  # of weights.safetensors of one fold
    epochs: int  # of all folds together, as are
    training_seconds: float  # with validation, without the workers' start
    memory_gb: float  # the most that the first worker of a training held
    trained_on: tuple[str, ...]  # "2 workers, mixed_bfloat16"; several if its folds differ
    images_per_second: float  # of prediction


@dataclass(frozen=True)
class Contender:
    """One model of the comparison."""

    title: str
    folder: str  # of its folds, within the comparison's
    settings: Mapping[str, Any]  # that differ from the others'
    pooled: Pooled
    costs: Costs
    figures: Mapping[str, Figure]  # per radiograph, each of COMPARED
    differences: Mapping[str, Mapping[str, Figure]]  # of these to another's, by its title: the baseline's first

    def verdict(self, other: str) -> str:
        """What the difference in AUC comes to."""
        difference = self.differences[other]["auc"]
        if difference.value is None:
            return f"not to be compared with {other}: test has one class only"
        if difference.low is None or difference.low <= 0 <= difference.high:
            return f"by AUC not to be told apart from {other}"
        return f"by AUC {'better' if difference.value > 0 else 'worse'} than {other} on these radiographs"


def figures(pooled: Pooled) -> dict[str, Figure]:
    """AUC within the folds, and sensitivity and specificity at the folds' own thresholds, per radiograph."""
    radiographs = _radiographs(pooled)
    whole = pooled.whole["radiograph"].figures
    return {name: whole[name] for name in COMPARED} | {
        "auc": auc_within_folds(radiographs.labels, radiographs.probabilities, radiographs.groups, radiographs.folds)
    }


def differences(pooled: Pooled, other: Pooled, pairs: int) -> dict[str, Figure]:
    """Of `figures`, this model's minus the other's; without an interval where nothing varies.

    The intervals are paired: both models meet the same groups in each resample.

    Args:
        pairs: that are compared in all. The intervals of one figure hold for all of them together with 95 %
            (Bonferroni; Dunn 1961, doi:10.1080/01621459.1961.10482090).
    """
    assert pooled.scores.select(["fold", "row"]).equals(other.scores.select(["fold", "row"]))
    ours, theirs = _radiographs(pooled), _radiographs(other)
    labels, groups, folds = ours.labels, ours.groups, ours.folds
    drawn = rate_differences(labels, ours.called, theirs.called, groups, _RESAMPLES)
    drawn["auc"] = auc_differences(labels, ours.probabilities, theirs.probabilities, groups, _RESAMPLES, folds)
    found, (own, its) = {}, (figures(pooled), figures(other))
    for name in COMPARED:
        if own[name].value is None:
            found[name] = Figure(value=None)
            continue
        found[name] = difference = Figure(value=own[name].value - its[name].value)
        low, high = np.percentile(drawn[name], [2.5 / pairs, 100 - 2.5 / pairs]).tolist()
        if low < high:  # else resampling finds nothing that varies, which proves nothing
            difference.low, difference.high = low, high
    return found


@dataclass(frozen=True)
class _Radiographs:
    """All [N]."""

    labels: np.ndarray
    groups: np.ndarray
    folds: np.ndarray
    probabilities: np.ndarray
    called: np.ndarray  # bool, a fracture


def _radiographs(pooled: Pooled) -> _Radiographs:
    names = ("label", "group_id", "fold", "radiograph_id", "probability", "threshold")
    labels, groups, folds, radiograph_ids, *values = (pooled.scores[name].to_numpy() for name in names)
    first, (probabilities, thresholds) = by_radiograph(labels, radiograph_ids, *values)
    return _Radiographs(labels[first], groups[first], folds[first], probabilities, probabilities >= thresholds)


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


def read_costs(run: StoragePath, folds: int, parameters: int, images_per_second: float) -> Costs:
    """What the finished folds in `run` say of themselves, with what was measured of the model."""
    logs = [(run / f"fold-{number}" / "metrics.jsonl").read_bytes() for number in range(1, folds + 1)]
    epochs = [json.loads(line) for log in logs for line in log.splitlines()]
    weights = [info.size for info in (run / "fold-1" / "bundle").files() if info.base_name == "weights.safetensors"]
    runs = [(run / f"fold-{number}" / "bundle" / "bundle.json").read_json()["run"] for number in range(1, folds + 1)]
    machines = {f"{told['workers']} worker{'s' if told['workers'] > 1 else ''}, {told['precision']}" for told in runs}
    return Costs(
        parameters=parameters,
        trained_parameters=max(epoch["trained_parameters"] for epoch in epochs),
        weights_bytes=sum(weights),
        epochs=len(epochs),
        training_seconds=sum(epoch["seconds"] for epoch in epochs),
        memory_gb=max(epoch["memory_gb"] for epoch in epochs),
        images_per_second=images_per_second,
        trained_on=tuple(sorted(machines)),
    )


def write_comparison(
    run: StoragePath, manifest: Manifest, contenders: Sequence[Contender], caveats: Sequence[str]
) -> None:
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
    labels = _radiographs(baseline.pooled).labels
    curves = {contender.title: _radiographs(contender.pooled).probabilities for contender in contenders}
    page = render(
        "comparison.html",
        title=f"Comparison {run.name}",
        baseline=baseline,
        contenders=contenders,
        caveats=caveats,
        manifest=manifest,
        machine=machine,
        alike=_alike(contenders),
        pairs=sum(len(contender.differences) for contender in contenders),
        roc=png(plot_rocs(labels, curves, "\n".join(caveats))) if len(np.unique(labels)) == 2 else "",
    )
    (run / "comparison.html").write_bytes(page)


def _alike(contenders: Sequence[Contender]) -> bool:
    """Whether all folds were trained on as many workers, and those of each contender in one precision."""
    machines = [contender.costs.trained_on for contender in contenders]
    return {len(each) for each in machines} == {1} and len({each[0].partition(",")[0] for each in machines}) == 1


def _plain(contender: Contender) -> dict[str, Any]:
    return {
        "settings": contender.settings,
        **as_json({"pooled": contender.pooled.whole}),
        "figures": {name: figure.model_dump() for name, figure in contender.figures.items()},
        "differences": {
            other: {name: figure.model_dump() for name, figure in found.items()}
            for other, found in contender.differences.items()
        },
        "auc_mean_and_deviation": contender.pooled.spread("auc"),
        "costs": asdict(contender.costs),
    }


def comparison_lines(contenders: Sequence[Contender]) -> list[str]:
    """The comparison on a screen."""
    lines = []
    for contender in contenders:
        count = contender.pooled.whole["radiograph"].count
        told = ", ".join(f"{word} {figure_text(contender.figures[name])}" for name, word in COMPARED.items())
        lines += [f"contender  {contender.title}", f"           {count:,} radiographs: {told}"]
        for other, found in contender.differences.items():
            lines.append(f"           {contender.verdict(other)}: {_in_words(found)}")
        c = contender.costs
        lines.append(
            f"           {c.parameters:,} parameters, {c.training_seconds / 60:.1f} min of training, "
            f"{c.images_per_second:.0f} images/s predicted, {c.memory_gb:.1f} GB a worker ({' or '.join(c.trained_on)})"
        )
    return lines


def table_lines(contenders: Sequence[Contender]) -> list[str]:
    """The comparison as a table in Markdown."""
    columns = [
        *COMPARED.values(),
        f"AUC, to {contenders[0].title}",
        "parameters",
        "training, min",
        "images/s",
        "memory, GB",
    ]
    lines = [f"| per radiograph | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for contender in contenders:
        c = contender.costs
        cells = [contender.title.replace("|", r"\|"), *(figure_text(contender.figures[name]) for name in COMPARED)]
        found = contender.differences.get(contenders[0].title)
        cells.append(signed(found["auc"]) if found else "")
        cells += [f"{c.parameters:,}", f"{c.training_seconds / 60:.1f}", f"{c.images_per_second:.0f}"]
        lines.append(f"| {' | '.join([*cells, f'{c.memory_gb:.1f}'])} |")
    for contender in contenders:
        for other, found in contender.differences.items():
            if other != contenders[0].title:
                lines += ["", f"{contender.title} is {contender.verdict(other)}: {_in_words(found)}."]
    return lines


def _in_words(found: Mapping[str, Figure]) -> str:
    return ", ".join(f"{word} {signed(found[name])}" for name, word in COMPARED.items())


def signed(difference: Figure) -> str:
    """A difference with its interval."""
    if difference.value is None:
        return "undefined"
    interval = "" if difference.low is None else f" [{difference.low:+.3f}, {difference.high:+.3f}]"
    return f"{difference.value:+.3f}{interval}"
