"""Train and test a fracture classifier on Ray workers: the main job.

  python job/train.py                                  sample radiographs, the quick recipe: minutes on 2 cores
  python job/train.py --data DIR --workers 2           your radiographs, the default recipe
  python job/train.py --shards SHARDS --run NAME       shards of job/preprocess.py; the same NAME again resumes
  ray job submit --working-dir . -- python job/train.py --data s3://... --storage s3://...

Preprocesses (where the shards are not there yet), trains with early stopping on validation loss, scores the best
weights once on test, and leaves in STORAGE/runs/NAME:

  bundle/            the model (model.keras, saved_model/) and bundle.json: metrics, threshold, settings, versions
  report/            curves.png, confusion_matrix.png, roc.png
  predictions.parquet, metrics.jsonl, config.yaml, tensorboard/, and the last two checkpoints

Exit codes: 0 success, 2 a mistake in what was asked, 1 anything else.
"""

from __future__ import annotations

import argparse
import re
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import _cli
from preprocess import prepare

if TYPE_CHECKING:
    from fracture.config import Config
    from fracture.evaluation.metrics import Metrics
    from fracture.input.shards import Manifest
    from fracture.storage import Place


def main(args: argparse.Namespace) -> None:
    from fracture.evaluation.report import caveats, result_lines
    from fracture.input.shards import read_manifest
    from fracture.release.bundle import read_test_metrics
    from fracture.storage import place
    from fracture.training.driver import check_batches, check_run, with_data_of

    _check_names(args)
    sample = args.data is None and args.shards is None
    config = _cli.settings(args, _compute_settings(args), _cli.CONFIGS / "quick.yaml" if sample else None)
    args.resume_hint = f"the same command with --run {args.run}"
    storage = place(args.storage or _cli.default_storage())
    run = storage / "runs" / args.run
    print(f"run        {run}", flush=True)
    shards = place(args.shards) if args.shards else _shards(args, config, storage)
    manifest = read_manifest(shards)
    config = with_data_of(config, manifest)
    check_batches(config, manifest)
    check_run(run, config, manifest)
    test = read_test_metrics(run / "bundle")
    if test is None:
        test = _train_and_test(config, shards, manifest, run, args.verbose)
    else:
        print("finished   earlier; a new training takes a new --run name")
    lines = [*result_lines(test), *(f"CAVEAT     {line}" for line in caveats(manifest))]
    lines += [f"bundle     {run / 'bundle'} (the model and its figures)", f"report     {run / 'report'} (plots)"]
    print("\n".join(lines), flush=True)


def _train_and_test(config: Config, shards: Place, manifest: Manifest, run: Place, verbose: bool) -> Metrics:
    from fracture.evaluation.report import metrics_of, write_report
    from fracture.evaluation.scores import gather_scores
    from fracture.release.bundle import THRESHOLD, write_bundle
    from fracture.training.driver import check_capacity, start_ray, train
    from fracture.training.screen import Screen

    start_ray(verbose)
    check_capacity(config)
    outcome = train(config, shards, manifest, run, Screen(config))
    scores = gather_scores(run, manifest, config.compute.workers)
    val, test = (metrics_of(scores, split, THRESHOLD) for split in ("val", "test"))
    write_report(run / "report", manifest, outcome.history, outcome.best_epoch, scores, test)
    training = {
        "name": run.name,
        "epochs": len(outcome.history),
        "best_epoch": outcome.best_epoch,
        "workers": config.compute.workers,
        "precision": outcome.precision,
    }
    write_bundle(run / "bundle", config, manifest, training, val, test)
    return test


def _shards(args: argparse.Namespace, config: Config, storage: Place) -> Place:
    """Prepares the named data, or sample radiographs where none is named; where the shards are."""
    from fracture.preparation.preprocess import shards_name
    from fracture.storage import place

    data = place(args.data) if args.data is not None else _sample(config, storage)
    shards = storage / "shards" / shards_name(data, config.data)
    prepare(data, shards, config, args.verbose)
    return shards


def _sample(config: Config, storage: Place) -> Place:
    from tqdm import tqdm

    from fracture.preparation.sample import make_sample

    folder = storage / "data" / f"sample-{config.sample.images}-{config.sample.seed}"
    print("sample     no --data and no --shards: training on SYNTHETIC sample radiographs, to try the job", flush=True)
    with tqdm(
        total=config.sample.images, desc="draw sample", unit=" images", leave=False, disable=not sys.stderr.isatty()
    ) as bar:
        make_sample(folder, config.sample, bar.update)
    return folder


def _compute_settings(args: argparse.Namespace) -> list[str]:
    flags = [f"compute.workers={args.workers}"] if args.workers is not None else []
    return flags + (["compute.gpu=true"] if args.gpu else [])


def _check_names(args: argparse.Namespace) -> None:
    from fracture.errors import UsageError

    for flag in ("data", "shards", "storage"):
        if getattr(args, flag) == "":
            raise UsageError(f"--{flag} is empty: name a folder, or leave the flag out")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", args.run):
        raise UsageError(f"--run {args.run!r}: a run's name is letters, digits, '.', '_' and '-', such as 2026-w48")


if __name__ == "__main__":
    parser = _cli.parser(__doc__)
    data = parser.add_argument_group("data").add_mutually_exclusive_group()
    data.add_argument("--data", metavar="DIR", help="folder or URI of radiographs; left out: synthetic samples")
    data.add_argument("--shards", metavar="SHARDS", help="folder or URI that job/preprocess.py wrote")
    where = parser.add_argument_group("run")
    where.add_argument("--storage", metavar="DIR", help="folder or URI that all workers reach, for shards and runs")
    where.add_argument(
        "--run",
        metavar="NAME",
        default=datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
        help="name of the run; one that was begun is resumed (default: the time)",
    )
    where.add_argument("--workers", metavar="N", type=int, help="training processes (default: compute.workers, 2)")
    where.add_argument("--gpu", action="store_true", help="give each worker a GPU")
    _cli.run(main, parser.parse_args())
