"""Train several models on the same folds, and rank them; the same as `fracture compare`, from a clone.

  python job/compare.py --data DIR --run NAME

Costs contenders times folds times one training. Shows a table, and leaves the comparison in STORAGE/runs/NAME.
"""

import sys

import _clone  # noqa: F401 - makes the next import find this clone

from fracture.cli import main

if __name__ == "__main__":
    sys.exit(main(command="compare"))
