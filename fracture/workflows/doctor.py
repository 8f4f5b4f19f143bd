"""Check what a run needs on this machine: Python, TensorFlow, GPU, memory, Ray, and a folder to write to.

Every check is a function of what was found, so that each of its answers can be tested on any machine; `diagnose` reads
this machine and calls them all. TensorFlow and Ray are asked in processes of their own: a TensorFlow that was built for
another processor kills its process, and a Ray that does not answer keeps it waiting.
"""

import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil

from fracture.errors import RunError, UsageError
from fracture.runtime.cluster import JOIN_FIX, probe_cluster
from fracture.runtime.environment import check_open_files, check_temporary_folder, ray_folder
from fracture.runtime.gpus import (
    Finding,
    TensorFlowFacts,
    check_cuda,
    check_gpu,
    find_missing_cuda,
    read_driver,
    read_tensorflow,
)
from fracture.storage import storage_path

SUPPORTED_PYTHON = ((3, 11), (3, 13))  # the first and the last version
TENSORFLOW = "2.21"
LEAST_MEMORY = 2 * 2**30  # bytes that should be free; Ray ends workers when a machine's memory is 95 % full
OBJECT_STORE_SHARE = 0.3  # of memory, that Ray keeps in /dev/shm
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of the container that this process runs in
_GIB = 2**30


def diagnose(storage: str) -> list[Finding]:
    """Run every check.

    Args:
        storage: folder or URI that runs are written to.
    """
    tensorflow, driver = read_tensorflow(), read_driver()
    memory, free = read_memory()
    return [
        check_python(sys.version_info[:3]),
        check_tensorflow(tensorflow),
        check_gpu(driver, tensorflow.gpus),
        check_cuda(driver, tensorflow, find_missing_cuda(driver, tensorflow)),
        check_memory(memory, free),
        check_shared_memory(memory, read_shared_memory()),
        check_temporary_folder(ray_folder(os.environ)),
        check_open_files(),
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
    if address in ("", "local"):
        return Finding("ray", True, "RAY_ADDRESS names no cluster: each run starts Ray on this machine")
    try:
        resources = probe_cluster(address)
    except (OSError, RunError) as error:
        text = f"no cluster can be joined at RAY_ADDRESS={address}: {str(error).rstrip('.')}"
        return Finding("ray", False, text, JOIN_FIX)
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
