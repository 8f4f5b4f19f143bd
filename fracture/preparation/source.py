"""List the radiographs of data folders, each with its label, split, patient and study.

No image is decoded and nothing is changed. Of DICOM files the header is read, since patient and study stand there.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fracture.config import DataConfig
from fracture.errors import UsageError
from fracture.labels import CLASS_NAMES, SPLITS
from fracture.preparation.decoding.dicom import DicomHeader
from fracture.preparation.decoding.headers import read_headers
from fracture.preparation.identity import PatientKey, normalise_id
from fracture.preparation.labels.class_words import ClassWords
from fracture.preparation.labels.labelling import Box, LabelledFile, Labelling
from fracture.preparation.labels.labels_file import FileIdentity, read_labels_file
from fracture.preparation.layouts.clutter import is_marker, sort_out
from fracture.preparation.layouts.folders import names_classes
from fracture.preparation.layouts.layout import read_layout
from fracture.preparation.layouts.paths import join_few
from fracture.preparation.listing import ListedFile, list_files, name_files
from fracture.progress import Progress
from fracture.storage import StoragePath

_MANY_OF_ONE = 20  # files of one patient, beyond which more than half of all files are suspicious


@dataclass(frozen=True)
class ImageFile:
    """A file as it was listed."""

    path: str  # relative to the data root, or its HMAC in a DICOM export; of several roots, ORIGIN/PATH
    label: int
    split: str  # as found; "" if the folder has none
    size: int  # bytes
    modified: int  # nanoseconds since the epoch
    patients: tuple[str, ...] = ()  # files that share one of these are of one patient
    group_match: str = ""  # what `data.group_pattern` finds in the path: files that share it belong together
    study: str = ""  # "" if unknown
    instance: str = ""  # of a DICOM file: files that share it are one object
    origin: str = ""  # hospital, scanner or collection; "" if unknown
    is_dicom: bool = False  # its header was read
    boxes: tuple[Box, ...] = ()  # drawn around its fractures


@dataclass(frozen=True)
class Source:
    """The files of one data folder, or of several."""

    roots: dict[str, StoragePath]  # origin -> folder; "" -> folder if there is only one
    files: tuple[ImageFile, ...]  # sorted by path
    class_folders: dict[str, list[str]]  # class name -> names found, of folders or in the labels file
    synthetic: bool
    split_fault: str  # why the split found cannot be used; "" if it can
    layout: str = "folders"  # how the labels were found
    labels: StoragePath | None = None  # the labels file
    on_disk: dict[str, str] = field(default_factory=dict)  # path -> path on the disk below its root, if it differs
    left_out: dict[str, int] = field(default_factory=dict)  # why -> files that are listed nowhere
    unmatched_rows: tuple[int, ...] = ()  # of the labels file
    unlabelled: tuple[str, ...] = ()  # paths of images that the labels file does not name
    ignored_columns: tuple[str, ...] = ()  # of the labels file, by name, or by number where that is private
    repeated_rows: tuple[int, ...] = ()  # of the labels file, which say what an earlier one says of the same image
    notes: tuple[str, ...] = ()  # what every report on this data has to say
    is_private: bool = False  # a DICOM export: paths, patients and studies are HMACs

    @property
    def name(self) -> str:
        """Return the folders, for messages."""
        return ", ".join(str(root) for root in self.roots.values())

    def locate(self, path: str) -> StoragePath:
        """Return the file with this `ImageFile.path`."""
        if "" in self.roots:
            return self.roots[""] / self.on_disk.get(path, path)
        origin, _, rest = path.partition("/")
        return self.roots[origin] / self.on_disk.get(path, rest)

    def hash_listing(self) -> str:
        """Hash the list of files: another hash if one is added, removed, rewritten or labelled anew. Reads no file."""
        digest = hashlib.sha256()
        for f in self.files:
            digest.update(repr(f).encode())
        return digest.hexdigest()


def find_source(
    roots: Sequence[StoragePath],
    config: DataConfig,
    labels: StoragePath | None = None,
    key: PatientKey | None = None,
    progress: Progress = lambda step, done, total: None,
) -> Source:
    """List the radiographs of one folder, or of several, each of which is then an origin of its own.

    Args:
        labels: a table with a label for each file, study or patient. Without it the folders' names are the labels, or
            what a public set has in its own layout.
        key: hides ids of patients and studies; needed where there are any in DICOM files or in the labels file.

    Raises:
        UsageError: the folder or the labels file cannot be used; the message names it, and the fix.
    """
    if labels and len(roots) > 1:
        raise UsageError("--labels belongs to one --data folder; give the file's own source column instead.")
    key, words = key or PatientKey(None), ClassWords(config)
    _check_names(roots)
    key.keep_out_of(roots)
    sources = [_read_root(root, config, words, labels, key, progress) for root in roots]
    source = sources[0] if len(sources) == 1 else _join(sources)
    for label, name in enumerate(CLASS_NAMES):
        if not any(f.label == label for f in source.files):
            raise UsageError(f"--data {source.name}: no image of class {name!r}; both classes are needed. Add images.")
    if config.split == "official" and source.split_fault:
        raise UsageError(
            f"--data {source.name}: {source.split_fault}, so data.split = official is not possible. Add what is "
            "missing, or use --split group."
        )
    if source.is_private:
        key.write_paths(source.on_disk)
    return source


def describe_source(source: Source) -> list[str]:
    """Return the lines that say where the radiographs are, how they are labelled and what was left out."""
    lines = [f"data       {source.name}{' (SYNTHETIC)' if source.synthetic else ''}"]
    lines.append(f"labels     {describe_labels(source)}")
    for numbers, name, what in (
        (source.unmatched_rows, "no image", "rows of the labels file"),
        (source.repeated_rows, "repeated", "rows of the labels file say what an earlier one says"),
    ):
        if numbers:
            rows = ", ".join(map(str, numbers[:5]))
            lines.append(f"{name:<10} {len(numbers):,} {what}; first: row {rows}")
    if source.ignored_columns:
        names = join_few(source.ignored_columns)
        lines.append(f"not read   {len(source.ignored_columns):,} columns of the labels file: {names}")
    if source.unlabelled:
        lines.append(f"no label   {len(source.unlabelled):,} images in the folder, which are not used")
    lines += [f"left out   {count:,} file{'s' if count > 1 else ''}: {why}" for why, count in source.left_out.items()]
    return [*lines, *(f"note       {note}" for note in source.notes)]


def describe_labels(source: Source) -> str:
    """Return where the labels came from, by which words, and how many patients and studies are known."""
    patients = len({file.patients for file in source.files if file.patients})  # each may have several ids
    studies, origins = (len({getattr(f, name) for f in source.files} - {""}) for name in ("study", "origin"))
    listed = ((name, source.class_folders[name]) for name in reversed(CLASS_NAMES))
    words = ", ".join(
        f"{name} is {join_few(found, 3)}" for name, found in listed if found
    )  # none where all are private
    known = ", ".join(
        [
            f"{patients:,} patients" if patients else "patients not known",
            f"{studies:,} studies" if studies else "studies not known",
            *([f"{origins:,} sources"] if origins else []),
        ]
    )
    return f"{len(source.files):,} files by {source.layout}: {'; '.join(filter(None, (words, known)))}"


def _check_names(roots: Sequence[StoragePath]) -> None:
    names = [root.name for root in roots]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(
            f"--data: two folders have the name {double!r}, and origins are distinguished by name. Rename one."
        )


def _read_root(
    root: StoragePath,
    config: DataConfig,
    words: ClassWords,
    labels: StoragePath | None,
    key: PatientKey,
    progress: Progress,
) -> Source:
    listed = list_files(root, key)
    kept, passed_over = sort_out(listed)
    headers = read_headers(root, kept, progress)
    not_used = {path: why for path, header in headers.items() if (why := _why_not_used(header, config))}
    images = [path for path in kept if path not in not_used]
    labels = labels or (_find_labels_file(root, listed) if config.layout == "csv" else None)
    if labels:
        found = _read_labels(root, labels, images, headers, words, config)
    else:  # which passes over the others itself: annotations are a layout's labels
        passed_over.clear()
        found = _read_folders(root, [path for path in listed if path not in not_used], config, words, bool(headers))
    hidden = key if headers or labels else None  # a public set's own numbers are no secret
    shown = name_files(images, key, is_private=bool(headers))
    files = sorted(
        (
            _make_file(file, shown[file.path], listed[file.path], headers.get(file.path), hidden, config, bool(headers))
            for file in found.labelling.files
        ),
        key=lambda file: file.path,
    )
    if headers:
        key.write_studies((header.study, header.accession) for header in headers.values())
    left_out = passed_over + Counter(not_used.values()) + Counter(found.labelling.left_out)
    return Source(
        roots={"": root},
        files=tuple(files),
        class_folders={name: sorted(found.labelling.words[name]) for name in CLASS_NAMES},
        synthetic=any(map(is_marker, listed)),
        split_fault="has its labels from a file, which names no splits" if labels else _find_split_fault(files),
        layout=found.layout,
        labels=labels,
        on_disk={name: path for path, name in shown.items() if name != path},
        left_out=dict(left_out.most_common()),
        unmatched_rows=tuple(found.unmatched_rows),
        unlabelled=tuple(sorted(shown[path] for path in found.unlabelled)),
        ignored_columns=tuple(found.ignored_columns),
        repeated_rows=tuple(found.repeated_rows),
        notes=(*found.labelling.notes, *_describe_headers(headers[path] for path in images if path in headers)),
        is_private=bool(headers),
    )


@dataclass(frozen=True)
class _Labels:
    """Where the labels of a folder were found, and what did not match."""

    labelling: Labelling
    layout: str
    unmatched_rows: Sequence[int] = ()
    unlabelled: Sequence[str] = ()
    ignored_columns: Sequence[str] = ()
    repeated_rows: Sequence[int] = ()


def _read_labels(
    root: StoragePath,
    labels: StoragePath,
    images: Sequence[str],
    headers: Mapping[str, DicomHeader],
    words: ClassWords,
    config: DataConfig,
) -> _Labels:
    if config.layout not in ("auto", "csv"):
        raise UsageError(f"--layout {config.layout} and --labels both say where the labels are. Leave one of them out.")
    found = read_labels_file(
        labels,
        images,
        words,
        key=config.label_key or None,
        root=str(root),
        identities={
            path: FileIdentity(header.instance, header.study, header.accession, header.patient)
            for path, header in headers.items()
        },
        private=bool(headers),
        max_unmatched=config.max_unmatched_fraction,
    )
    share = len(found.unlabelled) / max(1, len(images))
    if share > config.max_unlabelled_fraction:
        raise UsageError(
            f"--labels {labels}: {len(found.unlabelled):,} of {len(images):,} images in {root} have no row "
            f"({share:.1%}), more than data.max_unlabelled_fraction = {config.max_unlabelled_fraction}. Add their "
            "rows, or raise the limit if they are not to be used."
        )
    return _Labels(
        found.labelling,
        f"labels file, by {found.key}",
        found.unmatched_rows,
        found.unlabelled,
        found.ignored_columns,
        found.repeated_rows,
    )


def _read_folders(
    root: StoragePath, paths: Sequence[str], config: DataConfig, words: ClassWords, is_private: bool
) -> _Labels:
    refusal = UsageError(  # without names of folders, and so perhaps of patients
        f"--data {root}: its DICOM files are not in folders that name both classes; one alone may be somebody's name. "
        "Give a table of their labels with --labels FILE, by path, file name, SOPInstanceUID, StudyInstanceUID, "
        "accession number or patient, or say which names are classes with --set 'data.fracture_labels=[NAME]' and "
        "--set 'data.normal_labels=[NAME]'."
    )
    try:
        layout, labelling = read_layout(config.layout, root, paths, words)
    except UsageError:
        if not is_private:
            raise
        raise refusal from None
    if is_private and layout == "folders" and not names_classes(labelling, words):
        raise refusal
    return _Labels(labelling, layout)


def _find_labels_file(root: StoragePath, listed: Iterable[str]) -> StoragePath:
    tables = [path for path in listed if "/" not in path and path.lower().endswith((".csv", ".tsv", ".xlsx"))]
    if len(tables) != 1:
        raise UsageError(
            f"--layout csv: {root} has {len(tables)} tables (.csv, .tsv, .xlsx) beside its folders, and one is needed. "
            "Name the labels file with --labels FILE."
        )
    return root / tables[0]


def _why_not_used(header: DicomHeader, config: DataConfig) -> str:
    if not header.why_left_out and header.burned_in and config.exclude_burned_in:
        return "burnt-in annotations (data.exclude_burned_in)"
    return header.why_left_out


def _describe_headers(headers: Iterable[DicomHeader]) -> list[str]:
    counts, patients = Counter[str](), Counter[str]()
    for header in headers:
        patients[header.patient] += 1
        counts["burned_in"] += header.burned_in
        counts["frames"] += header.frames > 1
        counts["no patient"] += not header.patient
    lines = {
        "burned_in": "images say that annotations are burnt into their pixels (BurnedInAnnotation), names perhaps; "
        "data.exclude_burned_in leaves them out.",
        "frames": "files have several frames; the first is used.",
        "no patient": "DICOM files have no PatientID; their study alone says which belong together.",
        "one patient": "DICOM files share one PatientID, which may stand for nobody: all of them are one group then.",
    }
    files, [(patient, most)] = patients.total(), patients.most_common(1) or [("", 0)]
    if patient and most > max(_MANY_OF_ONE, files / 2):
        counts["one patient"] = most
    return [f"{counts[name]:,} {line}" for name, line in lines.items() if counts[name]]


def _make_file(
    file: LabelledFile,
    name: str,
    listed: ListedFile,
    header: DicomHeader | None,
    key: PatientKey | None,
    config: DataConfig,
    is_private: bool,
) -> ImageFile:
    """Join what is known of a file. With a key, ids become HMACs."""

    def hide(kind: str, value: str) -> str:
        return key.hide(kind, value) if key else value

    # Patient 7 of one hospital is not patient 7 of another; ids in DICOM files are taken for one hospital's, and in an
    # export the patients of its labels file for the same as the files'.
    patients = {header.patient if header else ""}
    if file.patient:
        patients |= {f"{file.origin}/{file.patient}"} | ({file.patient} if is_private else set())
    study = header.study if header and header.study else file.study and f"{file.origin}/{file.study}"
    modified = listed.modified
    if is_private:  # a date, which only tells whether the file has changed
        modified = int.from_bytes(bytes.fromhex(hide("modified", str(modified))[:14]))
    return ImageFile(
        path=name,
        label=file.label,
        split=file.split,
        size=listed.size,
        modified=modified,
        patients=tuple(sorted(hide("patient", normalise_id(patient)) for patient in patients if patient)),
        group_match=hide("match", _match_group(file, config.group_pattern)),
        study=hide("study", study),
        instance=hide("instance", header.instance) if header else "",
        origin=file.origin,
        is_dicom=header is not None,
        boxes=file.boxes,
    )


def _match_group(file: LabelledFile, pattern: str) -> str:
    """Return what `data.group_pattern` finds in a path; "" for nothing."""
    match = re.search(pattern, file.path) if pattern else None
    captured = (match.groups("") or (match.group(),)) if match else ()
    return f"{file.origin}/{'/'.join(captured)}" if any(captured) else ""


def _join(sources: list[Source]) -> Source:
    """Join the sources of several folders. What belongs together in one is apart in another, but for HMACs of ids."""

    def rename(name: str, source: Source, file: ImageFile) -> ImageFile:
        apart = {"group_match": file.group_match and f"{name}:{file.group_match}"}
        if not source.is_private:
            apart["patients"] = tuple(f"{name}:{patient}" for patient in file.patients)
            apart["study"] = file.study and f"{name}:{file.study}"
        return replace(file, path=f"{name}/{file.path}", origin=file.origin or name, **apart)

    named = {next(iter(source.roots.values())).name: source for source in sources}
    files = [rename(name, source, file) for name, source in named.items() for file in source.files]
    left_out = Counter[str]()
    for source in sources:
        left_out.update(source.left_out)
    return Source(
        roots={name: source.roots[""] for name, source in named.items()},
        files=tuple(sorted(files, key=lambda file: file.path)),
        class_folders={c: sorted({n for s in sources for n in s.class_folders[c]}) for c in CLASS_NAMES},
        synthetic=any(source.synthetic for source in sources),
        split_fault=next((source.split_fault for source in sources if source.split_fault), ""),
        layout=", ".join(dict.fromkeys(source.layout for source in sources)),
        on_disk={f"{name}/{path}": disk for name, source in named.items() for path, disk in source.on_disk.items()},
        left_out=dict(left_out),
        notes=tuple(dict.fromkeys(note for source in sources for note in source.notes)),
        is_private=any(source.is_private for source in sources),
    )


def _find_split_fault(files: Sequence[ImageFile]) -> str:
    found = {f.split for f in files}
    if found == {""}:
        return "has no train, val and test folders"
    if missing := [split for split in SPLITS if split not in found]:
        return f"has {', '.join(s for s in SPLITS if s in found)} but no {' and no '.join(missing)} folder"
    for split in SPLITS:
        for label, name in enumerate(CLASS_NAMES):
            if not any(f.split == split and f.label == label for f in files):
                return f"split {split!r} has no image of class {name!r}"
    return ""


def keyed_hash(text: str, seed: int) -> bytes:
    """Return 16 bytes that put texts in a random order, which is the same for the same seed on every machine."""
    return hashlib.blake2b(text.encode(), digest_size=16, key=seed.to_bytes(16, "little")).digest()
