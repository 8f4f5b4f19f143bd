"""Folders of radiographs as a list of files, each with its split and label. No image is opened, nothing is changed."""

import csv
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from pyarrow import fs

from fracture.config import DataConfig
from fracture.errors import UsageError
from fracture.labels import CLASS_NAMES, FRACTURE, NORMAL, SPLITS
from fracture.storage import StoragePath

SYNTHETIC_MARKER = "SYNTHETIC.json"  # the sample generator leaves it at the root of what it wrote

CLASS_FOLDERS = {
    FRACTURE: ("fracture", "fractured", "fractures"),
    NORMAL: ("normal", "not fractured", "not fracture", "non fractured", "non fracture", "no fracture", "unfractured"),
}
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
_WANTED = "Give the folder that holds the class folders, or train/, val/ and test/ with them inside."
_MOST_LABELS = 2**29  # bytes of a labels file, some millions of lines
_CLUTTER = {"thumbs.db", "desktop.ini"}


@dataclass(frozen=True)
class ImageFile:
    path: str  # relative to the data root; of several roots, ORIGIN/PATH
    label: int
    split: str  # as found; "" where the folder has none
    size: int  # bytes
    modified: int  # nanoseconds since the epoch
    patient: str = ""  # or study; "" where it is not known
    origin: str = ""  # hospital, scanner or collection; "" where it is not known


@dataclass(frozen=True)
class Source:
    roots: dict[str, StoragePath]  # origin -> folder; "" -> folder where there is but one
    files: tuple[ImageFile, ...]  # sorted by path
    class_folders: dict[str, list[str]]  # class name -> the names found: of folders, or in the labels file
    synthetic: bool
    split_fault: str  # why the split found cannot be used as it is; "" where it can
    labels: StoragePath | None = None  # the labels file
    unnamed: int = 0  # files in the folder that it does not name

    @property
    def name(self) -> str:
        return ", ".join(str(root) for root in self.roots.values())

    def place_of(self, path: str) -> StoragePath:
        if "" in self.roots:
            return self.roots[""] / path
        origin, _, rest = path.partition("/")
        return self.roots[origin] / rest

    def stamp(self) -> str:
        """Changes when any file is added, removed, resized, rewritten or labelled anew; costs no reading."""
        digest = hashlib.sha256()
        for f in self.files:
            digest.update(repr(f).encode())
        return digest.hexdigest()


def find_source(roots: Sequence[StoragePath], config: DataConfig, labels: StoragePath | None = None) -> Source:
    """Lists the radiographs of one folder or of several, each of which is then an origin of its own.

    Raises:
        UsageError: see `_read_tree` and `_read_labels`; names the folder and the fix.
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
        raise UsageError(f"--data: two folders are named {double!r}, and the name tells origins apart. Rename one.")
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


def _read_tree(root: StoragePath, config: DataConfig) -> Source:
    """`train/ val/ test/` with class folders inside, or class folders alone.

    The tree may lie some folders down, as Kaggle's download does.

    Raises:
        UsageError: no such folder, no images, an unknown class folder, classes inside and beside splits.
    """
    labels = _label_of_folder(config)
    infos = list_files(root)
    paths = [path for path in infos if not is_clutter(path)]
    placed = {path: found for path in paths if (found := _place_in_tree(path, labels))}
    _check_tree(root, paths, placed, labels)
    files = tuple(
        ImageFile(path, label, split, infos[path].size, infos[path].mtime_ns or 0)
        for path, (_, split, label) in sorted(placed.items())
    )
    folders: dict[str, set[str]] = {name: set() for name in CLASS_NAMES}
    for path, (base, split, label) in placed.items():
        folders[CLASS_NAMES[label]].add(path.split("/")[_depth(base) + (1 if split else 0)])
    return Source(
        roots={"": root},
        files=files,
        class_folders={name: sorted(found) for name, found in folders.items()},
        synthetic=any(path.rsplit("/", 1)[-1] == SYNTHETIC_MARKER for path in infos),
        split_fault=_split_fault(files),
    )


def _read_labels(root: StoragePath, config: DataConfig, labels: StoragePath) -> Source:
    """The files that a CSV names: columns `path` (below the root) and `label`, and if known `patient` and `source`.

    Raises:
        UsageError: a column missing or not known, an unknown label, an unknown path, a path named twice; names the
            line.
    """
    infos = list_files(root)
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
    known = ("path", "label", "patient", "source")
    allowed = "Columns: path,label and, if known, patient,source."
    if missing := [name for name in known[:2] if name not in columns]:
        raise UsageError(
            f"--labels {labels}: has no column {missing[0]!r}; its first line is {', '.join(columns)!r}. {allowed}"
        )
    if strange := [name for name in columns if name not in known]:  # patient_id, passed over, would leak patients
        raise UsageError(f"--labels {labels}: column {strange[0]!r} is not known. {allowed} Rename it, or take it out.")
    label_of = {"1": FRACTURE, "0": NORMAL} | _label_of_folder(config)
    files: dict[str, ImageFile] = {}
    names: dict[str, set[str]] = {name: set() for name in CLASS_NAMES}
    for line, row in table:
        where = f"--labels {labels}, line {line}"
        path, name = (row["path"] or "").strip(), (row["label"] or "").strip()
        label = label_of.get(_normalise(name))
        if label is None:
            classes = ", ".join(map(repr, sorted(label_of)))
            raise UsageError(f"{where}: label {name!r} names no known class. Known: {classes}.")
        if path.startswith("/") or ".." in path.split("/"):
            raise UsageError(f"{where}: path {path!r} may lead out of {root}. Paths lie below --data, without '..'.")
        if path not in infos:
            raise UsageError(f"{where}: there is no file {path!r} in {root}. Paths are relative to --data.")
        if path in files:
            raise UsageError(f"{where}: {path!r} stands in the file twice. Each image takes one line.")
        patient, origin = ((row.get(column) or "").strip() for column in known[2:])
        files[path] = ImageFile(path, label, "", infos[path].size, infos[path].mtime_ns or 0, patient, origin)
        names[CLASS_NAMES[label]].add(name)
    if not files:
        raise UsageError(f"--labels {labels}: names no image.")
    return Source(
        roots={"": root},
        files=tuple(files[path] for path in sorted(files)),
        class_folders={name: sorted(found) for name, found in names.items()},
        synthetic=any(path.rsplit("/", 1)[-1] == SYNTHETIC_MARKER for path in infos),
        split_fault="a labels file names no splits",
        labels=labels,
        unnamed=sum(not is_clutter(path) and path not in files for path in infos),
    )


def list_files(root: StoragePath, wanted: str = _WANTED) -> dict[str, fs.FileInfo]:
    """Every file below a data folder by its path there, clutter too; sorted.

    Args:
        wanted: what to do instead, for the errors.

    Raises:
        UsageError: no such folder, nothing in it, or a link out of it.
    """
    if not root.is_dir():
        what = "a file, not a folder" if root.is_file() else "no such folder"
        raise UsageError(f"--data {root}: {what}. {wanted}")
    _check_links(root)
    infos = {info.path[len(root.path.rstrip("/")) + 1 :]: info for info in root.files()}
    if not any(not is_clutter(path) for path in infos):
        raise UsageError(f"--data {root}: the folder is empty. {wanted}")
    return infos


def _check_links(root: StoragePath) -> None:
    """What is listed lies in the folder. Somebody's archive may hold links, and they would be followed: out of it, or
    round and round.

    Raises:
        UsageError: a link to a folder, or to a file elsewhere.
    """
    if not root.is_local:
        return  # a bucket has none
    home = os.path.realpath(root.path)
    for folder, folders, files in os.walk(home):  # which follows no link
        for name in (*folders, *files):
            path = os.path.join(folder, name)
            if not os.path.islink(path):
                continue
            target = os.path.realpath(path)
            if name in folders or not target.startswith(f"{home.rstrip('/')}/"):
                raise UsageError(
                    f"--data {root}: {os.path.relpath(path, home)!r} is a link to "
                    f"{'a folder' if name in folders else 'a file outside'}, {target}, and such links are not "
                    "followed. Copy what it leads to, or name that folder with a --data of its own."
                )


def _normalise(folder: str) -> str:
    return re.sub(r"[\s_\-]+", " ", folder).strip().lower()


def _label_of_folder(config: DataConfig) -> dict[str, int]:
    labels = {name: label for label, names in CLASS_FOLDERS.items() for name in names}
    for label, more in ((FRACTURE, config.fracture_folders), (NORMAL, config.normal_folders)):
        for name in map(_normalise, more):
            if labels.get(name, label) != label:
                raise UsageError(
                    f"folder name {name!r} is already {CLASS_NAMES[labels[name]]!r}; it cannot also be "
                    f"{CLASS_NAMES[label]!r}. Change data.fracture_folders or data.normal_folders."
                )
            labels[name] = label
    return labels


_SPLIT_OF_FOLDER = {name: split for split, names in SPLIT_FOLDERS.items() for name in names}


def is_clutter(path: str) -> bool:
    """Whether a file is of the system, or ours, and nobody's image."""
    parts = path.split("/")
    return parts[-1].lower() in _CLUTTER or any(part.startswith(".") for part in parts) or parts[-1] == SYNTHETIC_MARKER


def _place_in_tree(path: str, labels: dict[str, int]) -> tuple[str, str, int] | None:
    """(folder above the tree, split or "", label); None where no folder of the path names a class."""
    folders = path.split("/")[:-1]
    for depth, folder in enumerate(folders):
        split = _SPLIT_OF_FOLDER.get(_normalise(folder))
        if split and depth + 1 < len(folders):
            label = labels.get(_normalise(folders[depth + 1]))
            return None if label is None else ("/".join(folders[:depth]), split, label)
        if (label := labels.get(_normalise(folder))) is not None:
            return "/".join(folders[:depth]), "", label
    return None


def _class_parent(path: str, base: str, split: str) -> str:
    """The folder in which the class folders stand."""
    return "/".join(path.split("/")[: _depth(base) + bool(split)])


def _depth(base: str) -> int:
    return len(base.split("/")) if base else 0


def _check_tree(
    root: StoragePath, paths: Iterable[str], placed: dict[str, tuple[str, str, int]], labels: dict[str, int]
) -> None:
    known = ", ".join(repr(name) for name in sorted(labels))
    for path in placed:
        folders = [_normalise(folder) for folder in path.split("/")[:-1]]
        if any(a in labels and b in _SPLIT_OF_FOLDER for a, b in pairwise(folders)):
            raise UsageError(
                f"--data {root}: in {path!r} the class lies above the split. Move the folders to train/CLASS, "
                "val/CLASS and test/CLASS."
            )
    strays = Counter(path.rsplit("/", 1)[0] if "/" in path else "." for path in paths if path not in placed)
    if not placed:
        raise UsageError(
            f"--data {root}: no class folder found among {_few(strays)}. Folders that name a class: {known}; name "
            "others with --set 'data.fracture_folders=[NAME]' and --set 'data.normal_folders=[NAME]'."
        )
    # A stray beside the tree (a README, a table of labels) is nobody's class; a folder where classes stand is one.
    tops = {_class_parent(path, base, split) for path, (base, split, _) in placed.items()}
    unknown = {
        f for f in strays for top in tops if f != "." and f != top and f"{f}/".startswith(f"{top}/" if top else "")
    }
    if unknown:
        raise UsageError(
            f"--data {root}: folder {_few(sorted(unknown))} names no known class. Known: {known}. Rename it, or say "
            "what it is with --set 'data.fracture_folders=[NAME]' or --set 'data.normal_folders=[NAME]'."
        )
    bases = sorted({base or "." for base, _, _ in placed.values()})
    if len(bases) > 1:
        raise UsageError(f"--data {root}: holds {len(bases)} data sets, in {_few(bases)}. Name one of them.")
    if len({bool(split) for _, split, _ in placed.values()}) > 1:
        raise UsageError(
            f"--data {root}: has class folders inside and beside train/, val/ and test/. Move all images into splits, "
            "or none."
        )


def _split_fault(files: Sequence[ImageFile]) -> str:
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
    """16 bytes that order texts at random, the same for the same seed on every machine."""
    return hashlib.blake2b(text.encode(), digest_size=16, key=seed.to_bytes(16, "little")).digest()


def _few(names: Iterable[str], most: int = 5) -> str:
    listed = list(names)
    tail = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(repr(name) for name in listed[:most]) + tail
