"""Results of earlier scans, kept beside the shards, so that only new files of a grown folder are scanned.

`scanned.parquet` holds the facts of each file, found by data folder, path, size and time of change. `compared.parquet`
holds the similarity of each pair of views, found by their pixels. Both are valid only for the code that made them.
"""

import hashlib
import inspect
from dataclasses import asdict
from importlib.metadata import version

import cv2
import numpy as np
import PIL
import pyarrow as pa
import pyarrow.compute as pc

from fracture.preparation import facts
from fracture.preparation.decoding import decode, dicom, grey
from fracture.preparation.duplicates import alignment, signature
from fracture.preparation.duplicates.alignment import Similarity
from fracture.preparation.facts import FACTS, LISTED, UNOPENED, make_listed_row
from fracture.preparation.source import Source
from fracture.storage import StoragePath

SCANNED, COMPARED = "scanned.parquet", "compared.parquet"
_DECODERS = ("pydicom", "python-gdcm", "pylibjpeg-openjpeg")
_CODE = [inspect.getsource(module) for module in (decode, dicom, grey, signature, facts, alignment)]  # as it was loaded
_FILE_KEY = ("path", "bytes", "modified")
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


class ScanCache:
    """Facts and similarities that earlier scans of the same folder found."""

    def __init__(self, folder: StoragePath, source: Source, image_size: int) -> None:
        self._folder, self._source = folder, source
        code, roots = hash_code(image_size), sorted(str(root) for root in source.roots.values())
        self._keys = {COMPARED: code, SCANNED: hashlib.sha256(repr((code, roots)).encode()).hexdigest()}

    def read_facts(self) -> tuple[pa.Table, np.ndarray]:
        """Return the known rows of `FACTS`, and [rows] int64: the number of each row's file in the source."""
        files = self._source.files
        table = self._read(SCANNED, FACTS)
        rows = {key: row for row, key in enumerate(zip(*(table[n].to_pylist() for n in _FILE_KEY), strict=True))}
        found = np.array([rows.get((f.path, f.size, f.modified), -1) for f in files], np.int64)
        numbers = np.flatnonzero(found >= 0)
        known = table.take(found[numbers])
        # Labels and patients may have changed since.
        listed = pa.Table.from_pylist([make_listed_row(files[number]) for number in numbers], schema=LISTED)
        columns = [listed[name] if name in LISTED.names else known[name] for name in FACTS.names]
        return pa.Table.from_arrays(columns, schema=FACTS), numbers

    def write_facts(self, facts: pa.Table) -> None:
        # A file that could not be opened is tried again: its permissions may change, but not its size or time.
        opened = pc.fill_null(pc.not_equal(facts["reason"], UNOPENED), True)
        self._write(SCANNED, facts.filter(opened))

    def read_similarities(self) -> dict[bytes, Similarity]:
        """Return the known similarities by the hashes of the first and the second view, joined."""
        rows = self._read(COMPARED, _COMPARED).to_pylist()
        return {row.pop("views"): Similarity(**row) for row in rows}

    def write_similarities(self, similarities: dict[bytes, Similarity]) -> None:
        rows = [{"views": views} | asdict(similarity) for views, similarity in similarities.items()]
        self._write(COMPARED, pa.Table.from_pylist(rows, schema=_COMPARED))

    def _read(self, name: str, schema: pa.Schema) -> pa.Table:
        try:
            table = (self._folder / name).read_parquet()
        except (OSError, pa.ArrowException):  # missing or damaged: everything is scanned again
            return schema.empty_table()
        metadata = table.schema.metadata or {}
        valid = metadata.get(b"key") == self._keys[name].encode()
        return table.replace_schema_metadata() if valid else schema.empty_table()

    def _write(self, name: str, table: pa.Table) -> None:
        (self._folder / name).write_parquet(table.replace_schema_metadata({b"key": self._keys[name]}))


def hash_code(image_size: int) -> str:
    """Hash everything but the files that facts and pixels depend on: code, versions of libraries and image size."""
    libraries = (cv2.__version__, PIL.__version__, np.__version__, *map(version, _DECODERS))
    content = (image_size, *libraries, _CODE)
    return hashlib.sha256(repr(content).encode()).hexdigest()
