"""Train and test one run, or one run for each fold, and resume what was interrupted."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fracture.config import Config
from fracture.errors import UsageError
from fracture.workflows.arguments import Report, RunArguments, print_line, resumable, resume_hint
from fracture.workflows.locking import hold_run_lock, is_taken_over
from fracture.workflows.preprocess import prepare_run_data

if TYPE_CHECKING:
    from fracture.dataset.format import Dataset
    from fracture.evaluation.folds import PooledFolds
    from fracture.evaluation.metrics import Evaluation
    from fracture.inference.bundle import Bundle
    from fracture.storage import StoragePath


@dataclass(frozen=True, kw_only=True)
class TrainArguments(RunArguments):
    config: Config = field(default_factory=Config)


@dataclass(frozen=True)
class TrainResult:
    run: StoragePath
    evaluations: dict[str, Evaluation]  # split -> its figures; empty where folds were trained
    pooled: PooledFolds | None  # all test folds together; None where no folds were trained
    caveats: list[str]  # what has to stand beside every figure


def train(arguments: TrainArguments, report: Report = print_line) -> TrainResult:
    """Prepare the data, train with early stopping on validation, and test; what is finished is not done again.

    Raises:
        UsageError: the settings, the data or the run's name do not fit together.
        RunError: training failed, see `fracture.training.launch.train`; or another job took the run over.
        KeyboardInterrupt: a signal came; what could be saved in time is saved. Its note says how to resume.
    """
    from fracture.training.checks import with_data_of

    config, run = arguments.config, arguments.folder
    check_weights(config, run)
    with resumable(resume_hint(arguments.run)), hold_unfinished_run(run, "train", report):
        dataset = prepare_run_data(arguments, config, report)
        manifest = dataset.manifest
        config = with_data_of(config, manifest)
        if not manifest.folds and "train" not in manifest.shards:
            raise UsageError(
                f"{dataset.folder}: every image is in the test split, so there is nothing to train on. Preprocess "
                "with another data.split."
            )
        evaluations, pooled = {}, None
        if manifest.folds:
            pooled = train_folds(config, dataset, run, arguments.verbose, report)
        else:
            evaluations = train_run(config, dataset, run, arguments.verbose, report)
    from fracture.evaluation.report import list_caveats

    return TrainResult(run, evaluations, pooled, list_caveats(manifest))


def check_weights(config: Config, run: StoragePath) -> None:
    """Raise UsageError where a new run's file of weights does not exist, before its radiographs are scanned."""
    from fracture.training.checks import check_weights_file

    if config.pretrained and not run.folders():  # a run that has begun has a copy of its weights
        check_weights_file(config)


def hold_unfinished_run(run: StoragePath, command: str, report: Report) -> AbstractContextManager[None]:
    """Hold the run's lock, unless the run is finished, which is then only shown."""

    from fracture.inference.bundle import is_bundle

    return nullcontext() if is_bundle(run / "bundle") else hold_run_lock(run, command, report)


def train_run(
    config: Config,
    dataset: Dataset,
    run: StoragePath,
    verbose: bool = False,
    report: Report = print_line,
    initial: Bundle | None = None,
) -> dict[str, Evaluation]:
    """Train and test one run, unless it is finished, and return its figures by split.

    Args:
        initial: a finished model whose weights training begins with.
    """
    from fracture.inference.bundle import is_bundle, read_bundle
    from fracture.training.checks import check_data, check_run

    check_data(config, dataset)
    check_run(run, config, dataset, initial)
    report(f"run        {run}")
    if is_bundle(run / "bundle"):
        report("finished   earlier; give another --run name for a new training")
        return read_bundle(run / "bundle").evaluations
    return _train_and_finish(config, dataset, run, verbose, report, initial)


def train_folds(
    config: Config, dataset: Dataset, run: StoragePath, verbose: bool = False, report: Report = print_line
) -> PooledFolds:
    """Train one run for each fold, in folders of `run`, and pool the scores of their test folds."""
    for number, title in enumerate(dataset.manifest.folds, 1):
        report(f"fold       {number} of {len(dataset.manifest.folds)}: {title} is test")
        train_run(config, dataset.fold(number), run / f"fold-{number}", verbose, report)
    from fracture.evaluation.folds import pool_folds, write_folds
    from fracture.evaluation.matched import match_radiographs
    from fracture.evaluation.report import list_caveats

    pooled = pool_folds(run, dataset.manifest)
    pooled.whole["radiograph"].matched = match_radiographs(pooled.scores, dataset)
    write_folds(run, dataset.manifest, pooled, list_caveats(dataset.manifest))
    return pooled


def _train_and_finish(
    config: Config, dataset: Dataset, run: StoragePath, verbose: bool, report: Report, initial: Bundle | None
) -> dict[str, Evaluation]:
    from fracture.progress.console import Console
    from fracture.progress.status import StatusWriter
    from fracture.runtime.cluster import check_capacity, start_ray
    from fracture.training.launch import train
    from fracture.training.phases import count_epochs

    with StatusWriter(run, count_epochs(config), may_write=lambda: not is_taken_over()) as status:
        start_ray(verbose, to_train=True)
        check_capacity(config.compute)
        count = f"{config.compute.workers} worker{'s' if config.compute.workers > 1 else ''}"
        report(f"starting   {count} of Ray Train; 15 to 30 seconds until the first step")
        with Console() as console:
            outcome = train(config, dataset, run, [console.show, status.show], initial)
        from fracture.workflows.finish import finish_run  # loads statistics and plots, a second that can wait until now

        return finish_run(run, config, dataset, outcome, initial)
