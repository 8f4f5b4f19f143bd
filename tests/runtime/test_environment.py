"""What Ray needs of a machine, and what is done where there is no home folder."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fracture.errors import RunError
from fracture.runtime.environment import (
    LEAST_OPEN_FILES,
    check_environment,
    check_open_files,
    check_temporary_folder,
    provide_token,
    ray_folder,
    replace_home,
)
from fracture.runtime.submission import JOB_CONFIG
from tests.conftest import ROOT, small_disk, without_rights_to

HOMES = ["MPLCONFIGDIR", "KERAS_HOME", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"]
SESSION = "session_2026-01-01_00-00-00_000000_"


@pytest.fixture
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings that the code sets itself are not there, and are as before afterwards."""
    for name in HOMES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder in which the sockets of Ray have room; pytest's own have long names."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({}, "/tmp/ray"),
        ({"TMPDIR": "/scratch"}, "/scratch/ray"),
        ({"TMPDIR": "/scratch", "RAY_TMPDIR": "/short"}, "/short/ray"),
        ({"TMPDIR": ""}, "/tmp/ray"),
    ],
)
def test_the_folder_of_ray(environment: dict[str, str], folder: str):
    assert ray_folder(environment) == Path(folder)


def test_a_folder_whose_path_is_too_long_for_a_socket_is_refused(short_folder: Path):
    within = len(f"/{SESSION}{os.getpid()}/sockets/plasma_store")
    fits = "x" * (107 - within - len(f"{short_folder}/"))
    assert check_temporary_folder(short_folder / fits).ok
    found = check_temporary_folder(short_folder / f"{fits}xx")
    assert not found.ok
    assert found.text == f"the path of its folder {short_folder / fits}xx is 2 bytes too long for its sockets"
    assert "RAY_TMPDIR=/tmp/NAME" in found.fix
    assert not (short_folder / f"{fits}xx").exists()


@pytest.mark.parametrize(
    ("path", "reason"), [("/proc/ray", "No such file"), ("/dev/null/ray", "Not a directory"), ("/sys/ray", "")]
)
def test_a_folder_that_cannot_be_made_is_refused(path: str, reason: str):
    found = check_temporary_folder(Path(path))
    assert not found.ok
    assert found.text.startswith(f"its folder {path} cannot be written to: {reason}")


def test_a_folder_that_cannot_be_written_to_is_refused(short_folder: Path):
    with without_rights_to(short_folder, but=0o555):
        found = check_temporary_folder(short_folder)
    assert found.text == f"its folder {short_folder} cannot be written to: Permission denied"


def test_a_disk_that_is_almost_full_is_refused(short_folder: Path):
    with small_disk(short_folder / "disk", kilobytes=3072) as disk:
        found = check_temporary_folder(disk)
        with pytest.raises(OSError, match="No space left"):
            (disk / "file").write_bytes(bytes(2**22))
        full = check_temporary_folder(disk)
    assert found.text == f"3 MiB are free for its folder {disk}, and its logs take 100"
    assert found.fix == "Free some, or name a folder on another disk: RAY_TMPDIR=DIR"
    assert full.text == f"its folder {disk} cannot be written to: No space left on device"


def test_few_open_files_are_refused():
    assert check_open_files(LEAST_OPEN_FILES).ok
    assert check_open_files(-1).ok
    found = check_open_files(256)
    assert not found.ok
    assert found.text == "a process may open 256 files, and Ray's open up to 1024"
    assert "ulimit -n 65536" in found.fix


def test_ray_is_not_started_where_it_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("x" * 107)))
    with pytest.raises(
        RunError,
        match=r"^Ray cannot start on this machine: the path of its folder .*/ray is \d+ bytes too long for its ",
    ):
        check_environment()


@pytest.mark.usefixtures("no_settings")
def test_without_a_home_to_write_to_other_folders_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    replace_home()
    assert not {*HOMES} & os.environ.keys(), "there is one"
    monkeypatch.setenv("HOME", "/proc/none")
    monkeypatch.setenv("KERAS_HOME", "/given")
    replace_home()
    assert os.environ["MPLCONFIGDIR"].endswith(f"/matplotlib-{os.getuid()}")
    assert os.environ["KERAS_HOME"] == "/given"
    assert os.environ["HOME"] == "/proc/none"


@pytest.mark.usefixtures("no_settings")
def test_a_token_is_made_where_ray_could_not_keep_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    provide_token()
    assert "RAY_AUTH_TOKEN" not in os.environ, "Ray makes its own in a home that can be written"
    (tmp_path / ".ray/auth_token").write_text("kept")
    provide_token()
    assert "RAY_AUTH_TOKEN" not in os.environ, "there is one"
    monkeypatch.setenv("HOME", "/proc/none")
    provide_token()
    first = os.environ.pop("RAY_AUTH_TOKEN")
    provide_token()
    assert len(first) == len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert first != os.environ["RAY_AUTH_TOKEN"]
    monkeypatch.setenv("RAY_AUTH_TOKEN", "given")
    provide_token()
    assert os.environ["RAY_AUTH_TOKEN"] == "given"


NOBODY = [
    "unshare",
    "--user",
    "--map-user=12345",
    "--map-group=12345",
    "env",
    "-u",
    "HOME",
    "-u",
    "USER",
    "-u",
    "LOGNAME",
]


@pytest.fixture
def nobody() -> list[str]:
    """The first words of a command that runs as a user without a name and a home folder, as in containers."""
    if subprocess.run([*NOBODY, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system has no user namespaces")
    return NOBODY


@pytest.mark.slow
def test_a_user_without_a_name_and_a_home_leaves_no_files_in_the_current_folder(nobody: list[str], tmp_path: Path):
    code = (
        "from fracture.cli import main; code = main(['status', 'x']); import fracture.models; "
        "import matplotlib.pyplot; from fracture.workflows.locking import describe_user; "
        "print(code, describe_user().partition(' on ')[0])"
    )
    command = [*nobody, sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "2 user 12345\n"
    assert done.stderr == f"error: there is no run 'x' in {tmp_path}/runs. There are none; check --storage.\n"
    assert list(tmp_path.iterdir()) == []


def test_a_submitted_job_without_a_home_names_its_storage(nobody: list[str]):
    command = [*nobody, f"{JOB_CONFIG}={{}}", sys.executable, "-m", "fracture.cli", "status", "x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: no home folder is known here to write to: name a folder with --storage\n"


@pytest.mark.ray
def test_ray_starts_without_a_home_to_write_to(tmp_path: Path):
    code = (
        "from fracture.runtime.environment import replace_home; replace_home(); "
        "from fracture.runtime.cluster import start_ray; start_ray(False, to_train=True); "
        "import ray; print(ray.get(ray.remote(lambda: 42).remote()))"
    )
    environment = {name: value for name, value in os.environ.items() if name not in {*HOMES, "USER"}}
    command = [sys.executable, "-c", code]
    environment |= {"HOME": "/proc/none"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("42\n", "")
