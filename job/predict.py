"""Predict fractures in any number of radiographs; the same as `fracture predict`, from a clone.

  python job/predict.py --bundle runs/NAME/bundle --data DIR --out predictions.csv

Shows how many fractures are called, and writes one row per file.
"""

import sys

import _clone  # noqa: F401 - makes the next import find this clone

from fracture.cli import main

if __name__ == "__main__":
    sys.exit(main(command="predict"))
