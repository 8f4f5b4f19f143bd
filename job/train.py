"""Train and test a fracture classifier on Ray workers: the main job.

  python job/train.py                                  sample radiographs, the quick recipe: minutes on 2 cores
  python job/train.py --data DIR --workers 2           your radiographs, the default recipe
  python job/train.py --shards SHARDS --run NAME       shards of job/preprocess.py; the same NAME again resumes
  RAY_AUTH_MODE=token ray job submit --working-dir . -- python job/train.py --data s3://... --storage s3://...
  python job/train.py --status NAME [--storage DIR]    how that run goes, from any machine, while it runs or after

Preprocesses (where the shards are not there yet), trains with early stopping on validation loss, scores the best
weights once on test, and leaves in STORAGE/runs/NAME:

  bundle/            the model (weights.npz, model.keras, saved_model/) and bundle.json: metrics, threshold, settings
  report/            report.html, and its plots as PNG files
  predictions.parquet, metrics.jsonl, config.yaml, tensorboard/, and the last two checkpoints

Exit codes: 0 success, 2 a mistake in what was asked, 1 anything else.
"""

from __future__ import annotations

import argparse
import re
import sys
import threading
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import _cli
from preprocess import find, prepare

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fracture.config import Config
    from fracture.dataset.format import Dataset
    from fracture.evaluation.metrics import Evaluation
    from fracture.inference.bundle import Bundle
    from fracture.storage import StoragePath

_taken_over = threading.Event()  # by another job, which took this one for dead


def main(args: argparse.Namespace) -> None:
    if args.status:
        from fracture.progress.status import status_lines

        check_names(args)
        print("\n".join(status_lines(storage_of(args) / "runs", args.status, datetime.now(UTC))))
        return
    config, storage, run = begin(args)
    with locked(run):
        lines = _prepare_and_train(args, config, storage, run)
    print("\n".join(lines), flush=True)


def begin(args: argparse.Namespace, more: Sequence[str] = ()) -> tuple[Config, StoragePath, StoragePath]:
    """The settings that are asked for, the storage, and the run's folder in it.

    Args:
        more: assignments of settings, of other flags.

    Raises:
        UsageError: what is asked for cannot be.
    """
    from fracture.training.checks import check_weights_file

    check_names(args)
    sample = args.data is None and args.shards is None
    flags = [*_cli.data_settings(args), *compute_settings(args), *more]
    config = _cli.settings(args, flags, _cli.CONFIGS / "quick.yaml" if sample else None)
    storage = storage_of(args)
    run = storage / "runs" / args.run
    args.resume_hint = f"the same command with --run {args.run} (make: RUN={args.run})"
    if config.pretrained and not run.folders():  # before the long look at the data; a run that has begun has its own
        check_weights_file(config)
    asked = {assignment.partition("=")[0].strip() for assignment in args.assignments}
    if idle := sorted(asked & config.without_effect):
        print(f"no effect  {', '.join(idle)}: not on {config.model.name} as it learns here", flush=True)
    return config, storage, run


def storage_of(args: argparse.Namespace) -> StoragePath:
    from fracture.storage import storage_path

    return storage_path(args.storage or _cli.default_storage())


def _prepare_and_train(args: argparse.Namespace, config: Config, storage: StoragePath, run: StoragePath) -> list[str]:
    """What there is to say of the finished run."""
    from fracture.dataset.format import read_dataset
    from fracture.errors import UsageError
    from fracture.training.checks import with_data_of

    shards = shards_of(args, config, storage)
    dataset = read_dataset(shards)
    manifest = dataset.manifest
    config = with_data_of(config, manifest)
    if not manifest.folds and "train" not in manifest.shards:
        raise UsageError(
            f"{shards}: all of it is test; there is nothing to train on. Preprocess with another data.split."
        )
    if manifest.folds:
        lines = train_folds(config, dataset, run, args.verbose)
    else:
        lines = _told(train_once(config, dataset, run, args.verbose), run)
    from fracture.evaluation.report import caveats

    return [*lines, *(f"CAVEAT     {line}" for line in caveats(manifest))]


@contextmanager
def locked(run: StoragePath) -> Iterator[None]:
    """Keeps other jobs out of the run, unless it is finished and will only be shown.

    Raises:
        UsageError: another job holds it.
        RunError: another job took it over.
    """
    from fracture.errors import UsageError
    from fracture.inference.bundle import is_bundle
    from fracture.lock import HeldError
    from fracture.progress.status import LOCK

    if is_bundle(run / "bundle"):
        yield
        return
    try:
        with held(run / LOCK, f"run {run.name!r}", f"see --status {run.name}"):
            yield
    except HeldError as error:
        raise UsageError(f"{error}. Wait for it to end, stop that job, or give another --run name.") from None


@contextmanager
def held(lock: StoragePath, name: str, where: str) -> Iterator[None]:
    """Holds the lock of what is called `name`, and stops this job where another takes it over.

    Args:
        where: how far it is can be seen.

    Raises:
        HeldError: another job holds it.
        RunError: another job took it over.
    """
    from fracture.errors import RunError
    from fracture.lock import Lease, claim_of_this_process
    from fracture.runtime.signals import stop_at_once, stop_by_signals

    def give_up() -> None:
        _taken_over.set()
        stop_at_once()

    def tell(line: str) -> None:
        print(f"lock       {line}", flush=True)

    stop_by_signals()  # so that the lock is given back
    try:
        with Lease(lock, claim_of_this_process(_job()), name, give_up, tell):
            yield
    except BaseException:
        if not _taken_over.is_set():
            raise
    if _taken_over.is_set():
        raise RunError(
            f"another job took over {name}: this one gave no sign of life in {lock} for half a minute, asleep or cut "
            f"off. Every finished epoch is kept; {where}"
        )


def _job() -> str:
    """What others are told of this job; not its arguments, which would be in the storage then."""
    return f"ray job {number}" if (number := _cli.submission()) else f"job/{Path(sys.argv[0]).name}"


def train_once(
    config: Config,
    dataset: Dataset,
    run: StoragePath,
    verbose: bool,
    initial: Bundle | None = None,
) -> dict[str, Evaluation]:
    """Trains and tests, unless that is done.

    Args:
        initial: a finished model whose weights training begins with.
    """
    from fracture.inference.bundle import is_bundle, read_bundle
    from fracture.training.checks import check_batches, check_run

    check_batches(config, dataset)
    check_run(run, config, dataset, initial)
    print(f"run        {run}", flush=True)
    if is_bundle(run / "bundle"):
        print("finished   earlier; a new training takes a new --run name")
        return read_bundle(run / "bundle").evaluations
    return _train_and_test(config, dataset, run, verbose, initial)


def train_folds(config: Config, dataset: Dataset, run: StoragePath, verbose: bool) -> list[str]:
    """Trains once for each fold, each a run of its own below `run`, and pools what they say of their test folds."""
    for number, title in enumerate(dataset.manifest.folds, 1):
        print(f"fold       {number} of {len(dataset.manifest.folds)}: {title} is test", flush=True)
        train_once(config, dataset.fold(number), run / f"fold-{number}", verbose)
    from fracture.evaluation.folds import fold_lines, pool_folds, write_folds
    from fracture.evaluation.report import caveats

    pooled = pool_folds(run, dataset.manifest)
    write_folds(run, dataset.manifest, pooled, caveats(dataset.manifest))
    return [*fold_lines(pooled), f"report     {run / 'folds.html'}"]


def _train_and_test(
    config: Config, dataset: Dataset, run: StoragePath, verbose: bool, initial: Bundle | None
) -> dict[str, Evaluation]:
    from fracture.progress.console import Console
    from fracture.progress.status import StatusWriter
    from fracture.runtime.cluster import check_capacity, start_ray
    from fracture.training.launch import train
    from fracture.training.phases import most_epochs

    with StatusWriter(run, most_epochs(config), may_write=lambda: not _taken_over.is_set()) as status:
        start_ray(verbose, to_train=True)
        check_capacity(config.compute)
        count = f"{config.compute.workers} worker{'s' if config.compute.workers > 1 else ''}"
        print(f"starting   {count} of Ray Train; about 15 seconds until the first step", flush=True)
        with Console() as console:
            outcome = train(config, dataset, run, [console.show, status.show], initial)
        # Only now: statistics and plots take a second to load, which the first step need not wait for.
        from fracture.workflows.finish import finish_run

        return finish_run(run, config, dataset, outcome, initial)


def _told(evaluations: dict[str, Evaluation], run: StoragePath) -> list[str]:
    """What a finished run says on the screen."""
    from fracture.evaluation.report import result_lines

    lines = [*result_lines(evaluations), f"bundle     {run / 'bundle'} (the model and its figures)"]
    return [*lines, f"report     {run / 'report' / 'report.html'}"]


def shards_of(args: argparse.Namespace, config: Config, storage: StoragePath) -> StoragePath:
    """The named shards; else prepares the named data, or sample radiographs where none is named."""
    from fracture.preparation.preprocess import shards_name
    from fracture.runtime.cluster import check_capacity, start_ray
    from fracture.storage import storage_path

    if args.shards:
        return storage_path(args.shards)

    def start() -> None:
        start_ray(args.verbose, to_train=True)
        check_capacity(config.compute)  # before the long look at the data

    roots = [storage_path(data) for data in args.data] if args.data else [_sample(config, storage)]
    source = find(args, roots, config)
    shards = storage / "shards" / shards_name(source, config.data)
    prepare(source, shards, config, start)
    return shards


def _sample(config: Config, storage: StoragePath) -> StoragePath:
    from fracture.preparation.sample import make_sample
    from fracture.progress.bars import ProgressBars

    folder = storage / "data" / f"sample-{config.sample.images}-{config.sample.seed}"
    print("sample     no --data and no --shards: training on SYNTHETIC sample radiographs, to try the job", flush=True)
    with ProgressBars() as bars:
        make_sample(folder, config.sample, lambda done: bars.show("draw sample", done, config.sample.images))
    return folder


def add_flags(parser: argparse.ArgumentParser, *, folds: bool = True) -> argparse._ArgumentGroup:
    """What every training is asked with; the group of those about the run."""
    data = parser.add_argument_group("data")
    which = data.add_mutually_exclusive_group()
    which.add_argument(
        "--data",
        metavar="DIR",
        action="append",
        help="folder or URI of radiographs, repeated: several origins; left out: synthetic samples",
    )
    which.add_argument("--shards", metavar="SHARDS", help="folder or URI that job/preprocess.py wrote")
    _cli.add_data_flags(data, folds=folds)
    where = parser.add_argument_group("run")
    where.add_argument("--storage", metavar="DIR", help="folder or URI that all workers reach, for shards and runs")
    where.add_argument(
        "--run",
        metavar="NAME",
        default=datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
        help="name of the run; one that was begun is resumed (default: the time)",
    )
    add_compute_flags(where)
    return where


def add_compute_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--workers",
        metavar="N",
        help="training processes (default: compute.workers, 2); 2:4: four, or at least two where machines are lost",
    )
    group.add_argument("--gpu", action="store_true", help="give each worker a GPU")


def compute_settings(args: argparse.Namespace) -> list[str]:
    least, colon, most = (args.workers or "").partition(":")
    flags = [f"compute.workers={most if colon else least}"] if args.workers is not None else []
    flags += [f"compute.min_workers={least}"] if colon else []
    return flags + (["compute.gpu=true"] if args.gpu else [])


def check_names(args: argparse.Namespace) -> None:
    from fracture.errors import UsageError

    if args.labels and not args.data:
        raise UsageError("--labels belongs to --data DIR: name the folder that its paths are in")
    for flag in ("data", "shards", "storage", "labels"):
        if "" in (getattr(args, flag), *(args.data or [])):
            raise UsageError(f"--{flag} is empty: name a folder, or leave the flag out")
    for flag, name in {"run": args.run, "status": getattr(args, "status", None)}.items():
        if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise UsageError(f"--{flag} {name!r}: a run's name is letters, digits, '.', '_' and '-', such as 2026-w48")


if __name__ == "__main__":
    parser = _cli.parser(__doc__)
    where = add_flags(parser)
    where.add_argument("--status", metavar="NAME", help="say how that run goes, and end; needs only --storage")
    _cli.run(main, parser.parse_args())
