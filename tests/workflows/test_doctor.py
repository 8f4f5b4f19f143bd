"""Every answer of every check, from facts that are given; and the checks of this machine as it is."""

import socket
import sys
import tomllib
from pathlib import Path

import psutil
import pytest

from fracture.workflows import doctor
from fracture.workflows.doctor import DriverFacts, Finding, TensorFlowFacts

PROJECT = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
GIB = 2**30
H100 = DriverFacts(("NVIDIA H100 80GB HBM3, 550.54.15, 81559 MiB",))
BUILT_FOR_CUDA = TensorFlowFacts("2.21.0", (), "12.5.1", "9")
LIBRARIES = [
    *("libcudart.so.12", "libcublas.so.12", "libcufft.so.11", "libcusolver.so.11", "libcusparse.so.12"),
    *("libcudnn.so.9", "libnccl.so.2"),
]


def test_a_finding_is_one_line():
    findings = [
        Finding("python", True, "3.12.1, one of the supported 3.11 to 3.13"),
        Finding("storage", False, "s3://b/runs cannot be written", "Name another folder with --storage"),
        Finding("/dev/shm", True, "0.1 GiB free", "Give the container more"),
    ]
    assert doctor.finding_lines(findings) == [
        "python     3.12.1, one of the supported 3.11 to 3.13",
        "storage    FAILS: s3://b/runs cannot be written. Name another folder with --storage",
        "/dev/shm   0.1 GiB free. Give the container more",
    ]


@pytest.mark.parametrize("version", [(3, 11, 0), (3, 12, 1), (3, 13, 0)])
def test_three_versions_of_python_are_supported(version: tuple[int, int, int]):
    assert doctor.check_python(version).ok


@pytest.mark.parametrize("version", [(3, 10, 13), (3, 14, 0)])
def test_other_versions_of_python_are_not(version: tuple[int, int, int]):
    found = doctor.check_python(version)
    assert not found.ok
    assert found.text == f"{'.'.join(map(str, version))}, none of the supported 3.11 to 3.13"
    assert "make setup PYTHON=python3.11" in found.fix


def test_the_versions_are_those_of_the_project():
    first, (major, minor) = doctor.SUPPORTED_PYTHON
    assert PROJECT["requires-python"] == f">={first[0]}.{first[1]},<{major}.{minor + 1}"
    assert f"tensorflow=={doctor.TENSORFLOW}.*" in PROJECT["dependencies"]


def test_a_tensorflow_that_does_not_load_is_reported_with_its_reason():
    found = doctor.check_tensorflow(TensorFlowFacts(error="ModuleNotFoundError: No module named 'tensorflow'"))
    assert not found.ok
    assert found.text == "does not load: ModuleNotFoundError: No module named 'tensorflow'"
    assert "requirements.lock" in found.fix


def test_another_tensorflow_is_not_supported():
    assert doctor.check_tensorflow(TensorFlowFacts("2.21.3")).ok
    found = doctor.check_tensorflow(TensorFlowFacts("2.20.0"))
    assert not found.ok
    assert found.text == "2.20.0, and 2.21 is needed"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise ImportError('libstdc++.so.6 is missing')", "ImportError: libstdc++.so.6 is missing"),
        ("import os; os.kill(os.getpid(), 4)", "its process was ended by signal 4"),  # an instruction it lacks
    ],
)
def test_a_tensorflow_that_breaks_does_not_break_the_doctor(
    code: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "tensorflow.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert doctor.read_tensorflow() == TensorFlowFacts(error=reason)


@pytest.mark.parametrize(
    ("script", "facts"),
    [
        (f"echo '{H100.gpus[0]}'", H100),
        ("echo 'NVIDIA-SMI has failed'; exit 9", DriverFacts(error="NVIDIA-SMI has failed")),
        ("exit 9", DriverFacts(error="it says nothing")),
    ],
)
def test_the_driver_is_asked_through_its_program(
    script: str, facts: DriverFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.read_driver() == facts
    (tmp_path / "nvidia-smi").unlink()
    assert doctor.read_driver() is None


def test_a_machine_without_a_driver_trains_on_its_cpus():
    found = doctor.check_gpu(None, ())
    assert found.ok
    assert "no GPU: there is no NVIDIA driver here" in found.text
    assert doctor.check_cuda(None, BUILT_FOR_CUDA, []).ok
    assert doctor.check_gpu(DriverFacts(), ()).ok


def test_a_driver_that_fails_is_reported_in_its_words():
    found = doctor.check_gpu(DriverFacts(error="couldn't communicate with the NVIDIA driver"), ())
    assert not found.ok
    assert "NVIDIA's driver fails: couldn't communicate" in found.text


def test_a_gpu_that_tensorflow_can_use():
    found = doctor.check_gpu(H100, ("NVIDIA H100 80GB HBM3",))
    assert found.ok
    assert found.text == "1 usable: NVIDIA H100 80GB HBM3 (NVIDIA H100 80GB HBM3, 550.54.15, 81559 MiB)"
    cuda = doctor.check_cuda(H100, BUILT_FOR_CUDA, [])
    assert (cuda.ok, cuda.text) == (True, "the libraries of CUDA 12.5.1 and cuDNN 9 are found")


def test_a_gpu_that_tensorflow_cannot_use_is_reported_with_the_missing_library():
    found = doctor.check_gpu(H100, ())
    assert not found.ok
    assert found.text.startswith("TensorFlow can use none of NVIDIA H100")
    cuda = doctor.check_cuda(H100, BUILT_FOR_CUDA, ["libcudnn.so.9"])
    assert not cuda.ok
    assert cuda.text == "of CUDA 12.5.1 and cuDNN 9, these libraries are missing: libcudnn.so.9"
    assert "pip install 'tensorflow[and-cuda]==2.21.0'" in cuda.fix


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (TensorFlowFacts("2.21.0"), "this TensorFlow is one for CPUs"),
        (TensorFlowFacts(error="x"), "TensorFlow does not load"),
    ],
)
def test_cuda_libraries_need_a_tensorflow_that_uses_them(facts: TensorFlowFacts, reason: str):
    found = doctor.check_cuda(H100, facts, [])
    assert not found.ok
    assert found.text == f"not looked for: {reason}"


def test_the_cuda_libraries_follow_from_what_tensorflow_was_built_for():
    assert doctor.list_cuda_libraries(BUILT_FOR_CUDA) == LIBRARIES
    assert doctor.list_cuda_libraries(TensorFlowFacts("2.21.0")) == []


def test_a_library_is_missing_where_it_does_not_load():
    here = "libc.so.6" if sys.platform == "linux" else "libSystem.dylib"
    assert doctor.find_missing_libraries([here, "libfracture-has-none.so.1"]) == ["libfracture-has-none.so.1"]


def test_too_little_memory_is_reported():
    assert doctor.check_memory(16 * GIB, 12 * GIB) == Finding("memory", True, "12.0 GiB free of 16.0")
    found = doctor.check_memory(4 * GIB, GIB)
    assert not found.ok
    assert found.text == "1.0 GiB free of 4.0, and a run takes at least 2"


def test_a_small_shared_memory_is_slow_and_no_failure():
    assert doctor.check_shared_memory(10 * GIB, 3 * GIB) == Finding("/dev/shm", True, "3.0 GiB free")
    found = doctor.check_shared_memory(10 * GIB, GIB // 16)
    assert found.ok
    assert "0.1 GiB free, less than 30 % of memory" in found.text
    assert found.fix.endswith("--shm-size=3.0g")
    assert doctor.check_shared_memory(10 * GIB, None).text.startswith("none on this system")


def test_without_an_address_ray_starts_on_this_machine():
    found = doctor.check_ray("")
    assert found.ok
    assert "each run starts Ray on this machine" in found.text


def test_a_cluster_that_does_not_answer_is_reported_at_once():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"  # bound, and nothing listens
        found = doctor.check_ray(address)
    assert not found.ok
    assert found.text.startswith(f"no cluster answers at RAY_ADDRESS={address}: ")
    assert "refused" in found.text
    assert "unset RAY_ADDRESS" in found.fix


def test_a_folder_is_written_to_and_left_as_it_was(tmp_path: Path):
    assert doctor.check_storage(str(tmp_path)) == Finding("storage", True, f"{tmp_path} can be written to")
    assert doctor.check_storage(str(tmp_path / "not/yet/there")).ok
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_reported(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    found = doctor.check_storage(str(tmp_path / "file"))
    assert not found.ok
    assert "cannot be written" in found.text
    assert "--storage" in found.fix
    assert (tmp_path / "file").read_bytes() == b""


def test_credentials_in_the_address_of_a_bucket_are_not_repeated():
    found = doctor.check_storage("s3://KEY:opensesame@bucket/runs")
    assert not found.ok
    assert "URI holds credentials" in found.text
    assert "opensesame" not in str(found)


def test_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As it is: the tests run on it, so only what a GPU needs may fail."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    findings = {each.name: each for each in doctor.diagnose(str(tmp_path))}
    assert list(findings) == ["python", "tensorflow", "gpu", "cuda", "memory", "/dev/shm", "ray", "storage"]
    assert all(len(name) <= 10 for name in findings)
    assert {name for name, each in findings.items() if not each.ok} <= {"gpu", "cuda", "memory"}
    assert ".".join(map(str, sys.version_info[:3])) in findings["python"].text
    total, free = doctor.read_memory()
    assert 0 < free <= total <= psutil.virtual_memory().total
