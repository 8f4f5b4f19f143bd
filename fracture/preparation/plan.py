"""What goes into which split, and the ledger of where every file went that was ever seen."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from fracture.config import DataConfig
from fracture.dataset.format import LEDGER, MANIFEST, read_manifest
from fracture.errors import UsageError
from fracture.labels import CLASS_NAMES, SPLITS
from fracture.preparation.audit import Audit
from fracture.preparation.duplicates.grouping import COPY_KINDS, KINDS, first_of_each, group_numbers
from fracture.preparation.scan import Examined
from fracture.preparation.source import Source
from fracture.preparation.split import RETIRED, assign, assign_by_source, first_lack, shares_of
from fracture.storage import StoragePath

_DECIDING = ("split", "folds", "seed", "val_fraction", "test_fraction")  # of the settings, where a group goes


@dataclass(frozen=True)
class Plan:
    """What goes where."""

    split: str
    reason: str
    files: pa.Table  # facts of every file, with its group's id and its split; "" where it is left out
    radiograph_ids: np.ndarray  # [files] int64 ids of the radiographs
    groups: np.ndarray  # [files] int64 ids of what may not be parted
    splits: np.ndarray  # [files] str
    names: tuple[str, ...]  # of the splits
    folds: tuple[str, ...]  # their titles; empty where there are none
    moved: list[str]
    left_out: dict[str, int]


_LEDGER = pa.schema([("sha256", pa.binary(32)), ("pixels", pa.binary(16)), ("split", pa.string())])


@dataclass(frozen=True)
class _Ledger:
    """Where every file went that was ever seen, also one that is gone: it may come back, or come back re-encoded."""

    by_file: dict[bytes, str]  # hash of the file -> split, or RETIRED
    by_pixels: dict[bytes, str]  # hash of the grey image -> the same

    @classmethod
    def of(cls, rows: Iterable[tuple[bytes | None, bytes | None, str]]) -> "_Ledger":
        """Of (hash of the file, of its pixels, split); of two rows with one hash, the one that is retired counts."""
        ledger = cls({}, {})
        for digest, pixels, split in rows:
            for known, key in ((ledger.by_file, digest), (ledger.by_pixels, pixels)):
                if key is not None and split and known.get(key) != RETIRED:
                    known[key] = split
        return ledger

    def split_of(self, digest: bytes, pixels: bytes) -> str | None:
        found = (self.by_file.get(digest), self.by_pixels.get(pixels))
        return RETIRED if RETIRED in found else found[0] or found[1]


def read_ledger(out: StoragePath, config: DataConfig) -> pa.Table:
    """The ledger in `out`, if it was made under the same settings of the split."""
    try:
        before = (out / MANIFEST).read_json()["parameters"]  # also where a shard is lost: the split is not
        table = (out / LEDGER).read_parquet()
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        return _LEDGER.empty_table()
    wanted = config.model_dump(mode="json")
    same = all(before.get(key) == wanted[key] for key in _DECIDING)
    return table if same else _LEDGER.empty_table()


def renew_ledger(plan: "Plan", before: pa.Table) -> pa.Table:
    """That of before, with what was assigned now."""
    columns = (plan.files[name].to_pylist() for name in ("sha256", "pixels", "group_id", "split_used"))
    rows = [row for row in zip(*columns, strict=True) if row[0] is not None]
    split_of = {group: used for _, _, group, used in rows if used not in ("", RETIRED)}
    ledger = {row["sha256"]: row for row in before.to_pylist()}
    retired = {row["pixels"] for row in ledger.values() if row["split"] == RETIRED}
    retired |= {pixels for _, pixels, _, used in rows if used == RETIRED}  # and with it all of its copies
    for digest, pixels, group, _ in rows:
        if split := RETIRED if pixels in retired else split_of.get(group):
            ledger[digest] = {"sha256": digest, "pixels": pixels, "split": split}
    return pa.Table.from_pylist([ledger[digest] for digest in sorted(ledger)], schema=_LEDGER)


def check_same_split(before: StoragePath, config: DataConfig) -> None:
    there, wanted = read_manifest(before).parameters, config.model_dump(mode="json")
    for key in _DECIDING:
        if there.get(key) != wanted[key]:
            raise UsageError(
                f"data.{key} = {wanted[key]!r} would deal the radiographs out anew, and the champion was trained with "
                f"{there.get(key)!r}: what tested it might train the next. Keep {there.get(key)!r}, or begin another "
                "registry."
            )


def plan_split(examined: Examined, config: DataConfig, before: pa.Table, binding: bool) -> Plan:
    source, facts, links = examined.source, examined.facts, examined.links
    readable = facts["sha256"].is_valid().to_numpy()
    ledger = _Ledger.of(zip(*(before[name].to_pylist() for name in _LEDGER.names), strict=True))
    looks = zip(facts["sha256"].to_pylist(), facts["pixels"].to_pylist(), strict=True)
    previous = {d.hex(): split for d, p in looks if d is not None and (split := ledger.split_of(d, p))}
    labels = facts["label"].to_numpy()
    radiograph_ids, groups = (
        _group_ids(facts, group_numbers(len(facts), links, kinds), readable) for kinds in (COPY_KINDS, KINDS)
    )
    official = config.split == "official" or (
        config.split == "auto" and not config.folds and not source.split_fault and not examined.audit.leaks
    )
    strayed = _strayed(facts, previous) if official and binding else []
    if strayed and config.split == "official":
        raise UsageError(
            f"--data {source.name}: {strayed[0]!r} lies in training or validation, and has tested the champion. Move "
            f"it back, or use --split auto. {len(strayed)} such files."
        )
    official = official and not strayed
    splits = np.full(len(facts), "", dtype=object)
    moved: list[str] = []
    left_out: dict[str, int] = {}
    titles: tuple[str, ...] = ()
    if official:
        splits[readable] = np.array(facts["split"].to_pylist(), object)[readable]
        names: tuple[str, ...] = SPLITS
        _check_official(source, splits, labels)
        reason = "as found, asked for" if config.split == "official" else "as found: no radiograph is in two splits"
    else:
        torn = np.isin(
            radiograph_ids,
            np.intersect1d(radiograph_ids[readable & (labels == 0)], radiograph_ids[readable & (labels == 1)]),
        )
        kept = np.zeros(len(facts), bool)
        kept[first_of_each(facts["pixels"], readable)] = True
        left_out = {
            "a copy of the same pixels is kept": int((readable & ~kept & ~torn).sum()),
            "the radiograph stands under both labels": int((readable & torn).sum()),
        }
        rows = np.flatnonzero(readable & ~torn)
        if not len(rows):
            raise UsageError(
                f"--data {source.name}: every radiograph stands under both labels, for example "
                f"{examined.audit.conflicts[0][0]!r} and {examined.audit.conflicts[0][1]!r}. Remove the wrong copies."
            )
        hashes = [digest.hex() for digest in facts["sha256"].take(rows).to_pylist()]
        if config.folds == "source":
            origins = facts["origin"].take(rows).to_pylist()
            assignment, titles = assign_by_source(groups[rows], labels[rows], hashes, origins, config, previous)
            names = tuple(sorted(set(assignment.splits.tolist())))
        else:
            shares = shares_of(config)
            assignment = assign(groups[rows], labels[rows], hashes, shares, config.seed, previous)
            names = tuple(shares)
            titles = names if config.folds else ()
        splits[rows] = assignment.splits
        splits[~kept] = ""
        moved = assignment.moved
        reason = _reason(source, examined.audit, config, strayed)
        if retired := int((splits == RETIRED).sum()):
            left_out["it was test, and now belongs to a group that is not"] = retired
    files = facts.drop_columns(["modified", "small", "rings", "spectrum"])
    files = files.append_column("radiograph_id", pa.array(radiograph_ids, pa.int64()))
    files = files.append_column("group_id", pa.array(groups, pa.int64()))
    files = files.append_column("split_used", pa.array(splits.tolist(), pa.string()))
    kind = "official" if official else "test" if config.split == "test" else "folds" if config.folds else "group"
    return Plan(kind, reason, files, radiograph_ids, groups, splits.astype(str), names, titles, moved, left_out)


def _check_official(source: Source, splits: np.ndarray, labels: np.ndarray) -> None:
    if lacking := first_lack(splits, labels, SPLITS):
        split, label = lacking
        raise UsageError(f"--data {source.name}: no readable image of class {CLASS_NAMES[label]!r} in split {split!r}.")


def _strayed(facts: pa.Table, previous: dict[str, str]) -> list[str]:
    """Paths of files that were test, and are found in another split."""
    rows = zip(*(facts[name].to_pylist() for name in ("path", "split", "sha256")), strict=True)
    return [p for p, split, digest in rows if digest and previous.get(digest.hex()) == "test" and split != "test"]


def _reason(source: Source, audit: Audit, config: DataConfig, strayed: list[str]) -> str:
    if config.split == "test":
        return "none: all of it is test"
    if config.folds or config.split == "group":
        return "ours, asked for: whole groups"
    if source.split_fault:
        return f"ours, whole groups: the data {source.split_fault}"
    if strayed:
        return f"ours, whole groups: {len(strayed):,} images that were test are in other splits as found"
    leaking = sum(leak.leaking for leak in audit.leakage.values())
    return f"ours, whole groups: {leaking:,} validation and test images of the split found leak from training"


def _group_ids(facts: pa.Table, numbers: np.ndarray, readable: np.ndarray) -> np.ndarray:
    """[files] int64: the first 8 bytes of the smallest hash in the group, the same wherever the files lie."""
    ids: dict[int, bytes] = {}
    hashes = facts["sha256"].to_pylist()
    for row in np.flatnonzero(readable):
        number = int(numbers[row])
        ids[number] = min(ids.get(number, b"\xff" * 32), hashes[row])
    found = [int.from_bytes(ids.get(int(number), bytes(8))[:8], "little", signed=True) for number in numbers]
    return np.array(found, np.int64)
