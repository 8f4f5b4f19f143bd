"""Every answer about GPUs, from facts that are given, or from programs that stand for NVIDIA's."""

import sys
from pathlib import Path

import pytest

from fracture.errors import RunError
from fracture.runtime import gpus
from fracture.runtime.gpus import DriverFacts, TensorFlowFacts
from fracture.training.strategy import make_strategy

H100 = DriverFacts(("NVIDIA H100 80GB HBM3, 550.54.15, 81559 MiB",))
BUILT_FOR_CUDA = TensorFlowFacts("2.21.0", (), "12.5.1", "9")
LIBRARIES = [
    *("libcudart.so.12", "libcublas.so.12", "libcufft.so.11", "libcusolver.so.11", "libcusparse.so.12"),
    *("libcudnn.so.9", "libnccl.so.2"),
]


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
    assert gpus.read_tensorflow() == TensorFlowFacts(error=reason)


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
    assert gpus.read_driver() == facts
    (tmp_path / "nvidia-smi").unlink()
    assert gpus.read_driver() is None


def test_a_machine_without_a_driver_trains_on_its_cpus():
    found = gpus.check_gpu(None, ())
    assert found.ok
    assert "no GPU: there is no NVIDIA driver here" in found.text
    assert gpus.check_cuda(None, BUILT_FOR_CUDA, []).ok
    assert gpus.check_gpu(DriverFacts(), ()).ok


def test_a_driver_that_fails_is_reported_in_its_words():
    found = gpus.check_gpu(DriverFacts(error="couldn't communicate with the NVIDIA driver"), ())
    assert not found.ok
    assert "NVIDIA's driver fails: couldn't communicate" in found.text


def test_a_gpu_that_tensorflow_can_use():
    found = gpus.check_gpu(H100, ("NVIDIA H100 80GB HBM3",))
    assert found.ok
    assert found.text == "1 usable: NVIDIA H100 80GB HBM3 (NVIDIA H100 80GB HBM3, 550.54.15, 81559 MiB)"
    cuda = gpus.check_cuda(H100, BUILT_FOR_CUDA, [])
    assert (cuda.ok, cuda.text) == (True, "the libraries of CUDA 12.5.1 and cuDNN 9 are found")


def test_a_gpu_that_tensorflow_cannot_use_is_reported_with_the_missing_library():
    found = gpus.check_gpu(H100, ())
    assert not found.ok
    assert found.text.startswith("TensorFlow can use none of NVIDIA H100")
    cuda = gpus.check_cuda(H100, BUILT_FOR_CUDA, ["libcudnn.so.9"])
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
    found = gpus.check_cuda(H100, facts, [])
    assert not found.ok
    assert found.text == f"not looked for: {reason}"


def test_the_cuda_libraries_follow_from_what_tensorflow_was_built_for():
    assert gpus.list_cuda_libraries(BUILT_FOR_CUDA) == LIBRARIES
    assert gpus.list_cuda_libraries(TensorFlowFacts("2.21.0")) == []


def test_a_library_is_missing_where_it_does_not_load():
    here = "libc.so.6" if sys.platform == "linux" else "libSystem.dylib"
    assert gpus.find_missing_libraries([here, "libfracture-has-none.so.1"]) == ["libfracture-has-none.so.1"]


@pytest.mark.slow
def test_a_worker_that_should_have_a_gpu_says_why_it_has_none(tiny_config, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        RunError,
        match=r"^compute.gpu is set, and TensorFlow sees no GPU on this worker: no GPU: there is no NVIDIA driver",
    ):
        make_strategy(tiny_config("compute.gpu=true"))


def test_a_missing_gpu_is_explained_as_the_doctor_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A TensorFlow for CPUs on a machine with a driver and a GPU."""
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{H100.gpus[0]}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    (tmp_path / "tensorflow.py").write_text(
        "class config:\n  list_physical_devices = lambda kind: []\n"
        "class sysconfig:\n  get_build_info = dict\n__version__ = '2.21.0'\n"
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert gpus.explain_missing_gpu() == (
        f"TensorFlow can use none of {H100.gpus[0]}; CUDA: not looked for: this TensorFlow is one for CPUs. "
        "Install the package `tensorflow`, not `tensorflow-cpu`"
    )


@pytest.mark.parametrize(
    ("script", "bytes_free"),
    [
        ('test "$1" = --id=3 && echo 7680', 7680 * 2**20),
        ("echo [N/A]", 0),
        ("echo no devices were found; exit 6", 0),
    ],
    ids=["a GPU", "a driver that does not know", "no GPU"],
)
def test_free_memory_is_what_the_driver_says_of_the_workers_gpu(script: str, bytes_free: int, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert gpus.free_gpu_memory() == bytes_free


def test_without_a_driver_no_memory_is_free(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.free_gpu_memory() == 0
