"""List the files of folders of radiographs, each with its label and split. No image is opened, nothing is changed."""

import csv
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from pyarrow import fs

from fracture.config import DataConfig
from fracture.errors import UsageError
from fracture.labels import CLASS_NAMES, FRACTURE, NORMAL, SPLITS
from fracture.storage import StoragePath

SYNTHETIC_MARKER = "SYNTHETIC.json"  # in the root folder of generated radiographs

CLASS_FOLDERS = {
    FRACTURE: ("fracture", "fractured", "fractures"),
    NORMAL: ("normal", "not fractured", "not fracture", "non fractured", "non fracture", "no fracture", "unfractured"),
}
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
_EXPECTED = "Give the folder that holds the class folders, or train/, val/ and test/ with them inside."
_MOST_LABELS = 2**29  # bytes of a labels file; some millions of lines
_CLUTTER = {"thumbs.db", "desktop.ini"}
_COLUMNS = ("path", "label", "patient", "source")  # of a labels file
_ALLOWED = "Columns: path,label and, if known, patient,source."


@dataclass(frozen=True)
class ImageFile:
    """A file as it was listed."""

    path: str  # relative to the data root; of several roots, ORIGIN/PATH
    label: int
    split: str  # as found; "" if the folder has none
    size: int  # bytes
    modified: int  # nanoseconds since the epoch
    patient: str = ""  # or study; "" if unknown
    origin: str = ""  # hospital, scanner or collection; "" if unknown


@dataclass(frozen=True)
class Source:
    """The files of one data folder, or of several."""

    roots: dict[str, StoragePath]  # origin -> folder; "" -> folder if there is only one
    files: tuple[ImageFile, ...]  # sorted by path
    class_folders: dict[str, list[str]]  # class name -> names found, of folders or in the labels file
    synthetic: bool
    split_fault: str  # why the split found cannot be used; "" if it can
    labels: StoragePath | None = None  # the labels file
    unlabelled: int = 0  # files in the folder that are not in the labels file

    @property
    def name(self) -> str:
        """Return the folders, for messages."""
        return ", ".join(str(root) for root in self.roots.values())

    def locate(self, path: str) -> StoragePath:
        """Return the file with this `ImageFile.path`."""
        if "" in self.roots:
            return self.roots[""] / path
        origin, _, rest = path.partition("/")
        return self.roots[origin] / rest

    def hash_listing(self) -> str:
        """Hash the list of files: another hash if one is added, removed, rewritten or labelled anew. Reads no file."""
        digest = hashlib.sha256()
        for f in self.files:
            digest.update(repr(f).encode())
        return digest.hexdigest()


def find_source(roots: Sequence[StoragePath], config: DataConfig, labels: StoragePath | None = None) -> Source:
    """List the radiographs of one folder, or of several, each of which is then an origin of its own.

    Args:
        labels: a CSV file with the columns `path` and `label`, and if known `patient` and `source`. Without it, names
            of folders are the labels.

    Raises:
        UsageError: the folder or the labels file cannot be used; the message names it, and the fix.
    """
    if len(roots) == 1:
        source = _read_labels(roots[0], config, labels) if labels else _read_tree(roots[0], config)
    else:
        if labels:
            raise UsageError("--labels belongs to one --data folder; give the file's own source column instead.")
        source = _join([_read_tree(root, config) for root in roots])
    for label, name in enumerate(CLASS_NAMES):
        if not any(f.label == label for f in source.files):
            raise UsageError(f"--data {source.name}: no image of class {name!r}; both classes are needed. Add images.")
    if config.split == "official" and source.split_fault:
        raise UsageError(
            f"--data {source.name}: {source.split_fault}, so data.split = official is not possible. Add what is "
            "missing, or use --split group."
        )
    return source


def _join(sources: list[Source]) -> Source:
    roots = [root for source in sources for root in source.roots.values()]
    names = [root.name for root in roots]
    if len(set(names)) < len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise UsageError(
            f"--data: two folders have the name {double!r}, and origins are distinguished by name. Rename one."
        )
    files = [
        replace(f, path=f"{name}/{f.path}", origin=f.origin or name)
        for name, source in zip(names, sources, strict=True)
        for f in source.files
    ]
    return Source(
        roots=dict(zip(names, roots, strict=True)),
        files=tuple(sorted(files, key=lambda f: f.path)),
        class_folders={c: sorted({n for s in sources for n in s.class_folders[c]}) for c in CLASS_NAMES},
        synthetic=any(source.synthetic for source in sources),
        split_fault=next((source.split_fault for source in sources if source.split_fault), ""),
    )


class _TreePosition(NamedTuple):
    """A file's position in the tree of folders."""

    base: str  # folder above the splits or classes
    split: str  # "" if there are only class folders
    label: int

    @property
    def depth(self) -> int:
        """Return the number of folders above the class folder."""
        return (len(self.base.split("/")) if self.base else 0) + bool(self.split)


def _read_tree(root: StoragePath, config: DataConfig) -> Source:
    """List the files of `train/ val/ test/` with class folders inside, or of class folders alone.

    The tree may be some folders down, as in Kaggle's download.

    Raises:
        UsageError: no such folder, no images, an unknown class folder, classes inside and beside splits.
    """
    labels = _labels_of_folders(config)
    infos = list_files(root)
    paths = [path for path in infos if not is_clutter(path)]
    positions = {path: found for path in paths if (found := _find_position(path, labels))}
    _check_tree(root, paths, positions, labels)
    files = tuple(
        ImageFile(path, position.label, position.split, infos[path].size, infos[path].mtime_ns or 0)
        for path, position in sorted(positions.items())
    )
    folders: dict[str, set[str]] = {name: set() for name in CLASS_NAMES}
    for path, position in positions.items():
        folders[CLASS_NAMES[position.label]].add(path.split("/")[position.depth])
    return Source(
        roots={"": root},
        files=files,
        class_folders={name: sorted(found) for name, found in folders.items()},
        synthetic=_has_synthetic_marker(infos),
        split_fault=_find_split_fault(files),
    )


def _read_labels(root: StoragePath, config: DataConfig, labels: StoragePath) -> Source:
    """List the files in a labels file.

    Raises:
        UsageError: a missing, unknown or doubled column, a value without a column, an unknown label or path, or a path
            on two lines; names the line.
    """
    infos = list_files(root)
    label_of_name = {"1": FRACTURE, "0": NORMAL} | _labels_of_folders(config)
    files: dict[str, ImageFile] = {}
    names: dict[str, set[str]] = {name: set() for name in CLASS_NAMES}
    for line, row in _read_table(labels):
        where = f"--labels {labels}, line {line}"
        path, name, patient, origin = ((row.get(column) or "").strip() for column in _COLUMNS)
        label = label_of_name.get(_normalise(name))
        if label is None:
            classes = ", ".join(map(repr, sorted(label_of_name)))
            raise UsageError(f"{where}: label {name!r} names no known class. Known: {classes}.")
        _check_labelled_path(path, where, root, infos)
        if path in files:
            raise UsageError(f"{where}: {path!r} is in the file twice. Each image takes one line.")
        files[path] = ImageFile(path, label, "", infos[path].size, infos[path].mtime_ns or 0, patient, origin)
        names[CLASS_NAMES[label]].add(name)
    if not files:
        raise UsageError(f"--labels {labels}: names no image.")
    return Source(
        roots={"": root},
        files=tuple(files[path] for path in sorted(files)),
        class_folders={name: sorted(found) for name, found in names.items()},
        synthetic=_has_synthetic_marker(infos),
        split_fault="a labels file names no splits",
        labels=labels,
        unlabelled=sum(not is_clutter(path) and path not in files for path in infos),
    )


def _read_table(labels: StoragePath) -> list[tuple[int, dict[str, str]]]:
    """Return the rows of a labels file, each with the number of its line."""
    try:
        text = labels.read_bytes(most=_MOST_LABELS).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--labels {labels}: cannot be read as text: {error}.") from None
    rows = csv.DictReader(text.splitlines(), strict=True)
    try:
        rows.fieldnames = columns = [name.strip().lower() for name in rows.fieldnames or []]
        table = [(rows.line_num, row) for row in rows]
    except csv.Error as error:
        raise UsageError(f"--labels {labels}, line {rows.reader.line_num}: not readable as CSV: {error}.") from None
    _check_columns(labels, columns)
    for line, row in table:
        if None in row:  # a value without a column may be the patient, and then patients would leak
            raise UsageError(
                f"--labels {labels}, line {line}: has {len(columns) + len(row[None])} values for the {len(columns)} "
                f"columns of the first line. {_ALLOWED} Name every column there, or quote a value that holds a comma."
            )
    return table


def _check_columns(labels: StoragePath, columns: Sequence[str]) -> None:
    if missing := [name for name in _COLUMNS[:2] if name not in columns]:
        raise UsageError(
            f"--labels {labels}: has no column {missing[0]!r}; its first line is {', '.join(columns)!r}. {_ALLOWED}"
        )
    # An ignored column such as patient_id would mean that patients leak.
    if unknown := [name for name in columns if name not in _COLUMNS]:
        raise UsageError(
            f"--labels {labels}: column {unknown[0]!r} is not known. {_ALLOWED} Rename the column, or remove it."
        )
    if double := [name for name, count in Counter(columns).items() if count > 1]:
        raise UsageError(
            f"--labels {labels}: {double[0]!r} names two columns, and only one would be read. Remove the other."
        )


def _check_labelled_path(path: str, where: str, root: StoragePath, listed: Mapping[str, fs.FileInfo]) -> None:
    if path.startswith("/") or ".." in path.split("/"):
        raise UsageError(f"{where}: path {path!r} may lead out of {root}. Give paths relative to --data, without '..'.")
    if path not in listed:
        raise UsageError(f"{where}: there is no file {path!r} in {root}. Paths are relative to --data.")


def list_files(root: StoragePath, expected: str = _EXPECTED) -> dict[str, fs.FileInfo]:
    """List every file below a data folder, by its path relative to it. Clutter is included.

    Args:
        expected: the sentence of the error messages that says what to give instead.

    Raises:
        UsageError: no such folder, nothing in it, or a link that leads out of it.
    """
    if not root.is_dir():
        what = "a file, not a folder" if root.is_file() else "no such folder"
        raise UsageError(f"--data {root}: {what}. {expected}")
    _check_links(root)
    infos = {info.path[len(root.path.rstrip("/")) + 1 :]: info for info in root.files()}
    if not any(not is_clutter(path) for path in infos):
        raise UsageError(f"--data {root}: the folder is empty. {expected}")
    return infos


def _check_links(root: StoragePath) -> None:
    """Check that no link leads out of the folder or round in circles: a stranger's archive may hold such links.

    Raises:
        UsageError: a link to a folder, or to a file elsewhere.
    """
    if not root.is_local:
        return  # buckets have no links
    home = os.path.realpath(root.path)
    for folder, folders, files in os.walk(home):  # does not follow links
        for name in (*folders, *files):
            path = os.path.join(folder, name)
            if not os.path.islink(path):
                continue
            target = os.path.realpath(path)
            if name in folders or not target.startswith(f"{home.rstrip('/')}/"):
                raise UsageError(
                    f"--data {root}: {os.path.relpath(path, home)!r} is a link to "
                    f"{'a folder' if name in folders else 'a file outside'}, {target}, and such links are not "
                    "followed. Copy the target, or name its folder with a --data of its own."
                )


def _normalise(folder: str) -> str:
    return re.sub(r"[\s_\-]+", " ", folder).strip().lower()


def _labels_of_folders(config: DataConfig) -> dict[str, int]:
    labels = {name: label for label, names in CLASS_FOLDERS.items() for name in names}
    for label, more in ((FRACTURE, config.fracture_labels), (NORMAL, config.normal_labels)):
        for name in map(_normalise, more):
            if labels.get(name, label) != label:
                raise UsageError(
                    f"folder name {name!r} is already {CLASS_NAMES[labels[name]]!r}; it cannot also be "
                    f"{CLASS_NAMES[label]!r}. Change data.fracture_labels or data.normal_labels."
                )
            labels[name] = label
    return labels


_SPLIT_OF_FOLDER = {name: split for split, names in SPLIT_FOLDERS.items() for name in names}


def is_clutter(path: str) -> bool:
    """Return whether a file is certainly no image: hidden, made by the operating system, or our marker."""
    parts = path.split("/")
    return parts[-1].lower() in _CLUTTER or any(part.startswith(".") for part in parts) or parts[-1] == SYNTHETIC_MARKER


def _find_position(path: str, labels: Mapping[str, int]) -> _TreePosition | None:
    """Return the position that the folders of a path give; None if none of them names a class."""
    folders = path.split("/")[:-1]
    for depth, folder in enumerate(folders):
        base = "/".join(folders[:depth])
        split = _SPLIT_OF_FOLDER.get(_normalise(folder))
        if split and depth + 1 < len(folders):
            label = labels.get(_normalise(folders[depth + 1]))
            return None if label is None else _TreePosition(base, split, label)
        if (label := labels.get(_normalise(folder))) is not None:
            return _TreePosition(base, "", label)
    return None


def _check_tree(
    root: StoragePath, paths: Iterable[str], positions: Mapping[str, _TreePosition], labels: Mapping[str, int]
) -> None:
    for path in positions:
        folders = [_normalise(folder) for folder in path.split("/")[:-1]]
        if any(a in labels and b in _SPLIT_OF_FOLDER for a, b in pairwise(folders)):
            raise UsageError(
                f"--data {root}: in {path!r} the class is above the split. Move the folders to train/CLASS, "
                "val/CLASS and test/CLASS."
            )
    _check_other_folders(root, paths, positions, labels)
    bases = sorted({position.base or "." for position in positions.values()})
    if len(bases) > 1:
        raise UsageError(f"--data {root}: holds {len(bases)} data sets, in {_join_few(bases)}. Name one of them.")
    if len({bool(position.split) for position in positions.values()}) > 1:
        raise UsageError(
            f"--data {root}: has class folders inside and beside train/, val/ and test/. Move all images into splits, "
            "or none."
        )


def _check_other_folders(
    root: StoragePath, paths: Iterable[str], positions: Mapping[str, _TreePosition], labels: Mapping[str, int]
) -> None:
    """Check that there are class folders, and no folder of unknown name beside or in them."""
    known = ", ".join(repr(name) for name in sorted(labels))
    others = Counter(path.rsplit("/", 1)[0] if "/" in path else "." for path in paths if path not in positions)
    if not positions:
        raise UsageError(
            f"--data {root}: no class folder found among {_join_few(others)}. Folders that name a class: {known}; name "
            "others with --set 'data.fracture_labels=[NAME]' and --set 'data.normal_labels=[NAME]'."
        )
    # A file beside the class folders (a README, a table of labels) is ignored; a folder there may be a class.
    tops = {"/".join(path.split("/")[: position.depth]) for path, position in positions.items()}
    unknown = {
        f for f in others for top in tops if f != "." and f != top and f"{f}/".startswith(f"{top}/" if top else "")
    }
    if unknown:
        raise UsageError(
            f"--data {root}: folder {_join_few(sorted(unknown))} names no known class. Known: {known}. Rename it, or "
            "say what it is with --set 'data.fracture_labels=[NAME]' or --set 'data.normal_labels=[NAME]'."
        )


def _has_synthetic_marker(paths: Iterable[str]) -> bool:
    return any(path.rsplit("/", 1)[-1] == SYNTHETIC_MARKER for path in paths)


def _find_split_fault(files: Sequence[ImageFile]) -> str:
    found = {f.split for f in files}
    if found == {""}:
        return "has no train, val and test folders"
    if missing := [split for split in SPLITS if split not in found]:
        return f"has {', '.join(s for s in SPLITS if s in found)} but no {' and no '.join(missing)} folder"
    for split in SPLITS:
        for label, name in enumerate(CLASS_NAMES):
            if not any(f.split == split and f.label == label for f in files):
                return f"split {split!r} has no image of class {name!r}"
    return ""


def keyed_hash(text: str, seed: int) -> bytes:
    """Return 16 bytes that put texts in a random order, which is the same for the same seed on every machine."""
    return hashlib.blake2b(text.encode(), digest_size=16, key=seed.to_bytes(16, "little")).digest()


def _join_few(names: Iterable[str], most: int = 5) -> str:
    listed = list(names)
    tail = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(repr(name) for name in listed[:most]) + tail
