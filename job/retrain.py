"""Retrain on data that grows, and promote the model if it is no worse; the same as `fracture retrain`, from a clone.

  python job/retrain.py --data DIR --registry REGISTRY

Costs one training where something is new, else seconds. Exit code 10: the model was rejected.
"""

import sys

import _clone  # noqa: F401 - makes the next import find this clone

from fracture.cli import main

if __name__ == "__main__":
    sys.exit(main(command="retrain"))
