"""Train several models on the same grouped folds, and compare them on one page."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fracture.config import Config, load_config
from fracture.errors import RunError, UsageError
from fracture.evaluation.contenders import folder_name, read_contenders, select_contenders
from fracture.workflows.arguments import Report, RunArguments, print_line, resumable, resume_hint
from fracture.workflows.locking import hold_run_lock
from fracture.workflows.preprocess import prepare_run_data
from fracture.workflows.train import train_folds

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from fracture.dataset.format import Dataset
    from fracture.evaluation.comparison import Contender
    from fracture.evaluation.contenders import ContenderSettings
    from fracture.storage import StoragePath

DEFAULT_CONTENDERS = Path(__file__).parents[1] / "configs" / "comparisons" / "default.yaml"
_TIMED_IMAGES = 64  # that the speed of prediction is measured with
_DEFAULT_FOLDS = 5


@dataclass(frozen=True, kw_only=True)
class CompareArguments(RunArguments):
    """The contenders, and the settings that all of them share."""

    models: Path = DEFAULT_CONTENDERS  # YAML file of titles and their own settings
    only: tuple[str, ...] | None = None  # titles of the contenders to train; None: all
    config_file: Path | None = None  # YAML file of settings
    assignments: tuple[str, ...] = ()  # KEY=VALUE, on top of the file; a contender may not set the same key


@dataclass(frozen=True)
class CompareResult:
    contenders: list[Contender]  # with figures, costs and differences
    caveats: list[str]
    run: StoragePath


def compare(arguments: CompareArguments, report: Report = print_line) -> CompareResult:
    """Train the contenders' folds that are not finished, and write the comparison of all contenders that are.

    Raises:
        UsageError: the contenders, their settings or the data do not fit together, before anything is trained.
        RunError: a contender's training failed, or another job took the comparison over.
        KeyboardInterrupt: a signal came; what could be saved in time is saved. Its note says how to resume.
    """
    contenders = read_contenders(arguments.models)
    chosen = select_contenders(contenders, arguments.only)
    configs = {title: _load_settings(arguments, title, contender) for title, contender in contenders.items()}
    run = arguments.folder
    if (run / "run.json").is_file() or "fold-1" in run.folders():
        raise UsageError(f"{run} is a run of fracture train, not a comparison. Give another --run name.")
    with resumable(resume_hint(arguments.run)), hold_run_lock(run, "compare", report, kind="comparison"):
        return _train_and_compare(arguments, contenders, configs, chosen, run, report)


def _load_settings(arguments: CompareArguments, title: str, contender: ContenderSettings) -> Config:
    """Return the settings of one contender: the file's, its own and the shared ones; 5 folds unless a number is set."""
    own = [f"{key}={json.dumps(value)}" for key, value in contender.settings.items()]
    with _naming_contender(title):
        for assignment in arguments.assignments:
            key = assignment.partition("=")[0].strip()
            if any(f"{name}.".startswith(f"{key}.") for name in contender.settings):
                raise UsageError(
                    f"{assignment} is set for all contenders, but this one sets its own {key}: it would not be what "
                    "--models says. Change it there, or leave out the flag."
                )
        config = load_config(arguments.config_file, [*own, *arguments.assignments])
        if arguments.shards or "folds" in config.data.model_fields_set:
            return config
        return load_config(arguments.config_file, [*own, *arguments.assignments, f"data.folds={_DEFAULT_FOLDS}"])


@contextmanager
def _naming_contender(title: str) -> Iterator[None]:
    """Add the contender's title to errors."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"contender {title!r}: {error}") from None
    except RunError as error:
        raise RunError(f"contender {title!r}: {error}. To train only the others: --only TITLE ...") from None


def _train_and_compare(
    arguments: CompareArguments,
    contenders: Mapping[str, ContenderSettings],
    configs: dict[str, Config],
    chosen: Collection[str],
    run: StoragePath,
    report: Report,
) -> CompareResult:
    from fracture.training.checks import with_data_of

    batch_sizes = [configs[title].training.batch_size for title in chosen]
    dataset = prepare_run_data(arguments, next(iter(configs.values())), report, batch_sizes)
    if not dataset.manifest.folds:
        raise UsageError(
            f"{dataset.folder} has no folds to compare on: make {_DEFAULT_FOLDS}, here or with fracture preprocess, "
            f"by --folds {_DEFAULT_FOLDS}."
        )
    for title in configs:
        with _naming_contender(title):
            configs[title] = with_data_of(configs[title], dataset.manifest)
    finished = _check_contenders(configs, chosen, dataset, run)
    for number, title in enumerate(chosen, 1):
        report(f"contender  {number} of {len(chosen)}: {title}")
        with _naming_contender(title):
            pooled = train_folds(configs[title], dataset, run / folder_name(title), arguments.verbose, report)
        from fracture.evaluation.folds import format_folds  # loads scikit-learn

        for line in [*format_folds(pooled), f"report     {run / folder_name(title) / 'folds.html'}"]:
            report(line)
    from fracture.evaluation.comparison import write_comparison
    from fracture.evaluation.report import list_caveats

    shown = {title: contender for title, contender in contenders.items() if title in finished or title in chosen}
    measured = _measure(shown, dataset, run)
    notes = list_caveats(dataset.manifest)
    write_comparison(run, dataset.manifest, measured, notes)
    return CompareResult(measured, notes, run)


def _check_contenders(
    configs: Mapping[str, Config], chosen: Collection[str], dataset: Dataset, run: StoragePath
) -> set[str]:
    """Check each contender that is chosen or finished, before hours of training; return those that are finished."""
    from fracture.inference.bundle import is_bundle
    from fracture.training.checks import check_data, check_run

    finished = set()
    for title, config in configs.items():
        folds = [run / folder_name(title) / f"fold-{number}" for number in range(1, len(dataset.manifest.folds) + 1)]
        if all(is_bundle(fold / "bundle") for fold in folds):
            finished.add(title)
        elif title not in chosen:
            continue
        with _naming_contender(title):
            for number, fold in enumerate(folds, 1):
                check_data(config, of_fold := dataset.fold(number))
                check_run(fold, config, of_fold)
            if config.pretrained and title not in finished:
                from fracture.training.pretrained import check_backbone  # loads TensorFlow

                check_backbone(config)
    return finished


def _measure(contenders: Mapping[str, ContenderSettings], dataset: Dataset, run: StoragePath) -> list[Contender]:
    """Return the figures, costs and paired differences of finished contenders."""
    from fracture.dataset.format import images_of
    from fracture.evaluation.comparison import (
        Contender,
        compute_differences,
        compute_figures,
        measure_prediction_speeds,
        read_costs,
    )
    from fracture.evaluation.folds import pool_folds
    from fracture.inference.bundle import read_bundle

    folders = {title: run / folder_name(title) for title in contenders}
    models = {title: read_bundle(folder / "fold-1" / "bundle").build_model() for title, folder in folders.items()}
    images = images_of(dataset.read("fold-1", 0, _TIMED_IMAGES), dataset.image_size)
    speeds = measure_prediction_speeds(models, images)
    pooled = {title: pool_folds(folder, dataset.manifest) for title, folder in folders.items()}
    baseline = next(iter(contenders))  # the first of those that are finished
    others = {
        title: [
            other for other in dict.fromkeys((baseline, contender.against)) if other in contenders and other != title
        ]
        for title, contender in contenders.items()
    }
    pairs = sum(map(len, others.values()))
    return [
        Contender(
            title=title,
            folder=folder_name(title),
            settings=contender.settings,
            pooled=pooled[title],
            figures=compute_figures(pooled[title]),
            costs=read_costs(folders[title], len(dataset.manifest.folds), models[title].count_params(), speeds[title]),
            differences={other: compute_differences(pooled[title], pooled[other], pairs) for other in others[title]},
        )
        for title, contender in contenders.items()
    ]
