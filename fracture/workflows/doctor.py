"""Check what a run needs on this machine: Python, TensorFlow, GPU, memory, Ray, and a folder to write to.

Every check is a function of what was found, so that each of its answers can be tested on any machine; `diagnose` reads
this machine and calls them all. TensorFlow and Ray are asked in processes of their own: a TensorFlow that was built for
another processor kills its process, and a Ray that does not answer keeps it waiting.
"""

import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from fracture.errors import RunError, UsageError
from fracture.runtime.cluster import check_reachable
from fracture.storage import storage_path

SUPPORTED_PYTHON = ((3, 11), (3, 13))  # the first and the last version
TENSORFLOW = "2.21"
LEAST_MEMORY = 2 * 2**30  # bytes that should be free; Ray ends workers when a machine's memory is 95 % full
OBJECT_STORE_SHARE = 0.3  # of memory, that Ray keeps in /dev/shm
_PROBE_SECONDS = 120.0
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of the container that this process runs in
_GIB = 2**30

_TENSORFLOW_PROBE = """
import json
import tensorflow as tf
gpus = tf.config.list_physical_devices("GPU")
names = [tf.config.experimental.get_device_details(gpu).get("device_name", gpu.name) for gpu in gpus]
build = tf.sysconfig.get_build_info()
facts = {"version": tf.__version__, "gpus": names}
print(json.dumps(facts | {key: build.get(f"{key}_version", "") for key in ("cuda", "cudnn")}))
"""
_RAY_PROBE = """
import json
import ray
ray.init(log_to_driver=False)
print(json.dumps(ray.cluster_resources()))
"""


@dataclass(frozen=True)
class Finding:
    """The answer of one check."""

    name: str  # at most 10 characters, the label of its line
    ok: bool  # False: a run would fail
    text: str
    fix: str = ""  # what to do; advice where `ok` is True


@dataclass(frozen=True)
class TensorFlowFacts:
    """What TensorFlow says of itself."""

    version: str = ""
    gpus: tuple[str, ...] = ()  # that it can use
    cuda: str = ""  # version that it was built for, "12.5.1"; empty where it was built without
    cudnn: str = ""
    error: str = ""  # why it does not load


@dataclass(frozen=True)
class DriverFacts:
    """What NVIDIA's driver says, by nvidia-smi."""

    gpus: tuple[str, ...] = ()  # "NAME, DRIVER VERSION, MEMORY"
    error: str = ""


def diagnose(storage: str) -> list[Finding]:
    """Run every check.

    Args:
        storage: folder or URI that runs are written to.
    """
    tensorflow, driver = read_tensorflow(), read_driver()
    missing = find_missing_libraries(list_cuda_libraries(tensorflow)) if driver else []
    memory, free = read_memory()
    return [
        check_python(sys.version_info[:3]),
        check_tensorflow(tensorflow),
        check_gpu(driver, tensorflow.gpus),
        check_cuda(driver, tensorflow, missing),
        check_memory(memory, free),
        check_shared_memory(memory, read_shared_memory()),
        check_ray(os.environ.get("RAY_ADDRESS", "")),
        check_storage(storage),
    ]


def finding_lines(findings: Iterable[Finding]) -> list[str]:
    """Return one line for each finding: its label, what was found, and what to do."""
    return [
        f"{each.name:<10} {'' if each.ok else 'FAILS: '}{each.text}{f'. {each.fix}' if each.fix else ''}"
        for each in findings
    ]


def check_python(version: Sequence[int]) -> Finding:
    first, last = SUPPORTED_PYTHON
    shown, supported = ".".join(map(str, version)), f"the supported {_dotted(first)} to {_dotted(last)}"
    if first <= tuple(version[:2]) <= last:
        return Finding("python", True, f"{shown}, one of {supported}")
    fix = f"Make a new environment with one of them: make setup PYTHON=python{_dotted(first)}"
    return Finding("python", False, f"{shown}, none of {supported}", fix)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def check_tensorflow(facts: TensorFlowFacts) -> Finding:
    fix = "Install the locked dependencies: pip install --require-hashes -r requirements.lock"
    if facts.error:
        return Finding("tensorflow", False, f"does not load: {facts.error}", fix)
    if not facts.version.startswith(f"{TENSORFLOW}."):
        return Finding("tensorflow", False, f"{facts.version}, and {TENSORFLOW} is needed", fix)
    return Finding("tensorflow", True, facts.version)


def check_gpu(driver: DriverFacts | None, usable: Sequence[str]) -> Finding:
    """Compare the GPUs that NVIDIA's driver has with those that TensorFlow can use."""
    if usable:
        drivers = f" ({'; '.join(driver.gpus)})" if driver and driver.gpus else ""
        return Finding("gpu", True, f"{len(usable)} usable: {', '.join(usable)}{drivers}")
    if driver is None:
        return Finding("gpu", True, "no GPU: there is no NVIDIA driver here, so a run trains on the CPUs")
    if driver.error:
        return Finding("gpu", False, f"NVIDIA's driver fails: {driver.error}", "Load or install the driver anew")
    if not driver.gpus:
        return Finding("gpu", True, "no GPU: NVIDIA's driver has none, so a run trains on the CPUs")
    text = f"TensorFlow can use none of {'; '.join(driver.gpus)}"
    return Finding("gpu", False, text, "Install its CUDA libraries (next line)")


def check_cuda(driver: DriverFacts | None, facts: TensorFlowFacts, missing: Sequence[str]) -> Finding:
    if driver is None or not driver.gpus:
        return Finding("cuda", True, "not looked for, since there is no GPU")
    if facts.error or not facts.cuda:
        text = "not looked for: " + ("TensorFlow does not load" if facts.error else "this TensorFlow is one for CPUs")
        return Finding("cuda", False, text, "Install the package `tensorflow`, not `tensorflow-cpu`")
    needed = f"CUDA {facts.cuda} and cuDNN {facts.cudnn}"
    if missing:
        fix = f"Install them: pip install 'tensorflow[and-cuda]=={facts.version}'"
        return Finding("cuda", False, f"of {needed}, these libraries are missing: {', '.join(missing)}", fix)
    return Finding("cuda", True, f"the libraries of {needed} are found")


def check_memory(total: int, free: int) -> Finding:
    """Check that memory, in bytes, is free for a run."""
    text = f"{free / _GIB:.1f} GiB free of {total / _GIB:.1f}"
    if free >= LEAST_MEMORY:
        return Finding("memory", True, text)
    fix = "End other programs, or take a larger machine"
    return Finding("memory", False, f"{text}, and a run takes at least {LEAST_MEMORY / _GIB:.0f}", fix)


def check_shared_memory(memory: int, free: int | None) -> Finding:
    """Check that /dev/shm takes Ray's object store.

    Args:
        memory: bytes of the machine, or of its container.
        free: bytes in /dev/shm; None where there is no such folder.
    """
    if free is None:
        return Finding("/dev/shm", True, "none on this system: Ray keeps its objects elsewhere")
    share = memory * OBJECT_STORE_SHARE
    if free >= share:
        return Finding("/dev/shm", True, f"{free / _GIB:.1f} GiB free")
    text = f"{free / _GIB:.1f} GiB free, less than 30 % of memory: Ray keeps its objects on the disk, which is slow"
    return Finding("/dev/shm", True, text, f"Give the container more: docker run --shm-size={share / _GIB:.1f}g")


def check_ray(address: str) -> Finding:
    """Check that the cluster that `address` names can be joined.

    Args:
        address: value of RAY_ADDRESS; empty where it is not set.
    """
    if not address:
        return Finding("ray", True, "RAY_ADDRESS names no cluster: each run starts Ray on this machine")
    try:
        check_reachable(address)
        resources = _run_probe(_RAY_PROBE, os.environ | {"RAY_ADDRESS": address})
    except (OSError, RunError) as error:
        fix = "Use HOST:6379, or auto on a node of the cluster; unset RAY_ADDRESS to run on this machine"
        return Finding("ray", False, f"no cluster answers at RAY_ADDRESS={address}: {error}", fix)
    found = f"{resources.get('CPU', 0):.0f} CPUs, {resources.get('GPU', 0):.0f} GPUs"
    return Finding("ray", True, f"the cluster at {address} has {found}")


def check_storage(storage: str) -> Finding:
    """Check that a file can be written to the folder, or to the one that it would be made in, and be deleted."""
    try:
        storage_path(storage).check_writable()
    except (UsageError, RunError, OSError) as error:
        # Ours name the folder, and no credentials; a disk's own error names the probe.
        text = f"{storage} cannot be written to" if isinstance(error, OSError) else str(error).rstrip(".")
        return Finding("storage", False, text, "Name another folder with --storage")
    return Finding("storage", True, f"{storage} can be written to")


def read_tensorflow() -> TensorFlowFacts:
    """Load TensorFlow in another process, and ask it for its version and its GPUs."""
    try:
        facts = _run_probe(_TENSORFLOW_PROBE, os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"})
    except RunError as error:
        return TensorFlowFacts(error=str(error))
    return TensorFlowFacts(facts["version"], tuple(facts["gpus"]), facts["cuda"], facts["cudnn"])


def _run_probe(code: str, environment: dict[str, str]) -> dict[str, Any]:
    """Return the JSON that `code` prints last in a process of this Python.

    Raises:
        RunError: it failed, with the last line that it wrote, or took too long.
    """
    command = [sys.executable, "-c", code]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        raise RunError(f"no answer in {_PROBE_SECONDS:.0f} s") from None
    if done.returncode < 0:
        raise RunError(f"its process was ended by signal {-done.returncode}")
    if done.returncode:
        raise RunError(_last_line(done.stderr))
    return json.loads(_last_line(done.stdout))


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it says nothing")


def read_driver() -> DriverFacts | None:
    """Ask nvidia-smi for the GPUs; None where there is no such program, and so no driver."""
    if not (program := shutil.which("nvidia-smi")):
        return None
    command = [program, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        return DriverFacts(error=f"nvidia-smi does not answer in {_PROBE_SECONDS:.0f} s")
    if done.returncode:
        return DriverFacts(error=_last_line(done.stdout + done.stderr))
    return DriverFacts(tuple(line.strip() for line in done.stdout.splitlines() if line.strip()))


def list_cuda_libraries(facts: TensorFlowFacts) -> list[str]:
    """Return the names of the libraries that a TensorFlow built for these versions loads; none for one without CUDA."""
    if not facts.cuda:
        return []
    cuda = int(facts.cuda.partition(".")[0])
    numbers = {"cudart": cuda, "cublas": cuda, "cufft": cuda - 1, "cusolver": cuda - 1, "cusparse": 12}
    return [f"lib{name}.so.{number}" for name, number in (numbers | {"cudnn": facts.cudnn, "nccl": 2}).items()]


def find_missing_libraries(names: Iterable[str]) -> list[str]:
    """Return those that load neither from the system nor from NVIDIA's Python packages."""
    found = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (found.submodule_search_locations or [])] if found else []
    return [name for name in names if not _loads(name, folders)]


def _loads(library: str, folders: Iterable[Path]) -> bool:
    files = [str(file) for folder in folders for file in folder.glob(f"*/lib/{library}")]
    for file in [library, *files]:
        with suppress(OSError):
            ctypes.CDLL(file)
            return True
    return False


def read_memory() -> tuple[int, int]:
    """Return the bytes of memory of this machine or container, and how many of them are free."""
    memory = psutil.virtual_memory()
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.is_file() else "max"
    total = min(memory.total, int(limit)) if limit.isdigit() else memory.total
    return total, min(memory.available, total)


def read_shared_memory() -> int | None:
    """Return the free bytes of /dev/shm; None where there is no such folder."""
    folder = Path("/dev/shm")
    return shutil.disk_usage(folder).free if folder.is_dir() else None
