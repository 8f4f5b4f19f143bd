"""Checks of a run before it starts: its folder, its settings, its data and the weights that it begins with."""

import json
from typing import TYPE_CHECKING

from fracture.config import Config, DataConfig, flatten, rename_settings, with_settings
from fracture.dataset.format import Dataset, Manifest
from fracture.dataset.sharding import ShardedBatches
from fracture.errors import UsageError
from fracture.progress.status import LOCK, STATUS
from fracture.storage import StoragePath, storage_path
from fracture.training.checkpoint import BACKBONE

if TYPE_CHECKING:  # loading it takes a tenth of a second of a job's start
    from fracture.inference.bundle import Bundle

RUN_CARD = "run.json"  # the data and settings that a run was started with
_SCRATCH = "scratch"


def with_data_of(config: Config, manifest: Manifest) -> Config:
    """Return the settings with `data.*` as the data set was made with.

    Raises:
        UsageError: a setting of `data` was given that the data set does not have, or others do not fit to it.
    """
    made_with = DataConfig.model_validate_json(json.dumps(manifest.parameters))
    for key in config.data.model_fields_set:
        given, has = getattr(config.data, key), getattr(made_with, key)
        if given != has:
            raise UsageError(
                f"data.{key} = {given!r} is set, and the shards were made with {has!r}. "
                "Preprocess again with the new setting, or leave it out."
            )
    try:
        return with_settings(config, {"data": made_with.model_dump(mode="json")})
    except UsageError as error:  # a rule across sections, which the settings kept with their own `data`
        raise UsageError(f"the shards' images have {made_with.image_size} pixels: {error}") from None


def check_batch_size(batch_size: int, images: int, which: str = "images") -> None:
    """Raise UsageError where a batch would be larger than the data.

    Args:
        images: of training, or a number that these cannot be more than.
        which: these images are, for the message.
    """
    if batch_size > images:
        raise UsageError(f"training.batch_size = {batch_size} is more than the {images} {which}. Use a smaller one.")


def check_data(config: Config, dataset: Dataset) -> None:
    """Check that the settings can be trained with on this data.

    Raises:
        UsageError: see `check_batches` and `check_head`.
    """
    check_batches(config, dataset)
    check_head(config, dataset)


def check_batches(config: Config, dataset: Dataset) -> None:
    """Check that each worker has an image in each step: TensorFlow has no empty convolution.

    Raises:
        UsageError: a worker would have none.
    """
    batch_size = config.training.batch_size
    most = config.compute.workers
    check_batch_size(batch_size, dataset.rows("train"), "training images")
    for split in ("train", "val"):
        rows = dataset.rows(split)
        for workers, rank in ((n, rank) for n in range(config.compute.fewest, most + 1) for rank in range(n)):
            if (ShardedBatches(rows, batch_size, rank, workers).indices(seed=None) < 0).all(axis=1).any():
                raise UsageError(
                    f"{rows} {split} images in batches of {batch_size} leave one of {workers} workers with nothing to "
                    "do in a step. Use fewer --workers, or more images."
                )


def check_head(config: Config, dataset: Dataset) -> None:
    """Check that a ridge head can be fitted: its penalty is chosen by folds, of which each trains on both classes.

    Raises:
        UsageError: training has a class of one group.
    """
    if not (config.pretrained and config.transfer.head == "ridge"):
        return
    for name, groups in dataset.manifest.groups["train"].items():
        if groups < 2:
            raise UsageError(
                f"transfer.head = ridge: {dataset.folder} has {groups} group of {name} images to train on, and folds "
                "of training need 2 of each class. Use transfer.head = logistic, or more radiographs."
            )


def check_run(run: StoragePath, config: Config, dataset: Dataset, initial: "Bundle | None" = None) -> None:
    """Check that the run's folder is empty, or holds this very run as far as it got.

    Args:
        initial: the model whose weights the run begins with.

    Raises:
        UsageError: the run was started with other settings or other data, or the folder holds something else.
    """
    if not (run / RUN_CARD).is_file():
        ours = (f"{run.path}/{LOCK}/", f"{run.path}/{STATUS}", f"{run.path}/{BACKBONE}")
        if any(not info.base_name.endswith(".part") and not info.path.startswith(ours) for info in run.files()):
            raise UsageError(f"{run} holds other things than a run. Give another --run name.")
        return
    card = (run / RUN_CARD).read_json()
    recipe = card["recipe"] | {"data": rename_settings(card["recipe"]["data"])}
    # A setting that the version before did not have is as it was then: the default.
    before = dict(flatten(Config().recipe())) | dict(flatten(recipe))
    if isinstance(before.get("training.xla"), bool):  # of the version before, whose run may be finished
        before["training.xla"] = config.training.xla
    changed = [f"{k} {before.get(k)!r} -> {v!r}" for k, v in flatten(config.recipe()) if before.get(k) != v]
    if changed:
        raise UsageError(
            f"run {run.name!r} was started with other settings: {'; '.join(changed)}. "
            "Give the same settings to go on with it, or another --run name."
        )
    if card["dataset"] != dataset.manifest.fingerprint:
        raise UsageError(f"run {run.name!r} was started with other data. Give another --run name.")
    if card.get("initial_weights", _SCRATCH) != describe_initial_weights(config, initial):
        raise UsageError(
            f"run {run.name!r} was started with other weights: {card.get('initial_weights', _SCRATCH)}, not "
            f"{describe_initial_weights(config, initial)}. Give another --run name."
        )


def write_run_card(run: StoragePath, config: Config, dataset: Dataset, initial: "Bundle | None") -> None:
    """Write down what the run begins with, for `check_run`."""
    card = {
        "dataset": dataset.manifest.fingerprint,
        "recipe": config.recipe(),
        "initial_weights": describe_initial_weights(config, initial),
    }
    (run / RUN_CARD).write_json(card)


def describe_initial_weights(config: Config, initial: "Bundle | None") -> str:
    """Return what the weights began as: a bundle, a file, `imagenet`, or `scratch`."""
    if initial:
        return str(initial.folder)
    return config.transfer.weights if config.pretrained else _SCRATCH


def check_weights_file(config: Config) -> None:
    """Check the setting `transfer.weights`.

    Raises:
        UsageError: it names neither `imagenet` nor a file, or `transfer.pixel_scaling` is that of other weights.
    """
    weights, scaling = config.transfer.weights, config.transfer.pixel_scaling
    if weights == "imagenet" and scaling == "radimagenet":
        raise UsageError(
            "transfer.pixel_scaling = 'radimagenet' does not belong to transfer.weights = 'imagenet'. Name a file of "
            "RadImageNet's weights, or leave out transfer.pixel_scaling."
        )
    if weights != "imagenet" and not (weights.endswith(".h5") and storage_path(weights).is_file()):
        raise UsageError(
            f"transfer.weights = {weights!r}: there is no such file, or it does not end in .h5. Name imagenet, none, "
            f"or a file of the weights of {config.backbone} without top, as keras.applications writes them."
        )
    if scaling == "imagenet" and "radimagenet" in storage_path(weights).name.lower():
        raise UsageError(
            f"transfer.weights = {weights!r} has RadImageNet in its name, whose weights were trained with another "
            "scaling of the pixels. Add --set transfer.pixel_scaling=radimagenet; rename the file if it is another."
        )


def check_initial(config: Config, initial: "Bundle") -> None:
    """Check that a model's weights fit the network that the settings describe.

    Raises:
        UsageError: it is another network.
    """
    from fracture.models import weight_shapes

    wanted, there = weight_shapes(config), weight_shapes(initial.config)
    for which, shapes in ((config, wanted), (initial.config, there)):
        # These change what the weights mean, and not their shapes.
        shapes["quantum.circuit"] = which.quantum.circuit
        if which.backbone:
            for name in ("pixel_scaling", "pooling", "reductions", "inverted"):
                shapes[f"transfer.{name}"] = getattr(which.transfer, name)
    differing = [name for name in wanted | there if wanted.get(name) != there.get(name)]
    if differing:
        name = differing[0]
        raise UsageError(
            f"training cannot begin with the weights of {initial.folder}: its network has {there.get(name, 'no')} at "
            f"{name!r}, and these settings {wanted.get(name, 'no')}. Use its model settings, or begin from scratch."
        )
