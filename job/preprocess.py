"""Write radiographs as Parquet shards for training; the same as `fracture preprocess`, from a clone.

  python job/preprocess.py --data DIR --out SHARDS

Shows the audit and the split. Every file is decoded once; the same command again is done in a second.
"""

import sys

import _clone  # noqa: F401 - makes the next import find this clone

from fracture.cli import main

if __name__ == "__main__":
    sys.exit(main(command="preprocess"))
