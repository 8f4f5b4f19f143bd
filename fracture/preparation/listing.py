"""List the files of a data folder. No file is opened."""

import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from fracture.errors import UsageError
from fracture.preparation.decoding.headers import holds_dicom
from fracture.preparation.identity import PatientKey
from fracture.preparation.layouts.clutter import is_clutter
from fracture.storage import StoragePath

EXPECTED = "Give the folder that holds the class folders, or train/, val/ and test/ with them inside."


class ListedFile(NamedTuple):
    """What is known of a file before it is opened."""

    size: int  # bytes
    modified: int  # nanoseconds since the epoch; 0 where the store does not say


class _Fault(NamedTuple):
    """Why a folder cannot be listed."""

    path: str  # of a folder or link in it
    what: str  # follows the name in the message
    target: str = ""  # of a link
    advice: str = ""


def list_files(root: StoragePath, key: PatientKey, expected: str = EXPECTED) -> dict[str, ListedFile]:
    """List every file below a data folder, by its path relative to it, sorted. Clutter is included.

    A name whose bytes are no UTF-8 has them as surrogate escapes, as everywhere in Python.

    Args:
        key: hides the name of a file in an error message where there are DICOM files.
        expected: the sentence of the error messages that says what to give instead.

    Raises:
        UsageError: no such folder, nothing in it, one in it that cannot be read, or a link that leads out of it or
            round in circles: a stranger's archive may hold such links.
    """
    if not root.is_dir():
        what = "a file, not a folder" if root.is_file() else "no such folder"
        raise UsageError(f"--data {root}: {what}. {expected}")
    faults: list[_Fault] = []
    files = dict(sorted(_walk_disk(root, faults) if root.is_local else _walk_bucket(root)))
    if faults:
        raise UsageError(f"--data {root}: {_describe_fault(faults[0], root, files, key)}")
    if all(map(is_clutter, files)):
        raise UsageError(f"--data {root}: the folder is empty. {expected}")
    return files


def show_name(path: str) -> str:
    r"""Return a path as text that any file can hold: bytes that are no UTF-8 are written as `\xf6`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def name_files(paths: Iterable[str], key: PatientKey, *, is_private: bool) -> dict[str, str]:
    """Return the name under which each file is written down: its path, or an HMAC where paths may name patients.

    Where two paths would be shown alike, the later gets a number.
    """
    if is_private:
        return {path: key.hide("path", path) for path in paths}
    shown: dict[str, str] = {}
    paths = dict.fromkeys(paths)
    for path in paths:
        name, number = show_name(path), 2
        while name in shown or (name != path and name in paths):
            name, number = f"{show_name(path)} ({number})", number + 1
        shown[name] = path
    return {path: name for name, path in shown.items()}


def _walk_bucket(root: StoragePath) -> Iterator[tuple[str, ListedFile]]:
    above = len(root.path.rstrip("/")) + 1
    for info in root.files():
        yield info.path[above:], ListedFile(info.size, info.mtime_ns or 0)


def _walk_disk(root: StoragePath, faults: list[_Fault]) -> Iterator[tuple[str, ListedFile]]:
    home = os.path.realpath(root.path)

    def note(error: OSError) -> None:
        folder = os.path.relpath(error.filename, home)
        if not is_clutter(f"{folder}/x"):  # which systems keep to themselves
            advice = ". Change its permissions, or move it out of the folder."
            faults.append(_Fault(folder, f"cannot be read: {error.strerror}", advice=advice))

    for folder, folders, names in os.walk(home, onerror=note):  # does not follow links
        for name in (*folders, *names):
            if os.path.islink(path := os.path.join(folder, name)):
                faults += _check_link(home, path, is_folder=name in folders)
        for name in names:
            path = os.path.join(folder, name)
            if os.path.isfile(path):  # no pipe or socket, and no link to nothing
                state = os.stat(path)
                yield os.path.relpath(path, home), ListedFile(state.st_size, state.st_mtime_ns)


def _check_link(home: str, path: str, *, is_folder: bool) -> list[_Fault]:
    target = os.path.realpath(path)
    if not is_folder and target.startswith(f"{home.rstrip('/')}/"):
        return []
    what = f"is a link to {'a folder' if is_folder else 'a file outside'}"
    advice = ", and such links are not followed. Copy the target, or name its folder with a --data of its own."
    return [_Fault(os.path.relpath(path, home), what, show_name(target), advice)]


def _describe_fault(fault: _Fault, root: StoragePath, files: Iterable[str], key: PatientKey) -> str:
    """Return the message, which may be posted or logged: without a path where paths may name patients."""
    if holds_dicom(root, files) or (not files and key.is_made):
        hidden = key.hide("path", fault.path)
        table = key.write_paths({hidden: fault.path}).name
        return f"{hidden}, whose path is in {table} beside the key, {fault.what}{fault.advice}"
    target = f", {fault.target}" if fault.target else ""
    return f"{show_name(fault.path)!r} {fault.what}{target}{fault.advice}"
