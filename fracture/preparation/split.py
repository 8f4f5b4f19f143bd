"""Groups to splits or folds: a group lives in exactly one, and stays there when images are added later."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fracture.config import DataConfig
from fracture.errors import UsageError
from fracture.labels import CLASS_NAMES, FRACTURE, NORMAL, SPLITS
from fracture.preparation.source import keyed_hash

# Of a file that was in test until its group was joined to one of another split: in no split from then on, since what
# once tested a model may not train the next one.
RETIRED = "retired"


@dataclass(frozen=True)
class Assignment:
    """Where each file goes."""

    splits: np.ndarray  # [files] str; `RETIRED` among them
    moved: list[str] = field(default_factory=list)  # what was assigned before and had to move: "GROUP: test, val"


def shares_of(config: DataConfig) -> dict[str, float]:
    """Split names and the share of the groups that each is to have."""
    if config.split == "test":
        return {"test": 1.0}
    if config.folds == "source":  # of each source: what is tested, or trained on, and what validates then
        return {"": 1 - config.val_fraction, "-val": config.val_fraction}
    if config.folds:
        return dict.fromkeys([f"fold-{number}" for number in range(1, config.folds + 1)], 1 / config.folds)
    train = 1 - config.val_fraction - config.test_fraction
    return dict(zip(SPLITS, (train, config.val_fraction, config.test_fraction), strict=True))


def assign(
    groups: np.ndarray,
    labels: np.ndarray,
    hashes: Sequence[str],
    shares: Mapping[str, float],
    seed: int,
    previous: Mapping[str, str] | None = None,
) -> Assignment:
    """Deals whole groups out to the splits, by class and size, in an order that a keyed hash decides.

    Groups with fractures only, with normals only and with both are dealt separately, the large ones first, each to
    the split that lacks most: so all splits get their share of each class and of the large families.

    Args:
        groups: [N] int64.
        labels: [N] of 0 and 1.
        hashes: [N], of the files' contents; the smallest in a group names it.
        shares: split -> share of the groups; the first takes what has to move.
        previous: file hash -> split, of an earlier assignment, which stands. Where new images join groups of two
            splits, the whole goes to the first split (training), or to validation if training has none of it; but
            what was test is retired.

    Raises:
        UsageError: a class has too few groups for every split to get one.
    """
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(groups[order]) != 0])
    members = np.split(order, starts[1:])
    names = [min(hashes[i] for i in rows) for rows in members]
    kinds = [frozenset(labels[rows].tolist()) for rows in members]
    before = [{previous[hashes[i]] for i in rows if hashes[i] in previous} if previous else set() for rows in members]
    home = next(iter(shares))
    placed: dict[int, str] = {}
    moved = []
    for number, found in enumerate(before):
        joined = found - {RETIRED}
        if len(joined) > 1:
            moved.append(f"{names[number][:12]}: {', '.join(sorted(joined))}")
            joined.discard("test")
        if found:
            placed[number] = joined.pop() if len(joined) == 1 else home
    for kind in sorted(set(kinds), key=sorted):
        stratum = [number for number in range(len(members)) if kinds[number] == kind]
        _deal(stratum, members, names, shares, seed, placed, kind)
    splits = np.empty(len(groups), object)
    for number, rows in enumerate(members):
        for row in rows:
            was = previous.get(hashes[row]) if previous else None
            left_test = was == RETIRED or (was == "test" and placed[number] != "test")
            splits[row] = RETIRED if left_test else placed[number]
    _check_classes(splits, labels, groups, shares)
    return Assignment(splits.astype(str), moved)


def assign_by_source(
    groups: np.ndarray,
    labels: np.ndarray,
    hashes: Sequence[str],
    origins: Sequence[str],
    config: DataConfig,
    previous: Mapping[str, str] | None = None,
) -> tuple[Assignment, tuple[str, ...]]:
    """Each origin a fold, of two parts: `fold-N`, and `fold-N-val`, which validates where another origin is tested.

    A group that has images of several origins belongs to the first of them by name.

    Returns:
        The assignment, and the origins' names in the order of their folds.

    Raises:
        UsageError: fewer than two origins, files without one, or an origin that lacks a class.
    """
    if "" in origins and any(origins):
        raise UsageError(
            f"data.folds = source needs to know where each file is from, and {list(origins).count('')} of "
            f"{len(origins)} have no source. Fill in the labels file's column, or leave those files out."
        )
    home = dict(sorted(zip(groups.tolist(), origins, strict=True), key=lambda pair: pair[1], reverse=True))
    own = np.array([home[group] for group in groups.tolist()])
    names = tuple(np.unique(own).tolist())
    if len(names) < 2:
        raise UsageError(
            "data.folds = source needs images of two sources or more: name several --data folders, or give the labels "
            "file a source column."
        )
    parts = {digest: "-val" if split.endswith("-val") else "" for digest, split in (previous or {}).items()}
    splits, moved = np.empty(len(groups), object), []
    for number, name in enumerate(names, 1):
        rows = np.flatnonzero(own == name)
        try:
            part = assign(groups[rows], labels[rows], [hashes[i] for i in rows], shares_of(config), config.seed, parts)
        except UsageError:
            count = [len(np.unique(groups[rows][labels[rows] == label])) for label in range(len(CLASS_NAMES))]
            raise UsageError(
                f"source {name!r} has {count[FRACTURE]} separate fractured and {count[NORMAL]} normal radiographs or "
                "patients; data.folds = source needs two of each, to test on and to validate on. Leave it out, or "
                "use data.folds = 5."
            ) from None
        splits[rows] = [f"fold-{number}{suffix}" for suffix in part.splits]
        moved += part.moved
    return Assignment(splits.astype(str), moved), names


def _deal(
    stratum: list[int],
    members: list[np.ndarray],
    names: list[str],
    shares: Mapping[str, float],
    seed: int,
    placed: dict[int, str],
    kind: frozenset[int],
) -> None:
    quota = {name: share * len(stratum) for name, share in shares.items()}
    if len(stratum) >= len(shares):  # a small share of few groups still gets one
        small = [name for name, count in quota.items() if count < 1]
        for name in small:
            quota[name] = 1.0
        large = max(quota, key=lambda name: quota[name])
        quota[large] -= sum(quota.values()) - len(stratum)
    has = Counter(placed[number] for number in stratum if number in placed)

    def place_in_line(number: int) -> tuple[int, bytes]:
        return -int(np.log2(len(members[number]))), keyed_hash(names[number], seed)

    for number in sorted((n for n in stratum if n not in placed), key=place_in_line):
        done = sum(has.values()) + 1
        lacking = max(shares, key=lambda name: quota[name] * done / len(stratum) - has[name])
        placed[number] = lacking
        has[lacking] += 1


def first_lack(splits: np.ndarray, labels: np.ndarray, names: Iterable[str]) -> tuple[str, int] | None:
    """The first (split, label) that has no image; None where every split has both classes."""
    pairs = ((split, label) for label in range(len(CLASS_NAMES)) for split in names)
    return next((pair for pair in pairs if not ((splits == pair[0]) & (labels == pair[1])).any()), None)


def _check_classes(splits: np.ndarray, labels: np.ndarray, groups: np.ndarray, shares: Mapping[str, float]) -> None:
    if lacking := first_lack(splits, labels, shares):
        split, label = lacking
        count = len(np.unique(groups[labels == label]))
        raise UsageError(
            f"class {CLASS_NAMES[label]!r} has {count} separate radiographs or patients, and split {split!r} gets none "
            f"of them. Each of the {len(shares)} splits needs both classes: add images, ask for fewer folds, or "
            "change data.val_fraction and data.test_fraction."
        )
