"""Read a labels file: the label, patient, study and origin of each image that its rows name."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import NamedTuple

from fracture.errors import UsageError
from fracture.labels import CLASS_NAMES
from fracture.preparation.labels.class_words import EXCLUDED, ClassWords
from fracture.preparation.labels.columns import NAME_OF_KEY, Columns, Wording, find_columns, names_columns, quote
from fracture.preparation.labels.image_keys import MEANINGS, FileIdentity, ImageKeys
from fracture.preparation.labels.labelling import LabelledFile, Labelling
from fracture.preparation.labels.spreadsheet import Row, Table, read_table
from fracture.storage import StoragePath

_NUMBERED_WORD = re.compile(r"\d.*[^\W\d_]")  # `study4711 fracture`: the number may be a patient's
_MOST_SHOWN = 5  # rows, words and paths in a message


@dataclass(frozen=True)
class LabelsFile:
    """What a labels file says of the images of a folder."""

    labelling: Labelling
    unmatched_rows: list[int]  # rows that name no image
    unlabelled: list[str]  # paths that no row names
    ignored_columns: list[str]  # names, or numbers where messages show no value of the file
    key: str  # what the values that name the images are: one of MEANINGS
    repeated_rows: list[int]  # rows that say again what an earlier one says of the same image


@dataclass(frozen=True)
class _Key:
    """The column that names the images, and what its values were found to name."""

    column: int
    name: str  # as the header gives it
    tried: Sequence[str]  # meanings
    meaning: str  # by which most rows name an image
    paths: Mapping[str, list[str]]  # value -> images
    shared: Mapping[Row, list[str]] = field(default_factory=dict)  # row whose value several patients have -> its images

    def paths_of(self, row: Row) -> list[str]:
        return self.shared[row] if row in self.shared else self.paths.get(row.raw_value(self.column), [])

    def count_matches(self, rows: Iterable[Row]) -> int:
        return sum(bool(self.paths_of(row)) for row in rows)


class _Facts(NamedTuple):
    """What a row says of its images."""

    label: int | None  # or EXCLUDED; None where the row leaves it empty
    patient: str
    study: str
    origin: str


def read_labels_file(
    labels: StoragePath,
    paths: Sequence[str],
    words: ClassWords,
    *,
    key: str | None = None,
    root: str = "",
    identities: Mapping[str, FileIdentity] = {},
    private: bool = False,
    max_unmatched: float,
) -> LabelsFile:
    """Read a labels file, and find the images that its rows name.

    Args:
        paths: the images below the data folder, as on the disk.
        key: header of the column that names the images; None to find it by its name.
        root: the data folder as absolute paths begin; "" if none is absolute.
        identities: path -> what its DICOM header says.
        private: messages show no path and no value of the file.
        max_unmatched: share of the rows that may name no image.

    Raises:
        UsageError: no table, a missing or ambiguous column, a value without a column, an unknown label, a name that
            several files or a study that several patients share, rows that contradict each other, or too many that
            name no image.
    """
    wording = Wording("--labels" if private else f"--labels {labels}", private)
    table = read_table(labels, wording.where, lambda values: names_columns(values, key))
    columns = find_columns(table.header.values, key, wording)
    _check_rows(table, wording)
    images = ImageKeys(paths, root, identities)
    used = _find_key(table.rows, columns, images, max_unmatched, wording)
    if used.meaning in ("study", "accession"):
        used = replace(used, shared=_find_shared(table.rows, used, columns.patient, images, wording))
    unmatched = _find_unmatched(table.rows, used, images, max_unmatched, wording)
    if used.meaning == "patient":  # a row's study is that of some of its images only
        columns = replace(columns, study=None)
    rows_of = _group_by_path(table.rows, used, wording)
    facts = _read_facts({row for rows in rows_of.values() for row in rows}, columns, words, wording)
    for path, rows in rows_of.items():  # a row without a label says nothing where another has one
        rows_of[path] = [row for row in rows if facts[row].label is not None] or rows[:1]
        _check_agreement(path, rows_of[path], facts, columns, used, wording)
    return LabelsFile(
        labelling=_label_images(rows_of, facts, columns, wording),
        unmatched_rows=[row.number for row in unmatched],
        unlabelled=[path for path in images.paths if path not in rows_of and f"{root}/{path}" != str(labels)],
        ignored_columns=columns.list_ignored(used.column, show_names=not private),
        key=used.meaning,
        repeated_rows=sorted({row.number for rows in rows_of.values() for row in rows[1:]}),
    )


def _check_rows(table: Table, wording: Wording) -> None:
    """Check that there are rows, and that each value has a named column: it may be the patient, who then would leak.

    A first column of numbers that are all different, as pandas writes before each row, can join no patient's images.
    """
    if not table.rows:
        raise UsageError(f"{wording.where}: names no image; there is no row below the header. Add one for each image.")
    names, counts = table.header, [row.value(0) for row in table.rows]
    first = 1 if not names.value(0) and all(map(str.isdigit, counts)) and len(set(counts)) == len(counts) else 0
    for row in table.rows:
        for column in range(first, len(row.values)):
            if row.value(column) and not names.value(column):
                raise UsageError(
                    f"{wording.where}, row {row.number}: has a value in column {column + 1}, which has no name in row "
                    f"{names.number}. Name every column there, or quote a value that holds the separator."
                )


def _find_key(rows: Sequence[Row], columns: Columns, images: ImageKeys, max_unmatched: float, wording: Wording) -> _Key:
    """Return the first column and meaning by which enough rows name images, or else those by which most do.

    Raises:
        UsageError: the column has no known name, and enough rows name other images by another meaning.
    """
    keys: list[_Key] = []
    for column, meanings in columns.keys:
        values = {row.raw_value(column) for row in rows}
        found = [_Key(column, columns.names[column], meanings, m, images.find(values, m)) for m in meanings]
        enough = [key for key in found if len(rows) - key.count_matches(rows) <= max_unmatched * len(rows)]
        if len(meanings) == len(MEANINGS):
            _check_one_meaning(rows, enough, wording)
        if enough:
            return enough[0]
        keys += found
    return max(keys, key=lambda key: key.count_matches(rows))


def _check_one_meaning(rows: Sequence[Row], keys: Sequence[_Key], wording: Wording) -> None:
    for first, other in combinations(keys, 2):
        for row in rows:
            one, two = first.paths_of(row), other.paths_of(row)
            if one and two and one != two:
                raise UsageError(
                    f"{wording.where}, row {row.number}: the value of {quote(first.name)}"
                    f"{wording.show(row.value(first.column))} names different images among "
                    f"{MEANINGS[first.meaning]} and among {MEANINGS[other.meaning]}. Rename the column to "
                    f"{NAME_OF_KEY[first.meaning]!r} or to {NAME_OF_KEY[other.meaning]!r}."
                )


def _find_shared(
    rows: Iterable[Row], used: _Key, column: int | None, images: ImageKeys, wording: Wording
) -> dict[Row, list[str]]:
    """Return the images of each row whose value is in the headers of several patients: those of the row's own patient.

    Args:
        column: of patients; None if there is none.

    Raises:
        UsageError: the row names no patient.
    """
    count = {value: images.count_patients(paths) for value, paths in used.paths.items()}
    shared: dict[Row, list[str]] = {}
    for row in rows:
        if count.get(row.raw_value(used.column), 0) < 2:
            continue
        if not row.value(column):
            other = "'StudyInstanceUID'" if used.meaning == "accession" else "paths"
            raise UsageError(
                f"{wording.where}, row {row.number}: the value of {quote(used.name)}"
                f"{wording.show(row.value(used.column))} is of images of {count[row.raw_value(used.column)]} patients. "
                f"Give the row's patient in a column 'PatientID', or name the images by a column of {other}."
            )
        shared[row] = images.select_patient(used.paths_of(row), row.value(column))
    return shared


def _find_unmatched(
    rows: Sequence[Row], used: _Key, images: ImageKeys, max_unmatched: float, wording: Wording
) -> list[Row]:
    """Return the rows that name no image.

    Raises:
        UsageError: all of them, or more than the limit.
    """
    unmatched = [row for row in rows if not used.paths_of(row)]
    if len(unmatched) < len(rows) and len(unmatched) <= max_unmatched * len(rows):
        return unmatched
    if len(unmatched) == len(rows):
        count = f"none of the {len(rows)} rows names an image"
    else:
        count = f"{len(unmatched)} of {len(rows)} rows name no image, over the limit of {max_unmatched:.0%}"
    listed = _join_few(f"row {row.number}{wording.show(row.value(used.column))}" for row in unmatched)
    examples = "" if wording.private else f", and --data holds {' and '.join(map(quote, images.paths[:2]))}"
    raise UsageError(
        f"{wording.where}: {count}: {listed}. Column {quote(used.name)} was read as "
        f"{', '.join(MEANINGS[meaning] for meaning in used.tried)}{examples}. "
        f"{_describe_lost_zeros(unmatched, used, images)}Correct these rows, name another column with --key COLUMN, or "
        "raise data.max_unmatched_fraction."
    )


def _describe_lost_zeros(unmatched: Sequence[Row], used: _Key, images: ImageKeys) -> str:
    ids = [row.value(used.column) for row in unmatched]
    count = max((images.count_without_zeros(ids, m) for m in used.tried if m != "path"), default=0)
    if not count:
        return ""
    return f"{count} of them would but for zeros at the start, which spreadsheets drop: keep that column as text. "


def _group_by_path(rows: Iterable[Row], used: _Key, wording: Wording) -> dict[str, list[Row]]:
    """Return the rows that name each image."""
    rows_of = defaultdict(list)
    for row in rows:
        paths = used.paths_of(row)
        if used.meaning == "path" and len(paths) > 1:
            pair = "" if wording.private else f", {quote(paths[0])} and {quote(paths[1])}"
            raise UsageError(
                f"{wording.where}, row {row.number}: the value of {quote(used.name)}"
                f"{wording.show(row.value(used.column))} names {len(paths)} files{pair}. Give the whole path below "
                "--data, as it is on the disk."
            )
        for path in paths:
            rows_of[path].append(row)
    return dict(rows_of)


def _read_facts(rows: Iterable[Row], columns: Columns, words: ClassWords, wording: Wording) -> dict[Row, _Facts]:
    facts: dict[Row, _Facts] = {}
    unknown: dict[str, Row] = {}
    for row in sorted(rows):
        word = row.value(columns.label)
        label = words.of_value(word)
        if word and label is None:
            unknown.setdefault(word, row)
        facts[row] = _Facts(label, row.value(columns.patient), row.value(columns.study), row.value(columns.origin))
    if unknown:
        listed = _join_few(_describe_unknown(word, row, words, wording) for word, row in unknown.items())
        raise UsageError(
            f"{wording.where}: column {quote(columns.names[columns.label])} has {len(unknown)} "
            f"{'words' if len(unknown) > 1 else 'word'} of no known class: {listed}. Say what WORD means with --set "
            "'data.fracture_labels=[WORD]' or --set 'data.normal_labels=[WORD]', or leave its images out with --set "
            "'data.excluded_labels=[WORD]'."
        )
    return facts


def _describe_unknown(word: str, row: Row, words: ClassWords, wording: Wording) -> str:
    near = words.nearest_value(word)
    return f"row {row.number}{wording.show(word)}{f', near {quote(near)}' if near else ''}"


def _check_agreement(
    path: str, rows: Sequence[Row], facts: Mapping[Row, _Facts], columns: Columns, used: _Key, wording: Wording
) -> None:
    """Check that the rows which name one image say the same of it."""
    first = rows[0]
    for row in rows[1:]:
        for fact in _Facts._fields:
            if getattr(facts[first], fact) == getattr(facts[row], fact):
                continue
            column = getattr(columns, fact)
            values = "" if wording.private else f", {quote(first.value(column))} and {quote(row.value(column))}"
            fix = "" if used.meaning in ("path", "instance") else ", or name a column of paths with --key COLUMN"
            raise UsageError(
                f"{wording.where}: rows {first.number} and {row.number} name the same image{wording.show(path)}, with "
                f"different values of {quote(columns.names[column])}{values}. Correct or remove one of them{fix}."
            )


def _label_images(
    rows_of: Mapping[str, Sequence[Row]], facts: Mapping[Row, _Facts], columns: Columns, wording: Wording
) -> Labelling:
    files: list[LabelledFile] = []
    left_out: Counter[str] = Counter()
    found: dict[str, set[str]] = {name: set() for name in CLASS_NAMES}
    for path, rows in sorted(rows_of.items()):
        label, patient, study, origin = facts[rows[0]]
        if label is None:
            left_out["without a label"] += 1
            continue
        if label == EXCLUDED:
            left_out["excluded by data.excluded_labels"] += 1
            continue
        files.append(LabelledFile(path, label, patient=patient, study=study, origin=origin))
        words = {row.value(columns.label) for row in rows}
        found[CLASS_NAMES[label]] |= {word for word in words if not (wording.private and _NUMBERED_WORD.search(word))}
    return Labelling(tuple(files), {name: sorted(words) for name, words in found.items()}, dict(left_out))


def _join_few(texts: Iterable[str]) -> str:
    listed = list(texts)
    more = f" and {len(listed) - _MOST_SHOWN} more" if len(listed) > _MOST_SHOWN else ""
    return ", ".join(listed[:_MOST_SHOWN]) + more
