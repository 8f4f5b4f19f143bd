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
    import h5py
    import keras

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
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / file.name  # its ending tells Keras the format: .weights.h5 or, older, .h5
        local.write_bytes(file.read_bytes())
        try:
            backbone = build_backbone(config, str(local))
            _check_layer_names(local, backbone)
        except (OSError, ValueError, KeyError) as error:  # no HDF5; other layers or shapes; no weights in it
            setting = "quantum.backbone" if config.model.name == "qnn_transfer" else "model.name"
            raise UsageError(
                f"transfer.weights = {str(file)!r} does not hold the weights of {config.backbone} without top: "
                f"{str(error).splitlines()[0]} Name a file that does, or set {setting} to the network of this file."
            ) from None
    return backbone.get_weights()


def _check_layer_names(file: Path, backbone: "keras.Model") -> None:
    """Check the names of a file whose layers Keras took in their order, in which those of one shape may be exchanged.

    Some may be unknown, since Keras numbers layers without a name; Keras 2 wrote / for _.

    Raises:
        ValueError: a layer stands in another's place, or all are unknown.
    """
    import h5py  # of Keras' own dependencies

    with h5py.File(file) as content:
        group = content.get("model_weights", content)  # of a whole model, or weights alone
        names = [name for name in _read_names(group, "layer_names") if _read_names(group[name], "weight_names")]
    ours = [layer.name for layer in backbone.layers if layer.weights]
    theirs = [name.replace("/", "_") for name in names]
    found, expected = [name for name in theirs if name in ours], [name for name in ours if name in theirs]
    if theirs and not found:  # Keras 3's .weights.h5 has no such list, and is read by names
        raise ValueError(f"its layers have other names, such as {theirs[0]!r} for {ours[0]!r}.")
    for name, own in zip(found, expected, strict=True):
        if name != own:
            raise ValueError(f"its layer {name!r} stands where this network has {own!r}.")


def _read_names(group: "h5py.Group", attribute: str) -> list[str]:
    """Return a list of names, which Keras keeps in several attributes where it is long."""
    keys = sorted((key for key in group.attrs if key.startswith(attribute)), key=lambda key: (len(key), key))
    return [name.decode() if isinstance(name, bytes) else name for key in keys for name in group.attrs[key]]
