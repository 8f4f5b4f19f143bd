"""Write a model for Keras 3, TensorFlow, ONNX or TFLite; the same as `fracture export`, from a clone.

  python job/export.py --bundle runs/NAME/bundle --to onnx

Shows what was written, and the line of Python that loads it.
"""

import sys

import _clone  # noqa: F401 - makes the next import find this clone

from fracture.cli import main

if __name__ == "__main__":
    sys.exit(main(command="export"))
