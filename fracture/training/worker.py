"""The training loop, as every Ray Train worker runs it."""

import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fracture.config import Config
from fracture.input.lanes import Lanes
from fracture.input.shards import Manifest, read_index
from fracture.storage import Place
from fracture.training.checkpoint import SNAPSHOT, SNAPSHOT_COPY, LoopState


@dataclass(frozen=True)
class Assignment:
    """What the driver hands to every worker."""

    config: Config
    shards: Place
    manifest: Manifest  # of the shards, or of one fold of them
    run: Place
    events: Any  # ray.util.queue.Queue towards the driver's screen


def train_worker(assignment: Assignment) -> None:
    """Trains until early stopping or the last epoch, then scores validation and test with the best weights.

    Epochs are calls of `fit` in a plain loop, since what lies between two epochs (one model for all workers, one
    checkpoint, one report) is the part that has to be right.
    """
    import ray.train

    config, run = assignment.config, assignment.run
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    tell = _teller(assignment.events) if rank == 0 else lambda **event: None

    _set_up_devices(config)
    _switch_off_tuning()
    import tensorflow as tf
    import tf_keras as keras

    strategy = tf.distribute.MultiWorkerMirroredStrategy(communication_options=_communication(config))
    assert strategy.num_replicas_in_sync == workers, f"{strategy.num_replicas_in_sync} replicas, {workers} workers"

    from ray.train.collective import broadcast_from_rank_zero

    from fracture.input.draws import Draws, row_weights
    from fracture.input.pipeline import evaluation_batches, load_share, training_batches
    from fracture.training.precision import choose_precision

    precision = broadcast_from_rank_zero(choose_precision(config.training.precision))
    manifest = assignment.manifest
    batch_size, seed = config.training.batch_size, config.training.seed
    films = {split: _films(assignment, split) for split in ("train", "val")}
    seen = sum(manifest.rows(split) for split in films)
    train, val = (
        load_share(
            assignment.shards,
            manifest,
            split,
            Lanes(manifest.rows(split), batch_size, rank, workers),
            Draws(*films[split], sampling, seed),
            epochs,
            memory=int(config.compute.image_memory_gb * 1e9 * manifest.rows(split) / seen),
        )
        for split, sampling, epochs in (
            ("train", config.training.sampling, config.training.epochs),
            ("val", "image", 1),
        )
    )
    # What stops the training must count as the training does, or one film's hundred copies decide.
    val_weights = row_weights(*films["val"], config.training.sampling)

    keras.utils.set_random_seed(seed)
    keras.mixed_precision.set_global_policy(precision)
    with strategy.scope():
        model = _compiled_model(config, manifest, train.steps)
    optimizer = model.optimizer
    share_moving_averages = _moving_average_sharer(strategy, model)

    # 1. Go on from the run's newest checkpoint; 2. else start from scratch.
    state = _latest_state()
    if state is not None:
        model.set_weights(state.weights)
        for variable, value in zip(optimizer.variables, state.optimizer, strict=True):
            variable.assign(value)
    else:
        state = LoopState()
    tell(
        event="start",
        epochs_done=state.epochs_done,
        precision=precision,
        steps=train.steps,
        parameters=model.count_params(),
    )
    events = None
    if rank == 0:
        events = _EventLog(run / "tensorboard", state.history)
        if state.history:  # a killed worker may have checkpointed an epoch that it did not live to log
            _write_log(run, state)

    while not state.finished(config.training.epochs, config.training.patience):
        epoch = state.epochs_done
        started = time.monotonic()
        progress = _callbacks(tell, epoch, train.steps)
        batches = training_batches(train, seed, epoch, config.augment)
        fitted = model.fit(
            _on_each_worker(strategy, batches),
            epochs=1,
            steps_per_epoch=train.steps,
            callbacks=progress,
            verbose=0,
        )
        if (step := progress[-1].step) is not None:
            tell(event="diverged", epoch=epoch + 1, step=step, steps=train.steps)
            return
        trained = time.monotonic()

        share_moving_averages()
        weights = _local_arrays(strategy, model.weights)
        tell(event="validating", epoch=epoch + 1)
        validated = model.evaluate(
            _on_each_worker(strategy, evaluation_batches(val, val_weights)),
            steps=val.steps,
            return_dict=True,
            verbose=0,
        )
        if not np.isfinite(validated["weighted_cross_entropy"]):
            tell(event="diverged", epoch=epoch + 1, step=train.steps, steps=train.steps)
            return
        record = _record(
            epoch + 1,
            fitted.history,
            validated,
            manifest.rows("train") / (trained - started),
            float(optimizer.learning_rate.numpy()),
        )
        record["seconds"] = round(time.monotonic() - started, 3)
        state.record(record, weights, _local_arrays(strategy, optimizer.variables))
        _report(state, record, rank)
        if events is not None:
            _write_log(run, state)
            events.add(record)
            tell(event="epoch", record=record, best_epoch=state.best_epoch)

    tell(event="scoring")
    _score_and_export(assignment, state, rank, workers)


def _films(assignment: Assignment, split: str) -> tuple[np.ndarray, np.ndarray]:
    """(film, label) of each row."""
    index = read_index(assignment.shards, assignment.manifest, split, ["film", "label"])
    return index["film"].to_numpy(), index["label"].to_numpy()


def _callbacks(tell: Callable[..., None], epoch: int, steps: int) -> list[Any]:
    from fracture.training.callbacks import StepProgress, StopOnDivergence

    return [StepProgress(lambda step: tell(event="step", epoch=epoch + 1, step=step, steps=steps)), StopOnDivergence()]


def _teller(events: Any) -> Callable[..., None]:
    """Sends to the driver's screen; waits the millisecond it takes, so that a last word is not lost."""
    import ray

    return lambda **event: ray.get(events.actor.put_nowait.remote(event))


def _set_up_devices(config: Config) -> None:
    """TensorFlow takes every core and every byte of a GPU unless told so before it starts."""
    if config.training.xla:
        os.environ["TF_XLA_FLAGS"] = "--tf_xla_cpu_global_jit"  # else clusters are made for GPUs alone
    import tensorflow as tf

    if config.training.xla:  # not `jit_compile`: XLA cannot compile what adds up between workers
        tf.config.optimizer.set_jit("autoclustering")
    tf.config.threading.set_intra_op_parallelism_threads(config.compute.cpus_per_worker)
    tf.config.threading.set_inter_op_parallelism_threads(max(2, config.compute.cpus_per_worker))
    gpus = tf.config.list_physical_devices("GPU")
    if config.compute.gpu and not gpus:
        raise RuntimeError("compute.gpu is set, but TensorFlow sees no GPU on this worker")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)


def _communication(config: Config) -> Any:
    """NCCL adds up between GPUs, a ring of gRPC between CPUs."""
    import tensorflow as tf

    kinds = tf.distribute.experimental.CommunicationImplementation
    kind = kinds.NCCL if config.compute.gpu else kinds.RING
    return tf.distribute.experimental.CommunicationOptions(implementation=kind)


def _compiled_model(config: Config, manifest: Manifest, steps: int) -> Any:
    import tf_keras as keras

    from fracture.models import build_model
    from fracture.training.augmenting import AugmentingModel

    training = config.training
    rate: Any = training.learning_rate
    if training.schedule == "cosine":  # https://arxiv.org/abs/1608.03983, without restarts
        rate = keras.optimizers.schedules.CosineDecay(rate, decay_steps=steps * training.epochs)
    optimizer = keras.optimizers.Adam(rate, weight_decay=training.weight_decay or None)
    network = build_model(config, manifest.pixel_mean, manifest.pixel_std, step=lambda: optimizer.iterations)
    model = AugmentingModel(network.inputs, network.outputs)
    model.compile(
        optimizer,
        loss=keras.losses.BinaryCrossentropy(label_smoothing=training.label_smoothing),
        metrics=[
            # Keras' own `loss` weights each worker alike; a metric counts each row once.
            keras.metrics.BinaryCrossentropy(name="cross_entropy"),
            keras.metrics.BinaryAccuracy(name="accuracy"),
            keras.metrics.Precision(name="precision"),
            keras.metrics.Recall(name="recall"),
            keras.metrics.AUC(name="auc"),
        ],
        weighted_metrics=[keras.metrics.BinaryCrossentropy(name="weighted_cross_entropy")],
    )
    model.optimizer.build(model.trainable_variables)
    return model


def _on_each_worker(strategy: Any, batches: Any) -> Any:
    """Hands `fit` this worker's batches as they are; a plain dataset it would cut up again for the replicas."""
    return strategy.distribute_datasets_from_function(lambda context: batches)


def _switch_off_tuning() -> None:
    """Lets the iterators that hand batches to a device end at once.

    tf.data's autotuning has a thread that sleeps 10 ms, 20 ms, 40 ms, ... up to a minute, and dropping an iterator
    mostly waits for its next waking: an epoch of 6 s took 10 s, one of 11 s took 20 s. Our own datasets switch it
    off by their options; the small dataset that a distributed iterator adds on each device has no way to be given any,
    so its maker, private to TensorFlow 2.21, is wrapped.
    """
    import tensorflow as tf
    from tensorflow.python.data.ops import multi_device_iterator_ops

    make = multi_device_iterator_ops._create_device_dataset

    def make_untuned(*args: Any) -> Any:
        options = tf.data.Options()
        options.autotune.enabled = False
        return make(*args).with_options(options)

    multi_device_iterator_ops._create_device_dataset = make_untuned


def _moving_average_sharer(strategy: Any, model: Any) -> Callable[[], None]:
    """A function that sets each worker's moving averages of batch norm to the mean over workers.

    Each worker gathers its own. Without this, workers would validate different models, none of them the one saved.
    """
    import tensorflow as tf

    averages = model.non_trainable_variables

    def on_replica() -> None:
        context = tf.distribute.get_replica_context()
        for variable, mean in zip(averages, context.all_reduce("mean", [v + 0 for v in averages]), strict=True):
            variable.assign(mean)

    @tf.function
    def share() -> None:
        if averages:
            strategy.run(on_replica)

    return share


def _local_arrays(strategy: Any, variables: list[Any]) -> list[np.ndarray]:
    """This worker's values; reading them through the strategy would cost a collective for each."""
    return [strategy.experimental_local_results(variable)[0].numpy() for variable in variables]


def _record(
    epoch: int, trained: dict[str, list[float]], validated: dict[str, float], images_per_second: float, rate: float
) -> dict[str, float]:
    record: dict[str, float] = {"epoch": epoch}
    same = {name: name for name in ("accuracy", "precision", "recall", "auc")}
    record |= {name: float(trained[key][-1]) for name, key in ({"loss": "cross_entropy"} | same).items()}
    validation = {"loss": "weighted_cross_entropy"} | same
    record |= {f"val_{name}": float(validated[key]) for name, key in validation.items()}
    return record | {"images_per_second": round(images_per_second, 2), "learning_rate": rate}


def _latest_state() -> LoopState | None:
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return LoopState.load(Path(folder))


def _report(state: LoopState, record: dict[str, float], rank: int) -> None:
    """A barrier of all workers. Ray Train copies the folder to the run and only then names it the newest."""
    import ray.train

    if rank != 0:
        ray.train.report(record)
        return
    with tempfile.TemporaryDirectory() as folder:
        state.save(Path(folder))
        ray.train.report(record, checkpoint=ray.train.Checkpoint.from_directory(folder))


def _write_log(run: Place, state: LoopState) -> None:
    (run / "metrics.jsonl").write_bytes("".join(json.dumps(r) + "\n" for r in state.history).encode())
    with suppress(FileNotFoundError, ValueError):  # not written yet, or at this very moment
        snapshot = (run / SNAPSHOT).read_bytes()
        json.loads(snapshot)
        (run / SNAPSHOT_COPY).write_bytes(snapshot)


class _EventLog:
    """TensorBoard events, written locally and copied to the run, which may be in a bucket."""

    def __init__(self, place: Place, history: list[dict[str, float]]) -> None:
        from tensorboardX import SummaryWriter

        place.delete()
        self._place = place
        self._folder = tempfile.TemporaryDirectory()
        self._writer = SummaryWriter(self._folder.name)
        for record in history:
            self.add(record)

    def add(self, record: dict[str, float]) -> None:
        for name, value in record.items():
            metric, split = (name[4:], "validation") if name.startswith("val_") else (name, "training")
            if name != "epoch":
                self._writer.add_scalar(f"{metric}/{split}", value, int(record["epoch"]))
        self._writer.flush()
        self._place.upload(Path(self._folder.name))


def _score_and_export(assignment: Assignment, state: LoopState, rank: int, workers: int) -> None:
    import tf_keras as keras
    from ray.train.collective import barrier

    from fracture.evaluation.calibration import decide
    from fracture.evaluation.scores import read_scores, score_blocks, write_scores
    from fracture.models import build_model
    from fracture.release.bundle import export_model

    manifest = assignment.manifest
    # The model handed over computes in float32 everywhere, and it is this one that is scored.
    keras.mixed_precision.set_global_policy("float32")
    model = build_model(assignment.config, manifest.pixel_mean, manifest.pixel_std)
    model.set_weights(state.best_weights)
    for split in ("val", "test"):
        scores = score_blocks(model, assignment.shards, manifest, split, rank, workers)
        write_scores(assignment.run, scores, split, rank, workers)
    barrier()
    if rank == 0:
        val = read_scores(assignment.run, manifest, "val", workers)
        export_model(model, decide(val, assignment.config.evaluation), assignment.run / "bundle")
