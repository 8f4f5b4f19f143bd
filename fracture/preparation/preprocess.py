"""Images to facts to shards: maps over files on Ray. The one file of this room that knows Ray.

Tasks, not Ray Data: what is mapped is names of files, and Ray Data takes four seconds and two processes to start.

Where an image goes is known only when all have been examined; until then its pixels wait in files beside the shards,
since decoding an image a second time costs a hundred times as much. Which row goes into which shard is decided by
keyed hashes, so that any number of workers writes the same bytes.
"""

import hashlib
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import csv, fs

from fracture.config import DataConfig
from fracture.dataset.format import (
    FILES,
    LEDGER,
    MANIFEST,
    SCHEMA_VERSION,
    Dataset,
    Manifest,
    Pixels,
    Shard,
    encode_shard,
    images_of,
    read_dataset,
    read_manifest,
)
from fracture.errors import RunError, UsageError
from fracture.labels import CLASS_NAMES, SPLITS
from fracture.preparation.audit import Audit, alarming, alarms, leakage, make_audit
from fracture.preparation.audit_page import audit_page
from fracture.preparation.cache import COMPARED, EXAMINED, Cache, code_key, view_hashes
from fracture.preparation.decode import decode, too_large
from fracture.preparation.duplicates.alignment import Likeness, compare_pairs
from fracture.preparation.duplicates.grouping import COPY_KINDS, KINDS, find_links, first_of_each, group_numbers
from fracture.preparation.examine import FACTS, examine, pixels_hash, stack_views
from fracture.preparation.source import ImageFile, Source, keyed_hash
from fracture.preparation.split import RETIRED, assign, assign_by_source, first_lack, shares_of
from fracture.storage import StoragePath

_INPUT = "input.json"  # what the shards were made from, to tell in a second that nothing changed
_LINKS = "links.csv"  # why files are one group
_BESIDE = (MANIFEST, _INPUT, FILES, LEDGER, _LINKS, EXAMINED, COMPARED, "audit.json", "audit.html")
_WAITING = "pixels-{:09d}.raw"  # of the new files from this number on; each image [H, W] uint8
_IS_WAITING = r"pixels-\d{9}\.raw"
_EXAMINED_AT_ONCE, _COMPARED_AT_ONCE = 128, 32
_KEPT_EVERY = 300  # seconds of looking that a killed job may lose
_DECIDING = ("split", "folds", "seed", "val_fraction", "test_fraction")  # of the settings, where a group goes
_SPREAD = 4  # old rows that may be read for each that is wanted, before decoding is the smaller work

Progress = Callable[[str, int, int | None], None]  # what, done, of how many, where that is known


@dataclass(frozen=True)
class Examined:
    """All files of a source, looked at."""

    source: Source
    facts: pa.Table  # FACTS, in the order of the source's files
    links: pa.Table  # LINKS
    audit: Audit
    waiting: dict[str, tuple[str, int]]  # path -> file in `out` with the image's pixels, position in it


@dataclass(frozen=True)
class _Part:
    """What one task returns of the shard it wrote."""

    split: str
    number: int
    shard: Shard
    pixels: Pixels


@dataclass(frozen=True)
class _Before:
    """The shards that are there, whose pixels can be taken over."""

    dataset: Dataset
    rows: dict[tuple[str, bytes], tuple[str, int]]  # path and hash of the file -> split, row in it


def find_done(
    source: Source, out: StoragePath, config: DataConfig, before: StoragePath | None = None
) -> Manifest | None:
    """The manifest in `out`, where its shards were made from this very input and are whole.

    Args:
        before: as for `preprocess`.
    """
    try:
        made_from = (out / _INPUT).read_json()
        manifest = read_dataset(out).manifest
    except (FileNotFoundError, NotADirectoryError, UsageError, ValueError):
        return None
    same = made_from == _made_from(source, config, manifest, before)
    return manifest if same else None


def changed_settings(out: StoragePath, config: DataConfig) -> list[str]:
    """What differs from the settings that the shards in `out`, if any, were made with, as `key old -> new`."""
    try:
        before = read_dataset(out).manifest.parameters
    except (FileNotFoundError, NotADirectoryError, UsageError):
        return []
    now = config.model_dump(mode="json")
    return [f"data.{key} {before.get(key)!r} -> {now[key]!r}" for key in now if before.get(key) != now[key]]


def examine_source(
    source: Source,
    out: StoragePath,
    config: DataConfig,
    progress: Progress = lambda what, done, total: None,
    *,
    to_write: bool = False,
) -> Examined:
    """Looks at every file, finds what belongs together, and judges the whole; needs a started Ray.

    What is found is kept in `out` as well, so that neither a stopped job nor a folder that has grown costs it again.

    Args:
        to_write: `preprocess` follows; the pixels wait for it in `out`.

    Raises:
        UsageError: no file can be read.
        RunError: the disk is full.
    """
    cache = Cache(out, source, config.image_size)
    facts, waiting = _facts(source, cache, config, progress, out if to_write else None)
    if facts["sha256"].null_count == len(facts):
        reasons = ", ".join(f"{n} {reason}" for reason, n in Counter(facts["reason"].to_pylist()).most_common(3))
        raise UsageError(
            f"--data {source.name}: not one of {len(facts)} files can be read ({reasons}; first: {facts['path'][0]}). "
            "JPEG, PNG, GIF, BMP, WebP and TIFF can; convert others, such as DICOM, first."
        )
    comparer = _Comparer(facts, cache, progress)
    links = find_links(facts, config, comparer)
    cache.keep_likenesses(comparer.asked)
    return Examined(source, facts, links, make_audit(facts, links), waiting)


def preprocess(
    examined: Examined,
    out: StoragePath,
    config: DataConfig,
    progress: Progress = lambda what, done, total: None,
    before: StoragePath | None = None,
) -> Manifest:
    """Writes the shards of the examined source into the folder `out`; needs a started Ray.

    What `out` held before stays valid until the new manifest is written, in one stroke. The split that is recorded
    there stands: no group that was assigned before moves, where the settings of the split are the same.

    Args:
        before: manifest and files of a data set whose split has to stand in place of that in `out`.

    Raises:
        UsageError: too many files are unreadable, a split would lack a class, the split of `before` cannot stand, or
            `out` is somebody's folder of other things.
        RunError: the disk is full, or a file changed meanwhile.
    """
    source = examined.source
    check_out(source, out)
    _check_rejected(examined.audit, config)
    if before is not None:
        _check_same_split(before, config)
    ledger = _previous(before or out, config)
    plan = _plan(examined, config, ledger, binding=before is not None)
    try:
        parts = _write_parts(examined, out, config, plan, _pixels_of(out, config), progress)
    finally:
        _remove_waiting(out)
    manifest = _manifest(examined, plan, parts, config)
    (out / _INPUT).delete()
    write_audit(out, examined)
    (out / FILES).write_parquet(plan.files)
    (out / LEDGER).write_parquet(_ledger(plan, ledger))
    (out / MANIFEST).write_bytes(manifest.model_dump_json(indent=1).encode() + b"\n")
    (out / _INPUT).write_json(_made_from(source, config, manifest, before))
    _remove_others(out, manifest)
    return manifest


def check_apart(source: Source, out: StoragePath) -> None:
    """Raises UsageError where `out` lies inside the data folder, which is never written to, or around it."""
    there = _folder(out)
    for root in source.roots.values():
        here = _folder(root)
        if out.is_local == root.is_local and (there.startswith(here) or here.startswith(there)):
            raise UsageError(
                f"--out {out}: may not lie inside the data folder, which is never written to, or around it. Name "
                "another folder."
            )


def write_audit(out: StoragePath, examined: Examined) -> None:
    """`audit.json`, `audit.html` with the pictures of what it says, and `links.csv`, which names every copy."""
    (out / "audit.html").write_bytes(audit_page(examined.source, examined.facts, examined.audit))
    (out / "audit.json").write_bytes(examined.audit.model_dump_json(indent=1).encode() + b"\n")
    paths, links = examined.facts["path"], examined.links
    for position, name in enumerate(("first", "second")):
        links = links.set_column(position, name, paths.take(links[name]))
    sink = pa.BufferOutputStream()
    csv.write_csv(links, sink)
    (out / _LINKS).write_bytes(sink.getvalue())


def read_audit(out: StoragePath) -> Audit:
    return Audit.model_validate((out / "audit.json").read_json())


def shards_name(source: Source, config: DataConfig) -> str:
    """A folder name that differs for other data or other settings."""
    roots = sorted(str(root) for root in (*source.roots.values(), source.labels) if root)
    key = hashlib.sha256(repr((roots, sorted(config.model_dump(mode="json").items()))).encode()).hexdigest()
    return f"{'-'.join(root.name for root in source.roots.values())[:60]}-{key[:8]}"


def _map(function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    """Results of `function(*task)`, in whatever order they are done; our own errors are raised as they are."""
    import ray

    task = ray.remote(function)
    running = [task.remote(*arguments) for arguments in tasks]
    while running:
        [done], running = ray.wait(running)
        try:
            yield ray.get(done)
        except (RunError, UsageError) as error:  # Ray's own kind of it, which holds the stacks of all processes
            raise error.cause from None  # type: ignore[attr-defined]


def _facts(
    source: Source, cache: Cache, config: DataConfig, progress: Progress, waiting_room: StoragePath | None
) -> tuple[pa.Table, dict[str, tuple[str, int]]]:
    """Rows of `FACTS`, and where the pixels of those that were looked at now wait: see `Examined`."""
    known, numbers = cache.facts()
    new = np.setdiff1d(np.arange(len(source.files)), numbers)
    if not len(new):
        return known, {}
    size = config.image_size
    if waiting_room is not None:
        _remove_waiting(waiting_room)  # of a job that was stopped

    def look(start: int, chunk: list[tuple[ImageFile, StoragePath]]) -> tuple[int, pa.Table]:
        rows, pixels = zip(*(examine(file, _read(place, file.size), size) for file, place in chunk), strict=True)
        if waiting_room is not None:
            blank = np.zeros((size, size), np.uint8)
            waiting = np.stack([blank if image is None else image for image in pixels])
            (waiting_room / _WAITING.format(start)).write_bytes(pa.py_buffer(waiting))
        return start, pa.Table.from_pylist(rows, schema=FACTS)

    files = [(source.files[number], source.place_of(source.files[number].path)) for number in new]
    starts = range(0, len(files), _EXAMINED_AT_ONCE)
    tables: dict[int, pa.Table] = {}
    done, kept = 0, time.monotonic()
    for start, table in _map(look, [(start, files[start : start + _EXAMINED_AT_ONCE]) for start in starts]):
        tables[start] = table
        done += len(table)
        if time.monotonic() - kept > _KEPT_EVERY:
            cache.keep_facts(pa.concat_tables([known, *tables.values()]))
            kept = time.monotonic()
        progress("examine", done, len(files))
    facts = pa.concat_tables([known, *(tables[start] for start in starts)])
    if len(known):
        facts = facts.take(np.argsort(np.concatenate([numbers, new])))
    cache.keep_facts(facts)
    places = (divmod(position, _EXAMINED_AT_ONCE) for position in range(len(files)))
    waiting = {
        file.path: (_WAITING.format(block * _EXAMINED_AT_ONCE), row)
        for (file, _), (block, row) in zip(files, places, strict=True)
    }
    return facts, waiting if waiting_room is not None else {}


def _read(place: StoragePath, size: int = 0) -> bytes | None:
    """None where it cannot be opened, or has a `size` that is not worth trying."""
    if too_large(size):
        return None
    try:
        return place.read_bytes()
    except (PermissionError, FileNotFoundError):
        return None


class _Comparer:
    """Compares pairs of views on all of Ray's workers, which share one copy of them."""

    def __init__(self, facts: pa.Table, cache: Cache, progress: Progress) -> None:
        import ray

        views = stack_views(facts)
        self._hashes = view_hashes(views)
        self._known = cache.likenesses()
        self.asked: dict[bytes, Likeness] = {}
        self._cache, self._kept = cache, time.monotonic()
        self._views = ray.put(views)
        self._progress = progress
        self._done = 0
        self._task = ray.remote(_compare_pairs)

    def __call__(self, pairs: np.ndarray) -> list[Likeness]:
        import ray

        keys = [self._hashes[first] + self._hashes[second] for first, second in pairs.tolist()]
        new = np.flatnonzero([key not in self._known for key in keys])
        chunks = [new[start : start + _COMPARED_AT_ONCE] for start in range(0, len(new), _COMPARED_AT_ONCE)]
        results = [self._task.remote(self._views, pairs[chunk]) for chunk in chunks]
        for chunk, result in zip(chunks, results, strict=True):
            self._known |= zip([keys[number] for number in chunk], ray.get(result), strict=True)
            self._done += len(chunk)
            if time.monotonic() - self._kept > _KEPT_EVERY:
                self._cache.keep_likenesses(self._known)
                self._kept = time.monotonic()
            self._progress("compare", self._done, None)  # how many there will be is known at the end
        likenesses = [self._known[key] for key in keys]
        self.asked |= zip(keys, likenesses, strict=True)
        return likenesses


def _compare_pairs(views: np.ndarray, pairs: np.ndarray) -> list[Likeness]:
    import cv2

    cv2.setNumThreads(1)
    return compare_pairs(views, pairs)


@dataclass(frozen=True)
class _Plan:
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


_LEDGER = pa.schema([("sha256", pa.binary(32)), ("pixels", pa.binary(16)), ("split", pa.string())])


def _previous(out: StoragePath, config: DataConfig) -> pa.Table:
    """The ledger in `out`, if it was made under the same settings of the split."""
    try:
        before = (out / MANIFEST).read_json()["parameters"]  # also where a shard is lost: the split is not
        table = (out / LEDGER).read_parquet()
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        return _LEDGER.empty_table()
    wanted = config.model_dump(mode="json")
    same = all(before.get(key) == wanted[key] for key in _DECIDING)
    return table if same else _LEDGER.empty_table()


def _ledger(plan: "_Plan", before: pa.Table) -> pa.Table:
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


def _check_same_split(before: StoragePath, config: DataConfig) -> None:
    there, wanted = read_manifest(before).parameters, config.model_dump(mode="json")
    for key in _DECIDING:
        if there.get(key) != wanted[key]:
            raise UsageError(
                f"data.{key} = {wanted[key]!r} would deal the radiographs out anew, and the champion was trained with "
                f"{there.get(key)!r}: what tested it might train the next. Keep {there.get(key)!r}, or begin another "
                "registry."
            )


def _plan(examined: Examined, config: DataConfig, before: pa.Table, binding: bool) -> _Plan:
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
    return _Plan(kind, reason, files, radiograph_ids, groups, splits.astype(str), names, titles, moved, left_out)


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


def _pixels_of(out: StoragePath, config: DataConfig) -> _Before | None:
    """What is in `out`, where the same code made it, at the same size."""
    rows: dict[tuple[str, bytes], tuple[str, int]] = {}
    try:
        if (out / _INPUT).read_json().get("code") != code_key(config.image_size):
            return None
        dataset = read_dataset(out)
        for split in (name for name in dataset.splits if dataset.rows(name)):
            index = dataset.read_columns(split, ["source", "sha256"])
            names = zip(index["source"].to_pylist(), index["sha256"].to_pylist(), strict=True)
            rows |= {name: (split, row) for row, name in enumerate(names)}
    except (FileNotFoundError, NotADirectoryError, UsageError, ValueError):
        return None
    return _Before(dataset, rows)


def _write_parts(
    examined: Examined, out: StoragePath, config: DataConfig, plan: _Plan, before: _Before | None, progress: Progress
) -> list[_Part]:
    source = examined.source
    columns = {name: plan.files[name].to_pylist() for name in ("path", "label", "sha256", "origin", "pixels")}
    tasks = []
    for split in plan.names:
        rows = np.flatnonzero(plan.splits == split).tolist()
        rows.sort(key=lambda row: keyed_hash(columns["path"][row], config.seed))
        for number, start in enumerate(range(0, len(rows), config.rows_per_shard)):
            chunk = rows[start : start + config.rows_per_shard]
            content = {name: [columns[name][row] for row in chunk] for name in ("label", "sha256", "origin", "pixels")}
            content |= {"source": [columns["path"][row] for row in chunk], "group_id": plan.groups[chunk].tolist()}
            content["study_id"] = [None] * len(chunk)  # studies are not read yet
            content["radiograph_id"] = plan.radiograph_ids[chunk].tolist()
            places = [source.place_of(path) for path in content["source"]]
            names = zip(content["source"], content["sha256"], strict=True)
            written = [before.rows.get(name) if before else None for name in names]
            waiting = [examined.waiting.get(path) for path in content["source"]]
            tasks.append((split, number, places, waiting, written, content))
    previous = before.dataset if before else None

    def write(
        split: str,
        number: int,
        places: list[StoragePath],
        waiting: list[tuple[str, int] | None],
        written: list[tuple[str, int] | None],
        content: dict[str, list[Any]],
    ) -> _Part:
        pixels = _read_waiting(out, waiting, content.pop("pixels"), config.image_size)
        with suppress(UsageError):  # a damaged shard: its images are decoded again
            pixels |= _read_written(previous, written) if previous else {}
        return _write_shard(out, config, split, number, places, pixels, content)

    parts = []
    done, total = 0, int((plan.splits != "").sum())
    for part in _map(write, tasks):
        parts.append(part)
        done += part.shard.rows
        progress("write", done, total)
    return sorted(parts, key=lambda part: (plan.names.index(part.split), part.number))


def _read_waiting(
    out: StoragePath, waiting: list[tuple[str, int] | None], digests: list[bytes], size: int
) -> dict[int, np.ndarray]:
    """Position in the list -> [H, W] uint8, of the images that were looked at now.

    One that is not what was looked at, since another job wrote there too, is left to be decoded.
    """
    pixels: dict[int, np.ndarray] = {}
    for name in {place[0] for place in waiting if place}:
        with suppress(OSError), (out / name).open() as file:
            for position, place in enumerate(waiting):
                if place and place[0] == name:
                    image = file.read_at(size**2, place[1] * size**2)
                    if pixels_hash(image) == digests[position]:
                        pixels[position] = np.frombuffer(image, np.uint8).reshape(size, size)
    return pixels


def _read_written(dataset: Dataset, written: list[tuple[str, int] | None]) -> dict[int, np.ndarray]:
    """Position in the list -> [H, W] uint8, from the shards that are there.

    Rows that lie near each other in new shards did so in the old ones, since both are in the order of one hash; where
    they do not, as after a change of the seed, they are left to be decoded.
    """
    pixels: dict[int, np.ndarray] = {}
    for split in {place[0] for place in written if place}:
        rows = {position: place[1] for position, place in enumerate(written) if place and place[0] == split}
        start, stop = min(rows.values()), max(rows.values()) + 1
        if stop - start > _SPREAD * len(written):
            continue
        images = images_of(dataset.read(split, start, stop), dataset.image_size)
        pixels |= {position: images[row - start, ..., 0] for position, row in rows.items()}
    return pixels


def _write_shard(
    out: StoragePath,
    config: DataConfig,
    split: str,
    number: int,
    places: list[StoragePath],
    written: dict[int, np.ndarray],
    content: dict[str, list[Any]],
) -> _Part:
    images = []
    for position, (place, digest) in enumerate(zip(places, content["sha256"], strict=True)):
        if position in written:
            images.append(written[position])
            continue
        data = _read(place)
        if data is None or hashlib.sha256(data).digest() != digest:
            (out / EXAMINED).delete()  # what it says of this file is not so
            raise RunError(f"{place} changed while it was being prepared; run the same command again")
        images.append(decode(data, config.image_size).pixels)
    pixels = np.stack(images)  # [N, H, W] uint8
    encoded, digest = encode_shard(pixels, content)
    name = f"{split}-{number:05d}-{digest[:12]}.parquet"
    (out / name).write_bytes(encoded)
    histogram = np.bincount(pixels.ravel(), minlength=256)
    levels = np.arange(256)
    return _Part(
        split=split,
        number=number,
        shard=Shard(file=name, rows=len(images), bytes=encoded.size, digest=digest),
        pixels=Pixels(count=pixels.size, sum=int(histogram @ levels), square_sum=int(histogram @ levels**2)),
    )


def _manifest(examined: Examined, plan: _Plan, parts: list[_Part], config: DataConfig) -> Manifest:
    source, labels = examined.source, examined.facts["label"].to_numpy()
    shards = {split: [part.shard for part in parts if part.split == split] for split in plan.names}
    parameters = config.model_dump(mode="json")
    digest = hashlib.sha256(repr((SCHEMA_VERSION, sorted(parameters.items()))).encode())
    for split in plan.names:
        digest.update(f"{split}:{','.join(shard.digest for shard in shards[split])}\n".encode())

    def of_class(split: str, label: int) -> np.ndarray:
        return (plan.splits == split) & (labels == label)

    return Manifest(
        schema_version=SCHEMA_VERSION,
        fingerprint=digest.hexdigest(),
        synthetic=source.synthetic,
        split=plan.split,
        split_reason=plan.reason,
        folds=list(plan.folds),
        parameters=parameters,
        class_folders=source.class_folders,
        counts={s: {n: int(of_class(s, i).sum()) for i, n in enumerate(CLASS_NAMES)} for s in plan.names},
        groups={
            s: {n: len(np.unique(plan.groups[of_class(s, i)])) for i, n in enumerate(CLASS_NAMES)} for s in plan.names
        },
        leakage=leakage(plan.splits, examined.links),
        leakage_found=examined.audit.leakage,
        alarms=alarms(examined.audit),
        shortcuts={name: shortcut.auc for name, shortcut in alarming(examined.audit)},
        moved=plan.moved,
        left_out=plan.left_out,
        pixels={s: Pixels.total(part.pixels for part in parts if part.split == s) for s in plan.names},
        rejected=examined.audit.rejected,
        shards=shards,
    )


def _made_from(source: Source, config: DataConfig, manifest: Manifest, before: StoragePath | None) -> dict[str, str]:
    parameters = sorted(config.model_dump(mode="json").items())
    stands = "" if before is None else read_manifest(before).fingerprint
    content = repr((SCHEMA_VERSION, source.stamp(), source.synthetic, parameters))
    if stands not in ("", manifest.fingerprint):
        content += stands
    key = hashlib.sha256(content.encode()).hexdigest()
    return {"input": key, "code": code_key(config.image_size), "fingerprint": manifest.fingerprint}


def check_out(source: Source, out: StoragePath) -> None:
    check_apart(source, out)
    if strangers := [info.base_name for info in out.files() if not _is_ours(out, info)]:
        raise UsageError(
            f"--out {out}: holds other things, such as {strangers[0]!r}. Name a new folder, or one that holds shards."
        )


def _folder(place: StoragePath) -> str:
    return f"{os.path.realpath(place.path) if place.is_local else place.path}/"


def _check_rejected(audit: Audit, config: DataConfig) -> None:
    share = len(audit.rejected) / audit.files
    if share > config.max_rejected_fraction:
        reasons = ", ".join(f"{n} {reason}" for reason, n in Counter(r.reason for r in audit.rejected).most_common(3))
        raise UsageError(
            f"{len(audit.rejected)} of {audit.files} files ({share:.1%}) are unreadable ({reasons}; first: "
            f"{audit.rejected[0].path}), more than data.max_rejected_fraction = {config.max_rejected_fraction}. Mend "
            "or remove them, or raise the limit."
        )


def _remove_others(out: StoragePath, manifest: Manifest) -> None:
    """Shards of an earlier or interrupted run, once the manifest names the new ones."""
    keep = {shard.file for shards in manifest.shards.values() for shard in shards}
    for info in out.files():
        if _is_ours(out, info) and info.base_name not in keep | set(_BESIDE):
            (out / info.base_name).delete()


def _remove_waiting(out: StoragePath) -> None:
    for info in out.files():
        if re.fullmatch(_IS_WAITING, info.base_name):
            (out / info.base_name).delete()


def _is_ours(out: StoragePath, info: fs.FileInfo) -> bool:
    """Whether a file below `out` has a name that only this program gives."""
    shard = r"(?:train|val|test|fold-\d+(?:-val)?)-\d{5}-[0-9a-f]{12}\.parquet"
    name = rf"(?:{shard}|{_IS_WAITING}|{'|'.join(re.escape(name) for name in _BESIDE)})"
    return re.fullmatch(rf"{name}|\.{name}\.[0-9a-f]{{8}}\.part", info.path[len(out.path) + 1 :]) is not None


def summary(manifest: Manifest) -> list[str]:
    """What the shards hold, in a few aligned lines."""
    lines = [f"split      {manifest.split_reason}"]
    for split, counts in manifest.counts.items():
        groups = manifest.groups[split]
        told = ", ".join(f"{counts[name]:,} {name} of {groups[name]:,} groups" for name in reversed(CLASS_NAMES))
        lines.append(f"  {split:<8} {sum(counts.values()):,} images: {told}")
    lines += [f"left out   {n:,} images: {why}" for why, n in manifest.left_out.items() if n]
    lines += [
        f"moved      group {line}; new images join its parts, and what was test is left out" for line in manifest.moved
    ]
    return lines
