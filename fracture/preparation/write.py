"""Write a scanned source as a dataset: Parquet shards, their manifest, and the files beside them.

Keyed hashes decide which row goes into which shard, so any number of workers writes the same bytes.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from fracture.config import DataConfig
from fracture.dataset.format import (
    FILES,
    MANIFEST,
    SCHEMA_VERSION,
    Dataset,
    Manifest,
    Pixels,
    Shard,
    encode_shard,
    images_of,
    read_dataset,
)
from fracture.errors import RunError, UsageError
from fracture.labels import CLASS_NAMES
from fracture.preparation.audit import Audit, count_leakage, list_alarming_shortcuts, list_alarms
from fracture.preparation.decoding.decode import Rejected, decode
from fracture.preparation.facts import read_image_file
from fracture.preparation.identity import number_study
from fracture.preparation.ledger import Ledger, check_split_settings
from fracture.preparation.output import INPUT, check_output_folder, hash_input, remove_old_files, write_audit
from fracture.preparation.parallel import map_unordered, share
from fracture.preparation.pending import PendingPixels, read_pending, remove_pending
from fracture.preparation.plan import SplitPlan, plan_split
from fracture.preparation.scan import ScannedSource
from fracture.preparation.scan_cache import SCANNED, hash_code
from fracture.preparation.source import keyed_hash
from fracture.progress import Progress
from fracture.storage import StoragePath, encode_parquet

_MOST_READ = 4  # rows of earlier shards that may be read for each row that is needed, before decoding is less work


@dataclass(frozen=True)
class _ShardTask:
    """Everything that one task needs to write one shard. All sequences have one element a row."""

    out: StoragePath
    image_size: int
    split: str
    number: int
    files: list[StoragePath]
    pixel_hashes: list[bytes]
    pending: list[PendingPixels | None]
    earlier_rows: list[tuple[str, int] | None]  # split and row in the earlier dataset
    columns: dict[str, list[Any]]  # of the shard, without the image


@dataclass(frozen=True)
class _WrittenShard:
    """The result of a task."""

    split: str
    number: int
    shard: Shard
    pixels: Pixels


def write_dataset(
    scanned: ScannedSource,
    out: StoragePath,
    config: DataConfig,
    progress: Progress = lambda step, done, total: None,
    before: StoragePath | None = None,
) -> Manifest:
    """Write the shards and the manifest of a scanned source into the folder `out`. Ray must have been started.

    The shards that `out` held before stay valid until the new manifest replaces theirs. No group of the earlier dataset
    moves to another split, if the settings of the split are the same.

    Args:
        before: a folder with manifest and ledger of a dataset whose split is kept, in place of the one in `out`.

    Raises:
        UsageError: too many files are unreadable, a split would lack a class, an earlier split cannot be kept, or `out`
            is a folder of other things.
        RunError: the disk is full, or a file changed since it was scanned.
    """
    source = scanned.source
    check_output_folder(source, out)
    _check_rejected(scanned.audit, config)
    if before is not None:
        check_split_settings(before, config)
    ledger = Ledger.read(before or out, config)
    plan = plan_split(scanned, config, ledger, keep_test=before is not None)
    try:
        written = _write_shards(scanned, out, config, plan, progress)
    finally:
        remove_pending(out)
    files = encode_parquet(plan.files)
    manifest = _make_manifest(scanned, plan, written, config, hashlib.sha256(files).hexdigest())
    (out / INPUT).delete()
    write_audit(out, scanned)
    (out / FILES).write_bytes(files)
    ledger.update(plan.files).write(out, config)
    (out / MANIFEST).write_bytes(manifest.model_dump_json(indent=1).encode() + b"\n")
    (out / INPUT).write_json(hash_input(source, config, manifest, before))
    remove_old_files(out, manifest)
    return manifest


def summarize_split(manifest: Manifest) -> list[str]:
    """Describe the splits of a dataset in a few aligned lines."""
    lines = [f"split      {manifest.split_reason}"]
    for split, counts in manifest.counts.items():
        groups = manifest.groups[split]
        classes = ", ".join(f"{counts[name]:,} {name} of {groups[name]:,} groups" for name in reversed(CLASS_NAMES))
        lines.append(f"  {split:<8} {sum(counts.values()):,} images: {classes}")
    lines += [f"not tested {line}" for line in manifest.untested]
    lines += [f"left out   {n:,} images: {why}" for why, n in manifest.left_out.items() if n]
    lines += [
        f"moved      group {line}; its parts are one group now, and what was test is left out"
        for line in manifest.moved
    ]
    return lines


def _check_rejected(audit: Audit, config: DataConfig) -> None:
    share = len(audit.rejected) / audit.files
    if share > config.max_rejected_fraction:
        reasons = ", ".join(f"{n} {reason}" for reason, n in Counter(r.reason for r in audit.rejected).most_common(3))
        raise UsageError(
            f"{len(audit.rejected)} of {audit.files} files ({share:.1%}) are unreadable ({reasons}; first: "
            f"{audit.rejected[0].path}), more than data.max_rejected_fraction = {config.max_rejected_fraction}. Mend "
            "or remove them, or raise the limit."
        )


def _write_shards(
    scanned: ScannedSource, out: StoragePath, config: DataConfig, plan: SplitPlan, progress: Progress
) -> list[_WrittenShard]:
    """Write all shards on Ray's workers."""
    earlier, earlier_rows = _find_earlier_shards(out, config)
    earlier = share(earlier)
    tasks = [(task, earlier) for task in _prepare_tasks(scanned, out, config, plan, earlier_rows)]
    written: list[_WrittenShard] = []
    done, total = 0, int((plan.split_used != "").sum())
    for one in map_unordered(_write_shard, tasks):
        written.append(one)
        done += one.shard.rows
        progress("write", done, total)
    return sorted(written, key=lambda one: (plan.splits.index(one.split), one.number))


def _share_out_rows(plan: SplitPlan, config: DataConfig) -> list[tuple[str, int, list[int]]]:
    """Shuffle the rows of each split with the seed, and cut them into shards: (split, number, rows of the plan)."""
    paths, shards = plan.files["path"].to_pylist(), []
    for split in plan.splits:
        rows = np.flatnonzero(plan.split_used == split).tolist()
        rows.sort(key=lambda row: keyed_hash(paths[row], config.seed))
        for number, start in enumerate(range(0, len(rows), config.rows_per_shard)):
            shards.append((split, number, rows[start : start + config.rows_per_shard]))
    return shards


def _prepare_tasks(
    scanned: ScannedSource,
    out: StoragePath,
    config: DataConfig,
    plan: SplitPlan,
    earlier_rows: dict[tuple[str, bytes], tuple[str, int]],
) -> list[_ShardTask]:
    names = ("path", "label", "sha256", "origin", "pixels", "radiograph_id", "group_id", "study")
    listed = {name: plan.files[name].to_pylist() for name in names}
    tasks = []
    for split, number, rows in _share_out_rows(plan, config):
        columns = {name: [values[row] for row in rows] for name, values in listed.items()}
        paths, pixel_hashes, studies = (columns.pop(name) for name in ("path", "pixels", "study"))
        columns |= {"source": paths, "study_id": [number_study(study) for study in studies]}
        task = _ShardTask(
            out=out,
            image_size=config.image_size,
            split=split,
            number=number,
            files=[scanned.source.locate(path) for path in paths],
            pixel_hashes=pixel_hashes,
            pending=[scanned.pending.get(path) for path in paths],
            earlier_rows=[earlier_rows.get(key) for key in zip(paths, columns["sha256"], strict=True)],
            columns=columns,
        )
        tasks.append(task)
    return tasks


def _find_earlier_shards(
    out: StoragePath, config: DataConfig
) -> tuple[Dataset | None, dict[tuple[str, bytes], tuple[str, int]]]:
    """Find the shards in `out` whose pixels can be reused: the same code made them at the same image size.

    Returns:
        Their dataset, and path and hash of each file -> split and row in it.
    """
    rows: dict[tuple[str, bytes], tuple[str, int]] = {}
    try:
        if (out / INPUT).read_json().get("code") != hash_code(config.image_size):
            return None, {}
        dataset = read_dataset(out)
        for split in (name for name in dataset.splits if dataset.rows(name)):
            index = dataset.read_columns(split, ["source", "sha256"])
            keys = zip(index["source"].to_pylist(), index["sha256"].to_pylist(), strict=True)
            rows |= {key: (split, row) for row, key in enumerate(keys)}
    except (FileNotFoundError, NotADirectoryError, UsageError, ValueError):
        return None, {}
    return dataset, rows


def _write_shard(task: _ShardTask, earlier: Dataset | None) -> _WrittenShard:
    """Collect the pixels of a shard's images, and write the shard."""
    known = read_pending(task.out, task.pending, task.pixel_hashes, task.image_size)
    if earlier is not None:
        with suppress(UsageError):  # a damaged shard: its images are decoded again
            known |= _read_earlier_pixels(earlier, task.earlier_rows)
    pixels = np.stack([known[row] if row in known else _decode_again(task, row) for row in range(len(task.files))])
    encoded, digest = encode_shard(pixels, task.columns)  # of [N, H, W] uint8
    name = f"{task.split}-{task.number:05d}-{digest[:12]}.parquet"
    (task.out / name).write_bytes(encoded)
    histogram = np.bincount(pixels.ravel(), minlength=256)
    levels = np.arange(256)
    return _WrittenShard(
        split=task.split,
        number=task.number,
        shard=Shard(file=name, rows=len(pixels), bytes=encoded.size, digest=digest),
        pixels=Pixels(count=pixels.size, sum=int(histogram @ levels), square_sum=int(histogram @ levels**2)),
    )


def _read_earlier_pixels(dataset: Dataset, earlier_rows: Sequence[tuple[str, int] | None]) -> dict[int, np.ndarray]:
    """Read pixels from earlier shards: position in the sequence -> [H, W] uint8.

    Both shards are in the order of one hash, so rows that are close in the new shard were close in the earlier one. If
    they were not, as after a change of the seed, they are left out, to be decoded again.
    """
    pixels: dict[int, np.ndarray] = {}
    for split in {item[0] for item in earlier_rows if item}:
        rows = {position: item[1] for position, item in enumerate(earlier_rows) if item and item[0] == split}
        start, stop = min(rows.values()), max(rows.values()) + 1
        if stop - start <= _MOST_READ * len(earlier_rows):
            images = images_of(dataset.read(split, start, stop), dataset.image_size)
            pixels |= {position: images[row - start, ..., 0] for position, row in rows.items()}
    return pixels


def _decode_again(task: _ShardTask, row: int) -> np.ndarray:
    try:
        data = read_image_file(task.files[row])
    except Rejected:
        data = None
    if data is None or hashlib.sha256(data).digest() != task.columns["sha256"][row]:
        (task.out / SCANNED).delete()  # its facts of this file are wrong
        path = task.columns["source"][row]
        raise RunError(f"{path} changed while it was being prepared; run the same command again")
    return decode(data, task.image_size).pixels


def _make_manifest(
    scanned: ScannedSource, plan: SplitPlan, written: list[_WrittenShard], config: DataConfig, files_sha256: str
) -> Manifest:
    audit, source = scanned.audit, scanned.source
    shards = {split: [one.shard for one in written if one.split == split] for split in plan.splits}
    counts, groups = _count_classes(scanned, plan)
    return Manifest(
        schema_version=SCHEMA_VERSION,
        fingerprint=_compute_fingerprint(shards, config),
        synthetic=source.synthetic,
        split=plan.kind,
        split_reason=plan.reason,
        folds=list(plan.folds),
        untested=list(plan.untested),
        parameters=config.model_dump(mode="json"),
        class_folders=source.class_folders,
        counts=counts,
        groups=groups,
        leakage=count_leakage(plan.split_used, scanned.links),
        leakage_found=audit.leakage,
        alarms=list_alarms(audit),
        notes=list(source.notes),
        traits=sorted({name for traits in scanned.facts["traits"].to_pylist() for name, _ in traits or ()}),
        boxed=len(scanned.facts) - scanned.facts["boxes"].null_count,
        shortcuts={name: shortcut.auc for name, shortcut in list_alarming_shortcuts(audit)},
        moved=plan.moved,
        left_out=plan.left_out,
        pixels={split: Pixels.total(one.pixels for one in written if one.split == split) for split in plan.splits},
        rejected=audit.rejected,
        shards=shards,
        files_sha256=files_sha256,
    )


def _compute_fingerprint(shards: dict[str, list[Shard]], config: DataConfig) -> str:
    parameters = sorted(config.model_dump(mode="json").items())
    fingerprint = hashlib.sha256(repr((SCHEMA_VERSION, parameters)).encode())
    for split, listed in shards.items():
        fingerprint.update(f"{split}:{','.join(shard.digest for shard in listed)}\n".encode())
    return fingerprint.hexdigest()


def _count_classes(
    scanned: ScannedSource, plan: SplitPlan
) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, int]]]:
    """Count images and groups: split -> class name -> number."""
    labels = scanned.facts["label"].to_numpy()
    counts: dict[str, dict[str, int]] = {split: {} for split in plan.splits}
    groups: dict[str, dict[str, int]] = {split: {} for split in plan.splits}
    for split in plan.splits:
        for label, name in enumerate(CLASS_NAMES):
            chosen = (plan.split_used == split) & (labels == label)
            counts[split][name] = int(chosen.sum())
            groups[split][name] = len(np.unique(plan.group_ids[chosen]))
    return counts, groups
