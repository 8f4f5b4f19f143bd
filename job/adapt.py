"""Adapt a finished model to few local cases; the same as `fracture adapt`, from a clone.

  python job/adapt.py --bundle runs/NAME/bundle --data DIR --out adapted/NAME

Shows the figures on the local cases by folds, and leaves a new bundle in OUT/bundle.
"""

import sys

import _clone  # noqa: F401 - makes the next import find this clone

from fracture.cli import main

if __name__ == "__main__":
    sys.exit(main(command="adapt"))
