"""Sets whose labels are in a CSV file of their own, `dataset.csv`."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from fracture.errors import UsageError
from fracture.preparation.labels.class_words import EXCLUDED
from fracture.preparation.labels.labelling import LabelledFile, Labelling
from fracture.preparation.layouts.builder import OF_EXCLUDED, LabellingBuilder
from fracture.preparation.layouts.clutter import is_clutter, sort_out
from fracture.preparation.layouts.paths import find_split, folder_of, join_few, stem_of
from fracture.storage import StoragePath

TABLE = "dataset.csv"
_MOST_BYTES = 2**28
_HEADER_BYTES = 4096


class ImageRow(NamedTuple):
    """What a row says of the image that it names."""

    label: int  # or EXCLUDED
    word: str  # as the row has it
    patient: str = ""
    study: str = ""


def has_table(root: StoragePath, paths: Sequence[str], columns: Sequence[str]) -> bool:
    """Return whether there is a file of the table's name that has these columns."""
    return bool(_find_tables(root, paths, columns))


def _find_tables(root: StoragePath, paths: Sequence[str], columns: Sequence[str]) -> list[str]:
    """Return the files of the table's name that have these columns. Only their first lines are read."""
    found = (path for path in paths if path.rpartition("/")[2].lower() == TABLE and not is_clutter(path))
    return [path for path in found if {*columns} <= {*_read_header(root / path)}]


def _read_header(file: StoragePath) -> list[str]:
    with file.open() as stream:
        text = stream.read(_HEADER_BYTES).decode("utf-8-sig", errors="replace")
    return next(csv.reader(text.splitlines()[:1]), [])


def read_labels(
    root: StoragePath,
    paths: Sequence[str],
    columns: Sequence[str],
    read_row: Callable[[Mapping[str, str]], ImageRow | None],
    notes: Sequence[str] = (),
) -> Labelling:
    """Label each image by the row that has its name in the first of the columns, with or without extension.

    Args:
        read_row: returns None for a label that means nothing.

    Raises:
        UsageError: several tables; one that is damaged; a label that means nothing; an image in two rows.
    """
    tables = _find_tables(root, paths, columns)
    if len(tables) > 1:
        raise UsageError(f"--data {root}: holds {len(tables)} data sets, {join_few(tables)}. Name the folder of one.")
    (table,) = tables
    rows = _read_rows(root, table, columns, read_row)
    kept, left_out = sort_out(path for path in paths if path != table)
    builder, seen = LabellingBuilder(left_out), set()
    for path in kept:
        stem = stem_of(path)
        row = rows.get(stem)
        seen.add(stem)
        if row is None:
            builder.leave_out(f"no row in {TABLE}")
        elif row.label == EXCLUDED:
            builder.leave_out(OF_EXCLUDED)
        else:
            split = find_split(folder_of(path).split("/"))
            builder.add(LabelledFile(path, row.label, split, row.patient, row.study), [row.word])
    builder.leave_out(f"in {TABLE}, but not in the folder", len(rows.keys() - seen))
    return builder.build(*notes)


def _read_rows(
    root: StoragePath, table: str, columns: Sequence[str], read_row: Callable[[Mapping[str, str]], ImageRow | None]
) -> dict[str, ImageRow]:
    """Return the rows by the name of their image, without extension."""
    key, label = columns[:2]
    rows: dict[str, ImageRow] = {}
    for line, values in _read_table(root, table):
        where = f"--data {root}: {table}, line {line}"
        name = stem_of(values[key].strip())
        row = read_row(values)
        if row is None:
            raise UsageError(f"{where}: {label} {values[label]!r} is neither 0 nor 1. Correct it, or fetch it anew.")
        if rows.setdefault(name, row) != row:
            raise UsageError(f"{where}: {name!r} is in the file twice, with other values. Remove one of the rows.")
    return rows


def _read_table(root: StoragePath, table: str) -> list[tuple[int, dict[str, str]]]:
    try:
        text = (root / table).read_bytes(most=_MOST_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--data {root}: {table} cannot be read as text: {error}. Fetch it anew.") from None
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows = []
    try:
        for row in reader:
            if None in row or None in row.values():
                raise csv.Error(f"it has not the {len(reader.fieldnames or [])} values that the first line names")
            rows.append((reader.line_num, row))
    except csv.Error as error:
        raise UsageError(
            f"--data {root}: {table}, line {reader.reader.line_num}: not readable as CSV: {error}. Fetch it anew."
        ) from None
    return rows
