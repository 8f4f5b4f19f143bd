"""Images to shards, as a map over shards on Ray Data. The one file of this room that knows Ray.

Which file goes into which shard is decided by a keyed hash before anything is decoded, so that any number of
workers writes the same bytes, and no worker needs another's rows.
"""

import hashlib
import logging
import os
import pickle
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from pyarrow import fs

from fracture.config import DataConfig
from fracture.errors import RunError, UsageError
from fracture.input.shards import (
    MANIFEST,
    SCHEMA_VERSION,
    Copies,
    Manifest,
    Rejection,
    Shard,
    encode_shard,
    read_manifest,
)
from fracture.labels import CLASS_NAMES, SPLITS
from fracture.preparation.decode import Rejected, decode
from fracture.preparation.source import ImageFile, Source, keyed_hash
from fracture.storage import Place

_INPUT = "input.json"  # what the shards were made from, to tell in a second that nothing changed


@dataclass(frozen=True)
class _Part:
    """What one task returns of the shard it wrote: all small but 8 bytes an image."""

    split: str
    number: int
    shard: Shard | None  # None: every file was rejected
    counts: list[int]  # by label
    hashes: bytes  # the first 8 bytes of each file's SHA-256
    pixel_sum: int
    pixel_square_sum: int
    rejected: list[Rejection]


def find_done(source: Source, out: Place, config: DataConfig) -> Manifest | None:
    """The manifest in `out`, where its shards were made from this very input and are whole."""
    try:
        made_from = (out / _INPUT).read_json()
        manifest = read_manifest(out)
    except (FileNotFoundError, NotADirectoryError, UsageError, ValueError):
        return None
    same = made_from == {"input": _input_key(source, config), "fingerprint": manifest.fingerprint}
    return manifest if same else None


def preprocess(
    source: Source, out: Place, config: DataConfig, progress: Callable[[int], None] = lambda files: None
) -> Manifest:
    """Writes the shards of `source` into the folder `out`; needs a started Ray.

    What `out` held before stays valid until the new manifest is written, in one stroke.

    Args:
        progress: called with the number of files just finished.

    Raises:
        UsageError: too many files are unreadable, or `out` is somebody's folder of other things.
        RunError: the disk is full.
    """
    _check_out(source, out)
    parts = _write_parts(source, out, config, progress)
    _check_rejected(source, parts, config)
    for split in SPLITS:
        for label, name in enumerate(CLASS_NAMES):
            if not sum(part.counts[label] for part in parts if part.split == split):
                raise UsageError(f"--data {source.root}: no readable image of class {name!r} in split {split!r}.")
    manifest = _manifest(source, parts, config)
    (out / _INPUT).delete()
    (out / MANIFEST).write_bytes(manifest.model_dump_json(indent=1).encode() + b"\n")
    (out / _INPUT).write_json({"input": _input_key(source, config), "fingerprint": manifest.fingerprint})
    _remove_others(out, manifest)
    return manifest


def shards_name(data: Place, config: DataConfig) -> str:
    """A folder name that differs for other data or other settings."""
    key = hashlib.sha256(repr((str(data), sorted(config.model_dump(mode="json").items()))).encode()).hexdigest()
    return f"{data.name}-{key[:8]}"


def _write_parts(source: Source, out: Place, config: DataConfig, progress: Callable[[int], None]) -> list[_Part]:
    import ray

    # Pickled by us, since Arrow has no type for them and Ray Data would warn.
    tasks = [
        {"task": pickle.dumps((split, number, files))}
        for split in SPLITS
        for number, files in enumerate(_deal(source, split, config))
    ]
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # ours counts images
    # Importing ray.data has just set up a logger of its own, louder than Ray's.
    logging.getLogger("ray.data").setLevel(logging.getLogger("ray").getEffectiveLevel())
    context.print_on_execution_start = False
    root = source.root

    def write(row: dict[str, bytes]) -> dict[str, bytes]:
        try:
            return {"part": pickle.dumps(_write_shard(root, out, config, *pickle.loads(row["task"])))}
        except RunError as error:  # returned, since Ray would wrap it in traces
            return {"part": pickle.dumps(error)}

    parts = []
    for row in ray.data.from_items(tasks, override_num_blocks=len(tasks)).map(write).iter_rows():
        part = pickle.loads(row["part"])
        if isinstance(part, RunError):
            raise part
        parts.append(part)
        progress(sum(part.counts) + len(part.rejected))
    order = {split: i for i, split in enumerate(SPLITS)}
    return sorted(parts, key=lambda part: (order[part.split], part.number))


def _deal(source: Source, split: str, config: DataConfig) -> list[list[ImageFile]]:
    """The files of a split in shuffled order, cut into shards."""
    files = sorted((f for f in source.files if f.split == split), key=lambda f: keyed_hash(f.path, config.seed))
    return [files[i : i + config.rows_per_shard] for i in range(0, len(files), config.rows_per_shard)]


def _write_shard(root: Place, out: Place, config: DataConfig, split: str, number: int, files: list[ImageFile]) -> _Part:
    images, labels, hashes, sources, rejected = [], [], [], [], []
    for file in files:
        try:
            data = (root / file.path).read_bytes()
            images.append(decode(data, config.image_size))
        except (Rejected, PermissionError, FileNotFoundError) as error:
            reason = str(error) if isinstance(error, Rejected) else "cannot be opened"
            rejected.append(Rejection(path=file.path, split=file.split, reason=reason))
            continue
        labels.append(file.label)
        hashes.append(hashlib.sha256(data).digest())
        sources.append(file.path)
    counts = [labels.count(label) for label in range(len(CLASS_NAMES))]
    if not images:
        return _Part(split, number, None, counts, b"", 0, 0, rejected)
    pixels = np.stack(images)  # [N, H, W] uint8
    # Files of the same bytes are one group. Grouping by radiograph takes more than bytes.
    groups = [int.from_bytes(h[:8], "little", signed=True) for h in hashes]
    encoded, digest = encode_shard(pixels, labels, groups, hashes, sources)
    name = f"{split}-{number:05d}-{digest[:12]}.parquet"
    (out / name).write_bytes(encoded)
    histogram = np.bincount(pixels.ravel(), minlength=256)
    levels = np.arange(256)
    return _Part(
        split=split,
        number=number,
        shard=Shard(file=name, rows=len(images), bytes=encoded.size, digest=digest),
        counts=counts,
        hashes=b"".join(h[:8] for h in hashes),
        pixel_sum=int(histogram @ levels),
        pixel_square_sum=int(histogram @ levels**2),
        rejected=rejected,
    )


def _manifest(source: Source, parts: list[_Part], config: DataConfig) -> Manifest:
    train = [part for part in parts if part.split == "train"]
    pixels = sum(sum(part.counts) for part in train) * config.image_size**2
    mean = sum(part.pixel_sum for part in train) / pixels
    variance = sum(part.pixel_square_sum for part in train) / pixels - mean**2
    hashes = {s: np.frombuffer(b"".join(p.hashes for p in parts if p.split == s), np.uint64) for s in SPLITS}
    shards = {s: [p.shard for p in parts if p.split == s and p.shard is not None] for s in SPLITS}
    parameters = config.model_dump(mode="json")
    digest = hashlib.sha256(repr((SCHEMA_VERSION, sorted(parameters.items()))).encode())
    for split in SPLITS:
        digest.update(f"{split}:{','.join(shard.digest for shard in shards[split])}\n".encode())
    return Manifest(
        schema_version=SCHEMA_VERSION,
        fingerprint=digest.hexdigest(),
        synthetic=source.synthetic,
        official_split=source.has_splits,
        parameters=parameters,
        class_folders=source.class_folders,
        counts={
            s: {name: sum(p.counts[label] for p in parts if p.split == s) for label, name in enumerate(CLASS_NAMES)}
            for s in SPLITS
        },
        distinct_files={s: len(np.unique(hashes[s])) for s in SPLITS},
        copies=Copies(
            val_in_train=int(np.isin(hashes["val"], hashes["train"]).sum()),
            test_in_train=int(np.isin(hashes["test"], hashes["train"]).sum()),
            test_in_val=int(np.isin(hashes["test"], hashes["val"]).sum()),
        ),
        pixel_mean=mean,
        pixel_std=max(variance, 0.0) ** 0.5,
        rejected=sorted((r for part in parts for r in part.rejected), key=lambda r: r.path),
        shards=shards,
    )


def _input_key(source: Source, config: DataConfig) -> str:
    parameters = sorted(config.model_dump(mode="json").items())
    return hashlib.sha256(repr((SCHEMA_VERSION, source.stamp(), source.synthetic, parameters)).encode()).hexdigest()


def _check_out(source: Source, out: Place) -> None:
    there, root = (f"{os.path.realpath(p.path) if p.is_local else p.path}/" for p in (out, source.root))
    if out.is_local == source.root.is_local and (there.startswith(root) or root.startswith(there)):
        raise UsageError(f"--out {out}: shards may not lie inside the data folder or around it. Name another folder.")
    if strangers := [info.base_name for info in out.files() if not _is_ours(out, info)]:
        raise UsageError(
            f"--out {out}: holds other things, such as {strangers[0]!r}. Name a new folder, or one that holds shards."
        )


def _check_rejected(source: Source, parts: list[_Part], config: DataConfig) -> None:
    rejected = [r for part in parts for r in part.rejected]
    share = len(rejected) / len(source.files)
    if share > config.max_rejected_fraction:
        reasons = ", ".join(f"{n} {reason}" for reason, n in Counter(r.reason for r in rejected).most_common(3))
        raise UsageError(
            f"{len(rejected)} of {len(source.files)} files ({share:.1%}) are unreadable ({reasons}; first: "
            f"{rejected[0].path}), more than data.max_rejected_fraction = {config.max_rejected_fraction}. Mend or "
            "remove them, or raise the limit."
        )


def _remove_others(out: Place, manifest: Manifest) -> None:
    """Shards of an earlier or interrupted run, once the manifest names the new ones."""
    keep = {shard.file for shards in manifest.shards.values() for shard in shards} | {MANIFEST, _INPUT}
    for info in out.files():
        if _is_ours(out, info) and info.base_name not in keep:
            out.filesystem.delete_file(info.path)


def _is_ours(out: Place, info: fs.FileInfo) -> bool:
    """Whether a file below `out` has a name that only this program gives."""
    name = r"(?:(?:train|val|test)-\d{5}-[0-9a-f]{12}\.parquet|dataset\.json|input\.json)"
    return re.fullmatch(rf"{name}|\.{name}\.[0-9a-f]{{8}}\.part", info.path[len(out.path) + 1 :]) is not None


def summary(manifest: Manifest, files: int) -> str:
    """What preprocessing found in that many files, in a few aligned lines."""
    counts = " · ".join(
        f"{split} {sum(c.values()):,} ({c['fracture']:,} fracture, {c['normal']:,} normal)"
        for split, c in manifest.counts.items()
    )
    lines = [f"images     {counts}"]
    if not manifest.official_split:
        lines.append(f"split      random, seed {manifest.parameters['seed']}: the folder has no train/val/test")
    if manifest.rejected:
        reasons = ", ".join(f"{n} {r}" for r, n in Counter(r.reason for r in manifest.rejected).most_common(4))
        share = len(manifest.rejected) / files
        lines.append(f"rejected   {len(manifest.rejected)} files ({share:.2%}): {reasons}; paths in {MANIFEST}")
    lines += copies_warning(manifest)
    return "\n".join(lines)


def copies_warning(manifest: Manifest) -> list[str]:
    """Lines that say loudly how much of validation and test is in training too; none where nothing is."""
    copies, rows = manifest.copies, manifest.rows
    if not (copies.val_in_train or copies.test_in_train or copies.test_in_val):
        return []
    return [
        f"WARNING    {copies.test_in_train} of {rows('test')} test images and {copies.val_in_train} of {rows('val')} "
        "validation images are byte-for-byte copies of training images.",
        "           The test figures below measure memory, not the reading of radiographs.",
    ]
