"""Predict fractures with a finished model, for any number of radiographs.

  python job/predict.py --bundle runs/NAME/bundle --data DIR --out predictions.csv
  python job/predict.py --registry REGISTRY --data s3://BUCKET/DIR --out predictions.parquet   the champion
  python job/predict.py --bundle BUNDLE --data SHARDS --out predictions.csv                    every row of shards

DIR holds images in any layout, or is one file; whatever lies there gets a row, but what systems leave (Thumbs.db, names
with a dot first). Preprocessing, calibration and threshold are the bundle's own, so that the figures are evaluation's.

The columns of FILE, whose ending says CSV or Parquet: path, below --data (of several --data the whole path; of shards
what their source column says); probability of a fracture, calibrated; decision, fracture or normal; error, why a file
cannot be read, its other columns being empty then. Rows are in the order of the paths, those of shards in theirs. A
FILE that is there is replaced, when all is done.
"""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING

import _cli

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fracture.inference.bundle import Bundle


def main(args: argparse.Namespace) -> None:
    from fracture.inference.predict import check_out, find_inputs, formulas, predict, summary, write_results
    from fracture.progress.bars import ProgressBars
    from fracture.runtime.cluster import start_ray
    from fracture.storage import storage_path

    bundle, facts = _bundle(args)
    out = storage_path(args.out)
    inputs = find_inputs([storage_path(data) for data in args.data], bundle.image_size)
    check_out(out, inputs)
    print(f"model      {', '.join(f'{name} {value}' for name, value in facts.items())}", flush=True)
    print(f"data       {', '.join(args.data)}: {sum(map(len, inputs)):,} files", flush=True)
    started = time.monotonic()
    start_ray(args.verbose)
    with nullcontext() if args.verbose else _cli.python_alone_on_stderr(), ProgressBars() as bars:
        results = predict(bundle, inputs, bars.show, gpu=args.gpu, verbose=args.verbose)
    write_results(out, results, facts)
    seconds = time.monotonic() - started
    print("\n".join(summary(results, bundle.operating_point.threshold)))
    print(f"speed      {len(results) / seconds:.3g} files/s, {seconds:.0f} s in all, Ray's start included")
    if bundle.synthetic:
        print("CAVEAT     SYNTHETIC MODEL: it was trained on drawn radiographs and knows nothing of real ones.")
    if out.name.lower().endswith(".csv") and (count := formulas(results)):
        print(f"CAVEAT     {count:,} paths begin with = + - or @: a spreadsheet would run them; import them as text.")
    print(f"results    {out} ({len(results):,} rows)", flush=True)


def _bundle(args: argparse.Namespace) -> tuple[Bundle, dict[str, str]]:
    """The bundle, and what a result says of where it comes from."""
    from fracture.inference.bundle import read_bundle
    from fracture.registry.registry import Registry
    from fracture.storage import storage_path

    bundle = (
        Registry(storage_path(args.registry)).champion_bundle()
        if args.registry
        else read_bundle(storage_path(args.bundle))
    )
    facts = {"bundle": str(bundle.folder), "threshold": f"{bundle.operating_point.threshold!r}"}
    return bundle, facts | ({"version": str(int(bundle.folder.name))} if args.registry else {})


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What is asked, on the command line or in `words`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-v", "--verbose", action="store_true", help="show the logs of Ray and TensorFlow, and traces")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--bundle", metavar="DIR", help="folder or URI of a finished run's bundle")
    which.add_argument("--registry", metavar="DIR", help="folder or URI of a registry, whose champion is used")
    parser.add_argument(
        "--data",
        metavar="DIR",
        action="append",
        required=True,
        help="folder, file or URI of radiographs, or a folder of shards; repeated: several",
    )
    parser.add_argument("--out", metavar="FILE", required=True, help="path or URI ending in .csv or .parquet")
    parser.add_argument("--gpu", action="store_true", help="score on the cluster's GPUs, and decode on its CPUs")
    parser.set_defaults(kept="no results were written")
    return parser.parse_args(words)


if __name__ == "__main__":
    _cli.run(main, arguments())
