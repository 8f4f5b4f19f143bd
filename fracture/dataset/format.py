"""The format at rest: Parquet shards of grey images, and `dataset.json`, the manifest that makes them a dataset.

A shard is plain Arrow, readable by pyarrow alone. The manifest is written last: without it there is no dataset.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import from_json

from fracture.config import DataConfig, rename_settings
from fracture.errors import UsageError
from fracture.labels import CLASS_NAMES, SPLITS
from fracture.storage import StoragePath

SCHEMA_VERSION = 5
_READ_TOO = (4,)  # in which two settings have other names, and studies are not known
MANIFEST = "dataset.json"
FILES = "files.parquet"  # beside it: every file of the source, with its group and its split
# In `files.parquet`: x0, y0, x1, y1 of each box, shares of the decoded image's width and height, before it is resized.
# An image is squashed to the square that the model sees, so they are shares of the square's sides, too.
BOXES = pa.list_(pa.list_(pa.float32(), 4))
LEDGER = "ledger.parquet"  # beside it: the split of every file that was ever seen, also of one that is gone
UNTESTED = "untested"  # where the folds are sources: the split of those that are no fold; it trains in every fold
# 64 images of 224×224 are 3.2 MB: large enough to read at disk speed, small enough to share out to many workers.
ROW_GROUP_ROWS = 64
_MOST_MANIFEST = 2**26  # bytes; a shard takes 150 of them
_MOST_NAMES = 2**15  # bytes of a row beside its image: hashes and numbers, path and origin


class Shard(BaseModel):
    """One Parquet file of a split."""

    file: str = Field(pattern=r"^[a-z0-9-]+\.parquet$")  # beside the manifest, and nowhere else
    rows: int = Field(gt=0)
    bytes: int
    digest: str  # SHA-256 over the rows, in order; part of the file's name


class Leak(BaseModel):
    """The images of a split that share a radiograph or a patient with training, or in test with validation."""

    images: int
    by_kind: dict[str, int]  # bytes, pixels, copy, name, patient -> images, each under its first kind
    in_validation: int = 0  # images shared with validation alone

    @property
    def leaking(self) -> int:
        """Return the number of images that share something."""
        return sum(self.by_kind.values()) + self.in_validation

    @property
    def where(self) -> str:
        """Return the splits that share something with this one."""
        return "training or validation" if self.in_validation else "training"


class Rejection(BaseModel):
    """A file that cannot be used."""

    path: str
    split: str  # as found
    reason: str


class Pixels(BaseModel):
    """Sums over all pixels of a split, which give the mean and the deviation of any union of splits."""

    count: int
    sum: int
    square_sum: int

    @classmethod
    def total(cls, parts: Iterable["Pixels"]) -> "Pixels":
        """Return the sums over several splits."""
        listed = list(parts)
        return cls(**{name: sum(getattr(part, name) for part in listed) for name in cls.model_fields})


class Manifest(BaseModel):
    """The content of `dataset.json`."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int
    fingerprint: str  # of parameters and rows: same input and parameters, same fingerprint
    synthetic: bool
    split: str  # official: as found; group: made, no group in two splits; folds: the same, K times; test: all test
    split_reason: str
    folds: list[str]  # titles of the folds, in their order; empty where there are none
    untested: list[str] = []  # where the folds are sources: a line for each that is no fold, with the reason
    parameters: dict[str, Any]
    class_folders: dict[str, list[str]]
    counts: dict[str, dict[str, int]]  # split -> class name -> images
    groups: dict[str, dict[str, int]]  # split -> class name -> groups
    leakage: dict[str, Leak]  # "val", "test" -> images shared with training, in these shards
    leakage_found: dict[str, Leak]  # the same in the split as found; empty where there was none
    alarms: list[str]  # of the audit
    notes: list[str] = []  # what every report on this data has to say
    traits: list[str] = []  # of DICOM files, in `files.parquet`: manufacturer, body part, ...
    boxed: int = 0  # files that have boxes around fractures, in `files.parquet`
    shortcuts: dict[str, float]  # property of the file that predicts the label -> its AUC
    moved: list[str]  # groups that new images have moved to training
    left_out: dict[str, int]  # reason -> readable images that are in no shard
    pixels: dict[str, Pixels]
    rejected: list[Rejection]
    shards: dict[str, list[Shard]]  # split -> its shards, in row order
    files_sha256: str = ""  # of `files.parquet`; "" where an earlier version wrote the manifest

    @field_validator("parameters")
    @classmethod
    def _check_parameters(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        DataConfig.model_validate_json(json.dumps(parameters))
        if "image_size" not in parameters:
            raise ValueError("image_size is missing")
        return parameters

    @property
    def image_size(self) -> int:
        """Return the side of the square images, pixels."""
        return self.parameters["image_size"]

    @property
    def folds_are_sources(self) -> bool:
        """Return true if each fold is a source, which is tested by a model of the others."""
        return bool(self.folds) and self.parameters.get("folds") == "source"

    @property
    def pixel_mean(self) -> float:
        """Return the mean of the training images, in [0, 255]."""
        return self.pixels["train"].sum / self.pixels["train"].count

    @property
    def pixel_std(self) -> float:
        """Return the standard deviation of the training images, in [0, 255]."""
        train = self.pixels["train"]
        return max(train.square_sum / train.count - self.pixel_mean**2, 0.0) ** 0.5

    def rows(self, split: str) -> int:
        """Return the number of rows of a split."""
        return sum(shard.rows for shard in self.shards[split])

    def fold(self, number: int) -> "Manifest":
        """Return the manifest in which that fold, counted from 1, is test.

        The next fold validates and the others train. Of folds by source, a part of each of the others validates, and
        `untested` trains.
        """
        count = len(self.folds)
        others = [f"fold-{n}" for n in range(1, count + 1) if n != number]
        if f"fold-{number}-val" in self.shards:
            parts = {"test": [f"fold-{number}", f"fold-{number}-val"], "val": [f"{name}-val" for name in others]}
        else:
            parts = {"test": [f"fold-{number}"], "val": [f"fold-{number % count + 1}"]}
        parts["train"] = [name for name in (*others, UNTESTED) if name in self.shards and name not in parts["val"]]
        parts = {split: parts[split] for split in SPLITS}

        def summed(tables: dict[str, dict[str, int]], split: str) -> dict[str, int]:
            return {name: sum(tables[part][name] for part in parts[split]) for name in CLASS_NAMES}

        return self.model_copy(
            update={
                "fingerprint": f"{self.fingerprint}-fold-{number}",
                "folds": [],
                "counts": {split: summed(self.counts, split) for split in SPLITS},
                "groups": {split: summed(self.groups, split) for split in SPLITS},
                "leakage": {},  # groups do not straddle folds
                "pixels": {split: Pixels.total(self.pixels[part] for part in parts[split]) for split in SPLITS},
                "shards": {split: [shard for part in parts[split] for shard in self.shards[part]] for split in SPLITS},
            }
        )


def schema(image_size: int) -> pa.Schema:
    """Return the columns of a shard."""
    return pa.schema(
        [
            pa.field("image", pa.binary(image_size**2), nullable=False),  # uint8 [H, W], row by row
            pa.field("label", pa.uint8(), nullable=False),
            pa.field("radiograph_id", pa.int64(), nullable=False),  # copies of a radiograph have the same
            # Radiographs that a split may not separate: of one patient, or joined by copies.
            pa.field("group_id", pa.int64(), nullable=False),
            pa.field("study_id", pa.int64()),  # one examination of a patient; null where studies are not known
            pa.field("sha256", pa.binary(32), nullable=False),  # of the file
            pa.field("source", pa.string(), nullable=False),  # path relative to the data root
            pa.field("origin", pa.string(), nullable=False),  # hospital, scanner, collection; "" where not known
        ]
    )


def encode_shard(images: np.ndarray, rows: Mapping[str, Sequence[Any]]) -> tuple[pa.Buffer, str]:
    """Return a shard's bytes and the digest of its rows.

    Args:
        images: [N, H, W] uint8.
        rows: the other columns of the schema, each with N values.
    """
    count, size = images.shape[:2]
    pixels = pa.py_buffer(np.ascontiguousarray(images))
    columns = [pa.Array.from_buffers(pa.binary(size**2), count, [None, pixels])]
    columns += [pa.array(rows[field.name], field.type) for field in list(schema(size))[1:]]
    digest = hashlib.sha256(pixels)
    for row in zip(*(column.to_pylist() for column in columns[1:]), strict=True):
        digest.update(repr(row).encode())
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.Table.from_arrays(columns, schema=schema(size)),
        sink,
        row_group_size=ROW_GROUP_ROWS,
        compression="lz4",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )
    return sink.getvalue(), digest.hexdigest()


@dataclass(frozen=True)
class Dataset:
    """A folder of shards and its manifest, or one fold of them."""

    folder: StoragePath
    manifest: Manifest

    @property
    def image_size(self) -> int:
        """Return the side of the square images, pixels."""
        return self.manifest.image_size

    @property
    def splits(self) -> list[str]:
        """Return the names of the splits, or of the folds."""
        return list(self.manifest.shards)

    def rows(self, split: str) -> int:
        """Return the number of rows of a split."""
        return self.manifest.rows(split)

    def fold(self, number: int) -> "Dataset":
        """Return the dataset in which that fold, counted from 1, is test; see `Manifest.fold`."""
        return Dataset(self.folder, self.manifest.fold(number))

    def read(self, split: str, start: int, stop: int) -> pa.Table:
        """Read rows [start, stop) of a split. Only the row groups that hold them are opened.

        Raises:
            UsageError: a shard is damaged; names the file and the row group.
        """
        tables = list(self.read_blocks(split, start, stop))
        return pa.concat_tables(tables) if tables else schema(self.image_size).empty_table()

    def read_blocks(self, split: str, start: int, stop: int) -> Iterator[pa.Table]:
        """Read the same rows one row group at a time, so that only one is in memory.

        Raises:
            UsageError: a shard is damaged; names the file and the row group.
        """
        first = 0  # row number, within the split, of the shard's first row
        for shard in self.manifest.shards[split]:
            low, high = max(start - first, 0), min(stop - first, shard.rows)
            if low < high:
                yield from _read_shard(self.folder / shard.file, shard, low, high, self.image_size)
            first += shard.rows

    def read_columns(self, split: str, columns: Sequence[str]) -> pa.Table:
        """Read some columns of every row of a split, in row order; images need not be among them.

        Raises:
            UsageError: a shard is damaged; names the file and the row group.
        """
        return pa.concat_tables(
            block
            for shard in self.manifest.shards[split]
            for block in _read_shard(self.folder / shard.file, shard, 0, shard.rows, self.image_size, list(columns))
        )

    def find_files(self) -> StoragePath:
        """Return `files.parquet`, in which the groups are those of the shards.

        Raises:
            UsageError: it is missing, or of another writing: a job was killed before the manifest was written.
        """
        file, written = self.folder / FILES, self.manifest.files_sha256
        if not file.is_file():
            raise UsageError(f"{file} is missing. Run preprocessing again.")
        if written and file.hash_bytes() != written:
            raise UsageError(f"{file} is not the one that {MANIFEST} describes. Run preprocessing again.")
        return file

    def read_traits(self) -> dict[str, dict[str, str]]:
        """Return the traits of each file that has any, by its path: those of DICOM files.

        None are known where shards were copied without `files.parquet`.
        """
        if not self.manifest.traits or not (self.folder / FILES).is_file():
            return {}
        columns = pa.schema([pa.field("path", pa.string()), pa.field("traits", pa.map_(pa.string(), pa.string()))])
        batches = self.find_files().parquet_batches(columns)
        rows = (row for batch in batches for row in zip(*(column.to_pylist() for column in batch), strict=True))
        return {path: dict(traits) for path, traits in rows if traits}

    def read_boxes(self) -> dict[str, np.ndarray]:
        """Return the boxes around fractures of each file that has any, by its path: [boxes, 4] as in `BOXES`.

        None are known where shards were copied without `files.parquet`.
        """
        if not self.manifest.boxed or not (self.folder / FILES).is_file():
            return {}
        columns = pa.schema([pa.field("path", pa.string()), pa.field("boxes", BOXES)])
        batches = self.find_files().parquet_batches(columns)
        rows = (row for batch in batches for row in zip(*(column.to_pylist() for column in batch), strict=True))
        return {path: np.array(boxes) for path, boxes in rows if boxes}

    def read_seen(self, column: str) -> pa.ChunkedArray:
        """Read one column of every row of training and validation."""
        return pa.concat_tables(self.read_columns(split, [column]) for split in SPLITS[:2])[column]


def read_dataset(folder: StoragePath) -> Dataset:
    """Read the manifest in `folder`, and check that its shards are all there.

    Raises:
        UsageError: there are no shards, or they are of another version or damaged.
    """
    manifest = read_manifest(folder)
    sizes = {info.base_name: info.size for info in folder.files()}
    listed = [shard for shards in manifest.shards.values() for shard in shards]
    if len({shard.file for shard in listed}) < len(listed):
        raise UsageError(f"{folder / MANIFEST} is damaged: it names a shard twice. Run preprocessing again.")
    for shard in listed:
        if sizes.get(shard.file) != shard.bytes:
            state = "missing" if shard.file not in sizes else f"damaged: {sizes[shard.file]} of {shard.bytes} bytes"
            raise UsageError(f"{folder}: shard {shard.file} is {state}. Run preprocessing again.")
    return Dataset(folder, manifest)


def read_manifest(folder: StoragePath) -> Manifest:
    """Read the manifest in `folder`, whether or not its shards are there.

    Raises:
        UsageError: none there, of another version, or damaged.
    """
    try:
        content = from_json((folder / MANIFEST).read_bytes(most=_MOST_MANIFEST))
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            f"{folder} holds no shards: {MANIFEST} is missing. "
            "Make them with: fracture preprocess --data DIR --out SHARDS"
        ) from None
    except UsageError:
        raise
    except ValueError:
        raise UsageError(f"{folder / MANIFEST} is damaged: not JSON. Run preprocessing again.") from None
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version not in (SCHEMA_VERSION, *_READ_TOO):
        raise UsageError(
            f"{folder} holds shards of schema version {version}, and this program reads version {SCHEMA_VERSION}. "
            "Run preprocessing again."
        )
    if version in _READ_TOO and isinstance(content.get("parameters"), dict):
        content["parameters"] = rename_settings(content["parameters"])
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise UsageError(f"{folder / MANIFEST} is damaged at {where!r}. Run preprocessing again.") from None


def _read_shard(
    file: StoragePath, shard: Shard, low: int, high: int, image_size: int, columns: list[str] | None = None
) -> Iterator[pa.Table]:
    """Yield rows [low, high) of a shard, one row group at a time."""
    group = low // ROW_GROUP_ROWS
    try:
        with file.open() as stream:
            parquet = pq.ParquetFile(stream, page_checksum_verification=True)
            if parquet.metadata.num_rows != shard.rows or parquet.schema_arrow != schema(image_size):
                raise UsageError(f"shard {file} is not the one that {MANIFEST} describes. Run preprocessing again.")
            if fault := _fault(parquet.metadata, image_size):
                raise UsageError(f"shard {file} {fault}, as no shard of ours. Run preprocessing again.")
            for group in range(low // ROW_GROUP_ROWS, (high - 1) // ROW_GROUP_ROWS + 1):
                first = group * ROW_GROUP_ROWS
                skipped = max(low - first, 0)
                yield parquet.read_row_group(group, columns).slice(skipped, high - first - skipped)
    except (pa.ArrowException, OSError) as error:
        raise UsageError(
            f"shard {file} is damaged at row group {group}: {error}. Delete it and run preprocessing again."
        ) from None


def _fault(metadata: pq.FileMetaData, image_size: int) -> str:
    """Name what would let a small file take much memory: packed values, or too many in a row group; "" for nothing."""
    groups = -(-metadata.num_rows // ROW_GROUP_ROWS)
    if metadata.num_row_groups != groups:
        return f"claims {metadata.num_rows:,} rows in {metadata.num_row_groups:,} row groups"
    for number in range(groups):
        group = metadata.row_group(number)
        if group.num_rows != min(ROW_GROUP_ROWS, metadata.num_rows - number * ROW_GROUP_ROWS):
            return f"has {group.num_rows:,} rows in row group {number}"
        if group.total_byte_size > group.num_rows * (image_size**2 + _MOST_NAMES):
            return f"has {group.total_byte_size:,} bytes in row group {number}"
        columns = [group.column(column) for column in range(group.num_columns)]
        if any(not {"PLAIN", "RLE"}.issuperset(column.encodings) for column in columns):
            return f"stores values as {', '.join(sorted({e for c in columns for e in c.encodings}))}"
    return ""


def images_of(table: pa.Table, image_size: int) -> np.ndarray:
    """Return the pixels of a table of rows, [N, H, W, 1] uint8: one copy, and no Python per row."""
    images = np.empty((table.num_rows, image_size, image_size, 1), np.uint8)
    row = 0
    for chunk in table["image"].chunks:
        pixels = np.frombuffer(chunk.buffers()[1], np.uint8, len(chunk) * image_size**2, chunk.offset * image_size**2)
        images[row : row + len(chunk)] = pixels.reshape(-1, image_size, image_size, 1)
        row += len(chunk)
    return images
