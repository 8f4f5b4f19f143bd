"""Ray Train's TensorflowTrainer without the seconds that it spends on loading TensorFlow where nothing computes.

Its own configuration imports TensorFlow wherever it is made or unpickled: in the driver and in the controller, before
which no worker starts. Ours tells the workers of each other just the same.
"""

import json
import os
from collections.abc import Callable
from typing import Any

from ray.train._internal.base_worker_group import BaseWorkerGroup
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.tensorflow.tensorflow_trainer import TensorflowTrainer


class Trainer(TensorflowTrainer):
    """
    Args:
        alone: Ray ends with this job, so that there is nothing to clean up after it.
    """

    def __init__(self, train_loop_per_worker: Callable[..., None], *, alone: bool, **arguments: Any) -> None:
        self._unused = (DatasetsCallback, *([PlacementGroupCleanerCallback] if alone else []))
        # Past TensorflowTrainer's own constructor, which adds its configuration and nothing else.
        DataParallelTrainer.__init__(self, train_loop_per_worker, backend_config=ClusterSpec(), **arguments)

    def _create_default_callbacks(self) -> list[Any]:
        """Without the processes that have no use here, each a core for two seconds: there are no Ray Datasets."""
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, self._unused)]


class ClusterSpec(BackendConfig):
    @property
    def backend_cls(self) -> type[Backend]:
        return _Backend


class _Backend(Backend):
    def on_start(self, worker_group: BaseWorkerGroup, backend_config: BackendConfig) -> None:
        import ray

        addresses = worker_group.execute(_own_address)
        ray.get(
            [
                worker_group.execute_single_async(rank, _set_cluster, addresses, rank)
                for rank in range(len(worker_group))
            ]
        )


def _own_address() -> str:
    from ray._common.network_utils import build_address
    from ray.train._internal.utils import get_address_and_port

    return build_address(*get_address_and_port())


def _set_cluster(addresses: list[str], rank: int) -> None:
    """https://www.tensorflow.org/guide/distributed_training#TF_CONFIG"""
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}})
