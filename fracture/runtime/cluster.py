"""Starts a Ray on this machine or joins a cluster, and says how many workers fit on its nodes."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fracture.config import Config
from fracture.errors import RunError, UsageError
from fracture.runtime.signals import stop_by_signals
from fracture.runtime.submission import is_submitted

PACKAGE = Path(__file__).resolve().parents[1]  # the folder fracture, in a clone or in site-packages
ENVIRONMENT = {  # of every process
    "TF_USE_LEGACY_KERAS": "1",  # else TensorFlow loads Keras 3 as well, and with it scikit-learn: 1 s of 4
    "TF_CPP_MIN_LOG_LEVEL": "3",  # read by TensorFlow's C++ side when it loads
    "GRPC_VERBOSITY": "ERROR",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # `report` waits for this poll, up to 2 s an epoch by default
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the coming default; silences a warning about the change
}
RAY_ALONE = "FRACTURE_RAY_ALONE"
LOCAL_ENVIRONMENT = {  # a Ray of this job alone does without processes that take a core a second or more to start
    RAY_ALONE: "1",  # all processes of that Ray inherit it; Ray ends with the job
    "RAY_prestart_worker_first_driver": "0",  # they would be of another environment than ours
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody takes this machine away and says so before
}


def start_ray(verbose: bool) -> None:
    """Joins the cluster that RAY_ADDRESS or `ray job submit` names, or starts Ray on this machine; once a process.

    Raises:
        RunError: the named cluster does not answer.
    """
    ours = {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}  # a job may have set its own
    os.environ.update(ours)
    if not verbose:  # nodes tell of each worker that dies, whatever `log_to_driver` says; we do so in one line
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    import ray

    if ray.is_initialized():
        return
    joining = "RAY_ADDRESS" in os.environ
    environment = runtime_environment(ours, is_submitted(), joining)
    if not is_submitted() and not joining:
        os.environ.update({**LOCAL_ENVIRONMENT, **os.environ})
    if not verbose:
        logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        ray.init(
            address=None if joining else "local",
            include_dashboard=None if joining else False,
            runtime_env=environment,
            log_to_driver=verbose,
            logging_level=logging.INFO if verbose else logging.ERROR,
        )
    except (ConnectionError, ValueError) as error:
        raise RunError(
            f"no Ray cluster answers at RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}: {error}. It is HOST:6379 or auto "
            "on a node of the cluster; from elsewhere use ray job submit"
        ) from None
    stop_by_signals()


def runtime_environment(variables: Mapping[str, str], submitted: bool, joining: bool) -> dict[str, Any]:
    """Return Ray's `runtime_env` for this process, with which its workers find this very package.

    Args:
        variables: environment variables of every worker.
        submitted: whether `ray job submit` started this process, whose code is where it was submitted to.
        joining: whether RAY_ADDRESS names a cluster, whose machines do not have the package's folder.
    """
    if submitted:
        return {"env_vars": dict(variables)}
    if joining:  # the package alone: the folder around it is a whole clone, or all of site-packages
        return {"env_vars": dict(variables), "py_modules": [str(PACKAGE)], "excludes": ["__pycache__"]}
    return {"env_vars": {**variables, "PYTHONPATH": str(PACKAGE.parent)}}


def check_capacity(config: Config) -> None:
    """Ray would wait for ever for workers that can never be placed.

    Raises:
        UsageError: the cluster cannot hold the workers, or the fewest of them, now or after growing.
    """
    from ray._private.state import state

    each, nodes = resources_per_worker(config), node_resources()
    ceiling = state.get_max_resources_from_cluster_config() or {}  # what an autoscaler may grow it to
    room = max(workers_that_fit(ceiling, each), sum(workers_that_fit(node, each) for node in nodes))
    fewest = config.compute.fewest
    if fewest > room:
        wanted = " and ".join(f"{count} {resource}" for resource, count in each.items())
        has = ", ".join(" and ".join(f"{node.get(r, 0):g} {r}" for r in each) for node in nodes)
        fix = f"Use --workers {room} or fewer, or add machines" if room else "Ask for less, or add machines"
        raise UsageError(f"{fewest} workers of {wanted} each do not fit: the cluster's nodes have {has}. {fix}.")


def runs_at_once(config: Config) -> int:
    """How many runs of so many workers the machines hold that are there now; one at least."""
    each = resources_per_worker(config)
    return max(1, sum(workers_that_fit(node, each) for node in node_resources()) // config.compute.workers)


def resources_per_worker(config: Config) -> dict[str, int]:
    """What a worker takes."""
    return {"CPU": config.compute.cpus_per_worker} | ({"GPU": 1} if config.compute.gpu else {})


def node_resources() -> list[dict[str, float]]:
    """What each living machine has."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def workers_that_fit(resources: Mapping[str, float], each: Mapping[str, int]) -> int:
    """How many workers fit: a worker lies on one node."""
    return min(int(resources.get(resource, 0) // count) for resource, count in each.items())
