"""The arguments that several workflows take: the data, the run and its storage, and who gets the lines of progress."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fracture.errors import UsageError
from fracture.storage import StoragePath, storage_path

if TYPE_CHECKING:
    from fracture.preparation.identity import PatientKey

Report = Callable[[str], None]  # gets each line of progress


def print_line(line: str) -> None:
    print(line, flush=True)


@dataclass(frozen=True, kw_only=True)
class RunArguments:
    """A named run and the data that it trains on.

    Raises:
        UsageError: the run's name cannot be a folder's, a path is empty, or `labels` is given without `data`.
    """

    run: str
    storage: str = "."  # folder or URI; runs are in its folder runs, shards in its folder shards
    data: tuple[
        str, ...
    ] = ()  # folders or URIs of radiographs; without data and shards, sample radiographs are generated
    labels: str | None = None  # table of the labels of `data`
    key_file: str | None = None  # of the secret key that hides patients' ids; None: patients.key in `storage`
    shards: str | None = None  # folder or URI of shards, in place of `data`
    verbose: bool = False  # whether the logs of Ray and TensorFlow are shown

    def __post_init__(self) -> None:
        if self.labels and not self.data:
            raise UsageError("--labels belongs to --data DIR: name the folder that its paths are in")
        given = {"data": self.data, "shards": [self.shards], "storage": [self.storage], "labels": [self.labels]}
        for flag, paths in given.items():
            if "" in paths:
                raise UsageError(f"--{flag} is empty: name a folder, or leave the flag out")
        check_run_name("--run", self.run)

    @property
    def folder(self) -> StoragePath:
        return storage_path(self.storage) / "runs" / self.run


def patient_key(key_file: str | None, folder: StoragePath) -> "PatientKey":
    """Return the key that hides ids: of the file that is named, or else of patients.key in a folder on a disk.

    Raises:
        UsageError: the file is named as a URI.
    """
    from fracture.preparation.identity import PatientKey

    if key_file is None:
        return PatientKey(Path(folder.path) / "patients.key" if folder.is_local else None)
    if "://" in key_file:
        raise UsageError(f"--key-file {key_file}: a secret key stays on this machine's disk. Name a local file.")
    return PatientKey(Path(key_file).absolute())


def check_run_name(flag: str, name: str) -> None:
    """Raise UsageError where `name`, given with `flag`, cannot name a run."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UsageError(f"{flag} {name!r}: a run's name is letters, digits, '.', '_' and '-', such as 2026-w48")


@contextmanager
def resumable(hint: str) -> Iterator[None]:
    """Add to a KeyboardInterrupt how the work can be resumed."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(f"Go on with: {hint}")
        raise


def resume_hint(run: str) -> str:
    return f"the same command with --run {run} (make: RUN={run})"
