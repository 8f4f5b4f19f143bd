"""Tells the workers of each other, in the way that TensorFlow's strategies read.

Ray's own configuration for this does the same, and imports TensorFlow wherever it is unpickled: in the controller, too,
which has no use for it, and before which no worker starts.
"""

import json
import os

from ray.train._internal.base_worker_group import BaseWorkerGroup
from ray.train.backend import Backend, BackendConfig


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
