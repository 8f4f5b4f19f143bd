"""Search for better settings with many short trainings on Ray Tune."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fracture.config import Config
from fracture.errors import UsageError
from fracture.workflows.arguments import Report, RunArguments, print_line, resumable, resume_hint
from fracture.workflows.preprocess import prepare_run_data
from fracture.workflows.train import check_weights, hold_unfinished_run

if TYPE_CHECKING:
    from fracture.dataset.format import Dataset
    from fracture.storage import StoragePath
    from fracture.tuning.space import Result


@dataclass(frozen=True, kw_only=True)
class TuneArguments(RunArguments):
    config: Config = field(default_factory=Config)


@dataclass(frozen=True)
class TuneResult:
    trials: list[Result]  # by number
    best: StoragePath  # YAML file with the settings of the best trial
    shards: StoragePath
    caveats: list[str]


def tune(arguments: TuneArguments, report: Report = print_line) -> TuneResult:
    """Run the trials that are not done, and write the settings of the best one.

    Raises:
        UsageError: the search space, the data or the run's name do not fit together.
        RunError: every trial failed, or another job took the search over.
        KeyboardInterrupt: a signal came; what could be saved in time is saved. Its note says how to resume.
    """
    from fracture.tuning.space import check_space

    run = arguments.folder
    check_weights(arguments.config, run)
    check_space(arguments.config)
    with resumable(resume_hint(arguments.run)), hold_unfinished_run(run, "tune", report):
        return _prepare_and_search(arguments, run, report)


def _prepare_and_search(arguments: TuneArguments, run: StoragePath, report: Report) -> TuneResult:
    from fracture.evaluation.report import list_caveats
    from fracture.training.checks import with_data_of
    from fracture.tuning.space import BEST, check_trials, read_results, sample_trials, write_best, write_results

    own = arguments.config.training.batch_size
    batch_sizes = [trial.get("training.batch_size", own) for trial in sample_trials(arguments.config)]
    dataset = prepare_run_data(arguments, arguments.config, report, batch_sizes)
    manifest = dataset.manifest
    config = with_data_of(arguments.config, manifest)
    if "train" not in manifest.shards:
        raise UsageError(
            f"{dataset.folder}: a search needs the splits train and val. Preprocess without folds, and not all as test."
        )
    check_trials(config, dataset)
    results = read_results(run, config, manifest)
    write_results(run, config, manifest, results)
    numbers = range(1, config.tune.trials + 1)
    report(f"search     {run}")
    if idle := sorted(config.tune.space.keys() & config.without_effect):
        report(f"left out   {', '.join(idle)}: without effect on {config.model.name} with these settings")
    if not results.keys() >= set(numbers):
        _search(config, dataset, run, results, arguments.verbose, report)
    trials = [results[number] for number in numbers]
    write_best(run, config, trials)
    return TuneResult(trials, run / BEST, dataset.folder, list_caveats(manifest))


def _search(
    config: Config, dataset: Dataset, run: StoragePath, results: dict[int, Result], verbose: bool, report: Report
) -> None:
    """Run the missing trials, and add what they give to `results`."""
    from fracture.runtime.cluster import check_capacity, count_runs_at_once, start_ray
    from fracture.training.phases import count_epochs

    start_ray(verbose)
    check_capacity(config.compute)
    from fracture.tuning.trials import run_trials  # imports Ray Tune

    at_once = min(count_runs_at_once(config.compute), config.tune.concurrent or config.tune.trials)
    done = f", of which {len(results)} are done" if results else ""
    workers = f"{config.compute.workers} worker{'s' if config.compute.workers > 1 else ''}"
    report(
        f"starting   {config.tune.trials} trials of at most {count_epochs(config)} epochs{done}; {at_once} at a time, "
        f"each on {workers}"
    )
    run_trials(config, dataset, run, results, at_once)
