"""What to do where the memory of the device does not hold a step."""

from typing import Any

import numpy as np

from fracture.config import Config
from fracture.errors import RunError

_COPIES = 2  # of each layer's output in a step: itself, kept for the gradient, and a gradient or what a kernel needs


def explain_exhausted(config: Config, network: Any, memory: int) -> RunError:
    """Return the error of a worker whose device has no room for its part of a batch.

    Args:
        network: Keras model that was trained, or one like it.
        memory: bytes that were free on the device; 0 where that is not known.
    """
    size, workers = config.training.batch_size, config.compute.workers
    fits = suggest_batch_size(network, size, workers, memory)
    device = "GPU" if config.compute.gpu else "machine"
    fix = f"Train anew with --set training.batch_size={fits}" if fits else "Train anew with smaller images"
    return RunError(
        f"the memory of a worker's {device} does not hold its part of a batch, {-(-size // workers)} images of "
        f"training.batch_size = {size}. {fix}, under another --run name; or use more workers"
    )


def suggest_batch_size(network: Any, batch_size: int, workers: int, memory: int) -> int:
    """Return the largest half, quarter, ... of a batch whose step should fit; 0 where not one image a worker does.

    An estimate from the sizes of the layers' outputs.
    """
    most = memory // bytes_per_image(network) * workers if memory else batch_size
    while (batch_size := batch_size // 2) > most:
        pass
    return batch_size if batch_size >= workers else 0


def bytes_per_image(network: Any) -> int:
    """Estimate the bytes that a training step needs for each image."""
    sizes = {"float32": 4, "bfloat16": 2, "float16": 2}
    return sum(
        _COPIES * int(np.prod(layer.output.shape[1:])) * sizes.get(layer.compute_dtype, 4) for layer in network.layers
    )
