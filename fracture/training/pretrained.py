"""The weights that a backbone begins with: found once, and kept with the run, so that every worker begins alike."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fracture.arrays import Expected, file_bytes, load_arrays, save_arrays
from fracture.config import Config
from fracture.errors import RunError, UsageError
from fracture.models.transfer import build_backbone
from fracture.storage import StoragePath, storage_path
from fracture.training.checkpoint import BACKBONE
from fracture.training.checks import check_weights_file

if TYPE_CHECKING:
    from fracture.inference.bundle import Bundle


def keep_backbone(run: StoragePath, config: Config, initial: "Bundle | None") -> None:
    """Writes them into the run, unless it has them.

    Args:
        initial: a finished model whose they are; None: they are those that `transfer.weights` names.

    Raises:
        UsageError: there is no such file, or it is of another network.
        RunError: they cannot be downloaded.
    """
    if (run / BACKBONE).is_file():
        return
    expected = _expected(config)
    arrays = _named_weights(config) if initial is None else initial.weights()[: len(expected)]
    with tempfile.TemporaryDirectory() as folder:
        save_arrays(Path(folder) / BACKBONE, arrays, [array.name for array in expected])
        run.upload(Path(folder))


def check_backbone(config: Config) -> None:
    """Looks whether the weights that `transfer.weights` names can be had; raises as `keep_backbone`."""
    _named_weights(config)


def read_backbone(run: StoragePath, config: Config) -> list[np.ndarray]:
    """In the order of the backbone's."""
    expected, file = _expected(config), run / BACKBONE
    fix = "Remove it; it is made anew."
    return load_arrays(file.read_bytes(most=file_bytes(expected)[1]), expected, file, fix)


def _named_weights(config: Config) -> list[np.ndarray]:
    """In the order of the backbone's."""
    if config.transfer.weights == "imagenet":
        return _downloaded(config)
    return _from_file(config)


def _expected(config: Config) -> list[Expected]:
    weights = build_backbone(config).weights
    return [Expected(weight.name, tuple(weight.shape), np.dtype(np.float32)) for weight in weights]


def _downloaded(config: Config) -> list[np.ndarray]:
    import tf_keras as keras  # not before fracture.models, which keeps TensorFlow quiet as it loads

    keras.utils.disable_interactive_logging()  # its progress bar
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
        keras.utils.enable_interactive_logging()


def _from_file(config: Config) -> list[np.ndarray]:
    check_weights_file(config)
    file = storage_path(config.transfer.weights)
    backbone = build_backbone(config)
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "weights.h5"
        local.write_bytes(file.read_bytes())
        try:
            backbone.load_weights(local)
        except (OSError, ValueError, KeyError) as error:  # no HDF5; other layers or shapes; no weights in it
            raise UsageError(
                f"transfer.weights = {str(file)!r} does not hold the weights of {config.backbone} without top: "
                f"{str(error).splitlines()[0]} Name a file that does, or set model.name to the network it is of."
            ) from None
    return backbone.get_weights()
