"""What earlier looks at the same files found, kept beside the shards: a folder that has grown costs what is new."""

import hashlib
import inspect
from dataclasses import asdict

import cv2
import numpy as np
import PIL
import pyarrow as pa
import pyarrow.compute as pc

from fracture.preparation import decode, facts
from fracture.preparation.duplicates import alignment, signature
from fracture.preparation.duplicates.alignment import Likeness
from fracture.preparation.facts import FACTS, NAMED, UNOPENED, named, pixels_hash
from fracture.preparation.source import Source
from fracture.storage import StoragePath

EXAMINED, COMPARED = "examined.parquet", "compared.parquet"
_CODE = [inspect.getsource(module) for module in (decode, signature, facts, alignment)]  # as it was loaded
_STAMP = ("path", "bytes", "modified")
_COMPARED = pa.schema(
    [
        pa.field("views", pa.binary(32)),  # hash of the first and of the second
        pa.field("texture", pa.float64()),
        pa.field("detail", pa.float64()),
        pa.field("flipped", pa.bool_()),
        pa.field("inverted", pa.bool_()),
        pa.field("degrees", pa.float64()),
    ]
)


class Cache:
    """Facts of files by data folder, path, size and time of change; likenesses by the pixels compared.

    Holds only for the code that decodes, examines and compares as it is now.
    """

    def __init__(self, folder: StoragePath, source: Source, image_size: int) -> None:
        self._folder, self._source = folder, source
        code, roots = code_key(image_size), sorted(str(root) for root in source.roots.values())
        self._keys = {COMPARED: code, EXAMINED: hashlib.sha256(repr((code, roots)).encode()).hexdigest()}

    def facts(self) -> tuple[pa.Table, np.ndarray]:
        """Rows of `FACTS` that are known, and [rows] int64: which of the source's files each is of."""
        files = self._source.files
        table = self._read(EXAMINED, FACTS)
        rows = {key: row for row, key in enumerate(zip(*(table[n].to_pylist() for n in _STAMP), strict=True))}
        found = np.array([rows.get((f.path, f.size, f.modified), -1) for f in files], np.int64)
        numbers = np.flatnonzero(found >= 0)
        known = table.take(found[numbers])
        current = pa.Table.from_pylist([named(files[n]) for n in numbers], schema=NAMED)  # labels may be others now
        columns = [current[name] if name in NAMED.names else known[name] for name in FACTS.names]
        return pa.Table.from_arrays(columns, schema=FACTS), numbers

    def keep_facts(self, facts: pa.Table) -> None:
        opened = pc.fill_null(pc.not_equal(facts["reason"], UNOPENED), True)  # permissions change without a trace
        self._write(EXAMINED, facts.filter(opened))

    def likenesses(self) -> dict[bytes, Likeness]:
        """By `view_hashes` of the first and the second, joined."""
        rows = self._read(COMPARED, _COMPARED).to_pylist()
        return {row.pop("views"): Likeness(**row) for row in rows}

    def keep_likenesses(self, likenesses: dict[bytes, Likeness]) -> None:
        rows = [{"views": views} | asdict(likeness) for views, likeness in likenesses.items()]
        self._write(COMPARED, pa.Table.from_pylist(rows, schema=_COMPARED))

    def _read(self, name: str, schema: pa.Schema) -> pa.Table:
        try:
            table = (self._folder / name).read_parquet()
        except (OSError, pa.ArrowException):  # none yet, or damaged: all is looked at again
            return schema.empty_table()
        metadata = table.schema.metadata or {}
        valid = metadata.get(b"key") == self._keys[name].encode()
        return table.replace_schema_metadata() if valid else schema.empty_table()

    def _write(self, name: str, table: pa.Table) -> None:
        (self._folder / name).write_parquet(table.replace_schema_metadata({b"key": self._keys[name]}))


def view_hashes(views: np.ndarray) -> list[bytes]:
    return [pixels_hash(view) for view in views]


def code_key(image_size: int) -> str:
    """Differs where other code, or another size, would find other facts or pixels."""
    content = (image_size, cv2.__version__, PIL.__version__, np.__version__, _CODE)
    return hashlib.sha256(repr(content).encode()).hexdigest()
