"""A folder tree of radiographs as a list of files, each with its split and label. Nothing is opened or changed."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from fracture.config import DataConfig
from fracture.errors import UsageError
from fracture.labels import CLASS_NAMES, FRACTURE, NORMAL, SPLITS
from fracture.storage import Place

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
_CLUTTER = {"thumbs.db", "desktop.ini"}


@dataclass(frozen=True)
class ImageFile:
    path: str  # relative to the data root
    label: int
    split: str
    size: int  # bytes
    modified: int  # nanoseconds since the epoch


@dataclass(frozen=True)
class Source:
    root: Place
    files: tuple[ImageFile, ...]  # sorted by path
    class_folders: dict[str, list[str]]  # class name -> the folder names found
    has_splits: bool  # False: the random split of `data.seed`
    synthetic: bool

    def count(self, split: str, label: int | None = None) -> int:
        return sum(f.split == split and label in (None, f.label) for f in self.files)

    def stamp(self) -> str:
        """Changes when any file is added, removed, resized or rewritten; costs no reading."""
        digest = hashlib.sha256()
        for f in self.files:
            digest.update(f"{f.path}\0{f.split}\0{f.label}\0{f.size}\0{f.modified}\n".encode())
        return digest.hexdigest()


def find_source(root: Place, config: DataConfig) -> Source:
    """Lists the radiographs below `root`, in `train/ val/ test/` with class folders inside, or class folders alone.

    The tree may lie some folders down, as Kaggle's download does.

    Raises:
        UsageError: no folder, no images, an unknown class folder, a missing split or an empty class.
    """
    if not root.is_dir():
        what = "a file, not a folder" if root.is_file() else "no such folder"
        raise UsageError(f"--data {root}: {what}. Give the folder that holds train/, val/ and test/.")
    labels = _label_of_folder(config)
    infos = {info.path[len(root.path.rstrip("/")) + 1 :]: info for info in root.files()}
    paths = [path for path in infos if not _is_clutter(path)]
    if not paths:
        raise UsageError(f"--data {root}: the folder is empty. Give the folder that holds train/, val/ and test/.")

    placed = {path: found for path in paths if (found := _place_in_tree(path, labels))}
    _check_tree(root, paths, placed, labels)
    has_splits = any(split for _, split, _ in placed.values())
    if has_splits:
        _check_splits(root, placed)
    splits = {path: split for path, (_, split, _) in placed.items()}
    if not has_splits:
        splits = _random_split({path: label for path, (_, _, label) in placed.items()}, config)

    files = tuple(
        ImageFile(path, placed[path][2], splits[path], infos[path].size, infos[path].mtime_ns or 0)
        for path in sorted(placed)
    )
    folders: dict[str, set[str]] = {name: set() for name in CLASS_NAMES}
    for path, (base, split, label) in placed.items():
        folders[CLASS_NAMES[label]].add(path.split("/")[_depth(base) + (1 if split else 0)])
    source = Source(
        root=root,
        files=files,
        class_folders={name: sorted(found) for name, found in folders.items()},
        has_splits=has_splits,
        synthetic=any(path.rsplit("/", 1)[-1] == SYNTHETIC_MARKER for path in infos),
    )
    for split in SPLITS:
        for label, name in enumerate(CLASS_NAMES):
            if source.count(split, label) == 0:
                fix = "Add images, or remove the split folders to get a random split." if has_splits else "Add images."
                raise UsageError(
                    f"--data {root}: split {split!r} has no image of class {name!r}; "
                    f"each split needs both classes. {fix}"
                )
    return source


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


def _is_clutter(path: str) -> bool:
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
    root: Place, paths: Iterable[str], placed: dict[str, tuple[str, str, int]], labels: dict[str, int]
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


def _check_splits(root: Place, placed: dict[str, tuple[str, str, int]]) -> None:
    found = {split for _, split, _ in placed.values()}
    if missing := [split for split in SPLITS if split not in found]:
        raise UsageError(
            f"--data {root}: has {', '.join(s for s in SPLITS if s in found)} but no {' and no '.join(missing)} "
            "folder. Add it, or put all images into class folders without splits to get a random split."
        )


def _random_split(label_of: dict[str, int], config: DataConfig) -> dict[str, str]:
    """Each class shared out by the asked fractions, in the order of a keyed hash of the path."""
    splits = {}
    for label in set(label_of.values()):
        paths = sorted((p for p in label_of if label_of[p] == label), key=lambda p: keyed_hash(p, config.seed))
        test = max(1, round(len(paths) * config.test_fraction))
        val = max(1, round(len(paths) * config.val_fraction))
        for i, path in enumerate(paths):
            splits[path] = "test" if i < test else "val" if i < test + val else "train"
    return splits


def keyed_hash(text: str, seed: int) -> bytes:
    """16 bytes that order texts at random, the same for the same seed on every machine."""
    return hashlib.blake2b(text.encode(), digest_size=16, key=seed.to_bytes(16, "little")).digest()


def _few(names: Iterable[str], most: int = 5) -> str:
    listed = list(names)
    tail = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(repr(name) for name in listed[:most]) + tail
