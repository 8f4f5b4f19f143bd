"""One network for each `model.name`, behind one function."""

from fracture.models.cnn import build_cnn as build_model  # the only `model.name` so far

__all__ = ["build_model"]
