"""The network that a phase trains, with its weights, and its data."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from fracture.config import AugmentConfig, Config
from fracture.dataset.augment import augment
from fracture.dataset.format import Manifest
from fracture.dataset.pipeline import WorkerRows
from fracture.models import build_model
from fracture.models.transfer import FEATURES, build_backbone, build_head
from fracture.progress.events import FeaturesComputed
from fracture.training.checkpoint import LoopState
from fracture.training.features import Moments, compute_features, match_sources, mean_and_variance, measure_sources
from fracture.training.phases import Phase
from fracture.training.ridge_head import solve_head
from fracture.training.setup import Worker
from fracture.training.step import Replica
from fracture.training.strategy import adder

layers = keras.layers
_IMAGE_SHARE = 0.25  # of the GPU's memory, that images may take


@dataclass(frozen=True)
class PhaseModel:
    """A network with the data of a phase."""

    network: keras.Model
    replica: Replica
    train: WorkerRows
    val: WorkerRows
    augment: AugmentConfig

    @property
    def precision(self) -> str:
        """Return the Keras policy that the model computes with."""
        return self.network.get_layer("logit").dtype_policy.name

    @property
    def trainable_parameters(self) -> int:
        """Return the number of parameters that the phase trains."""
        return sum(int(np.prod(variable.shape)) for variable in self.network.trainable_variables)


def build_phase_model(worker: Worker, phase: Phase, state: LoopState) -> PhaseModel:
    """Build the network of a phase with its data. Every worker calls it.

    Args:
        state: inside the phase, it holds the weights and the optimizer of the trained model; at the beginning of the
            phase, the weights of the whole network, or none. Without weights, the network begins with those of the
            pretrained backbone, if there is one, under a head with random weights.
    """
    assignment, strategy, backbone = worker.assignment, worker.strategy, worker.backbone
    config, manifest = assignment.config, assignment.dataset.manifest
    each_part = partial(_report_features, worker)
    # Features are computed in float32, as the exported model computes them.
    keras.config.set_dtype_policy("float32" if phase.on_frozen_features else state.precision)
    train, val, augmentation, width = worker.train, worker.val, config.augment, 0
    is_new = not state.weights
    if backbone and (phase.on_frozen_features or is_new):
        pretrained = build_backbone(config)
        pretrained.set_weights(backbone)
        width = pretrained.output_shape[-1]
        mirrored = phase.on_frozen_features and augmentation.horizontal_flip
        features = compute_features(pretrained, train, mirrored, each_part)
        if phase.on_frozen_features:
            val = compute_features(pretrained, val, False, each_part)
        if config.transfer.standardise == "source":
            features, val, moments = _match_sources(worker, features, val)
        elif is_new or phase.in_closed_form:
            moments = mean_and_variance(features, adder(strategy, width))
        if phase.on_frozen_features:
            train, augmentation = features, _only_mirroring(augmentation)
            val = replace(val, images=val.images[:, 0])
    keras.utils.set_random_seed(config.training.seed)
    with strategy.scope():
        network, optimizer = _build(config, manifest, phase, train.steps, width)
    if state.weights:
        network.set_weights(state.weights[-len(network.weights) :])  # those of a head are the last
    elif backbone and not phase.on_frozen_features:
        network.set_weights([*backbone, *network.get_weights()[len(backbone) :]])
    if backbone and (is_new or phase.in_closed_form):  # also of a model whose training goes on from another's weights
        network.get_layer("standardise").set_weights(moments)
    if phase.in_closed_form:
        network.get_layer("logit").set_weights(solve_head(worker, features, moments))
    if state.optimizer:
        for variable, value in zip(optimizer.variables, state.optimizer, strict=True):
            variable.assign(value)
    if train.images.nbytes + val.images.nbytes <= worker.free_memory * _IMAGE_SHARE:
        train, val = train.copy_to_device(), val.copy_to_device()
    prepare = _choose_features if phase.on_frozen_features else augment
    replica = Replica(
        strategy,
        network,
        optimizer,
        lambda batch, *augmentation: prepare(train.take(batch), *augmentation),
        val.take,
        config.training.label_smoothing,
        config.uses_xla,
    )
    return PhaseModel(network, replica, train, val, augmentation)


def _match_sources(worker: Worker, train: WorkerRows, val: WorkerRows) -> tuple[WorkerRows, WorkerRows, Moments]:
    """Bring the features of all sources to one mean and variance, those of the average source, and return these too."""
    sources, add = worker.indices["train"].sources, adder(worker.strategy, train.images.shape[-1])
    moments = measure_sources(train, sources, add)
    common = tuple(np.mean(each, axis=0) for each in zip(*moments.values(), strict=True))
    val = match_sources(val, worker.indices["val"].sources, moments, common)
    return match_sources(train, sources, moments, common), val, common


def _report_features(worker: Worker, done: int, count: int) -> None:
    if done < count:
        worker.watchdog.busy("computing features")
    else:
        worker.watchdog.rest("waiting for the others' features")
    if worker.rank == 0:
        worker.assignment.channel.send(FeaturesComputed(done, count))


def _choose_features(features: tf.Tensor, transforms: tf.Tensor, exposures: tf.Tensor) -> tf.Tensor:
    """Choose the features [N, F] of the image or its mirror image from [N, 1 or 2, F]."""
    mirrored = tf.cast(transforms[:, 0] < 0, tf.int32)
    return tf.gather(features, mirrored, axis=1, batch_dims=1)


def _only_mirroring(augment: AugmentConfig) -> AugmentConfig:
    """Return the settings without any augmentation but horizontal flips."""
    none = dict.fromkeys(("rotation_degrees", "zoom", "stretch", "shift", "exposure"), 0.0)
    return augment.model_copy(update=none | {"vertical_flip": False})


def _build(config: Config, manifest: Manifest, phase: Phase, steps: int, width: int) -> tuple[keras.Model, Any]:
    """Build the network, and its optimizer with all of its variables."""
    optimizer = keras.optimizers.Adam(
        _schedule(config, phase, steps), weight_decay=config.training.weight_decay or None
    )
    if phase.on_frozen_features:
        network = build_head(config, width, step=lambda: optimizer.iterations.value)
    else:
        network = build_model(config, manifest.pixel_mean, manifest.pixel_std, step=lambda: optimizer.iterations.value)
        if phase.trains != "all":
            _freeze(network, config.transfer.unfreeze if phase.trains == "fine-tuning" else 0)
    scaled = keras.config.dtype_policy().name == "mixed_float16"  # else small gradients would be 0
    trained = keras.optimizers.LossScaleOptimizer(optimizer) if scaled else optimizer
    trained.build(network.trainable_variables)
    return network, trained


def _freeze(network: keras.Model, unfrozen: int | str) -> None:
    """Freeze the backbone except its last layers, as many as `unfrozen`.

    Batch norms stay frozen there too: the statistics of a few small batches would undo the pretraining.
    """
    pooled = next(number for number, layer in enumerate(network.layers) if layer.name.startswith(FEATURES))
    backbone = network.layers[:pooled]
    first = 0 if unfrozen == "all" else max(len(backbone) - unfrozen, 0)
    for number, layer in enumerate(backbone):
        layer.trainable = number >= first and not isinstance(layer, layers.BatchNormalization)


def _schedule(config: Config, phase: Phase, steps: int) -> Any:
    """Return the learning rate, or its schedule, over a phase of so many steps an epoch."""
    if config.training.schedule == "constant":
        return phase.learning_rate
    # https://arxiv.org/abs/1608.03983, without restarts
    return keras.optimizers.schedules.CosineDecay(phase.learning_rate, decay_steps=steps * phase.epochs)


def learning_rate(config: Config, phase: Phase, steps: int, step: int) -> float:
    """Return the learning rate of a step, counted from 0 over the whole phase.

    Keras' optimizer has that of its last step only if it has done one since it was made.
    """
    schedule = _schedule(config, phase, steps)
    return float(schedule(step) if callable(schedule) else schedule)
