"""The layout of a data folder: which of the known ones it is, and what it says of each file."""

from collections.abc import Sequence
from types import ModuleType
from typing import Literal

from fracture.errors import UsageError
from fracture.preparation.labels.class_words import ClassWords
from fracture.preparation.labels.labelling import Labelling
from fracture.preparation.layouts import coco, folders, fracatlas, grazpedwri, mura, yolo
from fracture.preparation.layouts.clutter import sort_out
from fracture.preparation.layouts.paths import folder_of, join_few
from fracture.storage import StoragePath

Layout = Literal["auto", "mura", "fracatlas", "grazpedwri", "yolo", "coco", "folders"]

# In the order in which they are tried. FracAtlas and GRAZPEDWRI-DX have boxes too, and class folders.
_MODULES: dict[str, ModuleType] = {
    "mura": mura,
    "fracatlas": fracatlas,
    "grazpedwri": grazpedwri,
    "yolo": yolo,
    "coco": coco,
}
_OF_BOXES = {"yolo", "coco"}


def read_layout(name: Layout, root: StoragePath, paths: Sequence[str], words: ClassWords) -> tuple[str, Labelling]:
    """Return the layout's name, which `auto` finds out, and what it says of the files.

    Args:
        paths: every file below the folder, relative to it; annotations and what machines leave too.

    Raises:
        UsageError: the folder is not of the layout that is named, or is damaged; the message says what to do.
    """
    if name == "auto":
        name = find_layout(root, paths, words)
    elif name != "folders" and not _MODULES[name].fits(root, paths):
        raise UsageError(_explain_misfit(name, root, paths, words))
    return name, (_MODULES | {"folders": folders})[name].read(root, paths, words)


def find_layout(root: StoragePath, paths: Sequence[str], words: ClassWords) -> Layout:
    """Return the layout of a folder. Boxes beside the images of class folders are no layout: the folders decide."""
    for name, module in _MODULES.items():
        if module.fits(root, paths) and not (name in _OF_BOXES and folders.name_both_classes(paths, words)):
            return name
    return "folders"


def _explain_misfit(name: Layout, root: StoragePath, paths: Sequence[str], words: ClassWords) -> str:
    kept, _ = sort_out(paths)
    found = join_few(sorted({folder_of(path) or "." for path in kept})) or "no images"
    other = find_layout(root, paths, words)
    return (
        f"--data {root}: --layout {name} expects {_MODULES[name].EXPECTED}; found {found}. Name the folder that holds "
        f"them, or use --layout {other}, which expects {(_MODULES | {'folders': folders})[other].EXPECTED}."
    )
