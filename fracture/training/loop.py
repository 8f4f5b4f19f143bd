"""The training loop, as every Ray Train worker runs it."""

import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fracture.config import Config
from fracture.dataset.format import Dataset
from fracture.dataset.sharding import ShardedBatches
from fracture.errors import RunError
from fracture.progress.events import (
    CheckpointSaved,
    DamagedCheckpoint,
    Diverged,
    EpochDone,
    FeaturesComputed,
    PhaseStarted,
    Scoring,
    TrainingStarted,
    TrainingStopped,
    Validating,
    WorkerError,
    WorkersStarted,
)
from fracture.progress.history import write_history
from fracture.runtime.channel import EventChannel
from fracture.runtime.failures import PeerLost
from fracture.runtime.watchdog import Watchdog
from fracture.storage import StoragePath
from fracture.training.checkpoint import Arrays, DamagedCheckpointError, LoopState
from fracture.training.checkpoint_folder import BEST, list_checkpoints, read_state, save_checkpoint, write_state
from fracture.training.phases import Phase, count_epochs, list_phases

_SLOW_STORE = 500_000  # bytes a second; a store may be slower than that, and then the watchdog takes it for stuck


@dataclass(frozen=True)
class Assignment:
    """The work that the driver hands to every worker."""

    config: Config
    dataset: Dataset  # all of it, or one fold
    run: StoragePath
    channel: EventChannel
    initial: Any = None  # the Bundle whose weights training begins with, if any
    search: StoragePath | None = None  # the search that this is a trial of: it is not scored


def train_worker(assignment: Assignment) -> None:
    """Train until early stopping or the last epoch; then score validation and test with the best weights."""
    import ray.train

    rank = ray.train.get_context().get_world_rank()
    stuck_seconds = assignment.config.recovery.stuck_seconds
    watchdog = Watchdog(str(assignment.run), f"worker-{rank}", None if stuck_seconds == "auto" else stuck_seconds)
    try:
        _train(assignment, watchdog)
    finally:
        watchdog.close()


@dataclass(frozen=True)
class _Worker:
    """The parts of a worker that all its phases share."""

    assignment: Assignment
    strategy: Any
    rank: int
    workers: int
    watchdog: Watchdog
    progress: Any  # the callback
    log: "_EventLog | None"  # rank 0's


def _train(assignment: Assignment, watchdog: Watchdog) -> None:
    """Train phase by phase, then score."""
    import ray.train

    config, manifest, channel = assignment.config, assignment.dataset.manifest, assignment.channel
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    if rank == 0:
        channel.send(WorkersStarted(workers))

    from fracture.training.strategy import agreement, make_strategy

    strategy = make_strategy(config)
    assert strategy.num_replicas_in_sync == workers, f"{strategy.num_replicas_in_sync} replicas, {workers} workers"

    from ray.train.collective import barrier, broadcast_from_rank_zero

    from fracture.dataset.sampler import row_weights
    from fracture.training.callbacks import Progress, StopRequested
    from fracture.training.phase_model import build_phase_model
    from fracture.training.precision import choose_precision

    radiograph_ids = {split: _read_radiograph_ids(assignment, split) for split in ("train", "val")}
    shares = _load_shares(assignment, radiograph_ids, rank, workers, watchdog)
    # What stops the training must count as the training does, or one radiograph's hundred copies decide.
    val_weights = row_weights(*radiograph_ids["val"], config.training.sampling)

    # 1. Go on from the run's newest checkpoint that is whole; 2. else from the weights of a finished model, if one was
    # named; 3. else from a backbone's that knows something; 4. else start from scratch.
    state = _latest_state(assignment, rank, watchdog)
    if state is None:
        state = LoopState(precision=broadcast_from_rank_zero(choose_precision(config.training.precision)))
        if assignment.initial is not None:
            state.weights = assignment.initial.load_weights()
    watchdog.busy("reading the backbone's weights")
    backbone = _backbone(assignment)

    log = None
    if rank == 0:
        compute = config.compute
        channel.send(
            TrainingStarted(
                workers=workers,
                unit="GPU" if compute.gpu else "CPU",
                units_per_worker=1 if compute.gpu else compute.cpus_per_worker,
                batch_size=config.training.batch_size,
                steps=shares[0].steps,
                max_epochs=count_epochs(config),
                epochs_done=state.epochs_done,
                steps_done=state.steps_done,
                precision="float32" if list_phases(config)[-1].on_frozen_features else state.precision,
            )
        )
        log = _EventLog(assignment.run / "tensorboard", state.history)
        if state.history:  # a worker may have been killed between an epoch's checkpoint and its line of the log
            write_history(assignment.run, state.history)
    progress = Progress(
        channel if rank == 0 else None,
        watchdog,
        agreement(strategy, 3),
        lambda: ray.train.get_preemption_info() is not None,  # rank 0 tells the others
        60 * config.checkpoint.every_minutes,
    )
    worker = _Worker(assignment, strategy, rank, workers, watchdog, progress, log)

    def computed(done: int, count: int) -> None:
        if done < count:
            watchdog.busy("computing features")
        else:
            watchdog.rest("waiting for the others' features")
        if rank == 0:
            channel.send(FeaturesComputed(done, count))

    try:
        for phase in list_phases(config)[state.phase :]:
            if not state.finished(phase.epochs, config.training.patience):  # else it was killed just then
                watchdog.busy("building the network")
                began = time.monotonic()
                phase_model = build_phase_model(strategy, config, manifest, phase, state, backbone, shares, computed)
                watchdog.rest("waiting for the others to build the network")
                barrier()
                if phase.on_frozen_features:  # it has the images once for all epochs: part of the next one's time
                    state.seconds += time.monotonic() - began
                if rank == 0:
                    channel.send(_describe_phase(config, phase, phase_model, state, backbone))
                if not _learn(worker, phase, phase_model, state, val_weights):
                    return
            state.end_phase(backbone if phase.on_frozen_features else [])
    except StopRequested:
        if rank == 0:
            channel.send(TrainingStopped(progress.epoch, state.steps_done))
        return
    except Exception as error:
        channel.send(WorkerError(progress.epoch, progress.step))
        if type(error).__module__.startswith("tensorflow."):  # the controller would load TensorFlow to read it
            raise _plain(error) from error
        raise

    if assignment.search is not None:  # none of its trials looks at test
        return
    if rank == 0:
        channel.send(Scoring(workers))
    _score(assignment, state, rank, workers, watchdog)


def _describe_phase(config: Config, phase: Phase, phase_model: Any, state: LoopState, backbone: Arrays) -> PhaseStarted:
    frozen = sum(array.size for array in backbone) if phase.on_frozen_features else 0
    return PhaseStarted(
        number=state.phase + 1,
        phases=len(list_phases(config)),
        model=config.model.name,
        precision=phase_model.precision,
        trained_part=phase.trains,
        unfrozen_layers=config.transfer.unfreeze,
        max_epochs=phase.epochs,
        last_epoch=state.phase_began + phase.epochs,
        parameters=phase_model.model.count_params() + frozen,
        trained_parameters=phase_model.trainable_parameters,
        frozen_features=phase.on_frozen_features,
        mirrored=config.augment.horizontal_flip,
    )


def _backbone(assignment: Assignment) -> Arrays:
    """Return the pretrained weights of the backbone as the run began; none where it began from scratch."""
    if not assignment.config.pretrained:
        return []
    from fracture.training.pretrained import read_backbone

    return read_backbone(assignment.search or assignment.run, assignment.config)


def _learn(worker: _Worker, phase: Phase, phase_model: Any, state: LoopState, val_weights: np.ndarray) -> bool:
    """Train one phase to its end; return False where the loss diverged.

    Epochs are calls of `fit` in a plain loop, since what lies between two epochs (one model for all workers, one
    checkpoint, one report) is the part that has to be right.
    """
    import tf_keras as keras

    from fracture.dataset.pipeline import evaluation_batches, training_batches
    from fracture.training.callbacks import StopOnDivergence
    from fracture.training.phase_model import learning_rate, optimizer_state
    from fracture.training.strategy import local_arrays, local_variables, on_each_worker, reducer

    strategy, rank, watchdog, progress = worker.strategy, worker.rank, worker.watchdog, worker.progress
    channel = worker.assignment.channel
    config, manifest, run = worker.assignment.config, worker.assignment.dataset.manifest, worker.assignment.run
    model, train, val, seed = phase_model.model, phase_model.train, phase_model.val, config.training.seed
    slots = optimizer_state(model.optimizer)
    metric_sums = [variable for metric in phase_model.metrics for variable in metric.variables]
    nothing = [np.zeros(variable.shape, variable.dtype.as_numpy_dtype) for variable in metric_sums]
    tally, results = reducer(strategy, "sum", metric_sums), _results(strategy, phase_model.metrics)
    results_of_validation = _results(strategy, [*phase_model.metrics, phase_model.weighted_loss])
    averages = phase_model.moving_averages()
    mean_averages = reducer(strategy, "mean", averages)

    def share_moving_averages() -> None:
        """Set each worker's moving averages of batch norm to their mean.

        Each gathers its own. Without this, workers would validate different models, none of them the one saved.
        Doing it more often changes nothing: the average of means is the mean of averages.
        """
        for variable, mean in zip(local_variables(strategy, averages), mean_averages(), strict=True):
            variable.assign(mean)

    def save() -> None:
        if rank == 0:
            watchdog.busy("saving", more=sum(array.nbytes for array in state.arrays()) / _SLOW_STORE)
        else:
            watchdog.rest("waiting for rank 0 to save")
        save_together(run, state, rank)
        watchdog.busy("going on after a checkpoint")
        progress.saved()

    def pause(seconds: Callable[[], float], tallied: Callable[[], Arrays], step: int) -> None:
        """Save inside an epoch."""
        share_moving_averages()
        weights = local_arrays(strategy, model.weights)
        state.pause(step, seconds(), weights, local_arrays(strategy, slots), tallied())
        save()
        if rank == 0:
            channel.send(CheckpointSaved(progress.epoch, step, train.steps))

    def send_divergence(step: int) -> None:
        channel.send(Diverged(state.epochs_done + 1, step, train.steps, phase.rate_setting, phase.learning_rate))

    def set_tallies(values: Arrays) -> None:
        """Set the metrics' sums as if rank 0 had counted it all."""
        for variable, value in zip(local_variables(strategy, metric_sums), values, strict=True):
            variable.assign(value if rank == 0 else np.zeros_like(value))

    while not state.finished(phase.epochs, config.training.patience):
        epoch, first = state.epochs_done, state.steps_done
        started = time.monotonic() - state.seconds
        if first < train.steps:
            pausing = partial(pause, lambda started=started: time.monotonic() - started, tally)
            progress.begin(epoch + 1, first, train.steps, pausing)
            divergence = StopOnDivergence()
            # Keras has set them to zero when an epoch begins.
            restore = keras.callbacks.LambdaCallback(
                on_epoch_begin=lambda epoch, logs: set_tallies(state.metric_sums or nothing)
            )
            model.fit(
                on_each_worker(strategy, training_batches(train, seed, epoch, phase_model.augment, first)),
                epochs=1,
                steps_per_epoch=train.steps - first,
                callbacks=[restore, divergence, progress],
                verbose=0,
            )
            if divergence.step is not None:
                if rank == 0:
                    send_divergence(first + divergence.step)
                return False
        else:
            set_tallies(state.metric_sums)
        trained, tallied, measured = time.monotonic() - started, tally(), results()
        set_tallies(nothing)  # before its first batch Keras does not know of the metrics

        share_moving_averages()
        watchdog.busy("going to validate")
        if rank == 0:
            channel.send(Validating(epoch + 1, train.steps, train.steps))
        pausing = partial(pause, lambda trained=trained: trained, lambda tallied=tallied: tallied)
        progress.begin(epoch + 1, train.steps, train.steps, pausing)
        model.evaluate(
            on_each_worker(strategy, evaluation_batches(val, val_weights)),
            steps=val.steps,
            callbacks=[progress],
            verbose=0,
        )
        validated = results_of_validation()
        if not np.isfinite(validated["weighted_cross_entropy"]):
            if rank == 0:
                send_divergence(train.steps)
            return False
        steps_done = model.optimizer.iterations.numpy()  # of this phase
        rate = learning_rate(config, phase, train.steps, steps_done - 1)  # of the last step
        record = _record(epoch + 1, measured, validated, manifest.rows("train") / trained, rate)
        record |= {"phase": state.phase + 1, "seconds": round(time.monotonic() - started, 3)}
        record["memory_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)  # Linux: KiB
        record["trained_parameters"] = phase_model.trainable_parameters
        state.record(record, local_arrays(strategy, model.weights), local_arrays(strategy, slots))
        save()
        if worker.log is not None:
            write_history(run, state.history)
            worker.log.add(record)
            channel.send(EpochDone(record, state.best_epoch))
        progress.between_epochs()
    return True


def _plain(error: Exception) -> Exception:
    """Turn TensorFlow's error into one that is read without TensorFlow."""
    name = type(error).__name__
    if name in ("UnavailableError", "AbortedError", "CancelledError", "DeadlineExceededError"):
        return PeerLost(name)
    lines = [line.partition(" [Op:")[0].strip() for line in str(error).splitlines()]
    return RuntimeError(f"{name}: {next((line for line in reversed(lines) if line and line[:2] != '[['), '')}")


def _read_radiograph_ids(assignment: Assignment, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the radiograph and the label of each row."""
    index = assignment.dataset.read_columns(split, ["radiograph_id", "label"])
    return index["radiograph_id"].to_numpy(), index["label"].to_numpy()


def _load_shares(
    assignment: Assignment,
    radiograph_ids: dict[str, tuple[np.ndarray, np.ndarray]],
    rank: int,
    workers: int,
    watchdog: Watchdog,
) -> list[Any]:
    """Read this worker's rows of training and validation; they divide the memory by their number."""
    from fracture.dataset.pipeline import load_worker_rows
    from fracture.dataset.sampler import BalancedSampler

    config, dataset = assignment.config, assignment.dataset
    training, seen = config.training, sum(dataset.rows(split) for split in radiograph_ids)
    return [
        load_worker_rows(
            dataset,
            split,
            ShardedBatches(dataset.rows(split), training.batch_size, rank, workers),
            BalancedSampler(*radiograph_ids[split], sampling, training.seed),
            epochs,
            memory=int(config.compute.image_memory_gb * 1e9 * dataset.rows(split) / seen),
            each_block=lambda: watchdog.busy("loading images"),
        )
        for split, sampling, epochs in (("train", training.sampling, count_epochs(config)), ("val", "image", 1))
    ]


def _results(strategy: Any, metrics: list[Any]) -> Callable[[], dict[str, float]]:
    """Return a function, to be called by all workers, that returns the metrics over all of them."""
    import tensorflow as tf

    @tf.function
    def compute() -> list[Any]:
        return strategy.run(lambda: [metric.result() for metric in metrics])

    return lambda: {
        metric.name: float(strategy.experimental_local_results(value)[0])
        for metric, value in zip(metrics, compute(), strict=True)
    }


def _record(
    epoch: int, trained: dict[str, float], validated: dict[str, float], images_per_second: float, rate: float
) -> dict[str, float]:
    record: dict[str, float] = {"epoch": epoch}
    same = {name: name for name in ("accuracy", "precision", "recall", "auc")}
    record |= {name: trained[key] for name, key in ({"loss": "cross_entropy"} | same).items()}
    validation = {"loss": "weighted_cross_entropy"} | same
    record |= {f"val_{name}": float(validated[key]) for name, key in validation.items()}
    return record | {"images_per_second": round(images_per_second, 2), "learning_rate": rate}


def _latest_state(assignment: Assignment, rank: int, watchdog: Watchdog) -> LoopState | None:
    """Return the state of the newest checkpoint that is whole, the same on all workers; None where there is none yet.

    Raises:
        RunError: there are some, and none is whole.
    """
    from ray.train.collective import broadcast_from_rank_zero

    chosen, state, run = "", None, assignment.run
    if rank == 0:
        chosen, state = _newest_whole(run, assignment.channel, watchdog)
    watchdog.rest("waiting for the others to load")
    chosen = broadcast_from_rank_zero(chosen)
    watchdog.busy("reading a checkpoint")
    return read_state(run / chosen) if chosen and rank != 0 else state


def _newest_whole(run: StoragePath, channel: EventChannel, watchdog: Watchdog) -> tuple[str, LoopState | None]:
    """Return the folder's name and the state; "" and None where there is no checkpoint yet."""
    checkpoints = list_checkpoints(run)
    for folder in reversed(checkpoints):
        watchdog.busy("reading a checkpoint")
        try:
            return folder.name, read_state(folder)
        except DamagedCheckpointError as error:
            channel.send(DamagedCheckpoint(folder.name, str(error)))
    if checkpoints:
        raise RunError(
            f"no checkpoint of this run can be read, and starting anew would throw its epochs away. Bring back the "
            f"folders checkpoint_* in {run.path}, or give another --run name"
        )
    return "", None


def save_together(run: StoragePath, state: LoopState, rank: int) -> None:
    """Save a checkpoint on rank 0 while the others wait, so that all go on from it if one is killed then."""
    from ray.train.collective import barrier

    if rank == 0:
        save_checkpoint(run, state)
    barrier()


class _EventLog:
    """Writes TensorBoard's events locally and copies them to the run, which may be in a bucket."""

    def __init__(self, folder: StoragePath, history: list[dict[str, float]]) -> None:
        from tensorboardX import SummaryWriter

        folder.delete()
        self._target = folder
        self._folder = tempfile.TemporaryDirectory()
        self._writer = SummaryWriter(self._folder.name)
        for record in history:
            self._write(record)

    def add(self, record: dict[str, float]) -> None:
        self._write(record)
        self._writer.flush()
        self._target.upload(Path(self._folder.name))

    def _write(self, record: dict[str, float]) -> None:
        for name, value in record.items():
            metric, split = (name[4:], "validation") if name.startswith("val_") else (name, "training")
            if name != "epoch":
                self._writer.add_scalar(f"{metric}/{split}", value, int(record["epoch"]))


def _score(assignment: Assignment, state: LoopState, rank: int, workers: int, watchdog: Watchdog) -> None:
    """Score this worker's blocks of validation and test; rank 0 hands the best weights over to `finish_run`."""
    import tf_keras as keras
    from ray.train.collective import barrier

    from fracture.evaluation.scores import score_blocks, write_scores
    from fracture.models import build_model

    dataset = assignment.dataset
    # The exported model computes in float32 everywhere, and it is this one that is scored.
    keras.mixed_precision.set_global_policy("float32")
    model = build_model(assignment.config, dataset.manifest.pixel_mean, dataset.manifest.pixel_std)
    model.set_weights(state.best_weights)
    for split in ("val", "test"):
        scoring = partial(watchdog.busy, f"scoring {split}")
        blocks = score_blocks(model, dataset, split, rank, workers, scoring)
        write_scores(assignment.run, blocks, split, rank, workers)
    if rank == 0:
        watchdog.busy("saving the best weights", more=sum(array.nbytes for array in state.best_weights) / _SLOW_STORE)
        write_state(assignment.run / BEST, LoopState(best_weights=state.best_weights))
    watchdog.rest("waiting for the others to score")
    barrier()
