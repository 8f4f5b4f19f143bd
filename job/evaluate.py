"""Score a finished model on radiographs that are new to it; the same as `fracture evaluate`, from a clone.

  python job/evaluate.py --bundle runs/NAME/bundle --data DIR --out evaluations/NAME

Shows AUC, sensitivity and specificity with intervals, and leaves a report in OUT.
"""

import sys

import _clone  # noqa: F401 - makes the next import find this clone

from fracture.cli import main

if __name__ == "__main__":
    sys.exit(main(command="evaluate"))
