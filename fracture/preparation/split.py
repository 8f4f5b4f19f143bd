"""Assign groups to splits or folds. A group is in exactly one, and stays there when images are added later."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fracture.config import DataConfig
from fracture.dataset.format import UNTESTED
from fracture.errors import UsageError
from fracture.labels import CLASS_NAMES, FRACTURE, NORMAL, SPLITS
from fracture.preparation.source import keyed_hash

# The split of a file that was in test until its group was joined to one of another split. It is in no split from then
# on, because a file that has tested a model may not train the next one.
RETIRED = "retired"


@dataclass(frozen=True)
class Assignment:
    """The split of each file."""

    splits: np.ndarray  # [files] str; may be `RETIRED`
    moved: list[str] = field(default_factory=list)  # groups of several earlier splits: "GROUP: test, val"
    sources: tuple[str, ...] = ()  # where the folds are sources: their names, in the order of the folds
    untested: tuple[str, ...] = ()  # a line for each source that is no fold, with the reason


@dataclass(frozen=True)
class _Group:
    name: str  # the smallest hash of its files
    rows: np.ndarray
    classes: frozenset[int]


def compute_shares(config: DataConfig) -> dict[str, float]:
    """Return each split's share of the groups."""
    if config.split == "test":
        return {"test": 1.0}
    if config.folds == "source":  # suffixes of the two parts of each fold
        return {"": 1 - config.val_fraction, "-val": config.val_fraction}
    if config.folds:
        return dict.fromkeys([f"fold-{number}" for number in range(1, config.folds + 1)], 1 / config.folds)
    train = 1 - config.val_fraction - config.test_fraction
    return dict(zip(SPLITS, (train, config.val_fraction, config.test_fraction), strict=True))


def assign_groups(
    groups: np.ndarray,
    labels: np.ndarray,
    hashes: Sequence[str],
    shares: Mapping[str, float],
    seed: int,
    previous: Mapping[str, str] | None = None,
) -> Assignment:
    """Assign whole groups to splits, stratified by class and size, in an order that a keyed hash decides.

    Groups with fractures only, with normals only and with both are assigned separately, the large ones first, each to
    the split that lacks most. So every split gets its share of each class and of the large groups.

    Args:
        groups: [N] int64.
        labels: [N], 0 or 1.
        hashes: [N], of the files' contents.
        shares: split -> share of the groups; the first split takes groups that have to move.
        previous: file hash -> split, of an earlier assignment, which is kept. If new images join groups of two splits,
            all go to the first split (training), or to validation if training has none of them; but files that were
            test are retired.

    Raises:
        UsageError: a class has too few groups for every split to get one.
    """
    previous = previous or {}
    members = _collect_groups(groups, labels, hashes)
    split_of_group, moved = _keep_previous(members, hashes, next(iter(shares)), previous)
    for classes in sorted({group.classes for group in members}, key=sorted):
        stratum = [number for number, group in enumerate(members) if group.classes == classes]
        _assign_stratum(stratum, members, shares, seed, split_of_group)
    splits = np.empty(len(groups), object)
    for number, group in enumerate(members):
        for row in group.rows:
            splits[row] = _retire_test(previous.get(hashes[row]), split_of_group[number])
    _check_classes(splits, labels, groups, shares)
    return Assignment(splits.astype(str), moved)


def assign_by_source(
    groups: np.ndarray,
    labels: np.ndarray,
    hashes: Sequence[str],
    origins: Sequence[str],
    config: DataConfig,
    previous: Mapping[str, str] | None = None,
) -> Assignment:
    """Make a fold of each origin, in two parts: `fold-N`, and `fold-N-val`, which validates when another fold is test.

    A group with images of several origins belongs to the first of them by name. An origin that lacks a class in one of
    its parts is no fold: all of it is `UNTESTED`, also for validation, which would mistake the source for the class.

    Raises:
        UsageError: files without an origin, or fewer than two origins that can be tested.
    """
    check_sources(origins, labels)
    origin_of_file = _find_origins(groups, origins)
    parts = {  # what was in no fold has no part to stay in
        sha256: "-val" if split.endswith("-val") else ""
        for sha256, split in (previous or {}).items()
        if split != UNTESTED
    }
    splits, moved, tested = np.full(len(groups), UNTESTED, object), [], []
    lacking, joined = [], []  # why the others are not tested
    for name in sorted(set(origins)):
        rows = np.flatnonzero(origin_of_file == name)
        if not len(rows):
            joined.append(f"source {name!r} has no radiograph or patient of its own")
            continue
        part = _assign_origin(groups[rows], labels[rows], [hashes[i] for i in rows], config, parts)
        if part is None:
            count = [len(np.unique(groups[rows][labels[rows] == label])) for label in (FRACTURE, NORMAL)]
            lacking.append(
                f"source {name!r} has {count[0]:,} separate fractured and {count[1]:,} normal radiographs or patients"
            )
            continue
        tested.append(name)
        splits[rows] = [f"fold-{len(tested)}{suffix}" for suffix in part.splits]
        moved += part.moved
    _check_tested(tested, [*lacking, *joined])
    untested = [f"{line}, and needs two of each to be tested; it trains in every fold" for line in lacking]
    untested += [f"{line}, and is tested with the others" for line in joined]
    return Assignment(splits.astype(str), moved, tuple(tested), tuple(untested))


def check_sources(origins: Sequence[str], labels: Sequence[int] | np.ndarray) -> None:
    """Check that sources can be left out one at a time, as far as can be seen without decoding an image.

    Args:
        origins: [files]; "" where it is not known.
        labels: [files], 0 or 1.

    Raises:
        UsageError: files without an origin, one origin only, or fewer than two with both classes.
    """
    if "" in origins and any(origins):
        raise UsageError(
            f"data.folds = source needs to know where each file is from, and {list(origins).count('')} of "
            f"{len(origins)} have no source. Fill in the labels file's column, or leave those files out."
        )
    names = sorted(set(origins))
    if len(names) < 2:
        raise UsageError(
            f"data.folds = source tests each source by a model of the others, and all {len(origins):,} images are of "
            f"one source{f', {names[0]!r}' if any(names) else ''}. Name several --data folders, give the labels file a "
            "source column, or use data.folds = 5."
        )
    counts = Counter(zip(origins, (int(label) for label in labels), strict=True))
    lacking = [name for name in names if not (counts[name, FRACTURE] and counts[name, NORMAL])]
    _check_tested(
        [name for name in names if name not in lacking],
        [
            f"source {name!r} has {counts[name, FRACTURE]:,} fractured and {counts[name, NORMAL]:,} normal images"
            for name in lacking
        ],
    )


def _check_tested(tested: Sequence[str], untested: Sequence[str]) -> None:
    """Check that every source that is tested leaves another to train on and to validate on."""
    if not tested:
        raise UsageError(
            f"data.folds = source has nothing to test on: {'; '.join(untested)}. A model that only tells the sources "
            "apart would seem to find fractures. Add images of the other class, to two sources or more."
        )
    if len(tested) == 1:
        raise UsageError(
            f"data.folds = source can test on {tested[0]!r} alone, and then has no other source with two of each "
            f"class to validate on: {'; '.join(untested)}. Add images, or use data.folds = 5."
        )


def find_missing_class(splits: np.ndarray, labels: np.ndarray, names: Iterable[str]) -> tuple[str, int] | None:
    """Return the first (split, label) without an image; None if every split has both classes."""
    pairs = ((split, label) for label in range(len(CLASS_NAMES)) for split in names)
    return next((pair for pair in pairs if not ((splits == pair[0]) & (labels == pair[1])).any()), None)


def _collect_groups(groups: np.ndarray, labels: np.ndarray, hashes: Sequence[str]) -> list[_Group]:
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(groups[order]) != 0])
    return [
        _Group(min(hashes[i] for i in rows), rows, frozenset(labels[rows].tolist()))
        for rows in np.split(order, starts[1:])
    ]


def _keep_previous(
    members: list[_Group], hashes: Sequence[str], first_split: str, previous: Mapping[str, str]
) -> tuple[dict[int, str], list[str]]:
    """Return the split of each group that has one, by its number, and a line for each group that had several."""
    split_of_group: dict[int, str] = {}
    moved = []
    for number, group in enumerate(members):
        found = {previous[hashes[i]] for i in group.rows if hashes[i] in previous}
        joined = found - {RETIRED}
        if len(joined) > 1:
            moved.append(f"{group.name[:12]}: {', '.join(sorted(joined))}")
            joined.discard("test")
        if found:
            split_of_group[number] = joined.pop() if len(joined) == 1 else first_split
    return split_of_group, moved


def _assign_stratum(
    stratum: list[int], members: list[_Group], shares: Mapping[str, float], seed: int, split_of_group: dict[int, str]
) -> None:
    """Assign the groups of a stratum that have no split yet, each to the split that lacks most."""
    quota = _compute_quota(len(stratum), shares)
    count = Counter(split_of_group[number] for number in stratum if number in split_of_group)

    def sort_key(number: int) -> tuple[int, bytes]:
        return -int(np.log2(len(members[number].rows))), keyed_hash(members[number].name, seed)

    for number in sorted((n for n in stratum if n not in split_of_group), key=sort_key):
        assigned = sum(count.values()) + 1
        split = max(shares, key=lambda name: quota[name] * assigned / len(stratum) - count[name])
        split_of_group[number] = split
        count[split] += 1


def _compute_quota(groups: int, shares: Mapping[str, float]) -> dict[str, float]:
    """Return the number of groups that each split should get: at least one, if there are enough groups."""
    quota = {name: share * groups for name, share in shares.items()}
    if groups >= len(shares):
        for name in [name for name, count in quota.items() if count < 1]:
            quota[name] = 1.0
        largest = max(quota, key=lambda name: quota[name])
        quota[largest] -= sum(quota.values()) - groups
    return quota


def _retire_test(previous: str | None, split: str) -> str:
    has_left_test = previous == RETIRED or (previous == "test" and split != "test")
    return RETIRED if has_left_test else split


def _find_origins(groups: np.ndarray, origins: Sequence[str]) -> np.ndarray:
    """Return the origin of each file's group: [files] str."""
    pairs = sorted(zip(groups.tolist(), origins, strict=True), key=lambda pair: pair[1], reverse=True)
    first_origin = dict(pairs)  # the last of a group's pairs counts, which has the first name
    return np.array([first_origin[group] for group in groups.tolist()])


def _assign_origin(
    groups: np.ndarray, labels: np.ndarray, hashes: Sequence[str], config: DataConfig, previous: Mapping[str, str]
) -> Assignment | None:
    """Return the parts of an origin's fold, or None where one would lack a class."""
    try:
        return assign_groups(groups, labels, hashes, compute_shares(config), config.seed, previous)
    except UsageError:
        return None


def _check_classes(splits: np.ndarray, labels: np.ndarray, groups: np.ndarray, shares: Mapping[str, float]) -> None:
    if missing := find_missing_class(splits, labels, shares):
        split, label = missing
        count = len(np.unique(groups[labels == label]))
        raise UsageError(
            f"class {CLASS_NAMES[label]!r} has {count} separate radiographs or patients, and split {split!r} gets none "
            f"of them. Each of the {len(shares)} splits needs both classes: add images, use fewer folds, or "
            "change data.val_fraction and data.test_fraction."
        )
