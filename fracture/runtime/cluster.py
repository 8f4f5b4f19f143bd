"""Starts Ray on this machine or joins a cluster, and counts how many workers fit on its nodes."""

import logging
import os
import socket
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fracture.config import ComputeConfig
from fracture.errors import RunError, UsageError
from fracture.runtime.environment import check_environment, provide_token
from fracture.runtime.gpus import run_probe
from fracture.runtime.quiet import silence_stderr
from fracture.runtime.signals import stop_by_signals
from fracture.runtime.submission import is_submitted

PACKAGE = Path(__file__).resolve().parents[1]  # the folder fracture, in a clone or in site-packages
ENVIRONMENT = {  # of all processes
    "TF_CPP_MIN_LOG_LEVEL": "3",  # read by TensorFlow's C++ side when it loads
    "GRPC_VERBOSITY": "ERROR",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a lost worker, and the end, are noticed at this poll; by default 2 s
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the coming default; silences a warning about the change
}
KERAS_ENVIRONMENT = {  # of all processes, whatever the user has set for other programs
    "KERAS_BACKEND": "tensorflow",  # else ~/.keras/keras.json may name another
    "TF_USE_LEGACY_KERAS": "0",  # else Ray's import of `tensorflow.keras` looks for Keras 2
}
LOCAL_ENVIRONMENT = {  # a Ray of this job alone does without processes that take a core a second or more to start
    "RAY_prestart_worker_first_driver": "0",  # they would be of another environment than ours
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody announces that this machine is taken away
}
JOIN_FIX = (
    "Start that cluster, give its token in RAY_AUTH_TOKEN, or unset RAY_ADDRESS to run on this machine. It is "
    "HOST:6379, or auto on a node of the cluster; from elsewhere use ray job submit"
)
_PROBE_SECONDS = 40.0
_PROBE = """
import json
import sys
import ray
try:
    ray.init(log_to_driver=False)
except Exception as error:
    sys.exit(" ".join(str(error).split()) or repr(error))
print(json.dumps(ray.cluster_resources()))
"""


def start_ray(verbose: bool, to_train: bool = False) -> None:
    """Join the cluster that RAY_ADDRESS or `ray job submit` names, or start Ray on this machine; once a process.

    Args:
        verbose: show Ray's own log.
        to_train: load TensorflowTrainer too, and TensorFlow with it, while Ray's processes start.

    Raises:
        RunError: the named cluster does not answer within a minute, or Ray cannot start on this machine.
    """
    ours = {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}  # a job may have set its own
    ours |= KERAS_ENVIRONMENT
    os.environ.update(ours)
    if not verbose:  # nodes log each worker that dies, whatever `log_to_driver` says; we do so in one line
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    if to_train:
        _init_ray_and_load_trainer(ours, verbose)
    else:
        _init_ray(ours, verbose)
    stop_by_signals()


def _init_ray(ours: Mapping[str, str], verbose: bool) -> None:
    import ray

    if ray.is_initialized():
        return
    joining = _is_joining()
    environment = runtime_environment(ours, is_submitted(), joining)
    if not is_submitted() and not joining:
        os.environ.update({**LOCAL_ENVIRONMENT, **os.environ})
    if not joining:
        check_environment()
        provide_token()
    if not verbose:
        logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        if joining and not is_submitted():  # a submitted job runs on the cluster that it joins
            probe_cluster(os.environ["RAY_ADDRESS"])
        ray.init(
            address=None if joining else "local",
            include_dashboard=None if joining else False,
            runtime_env=environment,
            log_to_driver=verbose,
            logging_level=logging.INFO if verbose else logging.ERROR,
        )
    except Exception as error:  # Ray raises a bare one where its processes do not start in time
        if joining:
            reason = " ".join(str(error).split()).rstrip(".")
            raise RunError(
                f"no Ray cluster can be joined at RAY_ADDRESS={os.environ['RAY_ADDRESS']}: {reason}. {JOIN_FIX}"
            ) from None
        raise RunError(
            f"Ray did not start on this machine: {str(error).strip()}. Its logs are in session_latest/logs of its "
            "folder, /tmp/ray or RAY_TMPDIR. If the machine is busy, run the same command again later"
        ) from error


def is_on_cluster() -> bool:
    """Return whether this process works with machines that it shares, and not with a Ray of its own."""
    return is_submitted() or _is_joining()


def _is_joining() -> bool:
    return os.environ.get("RAY_ADDRESS", "") not in ("", "local")  # which mean a Ray of one's own to Ray too


def probe_cluster(address: str, seconds: float = _PROBE_SECONDS) -> dict[str, float]:
    """Join the cluster in a process of its own, and return its resources.

    Ray itself has no time limit: where a port is open and no Ray answers, it tries for ever, and logs each try.

    Args:
        address: value of RAY_ADDRESS.
        seconds: for Ray to load, and to join.

    Raises:
        OSError: nothing answers at its HOST:PORT within 5 s.
        RunError: no cluster is found there in time, or it does not take this process: another Ray or Python, or a
            token that is missing.
    """
    _check_reachable(address)
    return run_probe(_PROBE, os.environ | {"RAY_ADDRESS": address}, seconds)


def _check_reachable(address: str) -> None:
    """Open a connection to HOST:PORT and close it.

    Raises:
        OSError: nothing answers there within 5 s.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():  # not so `auto`, which Ray finds at once or not at all
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OverflowError, UnicodeError) as error:  # a port above 65535, a name that no host can have
        raise OSError(str(error)) from None


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


def _init_ray_and_load_trainer(ours: Mapping[str, str], verbose: bool) -> None:
    """Start Ray in this thread, and meanwhile import Ray's TensorflowTrainer, and TensorFlow with it, in another.

    Not the other way round: Linux kills Ray's processes with the thread that started them (PR_SET_PDEATHSIG). What both
    need is imported first, so that neither waits for the other.
    """
    import ray.train  # noqa: F401

    with ThreadPoolExecutor(1) as pool:
        loaded = pool.submit(_load_trainer)
        _init_ray(ours, verbose)
    loaded.result()


def _load_trainer() -> None:
    with silence_stderr():
        import ray.train.tensorflow  # noqa: F401


def check_capacity(compute: ComputeConfig) -> None:
    """Check that the workers fit; Ray would wait for ever for workers that can never start.

    Raises:
        UsageError: the cluster cannot hold the workers, or the fewest of them, now or after growing.
    """
    from fracture.runtime.ray_internals import read_autoscaler_ceiling

    each = resources_per_worker(compute)
    room = max(count_workers_that_fit(read_autoscaler_ceiling(), each), count_workers_on_nodes(compute))
    if compute.fewest > room:
        wanted = " and ".join(f"{count} {resource}" for resource, count in each.items())
        has = ", ".join(" and ".join(f"{node.get(r, 0):g} {r}" for r in each) for node in node_resources())
        fix = f"Use --workers {room} or fewer, or add machines" if room else "Ask for less, or add machines"
        number = compute.fewest
        ours = f"{number} workers of {wanted} each do" if number > 1 else f"1 worker of {wanted} does"
        raise UsageError(f"{ours} not fit: the cluster's nodes have {has}. {fix}.")


def count_runs_at_once(compute: ComputeConfig) -> int:
    """Return how many runs of so many workers fit on the machines that are there now; one at least."""
    return max(1, count_workers_on_nodes(compute) // compute.workers)


def count_workers_on_nodes(compute: ComputeConfig) -> int:
    """Return how many workers fit on the machines that are there now, were nothing else on them."""
    each = resources_per_worker(compute)
    return sum(count_workers_that_fit(node, each) for node in node_resources())


def resources_per_worker(compute: ComputeConfig) -> dict[str, int]:
    """Return the CPUs and GPUs that a worker takes."""
    return {"CPU": compute.cpus_per_worker} | ({"GPU": 1} if compute.gpu else {})


def node_resources() -> list[dict[str, float]]:
    """Return the resources of each living machine."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def count_workers_that_fit(resources: Mapping[str, float], each: Mapping[str, int]) -> int:
    """Return how many workers fit on one machine, or into one sum of resources."""
    return min(int(resources.get(resource, 0) // count) for resource, count in each.items())
