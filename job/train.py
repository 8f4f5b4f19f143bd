"""Train and test a fracture classifier on Ray workers; the same as `fracture train`, from a clone.

  python job/train.py                             sample radiographs, the quick recipe: minutes on 2 cores
  python job/train.py --data DIR --workers 2      your radiographs, the default recipe
  RAY_AUTH_MODE=token ray job submit --working-dir . -- python job/train.py --data s3://... --storage s3://...

Shows a line for each epoch, then the test result, and leaves model and report in STORAGE/runs/NAME.
"""

import sys

import _clone  # noqa: F401 - makes the next import find this clone

from fracture.cli import main

if __name__ == "__main__":
    sys.exit(main(command="train"))
