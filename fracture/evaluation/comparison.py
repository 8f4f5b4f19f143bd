"""Comparison of several models trained on the same folds: their metrics, paired differences and costs."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fracture.dataset.format import Manifest
from fracture.evaluation.falls import FIGURES
from fracture.evaluation.folds import PooledFolds, falls_as_json
from fracture.evaluation.metrics import (
    Figure,
    as_json,
    auc_differences,
    auc_within_folds,
    average_by_radiograph,
    rate_differences,
)
from fracture.evaluation.plots import plot_rocs
from fracture.evaluation.report import format_difference, format_figure
from fracture.evaluation.scores import batch_size, describe_device, score
from fracture.page import png, render
from fracture.progress.history import read_history
from fracture.storage import StoragePath

COMPARED = {"auc": "AUC", "recall": "sensitivity", "specificity": "specificity"}
_RESAMPLES = 4000  # many: with several pairs the limits lie far out in the tails
_ROUNDS = 5


@dataclass(frozen=True)
class Costs:
    """The size of a contender's network, and the time and memory that it takes."""

    parameters: int
    trained_parameters: int  # the largest count of any epoch
    weights_bytes: int  # size of one fold's weights.safetensors
    epochs: int  # sum over all folds
    training_seconds: float  # sum over all folds, including validation, without the start of the workers
    memory_gb: float  # peak of rank 0 in any fold
    trained_on: tuple[str, ...]  # such as "2 workers, mixed_bfloat16"; several if the folds differ
    images_per_second: float  # in prediction


@dataclass(frozen=True)
class Contender:
    """One model of the comparison."""

    title: str
    folder: str  # name of the folder with its folds, inside the comparison's folder
    settings: Mapping[str, Any]  # those that this contender alone sets
    pooled: PooledFolds
    costs: Costs
    figures: Mapping[str, Figure]  # name of COMPARED -> figure per radiograph
    differences: Mapping[str, Mapping[str, Figure]]  # title of another contender -> differences, the baseline first

    def verdict(self, other: str) -> str:
        """Say in words whether this contender is better or worse than another by AUC."""
        difference = self.differences[other]["auc"]
        if difference.value is None:
            return f"cannot be compared with {other}: test has one class only"
        if difference.low is None or difference.low <= 0 <= difference.high:
            return f"is not distinguishable from {other} by AUC"
        return f"is {'better' if difference.value > 0 else 'worse'} than {other} by AUC on these radiographs"


def compute_figures(pooled: PooledFolds) -> dict[str, Figure]:
    """Return the AUC within folds, and sensitivity and specificity at each fold's own threshold, per radiograph."""
    radiographs = _average_radiographs(pooled)
    whole = pooled.whole["radiograph"].figures
    return {name: whole[name] for name in COMPARED} | {
        "auc": auc_within_folds(radiographs.labels, radiographs.probabilities, radiographs.groups, radiographs.folds)
    }


def compute_differences(
    pooled: PooledFolds, other: PooledFolds, pairs: int, resamples: int = _RESAMPLES
) -> dict[str, Figure]:
    """Return the figures of one model minus those of another, with paired 95 % intervals.

    In each resample both models are scored on the same groups. A difference that does not vary has no interval.

    Args:
        pairs: number of pairs compared in all. The intervals are widened to hold for all pairs together
            (Bonferroni; Dunn 1961, doi:10.1080/01621459.1961.10482090).
    """
    assert pooled.scores.select(["fold", "row"]).equals(other.scores.select(["fold", "row"]))
    first, second = _average_radiographs(pooled), _average_radiographs(other)
    labels, groups, folds = first.labels, first.groups, first.folds
    resampled = rate_differences(labels, first.called, second.called, groups, resamples)
    resampled["auc"] = auc_differences(labels, first.probabilities, second.probabilities, groups, resamples, folds)
    own_figures, other_figures, found = compute_figures(pooled), compute_figures(other), {}
    for name in COMPARED:
        if own_figures[name].value is None:
            found[name] = Figure(value=None)
            continue
        found[name] = difference = Figure(value=own_figures[name].value - other_figures[name].value)
        low, high = np.percentile(resampled[name], [2.5 / pairs, 100 - 2.5 / pairs]).tolist()
        if low < high:  # equal limits only say that no resample varied, which proves nothing
            difference.low, difference.high = low, high
    return found


@dataclass(frozen=True)
class _Radiographs:
    """Columns of the test radiographs, each [N]."""

    labels: np.ndarray
    groups: np.ndarray
    folds: np.ndarray
    probabilities: np.ndarray
    called: np.ndarray  # bool, true where the model calls a fracture


def _average_radiographs(pooled: PooledFolds) -> _Radiographs:
    names = ("label", "group_id", "fold", "radiograph_id", "probability", "threshold")
    labels, groups, folds, radiograph_ids, *values = (pooled.scores[name].to_numpy() for name in names)
    first, (probabilities, thresholds) = average_by_radiograph(labels, radiograph_ids, *values)
    return _Radiographs(labels[first], groups[first], folds[first], probabilities, probabilities >= thresholds)


def measure_prediction_speeds(models: Mapping[str, Any], images: np.ndarray) -> dict[str, float]:
    """Return each model's images per second: the median over rounds in which the models take turns.

    Args:
        models: name -> Keras model from images [N, H, W, 1] uint8 to probabilities [N, 1].
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        score(model, images)  # the first call compiles
    for _ in range(_ROUNDS):
        for name, model in models.items():
            started = time.perf_counter()
            score(model, images)
            seconds[name].append(time.perf_counter() - started)
    return {name: len(images) / statistics.median(durations) for name, durations in seconds.items()}


def read_costs(run: StoragePath, folds: int, parameters: int, images_per_second: float) -> Costs:
    """Read the training costs of the finished folds in `run`, and add the measured figures of the model."""
    epochs = [record for number in range(1, folds + 1) for record in read_history(run / f"fold-{number}")]
    weights = [info.size for info in (run / "fold-1" / "bundle").files() if info.base_name == "weights.safetensors"]
    runs = [(run / f"fold-{number}" / "bundle" / "bundle.json").read_json()["run"] for number in range(1, folds + 1)]
    machines = {
        f"{training['workers']} worker{'s' if training['workers'] > 1 else ''}, {training['precision']}"
        for training in runs
    }
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
    """Write `comparison.html`, `comparison.md` and `comparison.json`.

    Args:
        contenders: the baseline first; their predictions were timed on this machine.
    """
    baseline = contenders[0]
    machine = f"{describe_device()}, batches of {batch_size(manifest.image_size)}"
    (run / "comparison.json").write_json(
        {
            "baseline": baseline.title,
            "dataset": manifest.fingerprint,
            "predicted_on": machine,
            "contenders": {contender.title: _contender_as_json(contender) for contender in contenders},
        }
    )
    (run / "comparison.md").write_bytes("".join(f"{line}\n" for line in format_table(contenders)).encode())
    page = render(
        "comparison.html",
        title=f"Comparison {run.name}",
        baseline=baseline,
        contenders=contenders,
        caveats=caveats,
        manifest=manifest,
        machine=machine,
        trained_alike=_were_trained_alike(contenders),
        pairs=sum(len(contender.differences) for contender in contenders),
        fall_names=FIGURES,
        rocs=_plot_curves(contenders, "\n".join(caveats)),
    )
    (run / "comparison.html").write_bytes(page)


def _plot_curves(contenders: Sequence[Contender], caption: str) -> dict[str, str]:
    """Plot the ROC curves of each source that was held out; of other folds, of all together: name -> picture."""
    radiographs = {contender.title: _average_radiographs(contender.pooled) for contender in contenders}
    labels, folds = radiographs[contenders[0].title].labels, radiographs[contenders[0].title].folds
    sources = list(contenders[0].pooled.falls)
    parts = {title: folds == title for title in sources} or {"all folds": np.ones(len(labels), bool)}
    return {
        name: png(plot_rocs(labels[rows], {t: r.probabilities[rows] for t, r in radiographs.items()}, caption))
        for name, rows in parts.items()
        if len(np.unique(labels[rows])) == 2
    }


def _were_trained_alike(contenders: Sequence[Contender]) -> bool:
    """Return true if all folds had the same number of workers, and each contender's folds the same precision."""
    machines = [contender.costs.trained_on for contender in contenders]
    return {len(each) for each in machines} == {1} and len({each[0].partition(",")[0] for each in machines}) == 1


def _contender_as_json(contender: Contender) -> dict[str, Any]:
    return {
        "settings": contender.settings,
        **as_json({"pooled": contender.pooled.whole}),
        "figures": {name: figure.model_dump() for name, figure in contender.figures.items()},
        "differences": {
            other: {name: figure.model_dump() for name, figure in found.items()}
            for other, found in contender.differences.items()
        },
        "auc_mean_and_deviation": contender.pooled.spread("auc"),
        **falls_as_json(contender.pooled),
        "costs": asdict(contender.costs),
    }


def format_comparison(contenders: Sequence[Contender]) -> list[str]:
    """Return the lines that show the comparison on the screen."""
    lines = []
    for contender in contenders:
        count = contender.pooled.whole["radiograph"].count
        figures = ", ".join(f"{word} {format_figure(contender.figures[name])}" for name, word in COMPARED.items())
        lines += [f"contender  {contender.title}", f"           {count:,} radiographs: {figures}"]
        if contender.pooled.mean_fall is not None:
            inside, outside, fall = _format_fall(contender)
            lines.append(f"           mean over sources: AUC {inside} inside, {outside} outside, fall {fall}")
        for other, found in contender.differences.items():
            lines.append(f"           {contender.verdict(other)}: {_format_differences(found)}")
        c = contender.costs
        lines.append(
            f"           {c.parameters:,} parameters, {c.training_seconds / 60:.1f} min of training, "
            f"{c.images_per_second:.0f} images/s predicted, {c.memory_gb:.1f} GB a worker ({' or '.join(c.trained_on)})"
        )
    return lines


def format_table(contenders: Sequence[Contender]) -> list[str]:
    """Return the lines of the comparison as a Markdown table."""
    by_source = contenders[0].pooled.mean_fall is not None
    columns = [
        *(("inside AUC", "outside AUC", "fall") if by_source else ()),  # each source counts alike
        *(COMPARED | ({"auc": "AUC within sources, by pairs"} if by_source else {})).values(),
        f"AUC minus that of {contenders[0].title}",
        "parameters",
        "training, min",
        "images/s",
        "memory, GB",
    ]
    lines = [f"| per radiograph | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for contender in contenders:
        c = contender.costs
        cells = [contender.title.replace("|", r"\|"), *(_format_fall(contender) if by_source else ())]
        cells += [format_figure(contender.figures[name]) for name in COMPARED]
        found = contender.differences.get(contenders[0].title)
        cells.append(format_difference(found["auc"]) if found else "")
        cells += [f"{c.parameters:,}", f"{c.training_seconds / 60:.1f}", f"{c.images_per_second:.0f}"]
        lines.append(f"| {' | '.join([*cells, f'{c.memory_gb:.1f}'])} |")
    for contender in contenders:
        for other, found in contender.differences.items():
            if other != contenders[0].title:
                lines += ["", f"{contender.title} {contender.verdict(other)}: {_format_differences(found)}."]
    return lines


def _format_fall(contender: Contender) -> list[str]:
    """Return the AUC inside, that outside and the fall, as means over sources."""
    mean = contender.pooled.mean_fall
    assert mean is not None
    return [format_figure(mean.inside["auc"]), format_figure(mean.outside["auc"]), format_difference(mean.fall["auc"])]


def _format_differences(found: Mapping[str, Figure]) -> str:
    return ", ".join(f"{word} {format_difference(found[name])}" for name, word in COMPARED.items())
