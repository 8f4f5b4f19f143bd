"""Read a table as people keep it: CSV of any usual separator and encoding, or a sheet of an .xlsx."""

import codecs
import csv
import io
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, NamedTuple

from fracture.errors import UsageError
from fracture.storage import StoragePath

MOST_VALUES = 2**25  # of a sheet, empty ones among them: some hundred megabytes
SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}
_MOST_BYTES = 2**29  # of the file, and of all that an .xlsx unfolds to; some millions of rows
_MOST_ROWS = 2**20  # of a sheet, Excel's own limit; a damaged one may claim any number
_MOST_COLUMNS = 256  # of a sheet; a cell in Excel's last column makes a row of 16,384
_HEAD = 20  # rows among which the header stands; those above it are a title
_SEPARATOR_LINE = re.compile(r'"?sep=([^\w\s"]|\t)"?[^\S\r\n]*(\r\n|\r|\n)', re.IGNORECASE)  # Excel's own first line
_ESCAPES = re.compile("[\udc80-\udcff]+")
_XLSX = b"PK\x03\x04"  # a zip archive
_OLE = b"\xd0\xcf\x11\xe0"  # an .xls, or an .xlsx that a password locks

IsHeader = Callable[[Sequence[str]], bool]  # whether a row's values name the columns


class Row(NamedTuple):
    """A row of a table, with its values as they stand there."""

    number: int  # as spreadsheets and editors count, from 1
    values: tuple[str, ...]

    def raw_value(self, column: int | None) -> str:
        """Return the value of a column; "" if there is no such column, or the row ends before it."""
        return "" if column is None or column >= len(self.values) else self.values[column]

    def value(self, column: int | None) -> str:
        """Return the value of a column without spaces at its ends."""
        return self.raw_value(column).strip()


class Table(NamedTuple):
    """The header of a table and the rows below it; rows without any value are left out."""

    header: Row
    rows: list[Row]


def read_table(file: StoragePath, where: str, is_header: IsHeader) -> Table:
    """Read a table. The header is the first row that `is_header` accepts, or else the first of two values or more.

    Separator and encoding are found from the content. Of an .xlsx, the first visible sheet with a header is read.

    Args:
        where: the file, for the start of messages, which hold none of its values.

    Raises:
        UsageError: no such file, too large, no table, or quoted wrongly; names the row.
    """
    try:
        data = file.read_bytes(most=_MOST_BYTES)
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else "not a file that can be read"
        raise UsageError(f"{where}: {reason}. Check the path and its permissions.") from None
    if data.startswith(_OLE):
        raise UsageError(f"{where}: an old .xls, or locked by a password. Save it as .xlsx without one, or as CSV.")
    sheets = _read_sheets(data, where) if data.startswith(_XLSX) else [_read_text(data, where, is_header)]
    tables = [
        _find_table(rows, is_header) for sheet in sheets if (rows := [row for row in sheet if _count_values(row)])
    ]
    if not tables:
        raise UsageError(f"{where}: the file is empty. Its first row names the columns, the others name images.")
    return max(tables, key=lambda table: (is_header(table.header.values), _count_values(table.header) > 1))


def _find_table(rows: list[Row], is_header: IsHeader) -> Table:
    head = rows[:_HEAD]
    named = (i for i, row in enumerate(head) if is_header(row.values))
    wide = (i for i, row in enumerate(head) if _count_values(row) > 1)
    start = next(named, next(wide, 0))
    return Table(rows[start], rows[start + 1 :])


def _count_values(row: Row) -> int:
    return sum(bool(value.strip()) for value in row.values)


def read_as_windows(text: str) -> str:
    """Return a text whose bytes that are no UTF-8 (surrogate escapes) are read as Windows-1252 where it has them."""
    return _ESCAPES.sub(
        lambda match: match[0].encode("ascii", "surrogateescape").decode("cp1252", "surrogateescape"), text
    )


def _decode(data: bytes, where: str) -> str:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        text = data.decode("utf-16", "replace")
    else:
        text = read_as_windows(data.decode("utf-8-sig", "surrogateescape"))
    if "\0" in text:
        raise UsageError(f"{where}: no text, or UTF-16 without a byte order mark. Save it as .xlsx or as CSV in UTF-8.")
    return text


def _read_text(data: bytes, where: str, is_header: IsHeader) -> list[Row]:
    text, first = _decode(data, where), 1
    if line := _SEPARATOR_LINE.match(text):
        separator, text, first = line[1], text[line.end() :], 2
    else:
        separator = _find_separator(text, is_header)
    rows: list[Row] = []
    try:
        for values in csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True):
            rows.append(Row(first + len(rows), tuple(values)))
    except csv.Error as error:
        name = SEPARATORS.get(separator, repr(separator))
        raise UsageError(
            f"{where}, row {first + len(rows)}: not readable as CSV with the separator {name}: {error}. Close the "
            "quotes, or save the table as .xlsx or as CSV in UTF-8."
        ) from None
    return rows


def _find_separator(text: str, is_header: IsHeader) -> str:
    heads: dict[str, list[list[str]]] = {}
    for separator in SEPARATORS:
        heads[separator] = []
        with suppress(csv.Error):  # of the right separator, it is raised again when all rows are read
            heads[separator].extend(islice(csv.reader(io.StringIO(text, newline=""), delimiter=separator), _HEAD))
    for separator, rows in heads.items():
        if any(map(is_header, rows)):
            return separator
    return max(SEPARATORS, key=lambda separator: max(map(len, heads[separator]), default=0))


def _read_sheets(data: bytes, where: str) -> list[list[Row]]:
    """Return the rows of each visible sheet."""
    try:
        import openpyxl
    except ImportError:
        raise UsageError(
            f"{where}: .xlsx needs openpyxl, which is not installed here: pip install 'fracture[excel]'. Or save the "
            "sheet as CSV in UTF-8."
        ) from None
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > _MOST_BYTES:
            raise UsageError(f"{where}: unfolds to {size:,} bytes, over the limit of {_MOST_BYTES:,}. Save it as CSV.")
        with warnings.catch_warnings(action="ignore"):  # of styles and rules that it does not know
            book = openpyxl.load_workbook(io.BytesIO(data), read_only=True, data_only=True)
            return [list(_rows_of(sheet, where)) for sheet in book.worksheets if sheet.sheet_state == "visible"]
    except UsageError:
        raise
    except Exception:  # on a damaged file openpyxl and its parsers raise errors of many types
        raise UsageError(f"{where}: not readable as .xlsx. Save it anew as .xlsx, or as CSV in UTF-8.") from None


def _rows_of(sheet: Any, where: str) -> Iterator[Row]:
    sheet.reset_dimensions()  # what the file claims may be wrong, and every row would be filled up to it
    count = 0
    for number, cells in enumerate(sheet.iter_rows(max_row=_MOST_ROWS), start=1):
        values = [_text_of(cell) for cell in cells[:_MOST_COLUMNS]]
        while values and not values[-1].strip():
            values.pop()
        count += len(values)
        fault = f"the sheet has more than {MOST_VALUES:,} values" if count > MOST_VALUES else ""
        if any(cell.value is not None for cell in cells[_MOST_COLUMNS:]):
            fault = f"has a value beyond column {_MOST_COLUMNS}"
        if fault:
            raise UsageError(f"{where}, row {number}: {fault}. Keep only the columns of keys, labels and patients.")
        yield Row(number, tuple(values))


def _text_of(cell: Any) -> str:
    """Return what a cell shows: 1.0 is shown as 1, and 12 in the format 0000 as 0012."""
    value = cell.value
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is int and re.fullmatch("0+", cell.number_format):
        return str(value).zfill(len(cell.number_format))
    return str(value)
