"""What lies beside radiographs and is none: what machines leave, masks and annotations, documents and tables."""

import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

SYNTHETIC_MARKER = "SYNTHETIC.json"  # in the root folder of generated radiographs

# Reasons, as they are counted.
CLUTTER = "left by a system, a camera or a program"
ANNOTATION = "mask or annotation"
DOCUMENT = "document or table"

# Names of folders and files, in any case. `thumbs` is none of them: a hospital has radiographs of thumbs.
_NAMES = (
    *("__MACOSX", "Icon\r", "Desktop DB", "Desktop DF", "Network Trash Folder", "Temporary Items"),  # macOS
    *("TheVolumeSettingsFolder", "TheFindByContentFolder"),
    *("Thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "autorun.inf", "$RECYCLE.BIN"),  # Windows
    *("RECYCLER", "RECYCLED", "Recycle Bin", "System Volume Information", "Config.Msi", "MSOCache"),
    *("WPSettings.dat", "IndexerVolumeGuid", "lost+found"),
    *("@eaDir", "@tmp", "#recycle", "#snapshot", "@Recycle", "@Recently-Snapshot", "~snapshot", "trashbox"),  # NAS
    *("thumbnails", "ZbThumbnail.info", "Picasa.ini", "pspbrwse.jbf", "BridgeSort", "AUTPRINT.MRK"),  # cameras, viewers
    *("__pycache__", SYNTHETIC_MARKER),
)
# Ends of files' names: of links, temporary files and downloads; of previews and settings beside photographs.
_EXTENSIONS = (
    *("lnk", "url", "webloc", "desktop", "tmp", "temp", "swp", "swo", "bak", "orig", "cache", "pyc"),
    *("part", "partial", "filepart", "crdownload", "download", "opdownload", "aria2", "!ut", "!sync"),
    *("thm", "lrv", "ctg", "moi", "xmp", "aae", "pp3", "dop", "jbf"),
)
_CLUTTER = re.compile(
    rf"""
    (?:^|/) (?:
        \.                                                    # hidden: .DS_Store, ._x.png, .Trashes, .@__thumb
        | (?: {"|".join(re.escape(name) for name in _NAMES)} | found\.\d{{3}} ) (?:/|$)
        | ~\$ [^/]* $ | \#[^/]*\# $ | ~syncthing~             # open in Office or Emacs
    )
    | [^/]\.(?: {"|".join(map(re.escape, _EXTENSIONS))} ) $
    | ~ $                                                     # an editor's copy
    | zone\.identifier $ | :encryptable $ | :afp_\w+ $ | :com\.[\w.]+ $ | @syno(?:resource|eastream) $  # streams
    | \.sync-conflict-\d | [(][^/()]*conflicted[ ]copy[^/()]*[)] | [(]sfconflict[ ]  # Syncthing, Dropbox, Seafile
    """,
    re.IGNORECASE | re.VERBOSE,
)
_ANNOTATION = re.compile(
    r"""
    (?:^|/) (?:
        masks? | annotations? | labels? | heat[ _-]?maps? | seg | segmentations? | overlays? | contours?
        | bbox(?:es)? | bounding[ _-]?boxes | ground[ _-]?truths?
    ) /
    | (?:^|[/_.-]) (?: masks? | seg | segmentations? | heat-?maps? | annotations? | annotated | overlays? )
      (?: [_-]?\d+ )? (?: \.[^/.]* )? $
    | (?:^|/) mask[_-] [^/]* $
    """,
    re.IGNORECASE | re.VERBOSE,
)
_DOCUMENT = re.compile(
    r"[^/]\.(jsonl?|ndjson|xml|ya?ml|toml|ini|cfg|txt|log|md|rst|rtf|csv|tsv|xlsx?|xlsm|ods|odt|docx?|pptx?|pdf|html?"
    r"|css|js|py|ipynb|sh|md5|sha1|sha256)$",
    re.IGNORECASE,
)


def is_clutter(path: str) -> bool:
    """Return whether a file is certainly no radiograph: hidden, left by a machine or a program, or our marker."""
    return _find_reason(path) == CLUTTER


def is_annotation(path: str) -> bool:
    """Return whether a file says something about radiographs and is none: a mask, an annotation, a document, a table.

    Clutter is none.
    """
    return _find_reason(path) in (ANNOTATION, DOCUMENT)


def sort_out(paths: Iterable[str]) -> tuple[list[str], Counter[str]]:
    """Return the paths that may be radiographs, and how many others there are by reason."""
    kept: list[str] = []
    left_out: Counter[str] = Counter()
    for path in paths:
        if reason := _find_reason(path):
            left_out[reason] += 1
        else:
            kept.append(path)
    return kept, left_out


def _find_reason(path: str) -> str | None:
    folder, slash, name = path.rpartition("/")
    of_folder = _find_reason_of_folder(folder + slash)
    if of_folder == CLUTTER or _CLUTTER.search(name):
        return CLUTTER
    if _DOCUMENT.search(name):
        return DOCUMENT
    return ANNOTATION if of_folder or _ANNOTATION.search(name) else None


@lru_cache(maxsize=4096)  # a folder's files come one after the other
def _find_reason_of_folder(folder: str) -> str | None:
    if _CLUTTER.search(folder):
        return CLUTTER
    return ANNOTATION if _ANNOTATION.search(folder) else None
