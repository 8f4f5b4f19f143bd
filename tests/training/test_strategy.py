from pathlib import Path

import pytest

from fracture.training.strategy import free_gpu_memory


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
    assert free_gpu_memory() == bytes_free


def test_without_a_driver_no_memory_is_free(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert free_gpu_memory() == 0
