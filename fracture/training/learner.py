"""What learns in a phase: the network as it is compiled, its weights, and the data that it learns on."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tf_keras as keras

from fracture.config import AugmentConfig, Config
from fracture.dataset.format import Manifest
from fracture.dataset.pipeline import Share
from fracture.models import build_model
from fracture.models.transfer import build_backbone, build_head
from fracture.training.augmenting import AugmentingModel, MirroringModel
from fracture.training.checkpoint import Arrays, LoopState
from fracture.training.features import compute_features, mean_and_variance
from fracture.training.phases import Phase
from fracture.training.strategy import agreement

layers = keras.layers


@dataclass(frozen=True)
class Learner:
    model: AugmentingModel
    metrics: list[Any]  # that it is compiled with, for training
    weighted: Any  # the one that only validation is asked for
    train: Share
    val: Share
    augment: AugmentConfig

    @property
    def precision(self) -> str:
        return self.model.get_layer("logit").dtype_policy.name

    @property
    def learning(self) -> int:
        """Parameters that learn."""
        return sum(int(np.prod(variable.shape)) for variable in self.model.trainable_variables)

    def moving_averages(self) -> list[Any]:
        """Of the batch norms that learn."""
        norms = [layer for layer in self.model.layers if isinstance(layer, layers.BatchNormalization)]
        return [variable for norm in norms if norm.trainable for variable in norm.non_trainable_variables]


def make_learner(
    strategy: Any,
    config: Config,
    manifest: Manifest,
    phase: Phase,
    state: LoopState,
    backbone: Arrays,
    shares: tuple[Share, Share],
    each_part: Callable[[int, int], None],
) -> Learner:
    """Called by all workers alike.

    Args:
        state: in the midst of the phase, with the weights of what learns and its optimizer's; at its begin, with
            those of the whole network, or with none:
        backbone: then with these, where it knows something, under a head that is drawn.
        shares: images of training and of validation.
        each_part: is called with how many of how many images' features are computed.
    """
    # Features are computed in float32, as the model handed over will compute them.
    keras.mixed_precision.set_global_policy("float32" if phase.by_features else state.precision)
    (train, val), augment, width = shares, config.augment, 0
    drawn = not state.weights
    if backbone and (phase.by_features or drawn):
        knowing = build_backbone(config)
        knowing.set_weights(backbone)
        width = knowing.output_shape[-1]
        mirrored = phase.by_features and augment.horizontal_flip
        features = compute_features(knowing, train, mirrored, each_part)
        if drawn:
            moments = mean_and_variance(features, agreement(strategy, width))
        if phase.by_features:
            train, augment = features, _mirroring(augment)
            val = compute_features(knowing, val, False, each_part)
            val = replace(val, images=val.images[:, 0])
    keras.utils.set_random_seed(config.training.seed)
    with strategy.scope():
        model, metrics, weighted = _compiled(config, manifest, phase, train.steps, width)
    if state.weights:
        model.set_weights(state.weights[-len(model.weights) :])  # a head's are the last
    elif backbone:
        if not phase.by_features:
            model.set_weights([*backbone, *model.get_weights()[len(backbone) :]])
        model.get_layer("standardise").set_weights(moments)
    if state.optimizer:
        for variable, value in zip(optimizer_state(model.optimizer), state.optimizer, strict=True):
            variable.assign(value)
    return Learner(model, metrics, weighted, train, val, augment)


def _mirroring(augment: AugmentConfig) -> AugmentConfig:
    """Nothing of it but horizontal flips."""
    none = dict.fromkeys(("rotation_degrees", "zoom", "stretch", "shift", "exposure"), 0.0)
    return augment.model_copy(update=none | {"vertical_flip": False})


def _compiled(
    config: Config, manifest: Manifest, phase: Phase, steps: int, width: int
) -> tuple[AugmentingModel, list[Any], Any]:
    """The network, the metrics it is compiled with, and the one of them that weighs each row."""
    training = config.training
    optimizer = keras.optimizers.Adam(_schedule(config, phase, steps), weight_decay=training.weight_decay or None)
    if phase.by_features:
        network = build_head(config, width, step=lambda: optimizer.iterations)
        model = MirroringModel(network.inputs, network.outputs)
    else:
        network = build_model(config, manifest.pixel_mean, manifest.pixel_std, step=lambda: optimizer.iterations)
        if phase.learns != "all":
            _freeze(network, config.transfer.unfreeze if phase.learns == "layers" else 0)
        model = AugmentingModel(network.inputs, network.outputs)
    metrics = [
        # Keras' own `loss` weights each worker alike; a metric counts each row once.
        keras.metrics.BinaryCrossentropy(name="cross_entropy"),
        keras.metrics.BinaryAccuracy(name="accuracy"),
        keras.metrics.Precision(name="precision"),
        keras.metrics.Recall(name="recall"),
        keras.metrics.AUC(name="auc"),
    ]
    weighted = keras.metrics.BinaryCrossentropy(name="weighted_cross_entropy")
    model.compile(
        optimizer,
        loss=keras.losses.BinaryCrossentropy(label_smoothing=training.label_smoothing),
        metrics=metrics,
        weighted_metrics=[weighted],
    )
    model.optimizer.build(model.trainable_variables)
    return model, metrics, weighted


def _freeze(network: keras.Model, unfrozen: int | str) -> None:
    """The backbone but for its last layers, as many as are unfrozen.

    Its batch norms stay as they are even there: the statistics of a few small batches would undo what it knows.
    """
    names = [layer.name for layer in network.layers]
    backbone = network.layers[: names.index("features")]
    first = 0 if unfrozen == "all" else max(len(backbone) - unfrozen, 0)
    for number, layer in enumerate(backbone):
        layer.trainable = number >= first and not isinstance(layer, layers.BatchNormalization)


def _schedule(config: Config, phase: Phase, steps: int) -> Any:
    if config.training.schedule == "constant":
        return phase.learning_rate
    # https://arxiv.org/abs/1608.03983, without restarts
    return keras.optimizers.schedules.CosineDecay(phase.learning_rate, decay_steps=steps * phase.epochs)


def learning_rate(config: Config, phase: Phase, steps: int, step: int) -> float:
    """Of a step of the whole phase, counted from 0.

    Keras' optimizer knows that of its last step only if it has done one since it was made.
    """
    schedule = _schedule(config, phase, steps)
    return float(schedule(step) if callable(schedule) else schedule)


def optimizer_state(optimizer: Any) -> list[Any]:
    """Its variables; in float16 with the loss scale, which Keras does not count among them."""
    scale = getattr(optimizer, "_loss_scale", None)
    return [*optimizer.variables, *getattr(scale, "_weights", {}).values()]
