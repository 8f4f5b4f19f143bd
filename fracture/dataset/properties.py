"""Properties of an image beside the anatomy that may give its class away: size, sharpness, the detector and others."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fracture.dataset.format import Dataset
from fracture.errors import UsageError

_NUMBERS = {  # property -> its column
    "file size": "bytes",
    "border": "border",
    "mean grey": "mean",
    "sharpness": "sharpness",
    "compression": "compression",
}
_CATEGORIES = ("format", "origin")
COLUMNS = pa.schema(  # of the table of files, from which properties are made
    [
        *(pa.field(name, pa.string()) for name in ("path", *_CATEGORIES)),
        *(pa.field(name, pa.int32()) for name in ("width", "height")),
        pa.field("bytes", pa.int64()),
        *(pa.field(name, pa.float32()) for name in ("border", "mean", "sharpness", "compression")),
        pa.field("traits", pa.map_(pa.string(), pa.string())),
    ]
)


def collect_properties(files: pa.Table) -> dict[str, np.ndarray]:
    """Return the properties of some files, under the names that the audit gives them.

    Args:
        files: rows of a scan or of `files.parquet`. What an absent column says is left out.

    Returns:
        Name -> [N] float64, NaN where unknown, or [N] str, "" where unknown.
    """
    present, found = set(files.column_names), {}
    if {"width", "height"} <= present:
        width, height = (_read_numbers(files, name) for name in ("width", "height"))
        found |= {"size": width * height, "aspect": width / height}  # pixels
    found |= {name: _read_numbers(files, column) for name, column in _NUMBERS.items() if column in present}
    found |= {name: _read_texts(files[name].to_pylist()) for name in _CATEGORIES if name in present}
    listed = [dict(traits or ()) for traits in files["traits"].to_pylist()] if "traits" in present else []
    for name in sorted({name for traits in listed for name in traits}):
        found[name] = _read_texts([traits.get(name) for traits in listed])
    return found


def read_properties(dataset: Dataset, paths: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the properties of some of a dataset's images, as `collect_properties` does.

    None are known where shards were copied without their `files.parquet`, or with another; earlier versions wrote fewer
    columns to it.
    """
    wanted = pa.array(list(dict.fromkeys(paths)), pa.string())
    try:
        file = dataset.find_files()
        present = set(file.parquet_columns())
        if "path" not in present:
            return {}
        columns = pa.schema([field for field in COLUMNS if field.name in present])
        batches = [batch.filter(pc.is_in(batch["path"], wanted)) for batch in file.parquet_batches(columns)]
    except UsageError:
        return {}
    table = pa.Table.from_batches(batches, columns)
    rows = {path: row for row, path in enumerate(table["path"].to_pylist())}
    return collect_properties(table.take(pa.array([rows.get(path) for path in paths], pa.int64())))


def _read_numbers(files: pa.Table, column: str) -> np.ndarray:
    return files[column].cast(pa.float64()).to_numpy()


def _read_texts(values: Sequence[str | None]) -> np.ndarray:
    return np.array([value or "" for value in values], str)
