"""Download the public Kaggle set of radiographs, 0.5 GB; the same as `fracture download`, from a clone.

python job/download.py --out data
"""

import sys

import _clone  # noqa: F401 - makes the next import find this clone

from fracture.cli import main

if __name__ == "__main__":
    sys.exit(main(command="download"))
