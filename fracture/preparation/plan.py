"""Plan the split: which file goes to which split, and why."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from fracture.config import DataConfig
from fracture.errors import UsageError
from fracture.labels import CLASS_NAMES, FRACTURE, NORMAL, SPLITS
from fracture.preparation.duplicates.grouping import COPY_KINDS, KINDS, first_of_each, number_groups
from fracture.preparation.ledger import Ledger
from fracture.preparation.scan import ScannedSource
from fracture.preparation.split import (
    RETIRED,
    Assignment,
    assign_by_source,
    assign_groups,
    compute_shares,
    find_missing_class,
)

_NOT_LISTED = ["modified", "views", "rings", "spectrum"]  # columns of FACTS that `files.parquet` does not have


@dataclass(frozen=True)
class SplitPlan:
    """The split of each file, with the reasons."""

    kind: str  # official, group, folds or test, as in the manifest
    reason: str
    files: pa.Table  # facts of every file, radiograph_id, group_id, and split_used, which is "" for a file left out
    splits: tuple[str, ...]  # names
    folds: tuple[str, ...]  # titles of the folds; empty without folds
    untested: tuple[str, ...]  # a line for each source that is no fold, see `Assignment`
    moved: list[str]  # groups that had to move, see `Assignment`
    left_out: dict[str, int]  # why -> readable images that are in no split

    @cached_property
    def split_used(self) -> np.ndarray:
        """Return the split of each file: [files] str."""
        return np.array(self.files["split_used"].to_pylist(), str)

    @cached_property
    def group_ids(self) -> np.ndarray:
        """Return the group of each file: [files] int64."""
        return self.files["group_id"].to_numpy()


@dataclass(frozen=True)
class _Files:
    """Columns of a scanned source that the plan needs, one element a file."""

    facts: pa.Table
    readable: np.ndarray  # bool
    labels: np.ndarray
    radiograph_ids: np.ndarray  # int64
    group_ids: np.ndarray  # int64

    @classmethod
    def collect(cls, scanned: ScannedSource) -> "_Files":
        facts, links = scanned.facts, scanned.links
        readable = facts["sha256"].is_valid().to_numpy()
        radiograph_ids, group_ids = (
            _make_ids(facts, number_groups(len(facts), links, kinds), readable) for kinds in (COPY_KINDS, KINDS)
        )
        return cls(facts, readable, facts["label"].to_numpy(), radiograph_ids, group_ids)

    def list_with(self, split_used: np.ndarray) -> pa.Table:
        """Return the table of `files.parquet`."""
        columns = {"radiograph_id": self.radiograph_ids, "group_id": self.group_ids, "split_used": split_used.tolist()}
        table = self.facts.drop_columns(_NOT_LISTED)
        for name, values in columns.items():
            table = table.append_column(name, pa.array(values, pa.string() if name == "split_used" else pa.int64()))
        return table


def plan_split(scanned: ScannedSource, config: DataConfig, ledger: Ledger, *, keep_test: bool) -> SplitPlan:
    """Keep the split that was found, or make one of whole groups in which no group of the ledger moves.

    Args:
        keep_test: files that were test in the ledger may not be in another split, even in a split that was found.

    Raises:
        UsageError: the split would lack a class, every radiograph has both labels, or a test file was moved.
    """
    files, earlier = _Files.collect(scanned), ledger.find_splits(scanned.facts)
    moved_test_files: list[str] = []
    if _keeps_found_split(scanned, config):
        moved_test_files = _find_moved_test_files(scanned.facts, earlier) if keep_test else []
        if not moved_test_files:
            return _plan_found_split(scanned, files, config)
        if config.split == "official":
            raise UsageError(
                f"--data {scanned.source.name}: {moved_test_files[0]!r} is in training or validation, and has tested "
                f"the champion. Move it back, or use --split auto. {len(moved_test_files)} such files."
            )
    return _plan_new_split(scanned, files, config, earlier, moved_test_files)


def _keeps_found_split(scanned: ScannedSource, config: DataConfig) -> bool:
    if config.split == "auto":
        return not config.folds and not scanned.source.split_fault and not scanned.audit.leaks
    return config.split == "official"


def _find_moved_test_files(facts: pa.Table, earlier: dict[str, str]) -> list[str]:
    """Return the paths of files that were test and are now found in another split."""
    rows = zip(*(facts[name].to_pylist() for name in ("path", "split", "sha256")), strict=True)
    return [p for p, split, sha256 in rows if sha256 and earlier.get(sha256.hex()) == "test" and split != "test"]


def _plan_found_split(scanned: ScannedSource, files: _Files, config: DataConfig) -> SplitPlan:
    found = np.array(files.facts["split"].to_pylist(), object)
    split_used = np.where(files.readable, found, "")
    if missing := find_missing_class(split_used, files.labels, SPLITS):
        split, label = missing
        raise UsageError(
            f"--data {scanned.source.name}: no readable image of class {CLASS_NAMES[label]!r} in split {split!r}."
        )
    reason = (
        "as found: data.split = official" if config.split == "official" else "as found: no radiograph is in two splits"
    )
    return SplitPlan("official", reason, files.list_with(split_used), SPLITS, (), (), [], {})


def _plan_new_split(
    scanned: ScannedSource, files: _Files, config: DataConfig, earlier: dict[str, str], moved_test_files: list[str]
) -> SplitPlan:
    conflicting = _find_conflicting(files)
    kept = np.zeros(len(files.facts), bool)
    kept[first_of_each(files.facts["pixels"], files.readable)] = True
    left_out = {
        "a copy of the same pixels is kept": int((files.readable & ~kept & ~conflicting).sum()),
        "the radiograph has both labels": int((files.readable & conflicting).sum()),
    }
    rows = np.flatnonzero(files.readable & ~conflicting)
    if not len(rows):
        first, second = scanned.audit.conflicts[0][:2]
        raise UsageError(
            f"--data {scanned.source.name}: every radiograph has both labels, for example {first!r} and "
            f"{second!r}. Remove the wrong copies."
        )
    assignment = _assign_rows(files, rows, config, earlier)
    split_used = np.full(len(files.facts), "", object)
    split_used[rows] = assignment.splits
    split_used[~kept] = ""
    if retired := int((split_used == RETIRED).sum()):
        left_out["it was test, and now belongs to a group that is not"] = retired
    if config.folds == "source":
        names, folds = tuple(sorted(set(assignment.splits.tolist()))), assignment.sources
    else:
        names = tuple(compute_shares(config))
        folds = names if config.folds else ()
    kind = "test" if config.split == "test" else "folds" if config.folds else "group"
    reason = _explain_new_split(scanned, config, moved_test_files)
    listed = files.list_with(split_used)
    return SplitPlan(kind, reason, listed, names, folds, assignment.untested, assignment.moved, left_out)


def _find_conflicting(files: _Files) -> np.ndarray:
    """Mark the files of radiographs that have both labels: [files] bool."""
    ids = [files.radiograph_ids[files.readable & (files.labels == label)] for label in (NORMAL, FRACTURE)]
    return np.isin(files.radiograph_ids, np.intersect1d(*ids))


def _assign_rows(files: _Files, rows: np.ndarray, config: DataConfig, earlier: dict[str, str]) -> Assignment:
    """Assign some files to splits or folds."""
    groups, labels = files.group_ids[rows], files.labels[rows]
    hashes = [sha256.hex() for sha256 in files.facts["sha256"].take(rows).to_pylist()]
    if config.folds == "source":
        origins = files.facts["origin"].take(rows).to_pylist()
        return assign_by_source(groups, labels, hashes, origins, config, earlier)
    return assign_groups(groups, labels, hashes, compute_shares(config), config.seed, earlier)


def _explain_new_split(scanned: ScannedSource, config: DataConfig, moved_test_files: list[str]) -> str:
    if config.split == "test":
        return "none: all of it is test"
    if config.folds or config.split == "group":
        return "ours: whole groups"
    if scanned.source.split_fault:
        return f"ours, whole groups: the data {scanned.source.split_fault}"
    if moved_test_files:
        return f"ours, whole groups: {len(moved_test_files):,} images that were test are in other splits as found"
    leaking = sum(leak.leaking for leak in scanned.audit.leakage.values())
    return f"ours, whole groups: {leaking:,} validation and test images of the split found leak from training"


def _make_ids(facts: pa.Table, numbers: np.ndarray, readable: np.ndarray) -> np.ndarray:
    """Return the first 8 bytes of the smallest file hash in each file's group: [files] int64.

    Unlike the numbers, these ids do not depend on where the files are or which others there are.
    """
    smallest: dict[int, bytes] = {}
    hashes = facts["sha256"].to_pylist()
    for row in np.flatnonzero(readable):
        number = int(numbers[row])
        smallest[number] = min(smallest.get(number, b"\xff" * 32), hashes[row])
    ids = [int.from_bytes(smallest.get(int(number), bytes(8))[:8], "little", signed=True) for number in numbers]
    return np.array(ids, np.int64)
