"""The GPUs of this machine, as TensorFlow and NVIDIA's driver see them, and why TensorFlow sees none.

Every check is a function of what was found, so that each of its answers can be tested on any machine. TensorFlow is
asked in a process of its own: one that was built for another processor kills its process.
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

from fracture.errors import RunError

_PROBE_SECONDS = 120.0
_TENSORFLOW_PROBE = """
import json
import tensorflow as tf
gpus = tf.config.list_physical_devices("GPU")
names = [tf.config.experimental.get_device_details(gpu).get("device_name", gpu.name) for gpu in gpus]
build = tf.sysconfig.get_build_info()
facts = {"version": tf.__version__, "gpus": names}
print(json.dumps(facts | {key: build.get(f"{key}_version", "") for key in ("cuda", "cudnn")}))
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


def read_tensorflow() -> TensorFlowFacts:
    """Load TensorFlow in another process, and ask it for its version and its GPUs."""
    try:
        facts = run_probe(_TENSORFLOW_PROBE, os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"})
    except RunError as error:
        return TensorFlowFacts(error=str(error))
    return TensorFlowFacts(facts["version"], tuple(facts["gpus"]), facts["cuda"], facts["cudnn"])


def run_probe(code: str, environment: dict[str, str], seconds: float = _PROBE_SECONDS) -> dict[str, Any]:
    """Return the JSON that `code` prints last in a process of this Python.

    Raises:
        RunError: it failed, with the last line that it wrote, or took too long.
    """
    command = [sys.executable, "-c", code]
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=seconds, env=environment
        )
    except subprocess.TimeoutExpired:
        raise RunError(f"no answer in {seconds:.0f} s") from None
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
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=_PROBE_SECONDS)
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


def find_missing_cuda(driver: DriverFacts | None, facts: TensorFlowFacts) -> list[str]:
    """Return the libraries that TensorFlow would need for the GPUs here and that do not load; none without a driver."""
    return find_missing_libraries(list_cuda_libraries(facts)) if driver else []


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


def free_gpu_memory() -> int:
    """Return the free bytes of this process' GPU, as NVIDIA's driver says; 0 where it says nothing."""
    own = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]  # Ray sets it
    command = ["nvidia-smi", f"--id={own}", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        return int(subprocess.run(command, capture_output=True, check=True, timeout=30).stdout) * 2**20
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0


def explain_missing_gpu() -> str:
    """Return why TensorFlow sees no GPU, as `fracture doctor` says it."""
    driver, facts = read_driver(), read_tensorflow()
    if facts.gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        return f"another process sees {', '.join(facts.gpus)}, with CUDA_VISIBLE_DEVICES {visible}"
    cuda = check_cuda(driver, facts, find_missing_cuda(driver, facts))
    reason = check_gpu(driver, facts.gpus).text.removesuffix(", so a run trains on the CPUs")
    return reason if cuda.ok else f"{reason}; CUDA: {cuda.text}. {cuda.fix}"
