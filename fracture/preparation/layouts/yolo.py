"""YOLO's layout: `data.yaml` with the names of the classes, and `labels/` with a text file for each of `images/`."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import isfinite

import yaml

from fracture.errors import UsageError
from fracture.preparation.labels.class_words import ClassWords
from fracture.preparation.labels.labelling import Box, Labelling
from fracture.preparation.layouts.boxes import BoxedImage, ClassBox, clip_box, label_boxed
from fracture.preparation.layouts.builder import LabellingBuilder
from fracture.preparation.layouts.clutter import is_clutter, sort_out
from fracture.preparation.layouts.paths import find_split, folder_of, join_few, stem_of
from fracture.storage import StoragePath

EXPECTED = "data.yaml with the names of the classes, and a folder labels/ beside images/"
_USUAL_NAMES = {f"{name}.{end}" for name in ("data", "dataset", "meta") for end in ("yaml", "yml")}
_MOST_NAMES_BYTES = 2**20
_MOST_LABEL_BYTES = 2**24
_THREADS = 16  # a bucket answers in some 50 ms
_FILES_AT_A_TIME = 4096


def fits(root: StoragePath, paths: Sequence[str]) -> bool:
    """Return whether there is a YAML file, and a text file of an image as YOLO has them."""
    labels = _find_labels(paths) if _find_yaml(paths) else {}
    return bool(labels) and any(_find_key(path, "images") in labels for path in paths)


def read(root: StoragePath, paths: Sequence[str], words: ClassWords) -> Labelling:
    """Label images by their boxes, or by the outlines of what is in them. Without a text file, nobody has looked.

    Raises:
        UsageError: the names of the classes or a text file are damaged; a box has a class without a name; two sets.
    """
    labels, yaml_files = _find_labels(paths), _find_yaml(paths)
    name, classes = _read_classes(root, yaml_files)
    used = {*labels.values(), *yaml_files}
    kept, left_out = sort_out(path for path in paths if path not in used)
    builder = LabellingBuilder(left_out)
    pairs: list[tuple[str, str]] = []  # image, text file
    seen: set[str] = set()
    for path in kept:
        key = _find_key(path, "images")
        if key in labels:
            seen.add(key)
            pairs.append((path, labels[key]))
        else:
            builder.leave_out("without a file in labels/" if key else "outside images/")
    builder.leave_out("in labels/, but not in images/", len(labels.keys() - seen))
    return label_boxed(
        f"--data {root}: {name}", [*classes.values()], _read_images(root, pairs, classes), words, builder
    )


def _find_yaml(paths: Sequence[str]) -> list[str]:
    found = [path for path in paths if path.lower().endswith((".yaml", ".yml")) and not is_clutter(path)]
    usual = [path for path in found if path.rpartition("/")[2].lower() in _USUAL_NAMES]
    return usual or found


def _find_labels(paths: Sequence[str]) -> dict[str, str]:
    """Return the text files in labels/ by the key that each shares with its image."""
    found = (path for path in paths if path.lower().endswith(".txt") and not is_clutter(path))
    return {key: path for path in found if (key := _find_key(path, "labels"))}


def _find_key(path: str, folder: str) -> str | None:
    """Return the path without `images` or `labels`, whichever `folder` is, and without extension; None outside it."""
    folders = path.split("/")[:-1]
    level = next((level for level in reversed(range(len(folders))) if folders[level].lower() == folder), None)
    if level is None:
        return None
    return "/".join([*folders[:level], "", *folders[level + 1 :], stem_of(path)])


def _read_classes(root: StoragePath, files: Sequence[str]) -> tuple[str, dict[int, str]]:
    """Return the file that has the names of the classes, and the names by number."""
    found = {file: names for file in files if (names := _read_names(root, file))}
    if len({*map(repr, found.values())}) != 1:
        fault = f"{join_few(found)} have different names; name the folder of one" if found else "there are none"
        raise UsageError(f"--data {root}: names of classes are taken from {join_few(files)}: {fault}.")
    return next(iter(found.items()))


def _read_names(root: StoragePath, file: str) -> dict[int, str]:
    where = f"--data {root}: {file}"
    try:
        text = (root / file).read_bytes(most=_MOST_NAMES_BYTES).decode("utf-8-sig")
        has_alias = any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.BaseLoader))
        # Every value is read as it is written: a class may be called `no`.
        content = None if has_alias else yaml.BaseLoader(text).get_single_data()
    except (OSError, UnicodeError, RecursionError, yaml.YAMLError) as error:
        fault = str(error).partition("\n")[0]
        line = f", line {error.problem_mark.line + 1}" if getattr(error, "problem_mark", None) else ""
        raise UsageError(f"{where}{line}: not readable as YAML: {fault}. Fetch it anew.") from None
    if has_alias:  # a few aliases of aliases are gigabytes of names
        raise UsageError(f"{where}: has YAML aliases, such as *name, which are not read. Write the names out.")
    names = content.get("names") if isinstance(content, dict) else None
    pairs = dict(enumerate(names)) if isinstance(names, list) else names or {}
    try:
        classes = {int(number): _checked_name(name) for number, name in pairs.items()}
    except (AttributeError, ValueError):
        shown = f"{names!r:.200}" if isinstance(names, str) else "a structure"
        raise UsageError(f"{where}: names must be a list, names: [fracture, metal], and is {shown}.") from None
    count = content.get("nc") if classes else None
    if count is not None and count != str(len(classes)):
        shown = count if isinstance(count, str) else "no number"
        raise UsageError(
            f"{where}: nc is {shown}, and names has {len(classes)}: {join_few(classes.values())}. Correct it."
        )
    return classes


def _checked_name(name: object) -> str:
    if not isinstance(name, str):
        raise ValueError
    return name


def _read_images(
    root: StoragePath, pairs: Sequence[tuple[str, str]], classes: Mapping[int, str]
) -> Iterator[BoxedImage]:
    def read(pair: tuple[str, str]) -> BoxedImage:
        image, labels = pair
        return BoxedImage(image, find_split(folder_of(image).split("/")), _read_boxes(root, labels, classes))

    with ThreadPoolExecutor(_THREADS) as threads:
        for start in range(0, len(pairs), _FILES_AT_A_TIME):
            yield from threads.map(read, pairs[start : start + _FILES_AT_A_TIME])


def _read_boxes(root: StoragePath, file: str, classes: Mapping[int, str]) -> frozenset[ClassBox]:
    """Return what is in a text file, each line a box, CLASS X Y WIDTH HEIGHT, or an outline, CLASS X Y X Y ..."""
    try:
        lines = (root / file).read_bytes(most=_MOST_LABEL_BYTES).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--data {root}: {file} cannot be read as text: {error}. Fetch it anew.") from None
    found: set[ClassBox] = set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"--data {root}: {file}, line {number}"
        try:
            label, *rest = map(float, line.split())
        except ValueError:
            label, rest = -1.0, []
        if len(rest) < 4 or not all(map(isfinite, rest)) or not label.is_integer():
            raise UsageError(f"{where}: {line!r:.80} is no box, CLASS X Y WIDTH HEIGHT, and no outline. Correct it.")
        if label not in classes:
            raise UsageError(
                f"{where}: class {label:.0f} has no name; the names are of {min(classes)} to {max(classes)}. Correct "
                "the line, or the names in data.yaml."
            )
        found.add(ClassBox(classes[int(label)], _find_box(rest)))
    return frozenset(found)


def _find_box(numbers: Sequence[float]) -> Box | None:
    """Return the box of a line's numbers, or the one around its outline, which has three points or more."""
    if len(numbers) >= 6 and len(numbers) % 2 == 0:
        return clip_box(min(numbers[::2]), min(numbers[1::2]), max(numbers[::2]), max(numbers[1::2]))
    x, y, width, height = numbers[:4]  # the centre and the sides; a confidence may follow
    return clip_box(x - width / 2, y - height / 2, x + width / 2, y + height / 2)
