"""Compare models: train each on the same grouped folds, and tell on one page which is better, and how sure that is.

  python job/compare.py --data DIR --run NAME          the contenders of configs/comparisons, 5 folds each
  python job/compare.py --run NAME                     the same on sample radiographs, with the quick recipe
  python job/compare.py --shards SHARDS --models FILE --only cnn qnn --run NAME   trains these alone

FILE is YAML: a title, and the settings in which that contender differs, such as `cnn: {}` and `wide: {model: {filters:
[128, 256]}}`. The first is the baseline; `against: TITLE` compares a contender with another one, too. --config and
--set are for all; what a contender sets, --set may not. The same command again goes on where it was stopped, and takes
finished folds as they are. The page has all contenders of FILE that are finished. It costs contenders times folds times
what one training costs. Leaves in STORAGE/runs/NAME:

  comparison.html, comparison.md, comparison.json      figures with intervals, paired differences, costs
  CONTENDER/                                           folds.html, and fold-1 to fold-5: a run each, with its bundle

Exit codes: 0 success, 2 a mistake in what was asked, 1 anything else.
"""

from __future__ import annotations

import argparse
import json
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _cli
from train import add_flags, check_names, compute_settings, held, shards_of, storage_of, train_folds

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from fracture.config import Config
    from fracture.dataset.format import Dataset
    from fracture.evaluation.comparison import Contender
    from fracture.evaluation.contenders import ContenderSettings
    from fracture.storage import StoragePath

_CONTENDERS = _cli.CONFIGS / "comparisons/default.yaml"
_IMAGES = 64  # that prediction is timed with


def main(args: argparse.Namespace) -> None:
    from fracture.errors import UsageError
    from fracture.evaluation.contenders import choose, read_contenders
    from fracture.lock import HeldError
    from fracture.progress.status import LOCK

    check_names(args)
    contenders = read_contenders(Path(args.models))
    chosen = choose(contenders, args.only)
    configs = {title: _config(args, title, entry.settings) for title, entry in contenders.items()}
    run = storage_of(args) / "runs" / args.run
    if (run / "run.json").is_file() or "fold-1" in run.folders():
        raise UsageError(f"{run} is a run of job/train.py, and no comparison. Give another --run name.")
    args.resume_hint = f"the same command with --run {args.run} (make: RUN={args.run})"
    try:
        with held(run / LOCK, f"comparison {run.name!r}", f"see job/train.py --status {run.name}"):
            lines = _train_and_compare(args, contenders, configs, chosen, run)
    except HeldError as error:
        raise UsageError(f"{error}. Wait for it to end, stop that job, or give another --run name.") from None
    print("\n".join(lines), flush=True)


def _config(args: argparse.Namespace, title: str, settings: dict[str, Any]) -> Config:
    """Of the file, of the contender and of the flags; 5 folds where nobody says how many."""
    from fracture.errors import UsageError

    file = _cli.CONFIGS / "quick.yaml" if args.data is None and args.shards is None else None
    own = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    flags = [*_cli.data_settings(args), *compute_settings(args)]
    asked = [*own, *flags]
    with _named(title):
        for assignment in [*flags, *args.assignments]:
            key = assignment.partition("=")[0].strip()
            if any(f"{name}.".startswith(f"{key}.") for name in settings):
                raise UsageError(
                    f"{assignment} is asked for all, and this one has its own {key}: it would not be what --models "
                    "says. Change it there, or leave out the flag."
                )
        config = _cli.settings(args, asked, file)
        if args.shards or "folds" in config.data.model_fields_set:
            return config
        return _cli.settings(args, [*asked, "data.folds=5"], file)


@contextmanager
def _named(title: str) -> Iterator[None]:
    """Names the contender in errors."""
    from fracture.errors import RunError, UsageError

    try:
        yield
    except UsageError as error:
        raise UsageError(f"contender {title!r}: {error}") from None
    except RunError as error:
        raise RunError(f"contender {title!r}: {error}. The others go on without it: --only TITLE ...") from None


def _train_and_compare(
    args: argparse.Namespace,
    contenders: dict[str, ContenderSettings],
    configs: dict[str, Config],
    chosen: Collection[str],
    run: StoragePath,
) -> list[str]:
    from fracture.dataset.format import read_dataset
    from fracture.errors import UsageError
    from fracture.evaluation.contenders import folder_of
    from fracture.inference.bundle import is_bundle
    from fracture.training.checks import check_batches, check_run, with_data_of

    shards = shards_of(args, next(iter(configs.values())), storage_of(args))
    dataset = read_dataset(shards)
    if not dataset.manifest.folds:
        raise UsageError(f"{shards} has no folds to compare on: make 5, here or in job/preprocess.py, with --folds 5.")
    configs = {title: with_data_of(config, dataset.manifest) for title, config in configs.items()}
    finished = set()
    for title, config in configs.items():  # before hours of training, and not after
        folds = [run / folder_of(title) / f"fold-{number}" for number in range(1, len(dataset.manifest.folds) + 1)]
        if all(is_bundle(fold / "bundle") for fold in folds):
            finished.add(title)
        elif title not in chosen:
            continue
        with _named(title):
            for number, fold in enumerate(folds, 1):
                check_batches(config, dataset.fold(number))
                check_run(fold, config, dataset.fold(number))
            if config.pretrained and title not in finished:
                from fracture.training.pretrained import check_backbone  # loads TensorFlow

                check_backbone(config)
    for number, title in enumerate(chosen, 1):
        print(f"contender  {number} of {len(chosen)}: {title}", flush=True)
        with _named(title):
            lines = train_folds(configs[title], dataset, run / folder_of(title), args.verbose)
        print("\n".join(lines), flush=True)
    shown = {title: entry for title, entry in contenders.items() if title in finished or title in chosen}
    return _compare(shown, dataset, run)


def _compare(contenders: dict[str, ContenderSettings], dataset: Dataset, run: StoragePath) -> list[str]:
    """Writes the page; what there is to say."""
    from fracture.evaluation.comparison import comparison_lines, table_lines, write_comparison
    from fracture.evaluation.report import caveats

    told = _measured(contenders, dataset, run)
    write_comparison(run, dataset.manifest, told, caveats(dataset.manifest))
    lines = [*comparison_lines(told), "", *table_lines(told), ""]
    lines += [f"CAVEAT     {line}" for line in caveats(dataset.manifest)]
    return [*lines, f"comparison {run / 'comparison.html'} (comparison.md: the table; comparison.json: all figures)"]


def _measured(contenders: dict[str, ContenderSettings], dataset: Dataset, run: StoragePath) -> list[Contender]:
    from fracture.dataset.format import images_of
    from fracture.evaluation.comparison import Contender, differences, figures, prediction_speeds, read_costs
    from fracture.evaluation.contenders import folder_of
    from fracture.evaluation.folds import pool_folds
    from fracture.inference.bundle import read_bundle

    folders = {title: run / folder_of(title) for title in contenders}
    models = {title: read_bundle(folder / "fold-1" / "bundle").model() for title, folder in folders.items()}
    images = images_of(dataset.read("fold-1", 0, _IMAGES), dataset.image_size)
    speeds = prediction_speeds(models, images)
    pooled = {title: pool_folds(folder, dataset.manifest) for title, folder in folders.items()}
    baseline = next(iter(contenders))  # the first of those that are there
    others = {
        title: [other for other in dict.fromkeys((baseline, entry.against)) if other in contenders and other != title]
        for title, entry in contenders.items()
    }
    pairs = sum(map(len, others.values()))
    return [
        Contender(
            title=title,
            folder=folder_of(title),
            settings=entry.settings,
            pooled=pooled[title],
            figures=figures(pooled[title]),
            costs=read_costs(folders[title], len(dataset.manifest.folds), models[title].count_params(), speeds[title]),
            differences={other: differences(pooled[title], pooled[other], pairs) for other in others[title]},
        )
        for title, entry in contenders.items()
    ]


if __name__ == "__main__":
    parser = _cli.parser(__doc__)
    add_flags(parser)
    which = parser.add_argument_group("contenders")
    which.add_argument(
        "--models",
        metavar="FILE",
        default=str(_CONTENDERS),
        help="YAML of contenders (default: fracture/configs/comparisons/default.yaml)",
    )
    which.add_argument("--only", metavar="TITLE", nargs="+", help="train these contenders alone")
    _cli.run(main, parser.parse_args())
