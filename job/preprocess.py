"""Turn a folder of radiographs into Parquet shards for training.

  python job/preprocess.py --data DIR --out SHARDS

DIR holds train/, val/ and test/, or class folders alone (then the split is random, by data.seed). Class folders are
named fracture, fractured, normal, not fractured and the like, in any case. Files may be JPEG, PNG, GIF, BMP, WebP or
TIFF under any name; what cannot be read is left out and listed in SHARDS/dataset.json. DIR is never changed.
Runs at some 900 images a second on 2 cores; run again on the same input, it is done in a second.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

import _cli

if TYPE_CHECKING:
    from fracture.config import Config
    from fracture.storage import Place


def main(args: argparse.Namespace) -> None:
    from fracture.storage import place

    prepare(place(args.data), place(args.out), _cli.settings(args), args.verbose)


def prepare(data: Place, out: Place, config: Config, verbose: bool) -> None:
    """Makes the shards of `data` in `out`, unless they are there, and prints what was found."""
    from fracture.preparation.preprocess import find_done, preprocess, summary
    from fracture.preparation.source import find_source
    from fracture.training.driver import start_ray

    source = find_source(data, config.data)
    print(f"data       {data}{' (SYNTHETIC)' if source.synthetic else ''}", flush=True)
    manifest = find_done(source, out, config.data)
    state = "unchanged since they were written"
    if manifest is None:
        from tqdm import tqdm

        start_ray(verbose)
        with tqdm(
            total=len(source.files), desc="preprocess", unit=" images", leave=False, disable=not sys.stderr.isatty()
        ) as bar:
            manifest = preprocess(source, out, config.data, bar.update)
        state = "written"
    print(summary(manifest, len(source.files)))
    print(f"shards     {out} ({state})", flush=True)


if __name__ == "__main__":
    parser = _cli.parser(__doc__)
    parser.add_argument("--data", metavar="DIR", required=True, help="folder or URI of the radiographs")
    parser.add_argument("--out", metavar="SHARDS", required=True, help="folder or URI to write the shards to")
    _cli.run(main, parser.parse_args())
