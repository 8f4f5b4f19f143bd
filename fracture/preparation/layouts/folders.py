"""Folders that name a class, at any level, with or without train, val and test above them."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from posixpath import commonpath

from fracture.errors import UsageError
from fracture.labels import CLASS_NAMES, FRACTURE, NORMAL
from fracture.preparation.labels.class_words import EXCLUDED, KNOWN_WORDS, ClassWords, without_number
from fracture.preparation.labels.labelling import LabelledFile, Labelling
from fracture.preparation.layouts.builder import OF_EXCLUDED, LabellingBuilder
from fracture.preparation.layouts.clutter import sort_out
from fracture.preparation.layouts.paths import find_split, folder_of, join_few
from fracture.storage import StoragePath

_OUTSIDE = "outside the class folders"
OF_DOUBT = "in folders that cast doubt on their class, such as 'uncertain'"
EXPECTED = "folders that name a class, alone or in train/, val/ and test/"
_MOST_CANDIDATES = 20

_Named = list[tuple[int, int]]  # depth and label of each folder on a path that names a class, from the top


@dataclass(frozen=True)
class _Position:
    """What the folders of a file say of it."""

    label: int  # or EXCLUDED
    split: str  # "" if there is none
    base: str  # folder above the split
    parent: str  # folder that holds the class folder
    word: str  # the class folder's name, without a number before it


def name_both_classes(paths: Iterable[str], words: ClassWords) -> bool:
    """Return whether folders name both classes, so that boxes drawn beside the images are not needed for it."""
    kept, _ = sort_out(paths)
    named = _find_named_folders({folder_of(path) for path in kept}, words)
    return {FRACTURE, NORMAL} <= {found[0][1] for found in named.values()}


def read(root: StoragePath, paths: Sequence[str], words: ClassWords) -> Labelling:
    """Label files by the names of the folders that they are in.

    Raises:
        UsageError: no folder names a class, or one class alone is named among other folders; one beside the class
            folders names none; two folders of a path contradict each other; a class is above its split; class folders
            are inside and beside splits, or those of two sets.
    """
    kept, left_out = sort_out(paths)
    folders = Counter(map(folder_of, kept))
    named = _find_named_folders(folders, words)
    if not named:
        raise UsageError(_explain_no_class(root, folders, left_out, words))
    positions = {folder: _find_position(folder.split("/"), found) for folder, found in named.items()}
    labelled = {folder: position for folder, position in positions.items() if position.label != EXCLUDED}
    _check_paths(root, {folder: named[folder] for folder in labelled})
    _check_other_folders(root, folders, positions, words)
    _check_splits(root, labelled.values())
    builder = LabellingBuilder(left_out)
    for folder in folders.keys() - labelled.keys():
        builder.leave_out(OF_EXCLUDED if folder in positions else _OUTSIDE, folders[folder])
    common = _count_common(folders)
    for folder in [folder for folder in labelled if any(map(words.is_doubtful, folder.split("/")[common:]))]:
        builder.leave_out(OF_DOUBT, folders[folder])
        del labelled[folder]
    for path in kept:
        if position := labelled.get(folder_of(path)):
            builder.add(LabelledFile(path, position.label, position.split), [position.word])
    labelling = builder.build()
    if _OUTSIDE in labelling.left_out and not names_classes(labelling, words):
        (label, names) = next(
            (label, names) for label, names in enumerate(map(labelling.words.get, CLASS_NAMES)) if names
        )
        raise UsageError(
            f"--data {root}: {join_few(names)} alone names a class, {CLASS_NAMES[label]}, and "
            f"{labelling.left_out[_OUTSIDE]:,} images are in other folders: it may be somebody's name. If it is the "
            f"class, say so with {words.format_setting(label, *names)}; otherwise use --labels FILE."
        )
    return labelling


def names_classes(labelling: Labelling, words: ClassWords) -> bool:
    """Return False where folders name one class alone, and the settings do not name it.

    `Bruch`, `Frisk` and `No` are surnames, too.
    """
    found = [names for names in labelling.words.values() if names]
    return len(found) != 1 or all(map(words.is_set, found[0]))


def _find_named_folders(folders: Collection[str], words: ClassWords) -> dict[str, _Named]:
    """Return which folders on its path name a class, of each folder that has any.

    Where they contradict each other and all the files lie below the upper one, that is the name of the whole:
    `Fracture/Normal/1.png`.
    """
    label_of = cache(words.of_folder)
    named = {
        folder: [
            (depth, label) for depth, name in enumerate(folder.split("/")) if (label := label_of(name)) is not None
        ]
        for folder in folders
    }
    for skipped in range(_count_common(folders) + 1):
        below = {folder: [found for found in all_ if found[0] >= skipped] for folder, all_ in named.items()}
        if not any(map(_contradict, below.values())):
            named = below
            break
    return {folder: found for folder, found in named.items() if found}


def _contradict(named: _Named) -> bool:
    return {FRACTURE, NORMAL} <= {label for _, label in named}


def _count_common(folders: Collection[str]) -> int:
    """Return the number of folders that hold all the files, and none of them directly."""
    if not folders or "" in folders:
        return 0
    slashed = [f"{folder}/" for folder in folders]  # sorted as their parts are
    common = commonpath([min(slashed), max(slashed)])
    return common.count("/") + (common not in folders) if common else 0


def _find_position(folders: Sequence[str], named: _Named) -> _Position:
    """Return what the uppermost class folder says, or an excluded one wherever it is."""
    depth, label = next((found for found in named if found[1] == EXCLUDED), named[0])
    level = next((level for level in reversed(range(depth)) if find_split([folders[level]])), depth)
    return _Position(
        label=label,
        split=find_split(folders[level:depth]),
        base="/".join(folders[:level]),
        parent="/".join(folders[:depth]),
        word=without_number(folders[depth]),
    )


def _check_paths(root: StoragePath, named: Mapping[str, _Named]) -> None:
    for folder, found in named.items():
        names = folder.split("/")
        if _contradict(found):
            pair = " and ".join(repr(names[depth]) for depth, _ in found)
            raise UsageError(
                f"--data {root}: folder {folder!r} is in both classes, by {pair}. Rename the one that is no class."
            )
        if any(find_split(names[depth + 1 : depth + 2]) for depth, _ in found):
            raise UsageError(
                f"--data {root}: in {folder!r} the class is above the split. Move the folders to train/CLASS, "
                "val/CLASS and test/CLASS."
            )


def _check_other_folders(
    root: StoragePath, folders: Iterable[str], positions: Mapping[str, _Position], words: ClassWords
) -> None:
    """Check that every folder beside a class folder names a class too: a file there is ignored, a folder may be one."""
    parents = {position.parent for position in positions.values() if position.label != EXCLUDED}
    unknown: dict[str, str] = {}  # path -> name
    for folder in folders:
        names = folder.split("/") if folder and folder not in positions else []
        for depth in reversed(range(len(names))):
            if "/".join(names[:depth]) in parents:
                unknown["/".join(names[: depth + 1])] = names[depth]
                break
    if unknown:
        raise UsageError(
            f"--data {root}: folder {join_few(sorted(unknown))} names no known class. Known: {KNOWN_WORDS}. "
            f"{words.advise(unknown.values())}"
        )


def _check_splits(root: StoragePath, positions: Collection[_Position]) -> None:
    bases = sorted({position.base or "." for position in positions if position.split})
    if len(bases) > 1:
        raise UsageError(f"--data {root}: holds {len(bases)} data sets, in {join_few(bases)}. Name one of them.")
    if len({bool(position.split) for position in positions}) > 1:
        raise UsageError(
            f"--data {root}: has class folders inside and beside train/, val/ and test/. Move all images into splits, "
            "or none."
        )


def _explain_no_class(
    root: StoragePath, folders: Collection[str], left_out: Mapping[str, int], words: ClassWords
) -> str:
    passed_over = "; ".join(f"{count} x {reason}" for reason, count in sorted(left_out.items()))
    candidates = _find_candidates(folders)
    advice = words.advise(candidates, are_classes=True) if candidates else "Make such folders, or use --labels FILE."
    return (
        f"--data {root}: no class folder found among {join_few(sorted(f or '.' for f in folders) or ['.'])}"
        f"{f' (passed over: {passed_over})' if passed_over else ''}. Folders that name a class: {KNOWN_WORDS}. {advice}"
    )


def _find_candidates(folders: Iterable[str]) -> list[str]:
    """Return the names of the folders that are likely to be classes: the uppermost of a few different ones."""
    levels: defaultdict[int, set[str]] = defaultdict(set)
    for folder in folders:
        for depth, name in enumerate(folder.split("/") if folder else []):
            if not find_split([name]):
                levels[depth].add(name)
    return next((sorted(names) for _, names in sorted(levels.items()) if 2 <= len(names) <= _MOST_CANDIDATES), [])
