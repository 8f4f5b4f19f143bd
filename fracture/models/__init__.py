"""One network for each `model.name`, behind one function."""

from fracture.models.cnn import build_cnn as build_model  # the only `model.name` so far
from fracture.models.cnn import weight_shapes

__all__ = ["build_model", "weight_shapes"]
