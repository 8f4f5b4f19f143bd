"""The weights that a backbone begins with. They are kept with the run, so that every worker has the same."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fracture.arrays import Expected, limit_bytes, load_arrays, save_arrays
from fracture.config import Config
from fracture.errors import RunError, UsageError
from fracture.models.transfer import build_backbone
from fracture.storage import StoragePath, storage_path
from fracture.training.checkpoint import BACKBONE
from fracture.training.checks import check_weights_file

if TYPE_CHECKING:
    from fracture.inference.bundle import Bundle


def keep_backbone(run: StoragePath, config: Config, initial: "Bundle | None") -> None:
    """Write the backbone's weights into the run, unless they are there.

    Args:
        initial: the finished model to take them from; None takes those that `transfer.weights` names.

    Raises:
        UsageError: there is no such file, or it holds the weights of another network.
        RunError: they cannot be downloaded.
    """
    if (run / BACKBONE).is_file():
        return
    expected = _expected(config)
    arrays = _named_weights(config) if initial is None else initial.load_weights()[: len(expected)]
    with tempfile.TemporaryDirectory() as folder:
        save_arrays(Path(folder) / BACKBONE, {e.name: array for e, array in zip(expected, arrays, strict=True)})
        run.upload(Path(folder))


def check_backbone(config: Config) -> None:
    """Check that the weights that `transfer.weights` names can be read; raises as `keep_backbone`."""
    _named_weights(config)


def read_backbone(run: StoragePath, config: Config) -> list[np.ndarray]:
    """Return the backbone's weights that are kept with the run, in layer order."""
    expected, file = _expected(config), run / BACKBONE
    fix = "Remove it; the next start writes it again."
    return load_arrays(file.read_bytes(most=limit_bytes(expected)), expected, file, fix)


def _named_weights(config: Config) -> list[np.ndarray]:
    """Return the weights that `transfer.weights` names, in layer order."""
    if config.transfer.weights == "imagenet":
        return _download(config)
    return _read_file(config)


def _expected(config: Config) -> list[Expected]:
    weights = build_backbone(config).weights
    return [Expected(weight.path, tuple(weight.shape), np.dtype(np.float32)) for weight in weights]


def _download(config: Config) -> list[np.ndarray]:
    import keras  # after fracture.models, which silences TensorFlow as it loads

    keras.config.disable_interactive_logging()  # its progress bar
    try:
        return build_backbone(config, "imagenet").get_weights()
    except Exception as error:  # urllib's, Keras' own for what it got, or the disk's
        reason = str(error).splitlines()[0]
        raise RunError(
            f"the ImageNet weights of {config.backbone} cannot be downloaded: {reason}. Fetch their file ..._no_top.h5 "
            "where there is a network, and name it: --set transfer.weights=FILE.h5; or train without them: "
            "--set transfer.weights=none"
        ) from None
    finally:
        keras.config.enable_interactive_logging()


def _read_file(config: Config) -> list[np.ndarray]:
    check_weights_file(config)
    file = storage_path(config.transfer.weights)
    backbone = build_backbone(config)
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / file.name  # its ending tells Keras the format: .weights.h5 or, older, .h5
        local.write_bytes(file.read_bytes())
        try:
            backbone.load_weights(local)
        except (OSError, ValueError, KeyError) as error:  # no HDF5; other layers or shapes; no weights in it
            raise UsageError(
                f"transfer.weights = {str(file)!r} does not hold the weights of {config.backbone} without top: "
                f"{str(error).splitlines()[0]} Name a file that does, or set model.name to the network of this file."
            ) from None
    return backbone.get_weights()
