"""Scan a source: decode every file once, find the links between files, and make the audit."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import pyarrow as pa

from fracture.config import DataConfig
from fracture.errors import UsageError
from fracture.preparation.audit import Audit, make_audit
from fracture.preparation.duplicates.alignment import Similarity, compare_pairs
from fracture.preparation.duplicates.grouping import find_links, stack_views
from fracture.preparation.facts import FACTS, hash_pixels, scan_file
from fracture.preparation.parallel import map_in_order, map_unordered, share
from fracture.preparation.pending import PendingPixels, name_pending_file, remove_pending, write_pending
from fracture.preparation.scan_cache import ScanCache
from fracture.preparation.source import ImageFile, Source, describe_labels
from fracture.progress import Progress
from fracture.storage import StoragePath

FILES_PER_TASK, PAIRS_PER_TASK = 128, 32
SECONDS_BETWEEN_SAVES = 300  # of results, and so the most that a killed job loses


@dataclass(frozen=True)
class ScannedSource:
    """All files of a source, with what the scan found."""

    source: Source
    facts: pa.Table  # FACTS, in the order of the source's files
    links: pa.Table  # LINKS
    audit: Audit
    pending: dict[str, PendingPixels]  # path -> its pixels in the output folder


def scan_source(
    source: Source,
    out: StoragePath,
    config: DataConfig,
    progress: Progress = lambda step, done, total: None,
    *,
    keep_pixels: bool = False,
) -> ScannedSource:
    """Scan every file, find links between files, and make the audit. Ray must have been started.

    Results are also kept in `out`, so that a stopped job or a folder that has grown does not repeat work.

    Args:
        keep_pixels: keep the pixels of new files in `out` until `write_dataset` writes them to shards.

    Raises:
        UsageError: no file can be read.
        RunError: the disk is full.
    """
    cache = ScanCache(out, source, config.image_size)
    facts, pending = _collect_facts(source, cache, config, progress, out if keep_pixels else None)
    _check_readable(source, facts)
    comparer = _CachedComparer(stack_views(facts), cache, progress)
    links = find_links(facts, config, comparer)
    cache.write_similarities(comparer.used)
    listing = {
        "labelled": describe_labels(source),
        "left_out": source.left_out,
        "unmatched_rows": list(source.unmatched_rows),
        "repeated_rows": list(source.repeated_rows),
        "ignored_columns": list(source.ignored_columns),
        "unlabelled": list(source.unlabelled),
        "notes": list(source.notes),
    }
    return ScannedSource(source, facts, links, make_audit(facts, links).model_copy(update=listing), pending)


def _check_readable(source: Source, facts: pa.Table) -> None:
    if facts["sha256"].null_count == len(facts):
        reasons = ", ".join(f"{n} {reason}" for reason, n in Counter(facts["reason"].to_pylist()).most_common(3))
        raise UsageError(
            f"--data {source.name}: not one of {len(facts)} files can be read ({reasons}; first: {facts['path'][0]}). "
            "DICOM, JPEG, PNG, GIF, BMP, WebP, AVIF, JPEG 2000, PGM and TIFF can; convert others first."
        )


def _collect_facts(
    source: Source, cache: ScanCache, config: DataConfig, progress: Progress, pending_folder: StoragePath | None
) -> tuple[pa.Table, dict[str, PendingPixels]]:
    """Return the facts of all files, from the cache or from a scan, and the pending pixels of those scanned now."""
    known, numbers = cache.read_facts()
    new = np.setdiff1d(np.arange(len(source.files)), numbers)
    if not len(new):
        return known, {}
    if pending_folder is not None:
        remove_pending(pending_folder)  # of a job that was stopped
    files = [source.files[number] for number in new]
    scanned = _scan_files(source, files, known, cache, config, progress, pending_folder)
    facts = pa.concat_tables([known, scanned])
    if len(known):
        facts = facts.take(np.argsort(np.concatenate([numbers, new])))
    cache.write_facts(facts)
    return facts, _list_pending(files) if pending_folder is not None else {}


def _scan_files(
    source: Source,
    files: Sequence[ImageFile],
    known: pa.Table,
    cache: ScanCache,
    config: DataConfig,
    progress: Progress,
    pending_folder: StoragePath | None,
) -> pa.Table:
    """Scan files on Ray's workers. What is done is saved to the cache from time to time."""
    tables: dict[int, pa.Table] = {}
    done, saved = 0, time.monotonic()
    starts = range(0, len(files), FILES_PER_TASK)
    tasks = []
    for start in starts:
        block = [(file, source.locate(file.path)) for file in files[start : start + FILES_PER_TASK]]
        pending = None if pending_folder is None else pending_folder / name_pending_file(start)
        tasks.append((start, block, config.image_size, pending))
    for start, table in map_unordered(_scan_block, tasks):
        tables[start] = table
        done += len(table)
        if time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
            cache.write_facts(pa.concat_tables([known, *tables.values()]))
            saved = time.monotonic()
        progress("scan", done, len(files))
    return pa.concat_tables(tables[start] for start in starts)


def _scan_block(
    start: int, files: list[tuple[ImageFile, StoragePath]], size: int, pending: StoragePath | None
) -> tuple[int, pa.Table]:
    """Scan some files in one task.

    Args:
        pending: file for the pixels of the images, if they are to be kept.
    """
    rows, images = zip(*(scan_file(file, path, size) for file, path in files), strict=True)
    if pending is not None:
        write_pending(pending, images, size)
    return start, pa.Table.from_pylist(rows, schema=FACTS)


def _list_pending(files: Sequence[ImageFile]) -> dict[str, PendingPixels]:
    pending = {}
    for number, file in enumerate(files):
        row = number % FILES_PER_TASK
        pending[file.path] = PendingPixels(name_pending_file(number - row), row)
    return pending


class _CachedComparer:
    """Compares pairs of views on Ray's workers, unless their similarity is known."""

    def __init__(self, views: np.ndarray, cache: ScanCache, progress: Progress) -> None:
        self._views = share(views)
        self._hashes = [hash_pixels(view) for view in views]
        self._known = cache.read_similarities()
        self.used: dict[bytes, Similarity] = {}
        self._cache, self._saved = cache, time.monotonic()
        self._progress = progress
        self._done = 0

    def __call__(self, pairs: np.ndarray) -> list[Similarity]:
        keys = [self._hashes[first] + self._hashes[second] for first, second in pairs.tolist()]
        new = np.flatnonzero([key not in self._known for key in keys])
        chunks = [new[start : start + PAIRS_PER_TASK] for start in range(0, len(new), PAIRS_PER_TASK)]
        tasks = [(self._views, pairs[chunk]) for chunk in chunks]
        for chunk, found in zip(chunks, map_in_order(_compare_block, tasks), strict=True):
            self._known |= zip([keys[number] for number in chunk], found, strict=True)
            self._done += len(chunk)
            self._save_from_time_to_time()
            self._progress("compare", self._done, None)  # the total is known only at the end
        similarities = [self._known[key] for key in keys]
        self.used |= zip(keys, similarities, strict=True)
        return similarities

    def _save_from_time_to_time(self) -> None:
        if time.monotonic() - self._saved > SECONDS_BETWEEN_SAVES:
            self._cache.write_similarities(self._known)
            self._saved = time.monotonic()


def _compare_block(views: np.ndarray, pairs: np.ndarray) -> list[Similarity]:
    cv2.setNumThreads(1)  # one task takes one CPU
    return compare_pairs(views, pairs)
