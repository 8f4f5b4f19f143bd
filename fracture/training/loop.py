"""The training loop, as every Ray Train worker runs it."""

import gc
import resource
import time
from functools import partial
from typing import Any

import numpy as np

from fracture.progress.events import (
    CheckpointSaved,
    Diverged,
    EpochDone,
    PhaseStarted,
    Scoring,
    StepDone,
    TrainingStarted,
    TrainingStopped,
    Validating,
    WorkerError,
    WorkersStarted,
)
from fracture.progress.history import Record, write_history
from fracture.progress.tensorboard import TensorBoardLog
from fracture.runtime.failures import PeerLost
from fracture.runtime.watchdog import Watchdog
from fracture.storage import StoragePath
from fracture.training.checkpoint import LoopState
from fracture.training.checkpoint_folder import BEST, save_checkpoint, write_state
from fracture.training.phases import Phase, count_epochs, list_phases
from fracture.training.setup import Assignment, Worker, set_up

_SLOW_STORE = 500_000  # bytes a second; a store may be slower than that, and then the watchdog takes it for stuck


def train_worker(assignment: Assignment) -> None:
    """Train until early stopping or the last epoch; then score validation and test with the best weights."""
    import ray.train

    context = ray.train.get_context()
    rank, stuck_seconds = context.get_world_rank(), assignment.config.recovery.stuck_seconds
    watchdog = Watchdog(str(assignment.run), f"worker-{rank}", None if stuck_seconds == "auto" else stuck_seconds)
    try:
        if rank == 0:
            assignment.channel.send(WorkersStarted(context.get_world_size()))
        worker, state = set_up(assignment, watchdog)
        try:
            try:
                ended = _train(worker, state)
            except Exception:  # the driver gives up on what fails twice at one step
                last = state.steps_done + max(state.group - 1, 0)
                assignment.channel.send(WorkerError(state.epochs_done + 1, state.steps_done, last))
                raise
            if ended and assignment.search is None:  # no trial of a search looks at test
                _score(worker, state)
        except Exception as error:
            if type(error).__name__ == "ResourceExhaustedError":
                raise _exhausted(worker) from error
            if type(error).__module__.startswith("tensorflow."):  # the controller would load TensorFlow to read it
                raise _plain(error) from error
            raise
    finally:
        watchdog.close()


def _train(worker: Worker, state: LoopState) -> bool:
    """Train phase by phase.

    Args:
        state: where to go on; what is trained is recorded in it.

    Returns:
        Whether training came to its end: the loss did not diverge, and nobody asked to stop.
    """
    import ray.train
    from ray.train.collective import barrier

    from fracture.dataset.pipeline import evaluation_batches, training_batches
    from fracture.training.agreement import Agreement
    from fracture.training.metric_sums import compute_metrics
    from fracture.training.phase_model import build_phase_model, learning_rate
    from fracture.training.strategy import adder

    assignment, rank, watchdog = worker.assignment, worker.rank, worker.watchdog
    config, run, channel = assignment.config, assignment.run, assignment.channel
    patience, log = config.training.patience, None
    if rank == 0:
        channel.send(_describe_start(worker, state))
        log = TensorBoardLog(run / "tensorboard", state.history)
        if state.history:  # a worker may have been killed between an epoch's checkpoint and its line of the log
            write_history(run, state.history)
    agreement = Agreement(
        channel if rank == 0 else None,
        adder(worker.strategy, Agreement.NUMBERS),
        lambda: ray.train.get_preemption_info() is not None,  # a barrier; all get the same answer
        60 * config.checkpoint.every_minutes,
    )

    for phase in list_phases(config)[state.phase :]:
        if state.finished(phase.epochs, patience):  # killed after the last checkpoint of a phase
            state.end_phase(worker.backbone if phase.on_frozen_features else [])
            continue
        watchdog.busy("building the network")
        began = time.monotonic()
        built = build_phase_model(worker, phase, state)
        replica, train_rows, val_rows = built.replica, built.train, built.val
        watchdog.rest("waiting for the others to build the network")
        barrier()
        if phase.on_frozen_features:  # it has the images once for all epochs: part of the next one's time
            state.seconds += time.monotonic() - began
        if rank == 0:
            channel.send(_describe_phase(worker, phase, built, state))

        while not state.finished(phase.epochs, patience):
            epoch, started = state.epochs_done + 1, time.monotonic() - state.seconds

            # 1. Train, a group of steps a call.
            watchdog.busy(f"on its way to the next step, after step {state.steps_done} of epoch {epoch}")
            agreement.begin()
            replica.set_sums(state.metric_sums, rank)
            batches = iter(
                training_batches(train_rows, config.training.seed, epoch - 1, built.augment, state.steps_done)
            )
            while state.steps_done < train_rows.steps:
                at, state.group = time.monotonic(), min(agreement.steps, train_rows.steps - state.steps_done)
                done, finite = replica.train_steps(batches, state.group)
                state.steps_done, state.group = state.steps_done + done, 0
                watchdog.step(f"training, after step {state.steps_done} of epoch {epoch}")
                if not finite:
                    return _diverged(worker, phase, epoch, state.steps_done)
                now = time.monotonic()
                agreed = agreement.reach(StepDone(epoch, state.steps_done, train_rows.steps), done, now - at)
                if agreed.save or agreed.stop:
                    _save_inside(worker, state, replica, agreement, now - started, replica.total_sums())
                if agreed.stop:
                    return _stopped(worker, epoch, state)
            seconds, sums = time.monotonic() - started, replica.total_sums()

            # 2. Validate one and the same network on all workers; a resumed run begins here where it trained all steps.
            replica.share_moving_averages()
            watchdog.busy("going to validate")
            agreement.begin()
            replica.set_sums([], rank)
            if rank == 0:
                channel.send(Validating(epoch, train_rows.steps, train_rows.steps))
            batches, counted = iter(evaluation_batches(val_rows, worker.val_weights)), 0
            while counted < val_rows.steps:
                at, group = time.monotonic(), min(agreement.steps, val_rows.steps - counted)
                replica.validate_steps(batches, group)
                counted += group
                watchdog.step(f"validating, after batch {counted} of epoch {epoch}")
                agreed = agreement.reach(
                    Validating(epoch, train_rows.steps, train_rows.steps), group, time.monotonic() - at
                )
                if agreed.save or agreed.stop:
                    _save_inside(worker, state, replica, agreement, seconds, sums)
                if agreed.stop:
                    return _stopped(worker, epoch, state)
            validated = compute_metrics(replica.total_sums())
            if not np.isfinite(validated["weighted_loss"]):
                return _diverged(worker, phase, epoch, train_rows.steps)

            # 3. Record the epoch: checkpoint, log, and the driver.
            record = _record(epoch, compute_metrics(sums), validated)
            record["images_per_second"] = round(assignment.dataset.rows("train") / seconds, 2)
            last_step = replica.steps_done() - 1  # of the phase
            record["learning_rate"] = learning_rate(config, phase, train_rows.steps, last_step)
            record |= {"phase": state.phase + 1, "seconds": round(time.monotonic() - started, 3)}
            record["memory_gb"] = round(
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3
            )  # Linux: KiB
            record["trained_parameters"] = built.trainable_parameters
            state.record(record, replica.weights(), replica.optimizer_state())
            _save(worker, state, agreement)
            if log is not None:
                write_history(run, state.history)
                log.add(record)
                channel.send(EpochDone(record, state.best_epoch))
            if agreement.reach().stop:  # it has just been saved
                return _stopped(worker, epoch, state)
        state.end_phase(worker.backbone if phase.on_frozen_features else [])  # the last one too: its best is scored
        del built, replica, train_rows, val_rows, batches  # else their memory is not free for the next phase's
        gc.collect()
    return True


def _save_inside(
    worker: Worker, state: LoopState, replica: Any, agreement: Any, seconds: float, sums: np.ndarray
) -> None:
    """Save inside an epoch, or before its validation is done."""
    replica.share_moving_averages()
    state.pause(state.steps_done, seconds, replica.weights(), replica.optimizer_state(), [sums])
    _save(worker, state, agreement)
    if worker.rank == 0:
        event = CheckpointSaved(state.epochs_done + 1, state.steps_done, worker.train.steps)
        worker.assignment.channel.send(event)


def _save(worker: Worker, state: LoopState, agreement: Any) -> None:
    if worker.rank == 0:
        worker.watchdog.busy("saving", more=sum(array.nbytes for array in state.arrays()) / _SLOW_STORE)
    else:
        worker.watchdog.rest("waiting for rank 0 to save")
    save_together(worker.assignment.run, state, worker.rank)
    worker.watchdog.busy("going on after a checkpoint")
    agreement.saved()


def save_together(run: StoragePath, state: LoopState, rank: int) -> None:
    """Save a checkpoint on rank 0 while the others wait, so that all go on from it if one is killed then."""
    from ray.train.collective import barrier

    if rank == 0:
        save_checkpoint(run, state)
    barrier()


def _stopped(worker: Worker, epoch: int, state: LoopState) -> bool:
    if worker.rank == 0:
        worker.assignment.channel.send(TrainingStopped(epoch, state.steps_done))
    return False


def _diverged(worker: Worker, phase: Phase, epoch: int, step: int) -> bool:
    if worker.rank == 0:
        event = Diverged(epoch, step, worker.train.steps, phase.rate_setting, phase.learning_rate)
        worker.assignment.channel.send(event)
    return False


def _describe_start(worker: Worker, state: LoopState) -> TrainingStarted:
    config = worker.assignment.config
    compute = config.compute
    return TrainingStarted(
        workers=worker.workers,
        unit="GPU" if compute.gpu else "CPU",
        units_per_worker=1 if compute.gpu else compute.cpus_per_worker,
        batch_size=config.training.batch_size,
        steps=worker.train.steps,
        max_epochs=count_epochs(config),
        epochs_done=state.epochs_done,
        steps_done=state.steps_done,
        precision="float32" if list_phases(config)[-1].on_frozen_features else state.precision,
    )


def _describe_phase(worker: Worker, phase: Phase, model: Any, state: LoopState) -> PhaseStarted:
    config = worker.assignment.config
    frozen = sum(array.size for array in worker.backbone) if phase.on_frozen_features else 0
    return PhaseStarted(
        number=state.phase + 1,
        phases=len(list_phases(config)),
        model=config.model.name,
        precision=model.precision,
        trained_part=phase.trains,
        unfrozen_layers=config.transfer.unfreeze,
        max_epochs=phase.epochs,
        last_epoch=state.phase_began + phase.epochs,
        parameters=model.network.count_params() + frozen,
        trained_parameters=model.trainable_parameters,
        frozen_features=phase.on_frozen_features,
        mirrored=config.augment.horizontal_flip,
    )


def _record(epoch: int, trained: dict[str, float], validated: dict[str, float]) -> Record:
    """Return the metrics of an epoch. Training and validation differ in their loss, which validation weights."""
    names = ("accuracy", "precision", "recall", "auc")
    record: Record = {"epoch": epoch, "loss": trained["loss"]} | {name: trained[name] for name in names}
    return record | {"val_loss": validated["weighted_loss"]} | {f"val_{name}": validated[name] for name in names}


def _exhausted(worker: Worker) -> Exception:
    import tensorflow as tf

    from fracture.models import build_model
    from fracture.training.device_memory import explain_exhausted

    config = worker.assignment.config
    with tf.device("CPU:0"):  # the other is full
        return explain_exhausted(config, build_model(config, 0.0, 1.0), worker.free_memory)


def _plain(error: Exception) -> Exception:
    """Turn TensorFlow's error into one that is read without TensorFlow."""
    name = type(error).__name__
    if name in ("UnavailableError", "AbortedError", "CancelledError", "DeadlineExceededError"):
        return PeerLost(name)
    lines = [line.partition(" [Op:")[0].strip() for line in str(error).splitlines()]
    return RuntimeError(f"{name}: {next((line for line in reversed(lines) if line and line[:2] != '[['), '')}")


def _score(worker: Worker, state: LoopState) -> None:
    """Score this worker's blocks of validation and test; rank 0 hands the best weights over to `finish_run`."""
    import keras
    from ray.train.collective import barrier

    from fracture.evaluation.scores import score_blocks, write_scores
    from fracture.models import build_model

    assignment, watchdog = worker.assignment, worker.watchdog
    dataset, run = assignment.dataset, assignment.run
    if worker.rank == 0:
        assignment.channel.send(Scoring(worker.workers))
    # The exported model computes in float32 everywhere, and it is this one that is scored.
    keras.config.set_dtype_policy("float32")
    model = build_model(assignment.config, dataset.manifest.pixel_mean, dataset.manifest.pixel_std)
    model.set_weights(state.best_weights)
    for split in ("val", "test"):
        scoring = partial(watchdog.busy, f"scoring {split}")
        blocks = score_blocks(model, dataset, split, worker.rank, worker.workers, scoring)
        write_scores(run, blocks, split, worker.rank, worker.workers)
    if worker.rank == 0:
        watchdog.busy("saving the best weights", more=sum(array.nbytes for array in state.best_weights) / _SLOW_STORE)
        write_state(run / BEST, LoopState(best_weights=state.best_weights))
    watchdog.rest("waiting for the others to score")
    barrier()
