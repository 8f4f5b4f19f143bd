import pytest

from fracture.errors import UsageError
from fracture.runtime.cluster import check_capacity


def test_more_workers_than_the_cluster_holds_is_refused_at_once(ray_cluster, tiny_config):
    with pytest.raises(
        UsageError,
        match=r"5 workers of 1 CPU each do not fit: the cluster's nodes have 4 CPU. Use --workers 4 or f",
    ):
        check_capacity(tiny_config("compute.workers=5").compute)
    with pytest.raises(UsageError, match=r"2 workers of 1 CPU and 1 GPU each .* 4 CPU and 0 GPU. Ask for less, or add"):
        check_capacity(tiny_config("compute.gpu=true").compute)
    check_capacity(tiny_config("compute.workers=4").compute)
    check_capacity(tiny_config("compute.workers=8", "compute.min_workers=4").compute)
    with pytest.raises(UsageError, match=r"5 workers of 1 CPU each do not fit"):
        check_capacity(tiny_config("compute.workers=8", "compute.min_workers=5").compute)
