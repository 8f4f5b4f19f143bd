"""Search for better settings: many trainings on Ray Tune, each a run of Ray Train, the worse ones stopped early.

  python job/tune.py --data DIR --run NAME                 12 trials, drawn from tune.space of the default recipe
  python job/tune.py --shards SHARDS --run NAME --trials 30 --config mine.yaml
  python job/tune.py --run NAME                            the same NAME again goes on where it was, or adds trials

Trials are compared by their lowest validation loss, and none of them is tried on test. The first has the settings as
they are. Leaves in STORAGE/runs/NAME:

  best.yaml          the settings of the best trial: job/train.py --config best.yaml
  trials.json        the settings of all trials, and what they gave
  trial-00001/ ...   metrics.jsonl, config.yaml and tensorboard/ of each

Exit codes: 0 success, 2 a mistake in what was asked, 1 anything else.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import _cli
from train import add_flags, begin, locked, shards_of

if TYPE_CHECKING:
    from fracture.config import Config
    from fracture.dataset.format import Dataset
    from fracture.storage import StoragePath
    from fracture.tuning.space import Result


def main(args: argparse.Namespace) -> None:
    from fracture.tuning.space import check_space

    asked = {"tune.trials": args.trials, "tune.concurrent": args.concurrent}
    config, storage, run = begin(args, [f"{key}={value}" for key, value in asked.items() if value is not None])
    check_space(config)
    with locked(run):
        lines = _prepare_and_search(args, config, storage, run)
    print("\n".join(lines), flush=True)


def _prepare_and_search(args: argparse.Namespace, config: Config, storage: StoragePath, run: StoragePath) -> list[str]:
    """What there is to say of the finished search."""
    from fracture.dataset.format import read_dataset
    from fracture.errors import UsageError
    from fracture.evaluation.report import caveats
    from fracture.training.checks import with_data_of
    from fracture.tuning.space import BEST, check_trials, read_results, table_lines, write_best, write_results

    shards = shards_of(args, config, storage)
    dataset = read_dataset(shards)
    manifest = dataset.manifest
    config = with_data_of(config, manifest)
    if "train" not in manifest.shards:
        raise UsageError(f"{shards}: a search needs train and val. Preprocess without folds, and not all as test.")
    check_trials(config, dataset)
    results = read_results(run, config, manifest)
    write_results(run, config, manifest, results)
    numbers = range(1, config.tune.trials + 1)
    print(f"search     {run}", flush=True)
    if idle := sorted(config.tune.space.keys() & config.without_effect):
        print(f"left out   {', '.join(idle)}: without effect on {config.model.name} as it learns here", flush=True)
    if not results.keys() >= set(numbers):
        _search(args, config, dataset, run, results)
    shown = [results[number] for number in numbers]
    write_best(run, config, shown)
    best = run / BEST if run.is_local else f"a copy of {run / BEST}"
    again = f"--shards {shards}" + (f" --storage {args.storage}" if args.storage else "")
    return [
        *table_lines(shown),
        "           * lowest validation loss; the best of many by luck too, so expect less of it on test",
        f"best       {run / BEST}",
        f"train it   python job/train.py --config {best} {again}",
        *(f"CAVEAT     {line}" for line in caveats(manifest)),
    ]


def _search(
    args: argparse.Namespace,
    config: Config,
    dataset: Dataset,
    run: StoragePath,
    results: dict[int, Result],
) -> None:
    from fracture.runtime.cluster import check_capacity, count_runs_at_once, start_ray
    from fracture.training.phases import most_epochs

    start_ray(args.verbose)
    check_capacity(config.compute)
    from fracture.tuning.trials import run_trials

    at_once = min(count_runs_at_once(config.compute), config.tune.concurrent or config.tune.trials)
    trials, done = config.tune.trials, f", of which {len(results)} are done" if results else ""
    each = f"{config.compute.workers} worker{'s' if config.compute.workers > 1 else ''}"
    most = f"at most {most_epochs(config)} epochs"
    print(f"starting   {trials} trials of {most}{done}; {at_once} at a time, each on {each}", flush=True)
    run_trials(config, dataset, run, results, at_once)


if __name__ == "__main__":
    parser = _cli.parser(__doc__)
    where = add_flags(parser, folds=False)
    where.add_argument("--trials", metavar="N", help="tune.trials: trainings in all (default: 12)")
    where.add_argument(
        "--concurrent", metavar="N", help="trials at a time at most (default: as many as there is room for)"
    )
    _cli.run(main, parser.parse_args())
