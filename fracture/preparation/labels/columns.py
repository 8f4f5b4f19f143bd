"""Find what the columns of a labels file are by their names."""

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from fracture.errors import UsageError
from fracture.preparation.labels.class_words import normalise_word
from fracture.preparation.labels.image_keys import MEANINGS
from fracture.preparation.labels.spreadsheet import SEPARATORS

# Names of columns as `_simplify` writes them, in English, German and their neighbours. Of several patient, study or
# origin columns the one listed first is read: an id before a name.
_LABEL_NAMES = (
    *("label", "labels", "class", "classname", "fracture", "fractured", "isfracture", "isfractured", "hasfracture"),
    *("fracturelabel", "fracturevisible", "diagnosis", "finding", "findings", "result", "category", "target"),
    *("groundtruth", "y", "ytrue", "klasse", "befund", "diagnose", "fraktur", "bruch", "ergebnis", "kategorie"),
    *("classe", "etiquette", "diagnostic", "resultat", "clase", "etiqueta", "diagnostico", "hallazgo", "fractura"),
    *("fratura", "frattura", "diagnosi", "etichetta", "rotulo", "fractuur", "brudd", "brud", "zlamanie"),
)
_KEY_NAMES = {
    "path": (
        *("path", "filepath", "imagepath", "file", "filename", "imagefile", "imagefilename", "image", "imagename"),
        *("imageid", "filestem", "img", "imgpath", "imgname", "imgid", "picture", "photo", "radiograph"),
        *("pfad", "dateipfad", "bildpfad", "datei", "dateiname", "bild", "bilddatei", "bildname", "bildid", "aufnahme"),
        *("chemin", "fichier", "nomfichier", "nomdufichier", "ruta", "archivo", "nombrearchivo", "imagen", "caminho"),
        *("arquivo", "imagem", "percorso", "immagine", "nomefile", "pad", "bestand", "bestandsnaam", "plik", "fil"),
    ),
    "instance": ("sopinstanceuid", "sopuid", "sopinstance", "instanceuid", "imageuid"),
    "study": (
        *("studyinstanceuid", "studyuid", "studyid", "study", "studynumber", "studyno", "examid", "exam"),
        *("examination", "studie", "studienuid", "studienid", "untersuchung", "untersuchungsnummer", "examen"),
        *("estudio", "estudo", "studio", "onderzoek"),
    ),
    "accession": (
        *("accessionnumber", "accession", "accessionno", "accessionnr", "accessionid", "accno", "accnr", "accnum"),
        *("acc", "auftragsnummer", "auftragsnr", "anforderungsnummer", "anforderungsnr", "zugangsnummer"),
        *("numerodacces", "numerodeacceso", "numerodeacesso"),
    ),
    "patient": (
        *("patientid", "patid", "pid", "ptid", "patientnumber", "patientno", "patientnr", "patnr", "mrn"),
        *("medicalrecordnumber", "patientenid", "patientennummer", "patientennr", "patientuid", "subjectid"),
        *("idpatient", "idpaciente", "idpaziente", "patient", "subject", "paciente", "paziente", "pacjent"),
    ),
}
_ORIGIN_NAMES = (
    *("source", "origin", "site", "hospital", "institution", "institutionname", "centre", "center", "clinic"),
    *("collection", "herkunft", "quelle", "standort", "klinik", "krankenhaus", "haus", "hopital", "ospedale"),
)
_ORIGIN_NAMES_OF_PRIVATE = ("source", "origin")  # whose values are written: an institution's name shall not be
_KNOWN_KEYS = {name for names in _KEY_NAMES.values() for name in names}
_KNOWN = {*_LABEL_NAMES, *_KNOWN_KEYS, *_ORIGIN_NAMES}
# The usual name of a column of each kind, for messages.
NAME_OF_KEY = {
    "path": "path",
    "instance": "SOPInstanceUID",
    "study": "StudyInstanceUID",
    "accession": "AccessionNumber",
    "patient": "PatientID",
}
# What a column of such a name may hold. A column of another name, which --key names, may hold any.
_MEANINGS_OF = {
    "path": ("path", "instance"),
    "instance": ("instance", "path"),
    "study": ("study", "accession"),
    "accession": ("accession", "study"),
    "patient": ("patient",),
}
_MOST_COLUMNS = 12  # in a message
_MOST_CHARACTERS = 60  # of a value in a message


@dataclass(frozen=True)
class Wording:
    """How messages begin, and whether they may show what is in the file."""

    where: str
    private: bool

    def show(self, value: str) -> str:
        """Return a value in brackets, with a space before it; "" if it is private."""
        return "" if self.private else f" ({quote(value)})"


@dataclass(frozen=True)
class Columns:
    """The columns that are read, by number."""

    names: tuple[str, ...]  # as the header gives them
    label: int
    keys: list[tuple[int, tuple[str, ...]]]  # columns that may name the images, each with the meanings it may have
    patient: int | None
    study: int | None
    origin: int | None

    def list_ignored(self, key: int, *, show_names: bool) -> list[str]:
        """Return the columns that are not read where this one names the images: their names, or numbers from 1."""
        read = {self.label, key, self.patient, self.study, self.origin}
        ignored = [(column, name) for column, name in enumerate(self.names, 1) if name and column - 1 not in read]
        return [name if show_names else str(column) for column, name in ignored]


def names_columns(values: Sequence[str], key: str | None) -> bool:
    """Return whether these are the values of a header: they name a label, and what it belongs to."""
    names = [_simplify(value) for value in values]
    has_key = not _KNOWN_KEYS.isdisjoint(names) if key is None else bool(_find_by_name(values, key))
    return has_key and not set(_LABEL_NAMES).isdisjoint(names)


def find_columns(header: Sequence[str], key: str | None, wording: Wording) -> Columns:
    """Find the columns by the names in the header.

    Args:
        key: name of the column that names the images; None to find it by the known names.

    Raises:
        UsageError: no column of labels or keys, several of one name, or several that may be the label.
    """
    if sum(bool(text.strip()) for text in header) == 1:
        raise UsageError(
            f"{wording.where}: the first row is a single column{wording.show(''.join(header))}, or separated by "
            f"something other than {', '.join(SEPARATORS.values())}. Save the table as .xlsx or as CSV in UTF-8."
        )
    names = [_simplify(text) for text in header]
    if double := [name for name, count in Counter(names).items() if count > 1 and name in _KNOWN]:
        raise UsageError(
            f"{wording.where}: {double[0]!r} names two columns, and only one would be read. Remove or rename the other."
        )
    keys = _find_keys(header, names, wording) if key is None else _find_given_key(header, key, wording)
    patient, study, accession = (_find_first(names, _KEY_NAMES[kind]) for kind in ("patient", "study", "accession"))
    return Columns(
        names=tuple(text.strip() for text in header),
        label=_find_label(header, names, {column for column, _ in keys}, wording),
        keys=keys,
        patient=patient,
        study=accession if study is None else study,
        origin=_find_first(names, _ORIGIN_NAMES_OF_PRIVATE if wording.private else _ORIGIN_NAMES),
    )


def quote(value: str) -> str:
    """Return a value as messages show it: in quotes, on one line, and not too long."""
    return repr(value if len(value) <= _MOST_CHARACTERS else f"{value[:_MOST_CHARACTERS]}…")


def _simplify(text: str) -> str:
    """Return the name of a column as names are compared: `Accession-No.` and `AccessionNo (RIS)` are accessionno."""
    plain = unicodedata.normalize("NFD", normalise_word(re.sub(r"\([^)]*\)\s*$", "", text)))
    return re.sub(r"[\W_]+", "", "".join(char for char in plain if not unicodedata.combining(char)))


def _find_all(names: Sequence[str], known: Iterable[str]) -> list[int]:
    """Return the columns of known names, in the order of the known names."""
    return [names.index(name) for name in known if name in names]


def _find_first(names: Sequence[str], known: Iterable[str]) -> int | None:
    return next(iter(_find_all(names, known)), None)


def _find_by_name(header: Sequence[str], name: str) -> list[int]:
    """Return the columns of exactly this name, or else those whose name is only written otherwise."""
    exact = [i for i, text in enumerate(header) if text.strip() == name.strip()]
    return exact or [i for i, text in enumerate(header) if _simplify(text) and _simplify(text) == _simplify(name)]


def _find_keys(header: Sequence[str], names: Sequence[str], wording: Wording) -> list[tuple[int, tuple[str, ...]]]:
    columns = {kind: _find_all(names, known) for kind, known in _KEY_NAMES.items()}
    patients = columns.pop("patient")
    found = [(column, _MEANINGS_OF[kind]) for kind, listed in columns.items() for column in listed]
    if not found and patients:  # a patient may have fractured one bone only: the last that a label is taken to be of
        return [(patients[0], _MEANINGS_OF["patient"])]
    if not found:
        near = _find_similar(_names_to_show(header, wording), _KNOWN_KEYS)
        fix = f"{near!r} may be it: name it with --key {near!r}." if near else "Name the column with --key COLUMN."
        raise UsageError(
            f"{wording.where}: no column names the images, such as 'path', 'filename', 'StudyInstanceUID' or "
            f"'AccessionNumber'; {_describe(header, wording)}. {fix}"
        )
    return found


def _find_given_key(header: Sequence[str], key: str, wording: Wording) -> list[tuple[int, tuple[str, ...]]]:
    columns = _find_by_name(header, key)
    if len(columns) == 1:
        name = _simplify(header[columns[0]])
        kind = next((kind for kind, names in _KEY_NAMES.items() if name in names), None)
        return [(columns[0], _MEANINGS_OF[kind] if kind else tuple(MEANINGS))]
    if columns:
        raise UsageError(f"{wording.where}: --key {key!r} names two columns. Rename one of them.")
    near = _find_similar(_names_to_show(header, wording), [_simplify(key)], cutoff=0.6)
    fix = f"Is {near!r} meant?" if near else "Name one of its columns."
    raise UsageError(f"{wording.where}: no column is called --key {key!r}; {_describe(header, wording)}. {fix}")


def _find_label(header: Sequence[str], names: Sequence[str], keys: Collection[int], wording: Wording) -> int:
    found = [column for column in _find_all(names, _LABEL_NAMES) if column not in keys]
    if len(found) == 1 or (found and names[found[0]] == _LABEL_NAMES[0]):
        return found[0]
    if found:
        raise UsageError(
            f"{wording.where}: columns {_join(header[column] for column in sorted(found))} may each be the label. "
            "Rename the one that says fracture or normal to 'label'."
        )
    near = _find_similar(_names_to_show(header, wording), _LABEL_NAMES)
    fix = f"{near!r} may be it: rename it to 'label'." if near else "Rename the column of labels to 'label'."
    raise UsageError(
        f"{wording.where}: no column holds the label, such as 'label', 'class' or 'fracture'; "
        f"{_describe(header, wording)}. {fix}"
    )


def _find_similar(header: Sequence[str], known: Collection[str], cutoff: float = 0.75) -> str | None:
    return next((text for text in header if get_close_matches(_simplify(text), known, n=1, cutoff=cutoff)), None)


def _names_to_show(header: Sequence[str], wording: Wording) -> list[str]:
    """Return the names of the columns; none where the row may hold a patient's data and no names."""
    if wording.private and (_KNOWN - set(_LABEL_NAMES)).isdisjoint(map(_simplify, header)):
        return []
    return [text.strip() for text in header if text.strip()]


def _describe(header: Sequence[str], wording: Wording) -> str:
    names = _names_to_show(header, wording)
    if not names:
        return "no value of its first row is a known name"
    return f"its columns are {_join(names)}"


def _join(names: Iterable[str]) -> str:
    listed = [quote(name.strip()) for name in names]
    return ", ".join(listed[:_MOST_COLUMNS]) + (
        f" and {more} more" if (more := len(listed) - _MOST_COLUMNS) > 0 else ""
    )
