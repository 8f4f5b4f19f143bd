"""The examined source to shards, with manifest, audit and ledger beside them.

Which row goes into which shard is decided by keyed hashes, so that any number of workers writes the same bytes.
"""

import hashlib
import os
import re
from collections import Counter
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
from fracture.labels import CLASS_NAMES
from fracture.preparation.audit import Audit, alarming, alarms, leakage
from fracture.preparation.audit_page import audit_page
from fracture.preparation.decode import decode
from fracture.preparation.facts import pixels_hash
from fracture.preparation.parallel import Progress, map_tasks
from fracture.preparation.plan import Plan, check_same_split, plan_split, read_ledger, renew_ledger
from fracture.preparation.scan import IS_WAITING, Examined, read_image, remove_waiting
from fracture.preparation.scan_cache import COMPARED, EXAMINED, code_key
from fracture.preparation.source import Source, keyed_hash
from fracture.storage import StoragePath

_INPUT = "input.json"  # what the shards were made from, to tell in a second that nothing changed


_LINKS = "links.csv"  # why files are one group


_BESIDE = (MANIFEST, _INPUT, FILES, LEDGER, _LINKS, EXAMINED, COMPARED, "audit.json", "audit.html")


_SPREAD = 4  # old rows that may be read for each that is wanted, before decoding is the smaller work


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
        check_same_split(before, config)
    ledger = read_ledger(before or out, config)
    plan = plan_split(examined, config, ledger, binding=before is not None)
    try:
        parts = _write_parts(examined, out, config, plan, _pixels_of(out, config), progress)
    finally:
        remove_waiting(out)
    manifest = _manifest(examined, plan, parts, config)
    (out / _INPUT).delete()
    write_audit(out, examined)
    (out / FILES).write_parquet(plan.files)
    (out / LEDGER).write_parquet(renew_ledger(plan, ledger))
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
    examined: Examined, out: StoragePath, config: DataConfig, plan: Plan, before: _Before | None, progress: Progress
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
    for part in map_tasks(write, tasks):
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
        data = read_image(place)
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


def _manifest(examined: Examined, plan: Plan, parts: list[_Part], config: DataConfig) -> Manifest:
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


def _is_ours(out: StoragePath, info: fs.FileInfo) -> bool:
    """Whether a file below `out` has a name that only this program gives."""
    shard = r"(?:train|val|test|fold-\d+(?:-val)?)-\d{5}-[0-9a-f]{12}\.parquet"
    name = rf"(?:{shard}|{IS_WAITING}|{'|'.join(re.escape(name) for name in _BESIDE)})"
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
