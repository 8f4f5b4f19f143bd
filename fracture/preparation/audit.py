"""Audit a folder of radiographs before a model is trained on it."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel

from fracture.dataset.format import Leak, Rejection
from fracture.dataset.properties import COLUMNS, collect_properties
from fracture.labels import CLASS_NAMES, FRACTURE, NORMAL, SPLITS
from fracture.preparation.duplicates.grouping import COPY_KINDS, KINDS, first_of_each, number_groups

_EXTENSIONS = {
    "JPEG": {"jpg", "jpeg", "jpe", "jfif"},
    "PNG": {"png"},
    "GIF": {"gif"},
    "BMP": {"bmp", "dib"},
    "WEBP": {"webp"},
    "TIFF": {"tif", "tiff"},
    "AVIF": {"avif", "avifs"},
    "JPEG2000": {"jp2", "j2k", "j2c", "jpc", "jpf", "jpx"},
    "PPM": {"pgm", "ppm", "pbm", "pnm", "pfm"},
    "DICOM": {"dcm", "dicom", "dic", "ima", ""},
}
_EXAMPLES = 20  # pairs in the audit
_GIANT = 0.2  # share of the images; a larger group is an alarm
_MOST_GROUPS = 5000  # in the search for shortcuts, since grouped folds are slow
_MOST_CATEGORIES = 20  # of a trait of DICOM files; the rarer ones are one more
# Mean grey of the border, above which a radiograph looks like a negative: so do 1 % of the radiographs of two public
# sets (396 and 700 images), and 96 % of them when they are inverted.
_BRIGHT_BORDER = 147
_MOST_INVERTED = 0.05  # share of such images without an alarm
_ALARM_AUC = 0.6  # a shortcut of this AUC or more, and beyond chance, is an alarm
_TEST_SHARE, _ASSUMED_AUC = 0.15, 0.9  # of the test for which `describe_support` says how precise it is


class Pair(BaseModel):
    """A validation or test image, and an image in training that it is linked to."""

    path: str
    training_path: str
    kind: str
    texture: float | None
    detail: float | None
    degrees: float | None
    flipped: bool | None
    inverted: bool | None


class Shortcut(BaseModel):
    """The AUC of a property other than the anatomy as a predictor of the class, cross-validated by group."""

    auc: float
    low: float  # 95 % interval, with each group counted once
    high: float

    @property
    def is_alarming(self) -> bool:
        return self.auc >= _ALARM_AUC and self.low > 0.5


class Audit(BaseModel):
    """The content of `audit.json`."""

    files: int
    images: dict[str, int]  # class -> readable images
    distinct_images: dict[str, int]  # class -> images that differ in their pixels
    radiographs: dict[str, int]  # class -> groups of copies: the effective sample size
    groups: int  # radiographs of one patient joined
    largest_groups: list[int]
    splits: dict[str, dict[str, int]]  # split found -> class -> images; empty if there is none
    formats: dict[str, int]
    wrong_extension: list[str]  # paths whose extension does not match the content
    modes: dict[str, int]
    sizes: dict[str, int]  # "224x224" -> images, the ten most common
    side_range: tuple[int, int]  # shortest and longest side, pixels
    rejected: list[Rejection]
    copies: dict[str, int]  # kind -> links
    leakage: dict[str, Leak]  # "val", "test" -> leak
    conflicts: list[list[str]]  # paths of each radiograph that has both labels, up to ten
    inverted: list[str] = []  # paths of distinct images that look like negatives
    shortcuts: dict[str, Shortcut]  # "size", ..., "all"
    matched_on: str = ""  # the trait of DICOM files that tells the label best
    matched: Shortcut | None = None  # all properties, between a fracture and a normal that are alike in that trait
    constant_traits: list[str] = []  # of DICOM files: the same in all that have it
    absent_traits: list[str] = []  # of DICOM files: none has it
    # From the listing of the files:
    labelled: str = ""  # where the labels came from, how many patients and studies are known
    left_out: dict[str, int] = {}  # why -> files that are no radiographs, or that the user excludes
    unmatched_rows: list[int] = []  # of the labels file, as a spreadsheet numbers them
    repeated_rows: list[int] = []  # of the labels file, which say what an earlier one says
    ignored_columns: list[str] = []  # of the labels file, by name, or by number where that is private
    unlabelled: list[str] = []  # paths of images that the labels file does not name
    notes: list[str] = []  # what every report on this data has to say
    examples: list[Pair]  # of leakage, some of each kind of link

    @property
    def leaks(self) -> bool:
        return any(leak.leaking for leak in self.leakage.values())


def make_audit(facts: pa.Table, links: pa.Table) -> Audit:
    """Compute all figures from the rows of `FACTS` and `LINKS`."""
    readable = facts["sha256"].is_valid().to_numpy()
    labels, found = facts["label"].to_numpy(), np.array(facts["split"].to_pylist())
    radiograph_ids, groups = number_groups(len(facts), links, COPY_KINDS), number_groups(len(facts), links)
    distinct = first_of_each(facts["pixels"], readable)

    def count_classes(rows: np.ndarray) -> dict[str, int]:
        return {name: int((labels[rows] == label).sum()) for label, name in enumerate(CLASS_NAMES)}

    return Audit(
        files=len(facts),
        images=count_classes(np.flatnonzero(readable)),
        distinct_images=count_classes(distinct),
        radiographs={
            name: len(np.unique(radiograph_ids[readable & (labels == label)])) for label, name in enumerate(CLASS_NAMES)
        },
        groups=len(np.unique(groups[readable])),
        largest_groups=sorted(Counter(groups[readable].tolist()).values(), reverse=True)[:10],
        splits={s: count_classes(np.flatnonzero(readable & (found == s))) for s in SPLITS if (found == s).any()},
        **_describe_files(facts, readable),
        rejected=_list_rejections(facts),
        copies={kind: pc.sum(pc.equal(links["kind"], kind)).as_py() or 0 for kind in KINDS},
        leakage=count_leakage(np.where(readable, found, ""), links),
        conflicts=_list_conflicts(radiograph_ids, labels, readable, facts["path"].to_pylist()),
        inverted=_list_inverted(facts, distinct),
        **_find_shortcuts(facts, distinct, groups),
        **_list_untried_traits(facts),
        examples=_choose_examples(facts["path"].to_pylist(), found, groups, links),
    )


def count_leakage(splits: np.ndarray, links: pa.Table) -> dict[str, Leak]:
    """Count the images that validation and test share with training, and test with validation.

    Each image counts once, under the strongest kind of link to training.

    Args:
        splits: [files] str, "" for a file in no split.
    """
    training, validation, test = (splits == split for split in SPLITS)
    if not training.any():
        return {}
    leaks = {split: Leak(images=int((splits == split).sum()), by_kind={}) for split in SPLITS[1:]}
    counted = np.zeros(len(splits), bool)
    for number, kind in enumerate(KINDS):
        groups = number_groups(len(splits), links, list(KINDS)[: number + 1])
        shared = np.isin(groups, groups[training]) & ~counted
        for split, leak in leaks.items():
            leak.by_kind[kind] = int((shared & (splits == split)).sum())
        counted |= shared
    leaks["test"].in_validation = int((np.isin(groups, groups[validation]) & test & ~counted).sum())
    return leaks


def list_alarms(audit: Audit) -> list[str]:
    """Describe the faults of the data, one line each, the worst first."""
    lines = []
    for split, leak in reversed(audit.leakage.items()):  # test first
        if leak.leaking:
            exact = leak.by_kind["bytes"]
            lines.append(
                f"{leak.leaking} of {leak.images} {split} images show a radiograph or patient that {leak.where} has "
                f"too ({exact} are byte-for-byte copies): in the split as found, figures measure memory."
            )
    if audit.conflicts:
        first, second = audit.conflicts[0][:2]
        lines.append(f"Radiographs under both labels: {len(audit.conflicts):,}, for example {first!r} and {second!r}.")
    distinct = sum(audit.distinct_images.values())
    if len(audit.inverted) > _MOST_INVERTED * distinct:
        lines.append(
            f"{len(audit.inverted):,} of {distinct:,} images ({len(audit.inverted) / distinct:.0%}) look inverted, "
            f"bone dark on a bright ground, for example {audit.inverted[0]!r}: turn them, or leave them out."
        )
    readable, largest = sum(audit.images.values()), max(audit.largest_groups, default=0)
    if largest > _GIANT * readable and audit.groups > 1:
        lines.append(
            f"One group holds {largest:,} of {readable:,} images: no split can balance it. If that is not one patient, "
            "look for a patient column or a data.group_pattern that gives many the same name."
        )
    if shortcuts := list_alarming_shortcuts(audit):
        figures = ", ".join(f"{name} {shortcut.auc:.2f}" for name, shortcut in shortcuts)
        lines.append(f"Things beside the anatomy predict the label (AUC, chance is 0.50): {figures}.")
    return lines


def list_alarming_shortcuts(audit: Audit) -> list[tuple[str, Shortcut]]:
    """Return the names and shortcuts that are alarms, the strongest first."""
    found = [(name, shortcut) for name, shortcut in audit.shortcuts.items() if shortcut.is_alarming and name != "all"]
    return sorted(found, key=lambda item: -item[1].auc)


def describe_support(audit: Audit) -> str:
    """Describe in one phrase how precise a test on this many radiographs can be."""
    counts = audit.radiographs
    tested = [round(_TEST_SHARE * count) for count in counts.values()]
    fewest = min(counts, key=lambda name: counts[name])
    if min(tested) < 2:
        return (
            f"no firm figure: {counts[fewest]} {fewest} of {sum(counts.values()):,} radiographs, and a test of "
            f"{_TEST_SHARE:.0%} needs at least 2 of each class; --folds uses each one"
        )
    once, folds = (_compute_auc_margin(_ASSUMED_AUC, *numbers) for numbers in (tested, counts.values()))
    return (
        f"an AUC of {_ASSUMED_AUC:.2f} to within ±{once:.2f} in a test of {_TEST_SHARE:.0%} of the radiographs "
        f"({_join_classes(dict(zip(counts, tested, strict=True)))}), ±{folds:.2f} in folds that test each one"
    )


def format_audit(audit: Audit) -> list[str]:
    """Return the audit for a screen: about ten aligned lines, then the alarms."""
    conflicts = f"conflicts  radiographs under both labels: {len(audit.conflicts) or 'none'}"
    lines = [*_format_files(audit), _format_copies(audit), *_format_leakage(audit), conflicts]
    if audit.shortcuts:
        figures = ", ".join(f"{name} {shortcut.auc:.2f}" for name, shortcut in audit.shortcuts.items())
        lines.append(f"shortcuts  AUC of the label from {figures} (0.50 and below is chance)")
    if audit.matched:
        lines.append(
            f"matched    AUC of the label from all of these {audit.matched.auc:.2f} between images of one "
            f"{audit.matched_on}"
        )
    if untried := describe_untried_traits(audit):
        lines.append(f"not tried  {untried}")
    lines.append(f"supports   {describe_support(audit)}")
    return lines + [f"ALARM      {line}" for line in list_alarms(audit)]


def describe_untried_traits(audit: Audit) -> str:
    """Name the traits of DICOM files that cannot predict a label here; "" if there are none."""
    parts = ((audit.constant_traits, "the same in all images"), (audit.absent_traits, "in no image"))
    return "; ".join(f"{what}: {', '.join(names)}" for names, what in parts if names)


def _format_files(audit: Audit) -> list[str]:
    readable, rejected = sum(audit.images.values()), len(audit.rejected)
    lines = [f"files      {audit.files:,}: {readable:,} readable ({_join_classes(audit.images)}), {rejected} rejected"]
    if rejected:
        most_common = Counter(r.reason for r in audit.rejected).most_common(4)
        reasons = ", ".join(f"{n} {reason}" for reason, n in most_common)
        lines.append(f"rejected   {rejected} files ({rejected / audit.files:.2%}): {reasons}; paths in audit.json")
    formats = ", ".join(f"{n:,} {name}" for name, n in audit.formats.items())
    wrong = f" · {len(audit.wrong_extension)} under another extension" if audit.wrong_extension else ""
    common = ", ".join(f"{size} ({n:,})" for size, n in list(audit.sizes.items())[:3])
    shortest, longest = audit.side_range
    return [
        *lines,
        f"formats    {formats}{wrong} · modes {', '.join(audit.modes)}",
        f"sizes      sides of {shortest:,} to {longest:,} pixels; most often {common}",
    ]


def _format_copies(audit: Audit) -> str:
    distinct, conflicts = sum(audit.distinct_images.values()), len(audit.conflicts)
    radiographs = sum(audit.radiographs.values()) - conflicts
    twice = f", {conflicts} of them counted in both" if conflicts else ""
    largest = ", ".join(f"{n:,}" for n in audit.largest_groups[:3])
    return (
        f"copies     {distinct:,} distinct images of {radiographs:,} radiographs "
        f"({_join_classes(audit.radiographs)}{twice}); largest families {largest}"
    )


def _format_leakage(audit: Audit) -> list[str]:
    if not audit.leakage:
        return ["leakage    no split was found that could leak; training makes one of whole groups"]
    lines = []
    for split, leak in audit.leakage.items():
        kinds = ", ".join(f"{n:,} {KINDS[kind]}" for kind, n in leak.by_kind.items() if n)
        by_kind = f" ({kinds})" if kinds else ""
        lines.append(f"leakage    {leak.leaking:,} of {leak.images:,} {split} images are in {leak.where} too{by_kind}")
    return lines


def _compute_auc_margin(auc: float, negatives: int, positives: int) -> float:
    """Return half the 95 % interval of an AUC (Hanley and McNeil 1982, doi:10.1148/radiology.143.1.7063747)."""
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (positives - 1) * (q1 - auc**2) + (negatives - 1) * (q2 - auc**2)
    return 1.96 * float(np.sqrt(variance / (positives * negatives)))


def _join_classes(counts: dict[str, int]) -> str:
    return ", ".join(f"{counts[name]:,} {name}" for name in reversed(CLASS_NAMES))


def _describe_files(facts: pa.Table, readable: np.ndarray) -> dict[str, Any]:
    """Count formats, modes and sizes of readable files, as fields of the audit."""
    columns = facts.select(["path", "format", "mode", "width", "height"])
    files = columns.filter(pa.array(readable)).to_pylist()
    sides = [side for file in files for side in (file["width"], file["height"])]
    sizes = Counter(f"{file['width']}x{file['height']}" for file in files)
    return {
        "formats": _count(file["format"] for file in files),
        "wrong_extension": [f["path"] for f in files if _get_extension(f["path"]) not in _EXTENSIONS[f["format"]]],
        "modes": _count(file["mode"] for file in files),
        "sizes": dict(sizes.most_common(10)),
        "side_range": (min(sides, default=0), max(sides, default=0)),
    }


def _count(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _get_extension(path: str) -> str:
    return path.rsplit(".", 1)[-1].lower() if "." in path.rsplit("/", 1)[-1] else ""


def _list_rejections(facts: pa.Table) -> list[Rejection]:
    rows = facts.select(["path", "split", "reason"]).to_pylist()
    return [Rejection(**row) for row in rows if row["reason"] is not None]


def _list_untried_traits(facts: pa.Table) -> dict[str, list[str]]:
    """List the traits that are the same in all DICOM files or in none, as fields of the audit."""
    values: dict[str, set[str]] = {}
    for traits in facts["traits"].to_pylist():
        for name, value in traits or ():
            values.setdefault(name, set()).add(value)
    return {
        "constant_traits": sorted(name for name, found in values.items() if len(found) == 1 and found != {""}),
        "absent_traits": sorted(name for name, found in values.items() if found == {""}),
    }


def _list_conflicts(
    radiograph_ids: np.ndarray, labels: np.ndarray, readable: np.ndarray, paths: Sequence[str]
) -> list[list[str]]:
    """List up to ten paths of each radiograph that has both labels, one of each label first."""
    ids = [set(radiograph_ids[readable & (labels == label)].tolist()) for label in (NORMAL, FRACTURE)]
    both = ids[NORMAL] & ids[FRACTURE]
    files: dict[int, tuple[list[str], list[str]]] = {radiograph_id: ([], []) for radiograph_id in sorted(both)}
    for row in np.flatnonzero(np.isin(radiograph_ids, list(both)) & readable):
        files[int(radiograph_ids[row])][labels[row]].append(paths[row])
    return [[fractured[0], normal[0], *fractured[1:5], *normal[1:5]] for normal, fractured in files.values()]


def _list_inverted(facts: pa.Table, distinct: np.ndarray) -> list[str]:
    rows = distinct[facts["border"].take(distinct).to_numpy() > _BRIGHT_BORDER]
    return facts["path"].take(rows).to_pylist()


def _find_shortcuts(facts: pa.Table, distinct: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
    """Cross-validate each property of the distinct images, and all of them together, as a predictor of the class.

    Returns:
        Fields of the audit.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    chosen_groups = np.random.default_rng(0).permutation(np.unique(groups[distinct]))[:_MOST_GROUPS]
    distinct = distinct[np.isin(groups[distinct], chosen_groups)]
    labels, groups = facts["label"].take(distinct).to_numpy(), groups[distinct]
    folds = min(5, *_count_groups(labels, groups))
    if folds < 2:  # too few groups
        return {"shortcuts": {}}
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=0)
    parts = list(splitter.split(labels, labels, groups))
    features, traits = _collect_features(facts.select(COLUMNS.names).take(distinct))
    # 0 where a property is not known, which is no value of it.
    features["all"] = np.nan_to_num(np.concatenate(list(features.values()), axis=1))
    found = {name: _cross_validate(values, labels, groups, parts) for name, values in features.items()}
    shortcuts = {name: shortcut for name, shortcut in found.items() if shortcut is not None}
    alarming = [name for name in traits if name in shortcuts and shortcuts[name].is_alarming]
    if not alarming:
        return {"shortcuts": shortcuts}
    worst = max(alarming, key=lambda name: shortcuts[name].auc)
    matched = _cross_validate(features["all"], labels, groups, parts, traits[worst])
    return {"shortcuts": shortcuts, "matched_on": worst, "matched": matched}


def _collect_features(files: pa.Table) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Collect the properties of some images.

    Returns:
        All of them as a tree takes them: name -> [N, D] float64, NaN where unknown. And the traits of DICOM files that
        differ between some images: name -> [N] str.
    """
    features, traits = {}, {}
    for name, values in collect_properties(files).items():
        if values.dtype.kind == "f":
            features[name] = values[:, None]
        elif name == "format":
            features[name] = _encode_one_hot(values)
        elif len(np.unique(values)) > 1:
            if name != "origin":
                common = [value for value, _ in Counter(values.tolist()).most_common(_MOST_CATEGORIES)]
                traits[name] = values = np.where(np.isin(values, common), values, "another")
            features[name] = _encode_one_hot(values)
    sides = np.stack([files["width"].to_numpy(), files["height"].to_numpy()], axis=1).astype(float)
    features["size"] = np.sort(sides, axis=1)  # a tree sees more in both sides than in their product
    return features, traits


def _count_groups(labels: np.ndarray, groups: np.ndarray) -> list[int]:
    return [len(np.unique(groups[labels == label])) for label in range(len(CLASS_NAMES))]


def _encode_one_hot(names: np.ndarray) -> np.ndarray:
    return np.stack([names == name for name in np.unique(names)], axis=1).astype(float)


def _cross_validate(
    values: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    parts: list[tuple[np.ndarray, np.ndarray]],
    strata: np.ndarray | None = None,
) -> Shortcut | None:
    """Compute the AUC of a small decision tree on groups it was not fitted to; None if no part has both classes.

    Images whose values are not known are left out. Each group has weight 1, shared by its images. Scores of different
    trees cannot be ranked together, so the AUC is computed in each part, and averaged with the number of pairs of
    groups in it as weight.

    Args:
        strata: [N], or None; only images of one stratum are compared.
    """
    from sklearn.metrics import roc_auc_score
    from sklearn.tree import DecisionTreeClassifier

    known = ~np.isnan(values).any(axis=1)
    _, position, size = np.unique(groups, return_inverse=True, return_counts=True)
    weights = 1 / size[position]
    aucs, pairs = [], []
    for train, test in ((train[known[train]], test[known[test]]) for train, test in parts):
        if not len(train) or not len(test):
            continue
        tree = DecisionTreeClassifier(max_depth=3, min_weight_fraction_leaf=0.02, random_state=0)
        tree.fit(values[train], labels[train], sample_weight=weights[train])
        scores = tree.predict_proba(values[test]) @ tree.classes_
        for chosen in _split_strata(test, strata):
            compared = test[chosen]
            if 0 < labels[compared].sum() < len(compared):  # large groups may leave only one class in a part
                aucs.append(roc_auc_score(labels[compared], scores[chosen], sample_weight=weights[compared]))
                pairs.append(np.prod(_count_groups(labels[compared], groups[compared])))
    if not aucs:
        return None
    auc = float(np.average(aucs, weights=pairs))
    margin = _compute_auc_margin(auc, *_count_groups(labels[known], groups[known]))
    return Shortcut(auc=auc, low=max(0.0, auc - margin), high=min(1.0, auc + margin))


def _split_strata(rows: np.ndarray, strata: np.ndarray | None) -> list[np.ndarray]:
    """Return the positions in `rows` of each stratum; all of them without strata."""
    if strata is None:
        return [np.arange(len(rows))]
    return [np.flatnonzero(strata[rows] == stratum) for stratum in np.unique(strata[rows])]


def _choose_examples(paths: Sequence[str], found: np.ndarray, groups: np.ndarray, links: pa.Table) -> list[Pair]:
    """Choose pairs of a validation or test image and one of training: equally many of each kind, one for each group."""
    pairs: dict[str, dict[int, Pair]] = {kind: {} for kind in KINDS}
    chosen: set[tuple[int, int]] = set()  # files with the same bytes also have the same pixels
    order = list(KINDS)
    for link in sorted(links.to_pylist(), key=lambda link: (order.index(link["kind"]), -(link["texture"] or 0))):
        training, other = sorted((link["first"], link["second"]), key=lambda row: found[row] != SPLITS[0])
        leaks = found[training] == SPLITS[0] and found[other] in SPLITS[1:]
        if leaks and (training, other) not in chosen:
            chosen.add((training, other))
            figures = {name: link[name] for name in ("kind", "texture", "detail", "degrees", "flipped", "inverted")}
            pair = Pair(path=paths[other], training_path=paths[training], **figures)
            pairs[link["kind"]].setdefault(int(groups[training]), pair)
    by_kind = [list(by_group.values()) for by_group in pairs.values() if by_group]
    return [pair for some in by_kind for pair in some[: _EXAMPLES // len(by_kind)]]
