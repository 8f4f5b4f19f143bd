"""Search for better settings with many short trainings; the same as `fracture tune`, from a clone.

  python job/tune.py --data DIR --run NAME

Costs 12 trainings, of which most are stopped early. Leaves best.yaml in STORAGE/runs/NAME.
"""

import sys

import _clone  # noqa: F401 - makes the next import find this clone

from fracture.cli import main

if __name__ == "__main__":
    sys.exit(main(command="tune"))
