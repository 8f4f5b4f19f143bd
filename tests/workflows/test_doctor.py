"""Every answer of every check, from facts that are given; and the checks of this machine as it is."""

import os
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import psutil
import pytest

from fracture.runtime.gpus import Finding, TensorFlowFacts
from fracture.workflows import doctor

PROJECT = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
GIB = 2**30


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
    assert found.text.startswith(f"no cluster can be joined at RAY_ADDRESS={address}: ")
    assert "refused" in found.text
    assert "unset RAY_ADDRESS" in found.fix


@pytest.mark.slow
def test_the_doctor_finds_what_keeps_ray_from_starting(tmp_path: Path):
    """As a shell runs it, with few open files and a long name of the temporary folder, to a reader of ASCII alone."""
    folder = str(tmp_path / ("ö" * 60))
    settings = {"TMPDIR": folder, "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "HOME": "/proc/none"}
    command = f"ulimit -n 256; exec {sys.executable} -m fracture.cli doctor --storage {tmp_path}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | settings
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    lines = {line[:10].rstrip(): line[11:] for line in done.stdout.splitlines()}
    assert lines["tmp folder"].startswith(f"FAILS: the path of its folder {tmp_path}/{'?' * 60}/ray is ")
    assert lines["open files"].startswith("FAILS: a process may open 256 files, and Ray's open up to 1024. Raise the")


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


@pytest.mark.slow
def test_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As it is: the tests run on it, so only what a GPU needs may fail."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    findings = {each.name: each for each in doctor.diagnose(str(tmp_path))}
    assert list(findings) == [
        "python",
        "tensorflow",
        "gpu",
        "cuda",
        "memory",
        "/dev/shm",
        "tmp folder",
        "open files",
        "ray",
        "storage",
    ]
    assert all(len(name) <= 10 for name in findings)
    assert {name for name, each in findings.items() if not each.ok} <= {"gpu", "cuda", "memory"}
    assert ".".join(map(str, sys.version_info[:3])) in findings["python"].text
    total, free = doctor.read_memory()
    assert 0 < free <= total <= psutil.virtual_memory().total
