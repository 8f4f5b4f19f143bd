"""List, show, promote, roll back or prune versions of a model; the same as `fracture registry`, from a clone.

python job/registry.py list --registry REGISTRY
"""

import sys

import _clone  # noqa: F401 - makes the next import find this clone

from fracture.cli import main

if __name__ == "__main__":
    sys.exit(main(command="registry"))
