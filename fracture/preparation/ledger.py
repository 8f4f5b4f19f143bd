"""The ledger: the split of every file that was ever seen.

A file that is gone stays in it, because it may come back, or come back re-encoded.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from fracture.config import DataConfig
from fracture.dataset.format import LEDGER, MANIFEST, read_manifest
from fracture.errors import UsageError
from fracture.preparation.split import RETIRED
from fracture.storage import StoragePath

_SCHEMA = pa.schema(
    [
        ("sha256", pa.binary(32)),
        ("pixels", pa.binary(16)),
        ("split", pa.string()),
        (
            "ids",
            pa.list_(pa.string()),
        ),  # of patients, study and match of `data.group_pattern`; null of earlier versions
    ]
)
_EARLIER_SCHEMA = pa.schema(list(_SCHEMA)[:3])
_SETTINGS_KEY = b"split_settings"  # in the file's metadata
_SPLIT_SETTINGS = ("split", "folds", "seed", "val_fraction", "test_fraction")  # settings that decide a group's split


class Ledger:
    """Splits by the hash of the file, by the hash of its grey image, and by its patient and study."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table  # columns sha256, pixels, split, ids; RETIRED is one of the splits
        self._by_file: dict[bytes, str] = {}
        self._by_pixels: dict[bytes, str] = {}
        self._by_id: dict[str, str] = {}  # without RETIRED: the others of such a patient are in another split
        for sha256, pixels, split, ids in zip(*(table[name].to_pylist() for name in _SCHEMA.names), strict=True):
            if split != RETIRED:
                self._by_id |= dict.fromkeys(ids or (), split)
            for splits, key in ((self._by_file, sha256), (self._by_pixels, pixels)):
                if key is not None and split and splits.get(key) != RETIRED:  # a retired hash stays retired
                    splits[key] = split

    @classmethod
    def read(cls, folder: StoragePath, config: DataConfig) -> "Ledger":
        """Read the ledger in a folder; it is empty if there is none, or if it was made with other split settings.

        Raises:
            UsageError: it cannot be read, or it is missing where there is a manifest.
        """
        try:
            table = (folder / LEDGER).read_parquet()
            if table.schema.equals(_EARLIER_SCHEMA):
                table = table.append_column("ids", pa.nulls(len(table), _SCHEMA.field("ids").type))
            if not table.schema.equals(_SCHEMA):
                raise pa.ArrowInvalid(f"its columns are {', '.join(table.column_names)}")
        except (FileNotFoundError, NotADirectoryError):
            if (folder / MANIFEST).is_file():
                raise _lost_error(folder / LEDGER, "is missing") from None
            return cls(_SCHEMA.empty_table())
        except (OSError, pa.ArrowException) as error:
            raise _lost_error(folder / LEDGER, f"cannot be read: {error}") from None
        return cls(table if _read_settings(folder, table) == _select_settings(config) else _SCHEMA.empty_table())

    def write(self, folder: StoragePath, config: DataConfig) -> None:
        """Write the ledger, with the settings of its split, so that no other file is needed to go on with the split."""
        settings = json.dumps(_select_settings(config))
        (folder / LEDGER).write_parquet(self.table.replace_schema_metadata({_SETTINGS_KEY: settings}))

    def find_splits(self, facts: pa.Table) -> dict[str, str]:
        """Return the earlier split of each readable file that has one, by the file's hash in hexadecimal."""
        splits = {
            sha256.hex(): self._find_split(sha256, pixels) or self._find_split_of(ids)
            for sha256, pixels, ids in zip(
                facts["sha256"].to_pylist(), facts["pixels"].to_pylist(), _list_ids(facts), strict=True
            )
            if sha256 is not None
        }
        return {sha256: split for sha256, split in splits.items() if split}

    def update(self, files: pa.Table) -> "Ledger":
        """Return the ledger with the files of a split plan added.

        All copies of the same pixels are retired with one of them. A file that is in no split, since another with the
        same pixels is kept or since its radiograph has both labels, gets the split of its group; but what was test
        stays test, because it may not train when the wrong label is gone.
        """
        rows = {row["sha256"]: row for row in self.table.to_pylist()}
        retired = {row["pixels"] for row in rows.values() if row["split"] == RETIRED}
        retired |= {pixels for _, pixels, _, split, _ in _read_rows(files) if split == RETIRED}
        split_of_group = {group: split for _, _, group, split, _ in _read_rows(files) if split not in ("", RETIRED)}
        for sha256, pixels, group, split, ids in _read_rows(files):
            if pixels in retired:
                split = RETIRED
            elif not split:
                split = "test" if self._find_split(sha256, pixels) == "test" else split_of_group.get(group)
            if split:
                rows[sha256] = {"sha256": sha256, "pixels": pixels, "split": split, "ids": ids}
        return Ledger(pa.Table.from_pylist([rows[sha256] for sha256 in sorted(rows)], schema=_SCHEMA))

    def _find_split_of(self, ids: Sequence[str]) -> str | None:
        return next((self._by_id[one] for one in ids if one in self._by_id), None)

    def _find_split(self, sha256: bytes, pixels: bytes) -> str | None:
        found = (self._by_file.get(sha256), self._by_pixels.get(pixels))
        return RETIRED if RETIRED in found else found[0] or found[1]


def _list_ids(files: pa.Table) -> Iterator[list[str]]:
    """Yield what joins each file to others: its patients, its study, and the match of `data.group_pattern`."""
    columns = (files[name].to_pylist() for name in ("patients", "study", "group_match"))
    for patients, study, match in zip(*columns, strict=True):
        yield [one for one in (*patients, f"study {study}" * bool(study), f"match {match}" * bool(match)) if one]


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


def _select_settings(config: DataConfig) -> dict[str, Any]:
    settings = config.model_dump(mode="json")
    return {key: settings[key] for key in _SPLIT_SETTINGS}


def _read_settings(folder: StoragePath, ledger: pa.Table) -> dict[str, Any]:
    """Return the settings of the ledger's split; those of an older ledger stand in the manifest alone.

    Raises:
        UsageError: the manifest is damaged.
    """
    if saved := (ledger.schema.metadata or {}).get(_SETTINGS_KEY):
        return json.loads(saved)
    try:
        parameters = (folder / MANIFEST).read_json()["parameters"]
        return {key: parameters.get(key) for key in _SPLIT_SETTINGS}
    except FileNotFoundError:  # the first writing of the dataset was killed: nothing has used its split
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise _lost_error(folder / MANIFEST, "cannot be read, and has the settings of the split") from None


def _lost_error(file: StoragePath, fault: str) -> UsageError:
    fault = " ".join(fault.split()).rstrip(".")  # Arrow's text may be of several lines
    return UsageError(
        f"{file} {fault}. Without it images that have tested a model might train the next one. Put back a copy of it; "
        f"or begin a new split: name another folder, or delete {LEDGER} and {MANIFEST}."
    )


def _read_rows(files: pa.Table) -> Iterator[tuple[bytes, bytes, int, str, list[str]]]:
    """Yield hash, pixels, group, split and ids of each readable file."""
    columns = (files[name].to_pylist() for name in ("sha256", "pixels", "group_id", "split_used"))
    return (row for row in zip(*columns, _list_ids(files), strict=True) if row[0] is not None)
