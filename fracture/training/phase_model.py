"""The model that a phase trains: the compiled network with its weights, and its data."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tf_keras as keras

from fracture.config import AugmentConfig, Config
from fracture.dataset.format import Manifest
from fracture.dataset.pipeline import WorkerRows
from fracture.models import build_model
from fracture.models.transfer import build_backbone, build_head
from fracture.training.augmenting import AugmentingModel, MirroringModel
from fracture.training.checkpoint import Arrays, LoopState
from fracture.training.features import compute_features, mean_and_variance
from fracture.training.phases import Phase
from fracture.training.strategy import agreement

layers = keras.layers


@dataclass(frozen=True)
class PhaseModel:
    """A compiled model with the data of a phase."""

    model: AugmentingModel
    metrics: list[Any]  # of training and validation
    weighted_loss: Any  # a metric, of validation alone
    train: WorkerRows
    val: WorkerRows
    augment: AugmentConfig

    @property
    def precision(self) -> str:
        """Return the Keras policy that the model computes with."""
        return self.model.get_layer("logit").dtype_policy.name

    @property
    def trainable_parameters(self) -> int:
        """Return the number of parameters that the phase trains."""
        return sum(int(np.prod(variable.shape)) for variable in self.model.trainable_variables)

    def moving_averages(self) -> list[Any]:
        """Return the moving averages of the batch norms that are trained."""
        norms = [layer for layer in self.model.layers if isinstance(layer, layers.BatchNormalization)]
        return [variable for norm in norms if norm.trainable for variable in norm.non_trainable_variables]


def build_phase_model(
    strategy: Any,
    config: Config,
    manifest: Manifest,
    phase: Phase,
    state: LoopState,
    backbone: Arrays,
    rows: tuple[WorkerRows, WorkerRows],
    each_part: Callable[[int, int], None],
) -> PhaseModel:
    """Build the model of a phase with its data. Every worker calls it.

    Args:
        state: inside the phase, it holds the weights and the optimizer of the trained model; at the beginning of the
            phase, the weights of the whole network, or none.
        backbone: pretrained weights of the backbone, or none. A state without weights begins with these, under a head
            with random weights.
        rows: this worker's images of training and of validation.
        each_part: is called with the number of images whose features are computed, and of all images.
    """
    # Features are computed in float32, as the exported model computes them.
    keras.mixed_precision.set_global_policy("float32" if phase.on_frozen_features else state.precision)
    (train, val), augment, width = rows, config.augment, 0
    is_new = not state.weights
    if backbone and (phase.on_frozen_features or is_new):
        pretrained = build_backbone(config)
        pretrained.set_weights(backbone)
        width = pretrained.output_shape[-1]
        mirrored = phase.on_frozen_features and augment.horizontal_flip
        features = compute_features(pretrained, train, mirrored, each_part)
        if is_new:
            moments = mean_and_variance(features, agreement(strategy, width))
        if phase.on_frozen_features:
            train, augment = features, _only_mirroring(augment)
            val = compute_features(pretrained, val, False, each_part)
            val = replace(val, images=val.images[:, 0])
    keras.utils.set_random_seed(config.training.seed)
    with strategy.scope():
        model, metrics, weighted_loss = _compile(config, manifest, phase, train.steps, width)
    if state.weights:
        model.set_weights(state.weights[-len(model.weights) :])  # those of a head are the last
    elif backbone:
        if not phase.on_frozen_features:
            model.set_weights([*backbone, *model.get_weights()[len(backbone) :]])
        model.get_layer("standardise").set_weights(moments)
    if state.optimizer:
        for variable, value in zip(optimizer_state(model.optimizer), state.optimizer, strict=True):
            variable.assign(value)
    return PhaseModel(model, metrics, weighted_loss, train, val, augment)


def _only_mirroring(augment: AugmentConfig) -> AugmentConfig:
    """Return the settings without any augmentation but horizontal flips."""
    none = dict.fromkeys(("rotation_degrees", "zoom", "stretch", "shift", "exposure"), 0.0)
    return augment.model_copy(update=none | {"vertical_flip": False})


def _compile(
    config: Config, manifest: Manifest, phase: Phase, steps: int, width: int
) -> tuple[AugmentingModel, list[Any], Any]:
    """Return the compiled model, its metrics, and the metric that weights each row."""
    training = config.training
    optimizer = keras.optimizers.Adam(_schedule(config, phase, steps), weight_decay=training.weight_decay or None)
    if phase.on_frozen_features:
        network = build_head(config, width, step=lambda: optimizer.iterations)
        model = MirroringModel(network.inputs, network.outputs)
    else:
        network = build_model(config, manifest.pixel_mean, manifest.pixel_std, step=lambda: optimizer.iterations)
        if phase.trains != "all":
            _freeze(network, config.transfer.unfreeze if phase.trains == "fine-tuning" else 0)
        model = AugmentingModel(network.inputs, network.outputs)
    metrics = [
        # Keras' own `loss` weights each worker alike; a metric counts each row once.
        keras.metrics.BinaryCrossentropy(name="cross_entropy"),
        keras.metrics.BinaryAccuracy(name="accuracy"),
        keras.metrics.Precision(name="precision"),
        keras.metrics.Recall(name="recall"),
        keras.metrics.AUC(name="auc"),
    ]
    weighted_loss = keras.metrics.BinaryCrossentropy(name="weighted_cross_entropy")
    model.compile(
        optimizer,
        loss=keras.losses.BinaryCrossentropy(label_smoothing=training.label_smoothing),
        metrics=metrics,
        weighted_metrics=[weighted_loss],
    )
    model.optimizer.build(model.trainable_variables)
    return model, metrics, weighted_loss


def _freeze(network: keras.Model, unfrozen: int | str) -> None:
    """Freeze the backbone except its last layers, as many as `unfrozen`.

    Batch norms stay frozen there too: the statistics of a few small batches would undo the pretraining.
    """
    names = [layer.name for layer in network.layers]
    backbone = network.layers[: names.index("features")]
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


def optimizer_state(optimizer: Any) -> list[Any]:
    """Return the optimizer's variables, with float16's loss scale, which Keras does not count among them."""
    scale = getattr(optimizer, "_loss_scale", None)
    return [*optimizer.variables, *getattr(scale, "_weights", {}).values()]
