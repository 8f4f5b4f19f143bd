"""The ledger: the split of every file that was ever seen.

A file that is gone stays in it, because it may come back, or come back re-encoded.
"""

from collections.abc import Iterator

import pyarrow as pa

from fracture.config import DataConfig
from fracture.dataset.format import LEDGER, MANIFEST, read_manifest
from fracture.errors import UsageError
from fracture.preparation.split import RETIRED
from fracture.storage import StoragePath

_SCHEMA = pa.schema([("sha256", pa.binary(32)), ("pixels", pa.binary(16)), ("split", pa.string())])
_SPLIT_SETTINGS = ("split", "folds", "seed", "val_fraction", "test_fraction")  # settings that decide a group's split


class Ledger:
    """Splits by the hash of the file and by the hash of its grey image."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table  # columns sha256, pixels, split; RETIRED is one of the splits
        self._by_file: dict[bytes, str] = {}
        self._by_pixels: dict[bytes, str] = {}
        for sha256, pixels, split in zip(*(table[name].to_pylist() for name in _SCHEMA.names), strict=True):
            for splits, key in ((self._by_file, sha256), (self._by_pixels, pixels)):
                if key is not None and split and splits.get(key) != RETIRED:  # a retired hash stays retired
                    splits[key] = split

    @classmethod
    def read(cls, folder: StoragePath, config: DataConfig) -> "Ledger":
        """Read the ledger in a folder; it is empty if there is none, or if it was made with other split settings."""
        try:
            parameters = (folder / MANIFEST).read_json()["parameters"]  # needs no shard: the split outlives a lost one
            table = (folder / LEDGER).read_parquet()
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
            return cls(_SCHEMA.empty_table())
        wanted = config.model_dump(mode="json")
        same = all(parameters.get(key) == wanted[key] for key in _SPLIT_SETTINGS)
        return cls(table if same else _SCHEMA.empty_table())

    def find_splits(self, facts: pa.Table) -> dict[str, str]:
        """Return the earlier split of each readable file that has one, by the file's hash in hexadecimal."""
        hashes = zip(facts["sha256"].to_pylist(), facts["pixels"].to_pylist(), strict=True)
        splits = {sha256.hex(): self._find_split(sha256, pixels) for sha256, pixels in hashes if sha256 is not None}
        return {sha256: split for sha256, split in splits.items() if split}

    def update(self, files: pa.Table) -> "Ledger":
        """Return the ledger with the files of a split plan added.

        All copies of the same pixels are retired with one of them. A file that is in no split, since another with the
        same pixels is kept or since its radiograph has both labels, gets the split of its group; but what was test
        stays test, because it may not train when the wrong label is gone.
        """
        rows = {row["sha256"]: row for row in self.table.to_pylist()}
        retired = {row["pixels"] for row in rows.values() if row["split"] == RETIRED}
        retired |= {pixels for _, pixels, _, split in _read_rows(files) if split == RETIRED}
        split_of_group = {group: split for _, _, group, split in _read_rows(files) if split not in ("", RETIRED)}
        for sha256, pixels, group, split in _read_rows(files):
            if pixels in retired:
                split = RETIRED
            elif not split:
                split = "test" if self._find_split(sha256, pixels) == "test" else split_of_group.get(group)
            if split:
                rows[sha256] = {"sha256": sha256, "pixels": pixels, "split": split}
        return Ledger(pa.Table.from_pylist([rows[sha256] for sha256 in sorted(rows)], schema=_SCHEMA))

    def _find_split(self, sha256: bytes, pixels: bytes) -> str | None:
        found = (self._by_file.get(sha256), self._by_pixels.get(pixels))
        return RETIRED if RETIRED in found else found[0] or found[1]


def check_split_settings(before: StoragePath, config: DataConfig) -> None:
    """Check that the settings of the split are those of an earlier dataset.

    Raises:
        UsageError: one differs.
    """
    earlier, wanted = read_manifest(before).parameters, config.model_dump(mode="json")
    for key in _SPLIT_SETTINGS:
        if earlier.get(key) != wanted[key]:
            raise UsageError(
                f"data.{key} = {wanted[key]!r} would make another split, and the champion was trained with "
                f"{earlier.get(key)!r}: radiographs that tested it might train the next model. Keep "
                f"{earlier.get(key)!r}, or begin another registry."
            )


def _read_rows(files: pa.Table) -> Iterator[tuple[bytes, bytes, int, str]]:
    """Yield hash, pixels, group and split of each readable file."""
    columns = (files[name].to_pylist() for name in ("sha256", "pixels", "group_id", "split_used"))
    return (row for row in zip(*columns, strict=True) if row[0] is not None)
