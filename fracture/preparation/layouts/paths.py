"""Parts of a listed path, and how several of them stand in a message."""

import re
from collections.abc import Iterable

from fracture.preparation.labels.class_words import normalise_word

SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
_SPLIT_OF_FOLDER = {name: split for split, names in SPLIT_FOLDERS.items() for name in names}
_YEAR = re.compile(r" ?(19|20)\d\d$")  # `train2017`, as COCO has it


def find_split(folders: Iterable[str]) -> str:
    """Return the split that the innermost of these folders names; "" if none does."""
    splits = [split for folder in folders if (split := _SPLIT_OF_FOLDER.get(_YEAR.sub("", normalise_word(folder))))]
    return splits[-1] if splits else ""


def folder_of(path: str) -> str:
    """Return the folder of a listed path; "" for the root."""
    return path.rpartition("/")[0]


def stem_of(path: str) -> str:
    """Return a file's name without its folder and its last extension."""
    name = path.rpartition("/")[2]
    return name.rpartition(".")[0] or name


def join_few(names: Iterable[str], most: int = 5) -> str:
    """Return names for a message, the first of them quoted and the rest counted."""
    listed = list(names)
    tail = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(repr(name) for name in listed[:most]) + tail
