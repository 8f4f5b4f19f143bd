"""COCO's layout: JSON files with the keys `images`, `annotations` and `categories`, somewhere beside the images."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fracture.errors import UsageError
from fracture.preparation.labels.class_words import ClassWords
from fracture.preparation.labels.labelling import Box, Labelling
from fracture.preparation.layouts.boxes import BoxedImage, ClassBox, clip_box, label_boxed, list_fracture_boxes
from fracture.preparation.layouts.builder import LabellingBuilder
from fracture.preparation.layouts.clutter import is_clutter, sort_out
from fracture.preparation.layouts.paths import find_split, folder_of, join_few, stem_of
from fracture.storage import StoragePath

EXPECTED = "a JSON file with the keys images, annotations and categories"
_ID = (int, str)
_KEY = re.compile(rb'"(images|annotations|categories)"\s*:\s*\[')
_USUAL_NAME = re.compile(r"coco[^/]*$|(^|/)instances_[^/]*$", re.IGNORECASE)
_PEEK_BYTES = 2**16  # from either end: the images of a large file are longer than that
_MOST_BYTES = 2**29
_MOST_PIXELS = 2**31  # of a side
_MOST_FILES = 50  # more are of single images, as LabelMe writes them
_REPAIR = "Fetch it anew, or export it again."


def fits(root: StoragePath, paths: Sequence[str]) -> bool:
    """Return whether there is a JSON file with at least two of the keys. Only its ends are read."""
    return bool(_find_files(root, paths))


def read(root: StoragePath, paths: Sequence[str], words: ClassWords) -> Labelling:
    """Label images by their annotations. An image that no file lists is left out: nobody has looked at it.

    Raises:
        UsageError: a file is damaged; an annotation is of an image or a category that is none; an id is of two; a name
            fits two images.
    """
    files = _find_files(root, paths)
    kept, left_out = sort_out(path for path in paths if path not in files)
    builder = LabellingBuilder(left_out)
    found = _match_images(root, files, kept)
    builder.leave_out("in a JSON file, but not in the folder", found.missing)
    builder.leave_out("in no JSON file", len(kept) - len(found.boxes))
    boxed = (BoxedImage(path, found.splits[path], boxes) for path, boxes in found.boxes.items())
    return label_boxed(f"--data {root}: {join_few(files)}", sorted(found.names), boxed, words, builder)


def read_fracture_boxes(root: StoragePath, paths: Sequence[str], words: ClassWords) -> dict[str, tuple[Box, ...]]:
    """Return the boxes of fractures of each image, by its path, of a set whose labels are elsewhere.

    Raises:
        UsageError: as of `read`, but for the names of the classes.
    """
    files = _find_files(root, paths)
    kept, _ = sort_out(path for path in paths if path not in files)
    found = _match_images(root, files, kept)
    return {path: list_fracture_boxes(boxes, words) for path, boxes in found.boxes.items()}


@dataclass
class _MatchedImages:
    """What JSON files have of the images in the folder."""

    names: set[str]  # of all categories
    boxes: defaultdict[str, set[ClassBox]]  # path of an image -> its boxes
    splits: dict[str, str]  # path of an image -> its split
    missing: int  # images that are in a file alone


def _match_images(root: StoragePath, files: Iterable[str], kept: Sequence[str]) -> _MatchedImages:
    by_name, matched = _group_by_name(kept), _MatchedImages(set(), defaultdict(set), {}, 0)
    for file in files:
        split = find_split([*folder_of(file).split("/"), *re.split(r"[_. -]", stem_of(file))])
        categories, images = _read_file(root, file)
        matched.names.update(categories)
        for name, boxes in images.items():
            if path := _find_image(root, file, name, split, by_name):
                matched.boxes[path] |= boxes
                matched.splits[path] = find_split(folder_of(path).split("/")) or split
            else:
                matched.missing += 1
    return matched


def _find_files(root: StoragePath, paths: Sequence[str]) -> dict[str, None]:
    """Return the files in the order of their paths; a dict finds one at once."""
    found = [path for path in paths if path.lower().endswith(".json") and not is_clutter(path)]
    if len(found) > _MOST_FILES:
        found = [path for path in found if _USUAL_NAME.search(path)][:_MOST_FILES]
    return dict.fromkeys(path for path in found if _USUAL_NAME.search(path) or _has_keys(root / path))


def _has_keys(file: StoragePath) -> bool:
    with file.open() as stream:
        start = stream.read(_PEEK_BYTES)
        stream.seek(max(len(start), stream.size() - _PEEK_BYTES))
        return len({*_KEY.findall(start), *_KEY.findall(stream.read())}) > 1


def _group_by_name(paths: Iterable[str]) -> dict[str, list[str]]:
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for path in paths:
        groups[path.rpartition("/")[2]].append(path)
    return groups


def _find_image(
    root: StoragePath, file: str, name: str, split: str, by_name: Mapping[str, Sequence[str]]
) -> str | None:
    """Return the listed path that a file's `file_name` means: exporters write it from any folder."""
    name = name.replace("\\", "/")
    paths = by_name.get(name.rpartition("/")[2], [])
    choices = (
        [path for path in paths if path == f"{folder_of(file)}/{name}".lstrip("/")],
        [path for path in paths if f"/{path}".endswith(f"/{name}")],
        [path for path in paths if split and find_split(folder_of(path).split("/")) == split],
        paths,
    )
    for found in choices:
        if len(found) == 1:
            return found[0]
    if paths:
        raise UsageError(
            f"--data {root}: {file}: the image {name!r} may be any of {join_few(paths)}. Give it with its folder there."
        )
    return None


def _read_file(root: StoragePath, file: str) -> tuple[set[str], dict[str, set[ClassBox]]]:
    """Return the names of all categories, and the boxes of each image by its `file_name`."""
    where = f"--data {root}: {file}"
    content = _read_content(root, file)
    categories = _read_names(where, content, "categories", "name")
    images = _read_names(where, content, "images", "file_name")
    sizes = {item["id"]: (item.get("width"), item.get("height")) for item in content["images"]}
    found: dict[str, set[ClassBox]] = {name: set() for name in images.values()}  # a name may have several ids
    annotations = _read_list(where, content, "annotations", image_id=_ID, category_id=_ID)
    for number, item in enumerate(annotations):
        image, category = item["image_id"], item["category_id"]
        if image not in images or category not in categories:
            what = f"image_id {image!r}" if image not in images else f"category_id {category!r}"
            raise UsageError(f"{where}: annotations[{number}] has {what}, which the file does not list. {_REPAIR}")
        found[images[image]].add(ClassBox(categories[category], _find_box(item.get("bbox"), *sizes[image])))
    return {*categories.values()}, found


def _find_box(bbox: Any, width: Any, height: Any) -> Box | None:
    """Return the box of `bbox`, [X, Y, WIDTH, HEIGHT] in pixels of an image of that size; None where it is none."""
    pixels = [*(bbox if isinstance(bbox, list) else []), width, height]
    if len(pixels) != 6 or not all(isinstance(n, int | float) and abs(n) < _MOST_PIXELS for n in pixels):
        return None
    x, y, *sides = pixels
    if min(sides) <= 0:
        return None
    return clip_box(x / width, y / height, (x + sides[0]) / width, (y + sides[1]) / height)


def _read_names(where: str, content: Mapping[str, Any], key: str, name: str) -> dict[int | str, str]:
    """Return the names of a list's items by their ids."""
    names: dict[int | str, str] = {}
    for number, item in enumerate(_read_list(where, content, key, id=_ID, **{name: (str,)})):
        known = names.setdefault(item["id"], item[name])
        if known != item[name]:
            raise UsageError(
                f"{where}: {key}[{number}] has the id {item['id']!r} of {known!r}, and is {item[name]!r}. {_REPAIR}"
            )
    return names


def _read_content(root: StoragePath, file: str) -> dict[str, Any]:
    try:
        content = json.loads((root / file).read_bytes(most=_MOST_BYTES))
    except (OSError, ValueError, RecursionError) as error:  # a UsageError too, which is a ValueError: of its size
        raise UsageError(f"--data {root}: {file} cannot be read as JSON: {error}. {_REPAIR}") from None
    return content if isinstance(content, dict) else {}


def _read_list(where: str, content: Mapping[str, Any], key: str, **types: tuple[type, ...]) -> list[dict[str, Any]]:
    """Return a list of objects that have the named values, of these types."""
    items = content.get(key)
    if not isinstance(items, list):
        raise UsageError(f"{where}: has no list {key!r}. {_REPAIR}")
    for number, item in enumerate(items):
        for name, allowed in types.items():
            if not isinstance(item, dict) or not isinstance(item.get(name), allowed):
                raise UsageError(f"{where}: {key}[{number}] has no {name!r}. {_REPAIR}")
    return items
