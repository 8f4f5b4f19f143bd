"""Find the images that a key of a labels file names: by path, file name, or what a DICOM header says."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from fracture.preparation.labels.spreadsheet import read_as_windows

# What a key may mean, from the most specific to the least: name in code -> name in messages.
MEANINGS = {
    "path": "paths or file names",
    "instance": "SOP instance UIDs",
    "study": "study instance UIDs",
    "accession": "accession numbers",
    "patient": "patient ids",
}
_EXTENSION = re.compile(r"\.[a-z][a-z0-9]{1,4}$", re.IGNORECASE)  # never the last number of a UID
_WHOLE = re.compile(r"^(\d+)\.0$")  # a number as pandas writes it where others of its column are missing


@dataclass(frozen=True)
class FileIdentity:
    """What a DICOM header says of a file's origin. It is held in memory only, and never written."""

    instance: str = ""  # SOPInstanceUID
    study: str = ""  # StudyInstanceUID
    accession: str = ""
    patient: str = ""


class ImageKeys:
    """The images of a data folder, found by keys."""

    def __init__(self, paths: Sequence[str], root: str, identities: Mapping[str, FileIdentity]) -> None:
        """Take the images of a folder.

        Args:
            root: the folder as absolute keys begin; "" if none is absolute.
            identities: path -> what its header says; none for files without a header.
        """
        self.paths = sorted(paths)
        self._root = f"{_unify(root).rstrip('/')}/" if root else ""
        self._identities = identities

    def find(self, keys: Collection[str], meaning: str) -> dict[str, list[str]]:
        """Return the paths that each key names; a key that names none is left out.

        A path or file name that several files share has them all.
        """
        return self._find_paths(keys) if meaning == "path" else self._find_ids(keys, meaning)

    def _find_paths(self, keys: Collection[str]) -> dict[str, list[str]]:
        exact = _group((read_as_windows(path), path) for path in self.paths)
        found = {key: exact[key] for key in keys if key in exact}
        pending = {key: self._make_relative(key) for key in keys if key not in found}
        unified = [(_unify(path), path) for path in self.paths]
        for fold, part in product((str, str.casefold), _PARTS):
            if not pending:
                break
            wanted = {fold(text) for text in pending.values()}
            index = _group((form, path) for text, path in unified if (form := fold(part(text))) in wanted)
            found |= {key: index[fold(text)] for key, text in pending.items() if fold(text) in index}
            pending = {key: text for key, text in pending.items() if key not in found}
        return found

    def _make_relative(self, key: str) -> str:
        return re.sub(r"^(\./)+", "", _unify(key).removeprefix(self._root))

    def _find_ids(self, keys: Collection[str], meaning: str) -> dict[str, list[str]]:
        index = self._index_ids(meaning)
        found = ((key, index.get(_unify(key)) or index.get(_WHOLE.sub(r"\1", _unify(key)))) for key in keys)
        return {key: paths for key, paths in found if paths}

    def _index_ids(self, meaning: str) -> dict[str, list[str]]:
        ids = ((self._id_of(path, meaning), path) for path in self.paths)
        return _group((text, path) for text, path in ids if text)

    def _id_of(self, path: str, meaning: str) -> str:
        return _unify(getattr(self._identities.get(path, FileIdentity()), meaning))

    def count_patients(self, paths: Iterable[str]) -> int:
        """Return how many patients the headers of these images name."""
        return len({patient for path in paths if (patient := self._id_of(path, "patient"))})

    def select_patient(self, paths: Iterable[str], patient: str) -> list[str]:
        """Return those of the paths whose header names this patient."""
        index = _group((self._id_of(path, "patient"), path) for path in paths)
        return index.get(_unify(patient)) or index.get(_WHOLE.sub(r"\1", _unify(patient)), [])

    def count_without_zeros(self, keys: Iterable[str], meaning: str) -> int:
        """Return how many ids name an image but for zeros at the start, which spreadsheets drop from numbers."""
        ids = {text.lstrip("0") for text in self._index_ids(meaning)}
        return sum(_WHOLE.sub(r"\1", _unify(key)).lstrip("0") in ids for key in keys)


def _group(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    groups = defaultdict(list)
    for key, value in pairs:
        groups[key].append(value)
    return dict(groups)


def _unify(text: str) -> str:
    """Return a key or a path in one Unicode form, with slashes, and without spaces at its ends."""
    return unicodedata.normalize("NFC", read_as_windows(text)).replace("\\", "/").strip()


def _drop_extension(path: str) -> str:
    return _EXTENSION.sub("", path)


def _name_of(path: str) -> str:
    return path.rpartition("/")[2]


# What a key may give of a path, from the most of it to the least.
_PARTS = (str, _drop_extension, _name_of, lambda path: _drop_extension(_name_of(path)))
