"""What Ray and other libraries need of this machine: folders that they can write to, and open files.

Every check is a function of what it is given, so that each of its answers can be tested on any machine.
"""

import os
import resource
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from fracture.errors import RunError
from fracture.runtime.gpus import Finding

LEAST_OPEN_FILES = (
    1024  # of one process; a raylet holds some for each worker, and Ray raises the soft limit to the hard
)
LEAST_FREE = 100 * 2**20  # bytes, for the logs of a run
_LONGEST_SOCKET = 107  # bytes in the path of a Unix socket
_SOCKET = "session_2026-01-01_00-00-00_000000_{pid}/sockets/plasma_store"  # the longest path that Ray makes of a socket
_TAKE_ANOTHER = "Name a folder of yours with a short path: RAY_TMPDIR=/tmp/NAME"


def check_environment() -> None:
    """Check that Ray can start on this machine, which would say so itself late, in many lines, or never.

    Raises:
        RunError: it cannot; the message says what to change.
    """
    for finding in (check_temporary_folder(ray_folder(os.environ)), check_open_files()):
        if not finding.ok:
            raise RunError(f"Ray cannot start on this machine: {finding.text}. {finding.fix}")


def ray_folder(environment: Mapping[str, str]) -> Path:
    """Return the folder that Ray keeps its sockets and logs in. See the parameters of `ray start` for RAY_TMPDIR."""
    return Path(environment.get("RAY_TMPDIR") or environment.get("TMPDIR") or "/tmp") / "ray"


def check_temporary_folder(folder: Path) -> Finding:
    """Check that Ray's sockets and logs fit into the folder; it is made where it is missing, as Ray makes it."""
    room = _LONGEST_SOCKET - len(os.fsencode(folder / _SOCKET.format(pid=os.getpid())))
    if room < 0:
        text = f"the path of its folder {folder} is {-room} bytes too long for its sockets"
        return Finding("tmp folder", False, text, _TAKE_ANOTHER)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        text = f"its folder {folder} cannot be written to: {error.strerror}"
        return Finding("tmp folder", False, text, _TAKE_ANOTHER)
    if free < LEAST_FREE:
        text = f"{free >> 20} MiB are free for its folder {folder}, and its logs take {LEAST_FREE >> 20}"
        return Finding("tmp folder", False, text, "Free some, or name a folder on another disk: RAY_TMPDIR=DIR")
    return Finding("tmp folder", True, f"{folder} takes the files of Ray")


def check_open_files(limit: int | None = None) -> Finding:
    """Check that a process may open as many files as Ray's do.

    Args:
        limit: of one process; None: as it is here, -1: none.
    """
    if limit is None:
        _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY or limit >= LEAST_OPEN_FILES:
        return Finding("open files", True, "enough for each process")
    text = f"a process may open {limit} files, and Ray's open up to {LEAST_OPEN_FILES}"
    fix = "Raise the limit: ulimit -n 65536, as root or in /etc/security/limits.conf; docker run --ulimit nofile=65536"
    return Finding("open files", False, text, fix)


def replace_home() -> None:
    """Name other folders to Matplotlib and Keras where there is no home folder to write to, as in many containers.

    HOME itself is kept: a folder that can only be read may hold credentials.
    """
    home = Path(os.path.expanduser("~"))
    if home.is_absolute() and os.access(home, os.W_OK | os.X_OK):
        return
    temporary = Path(tempfile.gettempdir())
    os.environ.setdefault("MPLCONFIGDIR", str(temporary / f"matplotlib-{os.getuid()}"))
    os.environ.setdefault("KERAS_HOME", str(temporary / ".keras"))  # its own choice, but for a home that is not known


def provide_token() -> None:
    """Give a Ray of one's own a token for this job alone where Ray could not keep one in ~/.ray/auth_token."""
    if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        return
    file = Path(os.path.expanduser("~/.ray/auth_token"))
    if os.access(file, os.R_OK) or (file.is_absolute() and _can_be_written_to(file.parent)):
        return
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex()


def _can_be_written_to(folder: Path) -> bool:
    """Return whether files can be made in the folder, which is made where it is missing, as Ray makes it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)
