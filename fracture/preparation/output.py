"""The output folder of preprocessing: which files are ours, what they were made from, and the audit's files."""

import hashlib
import os
import re

import pyarrow as pa
from pyarrow import csv, fs
from pydantic import ValidationError

from fracture.config import DataConfig
from fracture.dataset.format import (
    FILES,
    LEDGER,
    MANIFEST,
    SCHEMA_VERSION,
    UNTESTED,
    Manifest,
    read_dataset,
    read_manifest,
)
from fracture.errors import UsageError
from fracture.preparation.audit import Audit
from fracture.preparation.audit_page import render_audit_page
from fracture.preparation.pending import PENDING_PATTERN
from fracture.preparation.scan import ScannedSource
from fracture.preparation.scan_cache import COMPARED, SCANNED, hash_code
from fracture.preparation.source import Source
from fracture.storage import StoragePath

OUTPUT_LOCK = "lock"  # folder of the lock that a job holds while it writes here
INPUT = "input.json"  # hashes of the input of the shards, so that an unchanged input is found in a second
_LINKS, _AUDIT, _AUDIT_PAGE = "links.csv", "audit.json", "audit.html"
_OTHER_FILES = (MANIFEST, INPUT, FILES, LEDGER, _LINKS, SCANNED, COMPARED, _AUDIT, _AUDIT_PAGE)
_FORMER_FILES = ("examined.parquet",)  # of schema version 3; removed when its folder is preprocessed again
_SHARD_PATTERN = rf"(?:train|val|test|{UNTESTED}|fold-\d+(?:-val)?)-\d{{5}}-[0-9a-f]{{12}}\.parquet"


def find_finished(
    source: Source, out: StoragePath, config: DataConfig, before: StoragePath | None = None
) -> Manifest | None:
    """Return the manifest in `out` if its shards were made from this very input and no file of it is missing.

    Args:
        before: as for `write_dataset`.
    """
    try:
        made_from = (out / INPUT).read_json()
        dataset = read_dataset(out)
        dataset.find_files()
    except (FileNotFoundError, NotADirectoryError, UsageError, ValueError):
        return None
    manifest = dataset.manifest
    return manifest if made_from == hash_input(source, config, manifest, before) else None


def list_changed_settings(out: StoragePath, config: DataConfig) -> list[str]:
    """List the settings that differ from those of the shards in `out`, if there are any, as `key old -> new`."""
    try:
        before = read_dataset(out).manifest.parameters
    except (FileNotFoundError, NotADirectoryError, UsageError):
        return []
    now = config.model_dump(mode="json")
    return [f"data.{key} {before.get(key)!r} -> {now[key]!r}" for key in now if before.get(key) != now[key]]


def hash_input(source: Source, config: DataConfig, manifest: Manifest, before: StoragePath | None) -> dict[str, str]:
    """Return the content of `input.json`."""
    parameters = sorted(config.model_dump(mode="json").items())
    content = repr((SCHEMA_VERSION, source.hash_listing(), source.synthetic, parameters))
    kept_split = "" if before is None else read_manifest(before).fingerprint
    if kept_split not in ("", manifest.fingerprint):
        content += kept_split
    key = hashlib.sha256(content.encode()).hexdigest()
    return {"input": key, "code": hash_code(config.image_size), "fingerprint": manifest.fingerprint}


def name_output_folder(source: Source, config: DataConfig) -> str:
    """Return a folder name that differs for other data or other settings."""
    roots = sorted(str(root) for root in (*source.roots.values(), source.labels) if root)
    key = hashlib.sha256(repr((roots, sorted(config.model_dump(mode="json").items()))).encode()).hexdigest()
    return f"{'-'.join(root.name for root in source.roots.values())[:60]}-{key[:8]}"


def check_outside_data(source: Source, out: StoragePath) -> None:
    """Check that neither of output folder and data folder contains the other: data folders are never written to.

    Raises:
        UsageError: one contains the other, or they are the same.
    """
    output = _resolve(out)
    for root in source.roots.values():
        data = _resolve(root)
        if out.is_local == root.is_local and (output.startswith(data) or data.startswith(output)):
            raise UsageError(
                f"--out {out}: may not be inside the data folder, which is never written to, or around it. Name "
                "another folder."
            )


def check_output_folder(source: Source, out: StoragePath) -> None:
    """Check that the output folder is outside the data, and holds nothing but earlier output.

    Raises:
        UsageError: it is not, or does.
    """
    check_outside_data(source, out)
    if others := [info.base_name for info in out.files() if not (_is_ours(out, info) or _is_claim(out, info))]:
        raise UsageError(
            f"--out {out}: holds other things, such as {others[0]!r}. Name a new folder, or one that holds shards."
        )


def remove_old_files(out: StoragePath, manifest: Manifest) -> None:
    """Remove shards and temporary files of earlier or interrupted runs, which the manifest does not list."""
    keep = {shard.file for shards in manifest.shards.values() for shard in shards} | set(_OTHER_FILES)
    for info in out.files():
        if _is_ours(out, info) and info.base_name not in keep:
            (out / info.base_name).delete()


def write_audit(out: StoragePath, scanned: ScannedSource) -> None:
    """Write `audit.json`, `audit.html` with example images, and `links.csv`, which lists every link."""
    (out / _AUDIT_PAGE).write_bytes(render_audit_page(scanned.source, scanned.facts, scanned.audit))
    (out / _AUDIT).write_bytes(scanned.audit.model_dump_json(indent=1).encode() + b"\n")
    paths, links = scanned.facts["path"], scanned.links
    for position, name in enumerate(("first", "second")):
        links = links.set_column(position, name, paths.take(links[name]))
    sink = pa.BufferOutputStream()
    csv.write_csv(links, sink)
    (out / _LINKS).write_bytes(sink.getvalue())


def read_audit(out: StoragePath) -> Audit:
    """Read `audit.json`.

    Raises:
        UsageError: it is damaged.
    """
    file = out / _AUDIT
    repair = f"Delete {out / INPUT}, and run the same command again: it writes both anew."
    try:
        return Audit.model_validate(file.read_json(repair))
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise UsageError(f"{file} is damaged at {where!r}. {repair}") from None


def _resolve(folder: StoragePath) -> str:
    return f"{os.path.realpath(folder.path) if folder.is_local else folder.path}/"


def _is_ours(out: StoragePath, info: fs.FileInfo) -> bool:
    """Return whether a file below `out` has a name that only this program gives."""
    others = "|".join(re.escape(name) for name in (*_OTHER_FILES, *_FORMER_FILES))
    name = rf"(?:{_SHARD_PATTERN}|{PENDING_PATTERN}|{others})"
    # A file that is being written has a temporary name until it is complete.
    return re.fullmatch(rf"{name}|\.{name}\.[0-9a-f]{{8}}\.part", _path_below(out, info)) is not None


def _is_claim(out: StoragePath, info: fs.FileInfo) -> bool:
    """Return whether a file below `out` is a job's claim on the lock; a killed job leaves it."""
    claim = r"[0-9a-f]{32}\.json"
    path = rf"{OUTPUT_LOCK}/(?:{claim}|\.{claim}\.[0-9a-f]{{8}}\.part)"
    return re.fullmatch(path, _path_below(out, info)) is not None


def _path_below(out: StoragePath, info: fs.FileInfo) -> str:
    return info.path[len(out.path) + 1 :]
