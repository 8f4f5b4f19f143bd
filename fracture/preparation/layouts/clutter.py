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
_CLUTTER_NAMES = (
    *("__MACOSX", "Icon\r", "Desktop DB", "Desktop DF", "Network Trash Folder", "Temporary Items"),  # macOS
    *("TheVolumeSettingsFolder", "TheFindByContentFolder"),
    *("Thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "autorun.inf", "$RECYCLE.BIN"),  # Windows
    *("RECYCLER", "RECYCLED", "Recycle Bin", "System Volume Information", "Config.Msi", "MSOCache"),
    *("WPSettings.dat", "IndexerVolumeGuid", *(f"FOUND.{number:03d}" for number in range(100)), "lost+found"),
    *("@eaDir", "@tmp", "#recycle", "#snapshot", "@Recycle", "@Recently-Snapshot", "~snapshot", "trashbox"),  # NAS
    *("thumbnails", "ZbThumbnail.info", "Picasa.ini", "pspbrwse.jbf", "BridgeSort", "AUTPRINT.MRK"),  # cameras, viewers
    *("__pycache__", SYNTHETIC_MARKER),
)
# Ends of files' names: of links, temporary files and downloads; of previews and settings beside photographs.
_CLUTTER_EXTENSIONS = {
    *("lnk", "url", "webloc", "desktop", "tmp", "temp", "swp", "swo", "bak", "orig", "cache", "pyc"),
    *("part", "partial", "filepart", "crdownload", "download", "opdownload", "aria2", "!ut", "!sync"),
    *("thm", "lrv", "ctg", "moi", "xmp", "aae", "pp3", "dop", "jbf"),
}
_HIDDEN = (".", "~$", "~syncthing~")  # begins of names
_STREAMS = ("~", "zone.identifier", ":encryptable", ":afp_afpinfo", ":afp_resource", "@synoresource", "@synoeastream")
_CONFLICT = re.compile(r"\.sync-conflict-\d|\([^()]*conflicted copy|\(sfconflict ")  # Syncthing, Dropbox, Seafile

# Names of folders, without spaces, `_` and `-`.
_ANNOTATION_FOLDERS = {
    *("mask", "masks", "seg", "segmentation", "segmentations", "heatmap", "heatmaps", "overlay", "overlays"),
    *("annotation", "annotations", "label", "labels", "bbox", "bboxes", "boundingbox", "boundingboxes"),
    *("contour", "contours", "groundtruth", "groundtruths"),
}
_ANNOTATION_ENDINGS = {
    *("mask", "masks", "seg", "segmentation", "segmentations", "heatmap", "heatmaps", "overlay", "overlays"),
    *("annotation", "annotations", "annotated"),
}
_DOCUMENT_EXTENSIONS = {
    *("json", "jsonl", "ndjson", "xml", "yaml", "yml", "toml", "ini", "cfg", "txt", "log", "md", "rst", "rtf"),
    *("csv", "tsv", "xls", "xlsx", "xlsm", "ods", "odt", "doc", "docx", "ppt", "pptx", "pdf", "html", "htm", "css"),
    *("js", "py", "ipynb", "sh", "md5", "sha1", "sha256"),
}

_CLUTTER_LOWER = {name.lower() for name in _CLUTTER_NAMES}


def is_marker(path: str) -> bool:
    """Return whether a file says that the radiographs beside it are generated."""
    return path.rpartition("/")[2] == SYNTHETIC_MARKER


def is_clutter(path: str) -> bool:
    """Return whether a file is certainly no radiograph: hidden, left by a machine or a program, or our marker."""
    return find_reason(path) == CLUTTER


def sort_out(paths: Iterable[str]) -> tuple[list[str], Counter[str]]:
    """Return the paths that may be radiographs, and how many others there are by reason; our marker is not counted."""
    kept: list[str] = []
    left_out: Counter[str] = Counter()
    for path in paths:
        if reason := find_reason(path):
            left_out[reason] += not is_marker(path)
        else:
            kept.append(path)
    return kept, +left_out


def find_reason(path: str) -> str | None:
    """Return why a file is no radiograph, by its path: `CLUTTER`, `ANNOTATION` or `DOCUMENT`; None if it may be one."""
    folder, _, name = path.rpartition("/")
    name = name.lower()
    stem, dot, extension = name.rpartition(".")
    of_folder = _find_reason_of_folder(folder)
    if of_folder == CLUTTER or _is_clutter_name(name) or (stem and extension in _CLUTTER_EXTENSIONS):
        return CLUTTER
    if stem and extension in _DOCUMENT_EXTENSIONS:
        return DOCUMENT
    return ANNOTATION if of_folder or _is_annotation_stem(stem if dot else name) else None


@lru_cache(maxsize=4096)  # a folder's files come one after the other
def _find_reason_of_folder(folder: str) -> str | None:
    names = folder.lower().split("/") if folder else []
    if any(map(_is_clutter_name, names)):
        return CLUTTER
    return ANNOTATION if any(re.sub(r"[\s_-]", "", name) in _ANNOTATION_FOLDERS for name in names) else None


def _is_clutter_name(name: str) -> bool:
    return (
        name.startswith(_HIDDEN)
        or name in _CLUTTER_LOWER
        or name.endswith(_STREAMS)
        or (name[0] == name[-1] == "#" and len(name) > 1)  # open in Emacs
        or ("conflict" in name and _CONFLICT.search(name) is not None)
    )


def _is_annotation_stem(stem: str) -> bool:
    """Return whether a name says that it is one: `1_mask`, `1-seg-2`, `mask_0001`."""
    parts = re.split(r"[_.-]", stem)
    last = parts[-2] if len(parts) > 1 and parts[-1].isdecimal() else parts[-1]
    return last.rstrip("0123456789") in _ANNOTATION_ENDINGS or (len(parts) > 1 and parts[0] == "mask")
