"""What a worker sets up before it trains: the strategy, its images, and the state to go on from."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fracture.config import Config
from fracture.dataset.format import Dataset
from fracture.dataset.sampler import label_by_source, measure_names
from fracture.dataset.sharding import ShardedBatches
from fracture.errors import RunError
from fracture.progress.events import DamagedCheckpoint
from fracture.runtime.channel import EventChannel
from fracture.runtime.watchdog import Watchdog
from fracture.storage import StoragePath
from fracture.training.checkpoint import Arrays, DamagedCheckpointError, LoopState
from fracture.training.checkpoint_folder import list_checkpoints, read_state
from fracture.training.phases import count_epochs


@dataclass(frozen=True)
class Assignment:
    """The work that the driver hands to every worker."""

    config: Config
    dataset: Dataset  # all of it, or one fold
    run: StoragePath
    channel: EventChannel
    initial: Any = None  # the Bundle whose weights training begins with, if any
    search: StoragePath | None = None  # the search that this is a trial of: it is not scored


@dataclass(frozen=True)
class RowIndex:
    """Columns of all rows of a split, over all workers: [rows] each."""

    radiograph_ids: np.ndarray  # int64
    group_ids: np.ndarray  # int64
    labels: np.ndarray  # 0 or 1
    sources: np.ndarray  # str
    name_lengths: np.ndarray  # letters of the file's name

    def classes(self, sampling: str) -> np.ndarray:
        """Return what is sampled alike: the labels, or the labels of each source."""
        return label_by_source(self.labels, self.sources) if sampling == "source" else self.labels


@dataclass(frozen=True)
class Worker:
    """What a worker has in all phases."""

    assignment: Assignment
    rank: int
    workers: int
    watchdog: Watchdog
    strategy: Any
    train: Any  # WorkerRows, of images
    val: Any
    indices: dict[str, RowIndex]  # of train and val
    val_weights: np.ndarray  # of each row of validation, over all workers
    backbone: Arrays  # pretrained weights as the run began; none where it began from scratch
    free_memory: int  # bytes of the GPU's memory before the training; 0 on CPUs


def set_up(assignment: Assignment, watchdog: Watchdog) -> tuple[Worker, LoopState]:
    """Join the other workers, and read this worker's images and the state to go on from."""
    import ray.train

    config, context = assignment.config, ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()

    from fracture.runtime.gpus import free_gpu_memory
    from fracture.training.strategy import make_strategy

    free_memory = free_gpu_memory() if config.compute.gpu else 0  # now: TensorFlow keeps what it has used
    strategy = make_strategy(config)
    assert strategy.num_replicas_in_sync == workers, f"{strategy.num_replicas_in_sync} replicas, {workers} workers"

    from ray.train.collective import broadcast_from_rank_zero

    from fracture.dataset.sampler import row_weights
    from fracture.training.precision import choose_precision

    indices = {split: _read_index(assignment.dataset, split) for split in ("train", "val")}
    train, val = _load_shares(assignment, indices, rank, workers, watchdog)
    # What stops the training must count as the training does, or one radiograph's hundred copies decide.
    sampling = config.training.sampling
    val_weights = row_weights(indices["val"].radiograph_ids, indices["val"].classes(sampling), sampling)

    # 1. Go on from the run's newest checkpoint that is whole; 2. else from the weights of a finished model, if one was
    # named; 3. else from a backbone's that knows something; 4. else start from scratch.
    state = _latest_state(assignment, rank, watchdog)
    if state is None:
        state = LoopState(precision=broadcast_from_rank_zero(choose_precision(config.training.precision)))
        if assignment.initial is not None:
            state.weights = assignment.initial.load_weights()
    watchdog.busy("reading the backbone's weights")
    rows, backbone = (train, val, indices, val_weights), _backbone(assignment)
    return Worker(assignment, rank, workers, watchdog, strategy, *rows, backbone, free_memory), state


def _backbone(assignment: Assignment) -> Arrays:
    """Return the pretrained weights of the backbone as the run began; none where it began from scratch."""
    if not assignment.config.pretrained:
        return []
    from fracture.training.pretrained import read_backbone

    return read_backbone(assignment.search or assignment.run, assignment.config)


def _read_index(dataset: Dataset, split: str) -> RowIndex:
    index = dataset.read_columns(split, ["radiograph_id", "group_id", "label", "origin", "source"])
    radiograph_ids, group_ids, labels = (index[name].to_numpy() for name in ("radiograph_id", "group_id", "label"))
    lengths = measure_names(index["source"].to_pylist())
    return RowIndex(radiograph_ids, group_ids, labels, np.array(index["origin"].to_pylist(), str), lengths)


def _load_shares(
    assignment: Assignment,
    indices: dict[str, RowIndex],
    rank: int,
    workers: int,
    watchdog: Watchdog,
) -> list[Any]:
    """Read this worker's rows of training and validation; they divide the memory by their number."""
    from fracture.dataset.pipeline import load_worker_rows
    from fracture.dataset.sampler import BalancedSampler

    config, dataset = assignment.config, assignment.dataset
    training, seen = config.training, sum(dataset.rows(split) for split in indices)
    return [
        load_worker_rows(
            dataset,
            split,
            ShardedBatches(dataset.rows(split), training.batch_size, rank, workers),
            BalancedSampler(indices[split].radiograph_ids, indices[split].classes(sampling), sampling, training.seed),
            epochs,
            memory=int(config.compute.image_memory_gb * 1e9 * dataset.rows(split) / seen),
            each_block=lambda: watchdog.busy("loading images"),
        )
        for split, sampling, epochs in (("train", training.sampling, count_epochs(config)), ("val", "image", 1))
    ]


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
