"""Show which parts of radiographs a model responds to; the same as `fracture explain`, from a clone.

  python job/explain.py --bundle runs/NAME/bundle --data DIR --out explanations/NAME

Leaves a page of Grad-CAM maps in OUT.
"""

import sys

import _clone  # noqa: F401 - makes the next import find this clone

from fracture.cli import main

if __name__ == "__main__":
    sys.exit(main(command="explain"))
