"""List the files of a data folder. No file is opened."""

import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from fracture.errors import UsageError
from fracture.preparation.identity import PatientKey
from fracture.preparation.layouts.clutter import is_clutter
from fracture.storage import StoragePath

EXPECTED = "Give the folder that holds the class folders, or train/, val/ and test/ with them inside."


class ListedFile(NamedTuple):
    """What is known of a file before it is opened."""

    size: int  # bytes
    modified: int  # nanoseconds since the epoch; 0 where the store does not say


def list_files(root: StoragePath, expected: str = EXPECTED) -> dict[str, ListedFile]:
    """List every file below a data folder, by its path relative to it, sorted. Clutter is included.

    A name whose bytes are no UTF-8 has them as surrogate escapes, as everywhere in Python.

    Args:
        expected: the sentence of the error messages that says what to give instead.

    Raises:
        UsageError: no such folder, nothing in it, or a link that leads out of it or round in circles: a stranger's
            archive may hold such links.
    """
    if not root.is_dir():
        what = "a file, not a folder" if root.is_file() else "no such folder"
        raise UsageError(f"--data {root}: {what}. {expected}")
    files = dict(sorted(_walk_disk(root) if root.is_local else _walk_bucket(root)))
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


def _walk_disk(root: StoragePath) -> Iterator[tuple[str, ListedFile]]:
    home = os.path.realpath(root.path)

    def refuse(error: OSError) -> None:
        folder = os.path.relpath(error.filename, home)
        if is_clutter(f"{folder}/x"):  # which systems keep to themselves
            return
        raise UsageError(
            f"--data {root}: {show_name(folder)!r} cannot be read: {error.strerror}. "
            "Change its permissions, or move it out of the folder."
        )

    for folder, folders, names in os.walk(home, onerror=refuse):  # does not follow links
        for name in (*folders, *names):
            if os.path.islink(path := os.path.join(folder, name)):
                _check_link(root, home, path, is_folder=name in folders)
        for name in names:
            path = os.path.join(folder, name)
            if os.path.isfile(path):  # no pipe or socket, and no link to nothing
                state = os.stat(path)
                yield os.path.relpath(path, home), ListedFile(state.st_size, state.st_mtime_ns)


def _check_link(root: StoragePath, home: str, path: str, *, is_folder: bool) -> None:
    target = os.path.realpath(path)
    if is_folder or not target.startswith(f"{home.rstrip('/')}/"):
        raise UsageError(
            f"--data {root}: {show_name(os.path.relpath(path, home))!r} is a link to "
            f"{'a folder' if is_folder else 'a file outside'}, {show_name(target)}, and such links are not followed. "
            "Copy the target, or name its folder with a --data of its own."
        )
