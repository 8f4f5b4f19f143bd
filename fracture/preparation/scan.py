"""Every file of a source, looked at once: facts, links and the audit.

Where an image goes is known only when all have been examined; until then its pixels wait in files beside the shards,
since decoding an image a second time costs a hundred times as much.
"""

import re
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from fracture.config import DataConfig
from fracture.errors import UsageError
from fracture.preparation.audit import Audit, make_audit
from fracture.preparation.decode import too_large
from fracture.preparation.duplicates.grouping import find_links
from fracture.preparation.facts import FACTS, examine
from fracture.preparation.parallel import KEPT_EVERY, Comparer, Progress, map_tasks
from fracture.preparation.scan_cache import Cache
from fracture.preparation.source import ImageFile, Source
from fracture.storage import StoragePath

_EXAMINED_AT_ONCE = 128


WAITING = "pixels-{:09d}.raw"  # of the new files from this number on; each image [H, W] uint8


IS_WAITING = r"pixels-\d{9}\.raw"


@dataclass(frozen=True)
class Examined:
    """All files of a source, looked at."""

    source: Source
    facts: pa.Table  # FACTS, in the order of the source's files
    links: pa.Table  # LINKS
    audit: Audit
    waiting: dict[str, tuple[str, int]]  # path -> file in `out` with the image's pixels, position in it


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
    comparer = Comparer(facts, cache, progress)
    links = find_links(facts, config, comparer)
    cache.keep_likenesses(comparer.asked)
    return Examined(source, facts, links, make_audit(facts, links), waiting)


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
        remove_waiting(waiting_room)  # of a job that was stopped

    def look(start: int, chunk: list[tuple[ImageFile, StoragePath]]) -> tuple[int, pa.Table]:
        rows, pixels = zip(*(examine(file, read_image(place, file.size), size) for file, place in chunk), strict=True)
        if waiting_room is not None:
            blank = np.zeros((size, size), np.uint8)
            waiting = np.stack([blank if image is None else image for image in pixels])
            (waiting_room / WAITING.format(start)).write_bytes(pa.py_buffer(waiting))
        return start, pa.Table.from_pylist(rows, schema=FACTS)

    files = [(source.files[number], source.place_of(source.files[number].path)) for number in new]
    starts = range(0, len(files), _EXAMINED_AT_ONCE)
    tables: dict[int, pa.Table] = {}
    done, kept = 0, time.monotonic()
    for start, table in map_tasks(look, [(start, files[start : start + _EXAMINED_AT_ONCE]) for start in starts]):
        tables[start] = table
        done += len(table)
        if time.monotonic() - kept > KEPT_EVERY:
            cache.keep_facts(pa.concat_tables([known, *tables.values()]))
            kept = time.monotonic()
        progress("examine", done, len(files))
    facts = pa.concat_tables([known, *(tables[start] for start in starts)])
    if len(known):
        facts = facts.take(np.argsort(np.concatenate([numbers, new])))
    cache.keep_facts(facts)
    places = (divmod(position, _EXAMINED_AT_ONCE) for position in range(len(files)))
    waiting = {
        file.path: (WAITING.format(block * _EXAMINED_AT_ONCE), row)
        for (file, _), (block, row) in zip(files, places, strict=True)
    }
    return facts, waiting if waiting_room is not None else {}


def read_image(place: StoragePath, size: int = 0) -> bytes | None:
    """None where it cannot be opened, or has a `size` that is not worth trying."""
    if too_large(size):
        return None
    try:
        return place.read_bytes()
    except (PermissionError, FileNotFoundError):
        return None


def remove_waiting(out: StoragePath) -> None:
    for info in out.files():
        if re.fullmatch(IS_WAITING, info.base_name):
            (out / info.base_name).delete()
