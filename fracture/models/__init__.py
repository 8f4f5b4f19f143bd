"""One network for each `model.name`, behind one function."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing is written to stderr: TensorFlow's C++ side writes there as it loads, at whatever log level."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


with _quiet():
    import tensorflow as tf

    tf.config.list_physical_devices()  # complains where there is no GPU
    from fracture.models.cnn import build_cnn as build_model  # the only `model.name` so far
    from fracture.models.cnn import weight_shapes

__all__ = ["build_model", "weight_shapes"]
