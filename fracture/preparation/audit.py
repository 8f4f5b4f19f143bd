"""What a person has to know of a folder of radiographs before anything is trained on it."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel

from fracture.dataset.format import Leak, Rejection
from fracture.labels import CLASS_NAMES, SPLITS
from fracture.preparation.duplicates.grouping import COPY_KINDS, KINDS, first_of_each, group_numbers

_EXTENSIONS = {
    "JPEG": {"jpg", "jpeg", "jpe", "jfif"},
    "PNG": {"png"},
    "GIF": {"gif"},
    "BMP": {"bmp", "dib"},
    "WEBP": {"webp"},
    "TIFF": {"tif", "tiff"},
}
_PLAINEST = 20
_GIANT = 0.2  # share of the images in one group from which on it is warned of
_ENOUGH = 5000  # groups to look for shortcuts in; the grouped folds take their time
_ALARM_AUC = 0.6  # a shortcut this strong, and beyond chance, is warned of
_TESTED, _SUPPOSED = 0.15, 0.9  # what the data supports is told for a test of this share, and for this AUC


class Pair(BaseModel):
    """A test or validation image and its like in training."""

    path: str
    twin: str
    kind: str
    texture: float | None
    detail: float | None
    degrees: float | None
    flipped: bool | None
    inverted: bool | None


class Shortcut(BaseModel):
    """How well something that is not the anatomy tells the classes apart, cross-validated by group."""

    auc: float
    low: float  # 95 % interval, with each group counted once
    high: float

    @property
    def alarming(self) -> bool:
        return self.auc >= _ALARM_AUC and self.low > 0.5


class Audit(BaseModel):
    """What `audit.json` says."""

    files: int
    images: dict[str, int]  # class -> readable images
    distinct_images: dict[str, int]  # class -> images that differ in their pixels
    radiographs: dict[str, int]  # class -> groups of copies: the effective sample size
    groups: int  # with patients joined too
    largest_groups: list[int]
    splits: dict[str, dict[str, int]]  # split found -> class -> images; empty where there is none
    formats: dict[str, int]
    wrong_extension: list[str]  # paths whose name says another format than the bytes
    modes: dict[str, int]
    sizes: dict[str, int]  # "224x224" -> images, the ten commonest
    side_range: tuple[int, int]  # shortest and longest side, pixels
    rejected: list[Rejection]
    copies: dict[str, int]  # kind -> links
    leakage: dict[str, Leak]  # "val", "test" -> leak
    conflicts: list[list[str]]  # paths of one radiograph that stand under both labels, up to ten each
    shortcuts: dict[str, Shortcut]  # "size", ..., "all"
    plainest: list[Pair]

    @property
    def leaks(self) -> bool:
        return any(leak.leaking for leak in self.leakage.values())


def make_audit(facts: pa.Table, links: pa.Table) -> Audit:
    """All figures, from the rows of `FACTS` and `LINKS`."""
    readable = facts["sha256"].is_valid().to_numpy()
    labels, paths = facts["label"].to_numpy(), facts["path"].to_pylist()
    radiograph_ids = group_numbers(len(facts), links, COPY_KINDS)
    groups = group_numbers(len(facts), links)
    distinct = first_of_each(facts["pixels"], readable)
    found = np.array(facts["split"].to_pylist())
    seen = facts.select(["path", "format", "mode", "width", "height"]).filter(pa.array(readable))
    sides = np.concatenate([seen["width"].to_numpy(), seen["height"].to_numpy()])
    sizes = Counter(f"{w}x{h}" for w, h in zip(seen["width"].to_pylist(), seen["height"].to_pylist(), strict=True))

    def by_class(rows: np.ndarray) -> dict[str, int]:
        return {name: int((labels[rows] == label).sum()) for label, name in enumerate(CLASS_NAMES)}

    return Audit(
        files=len(facts),
        images=by_class(np.flatnonzero(readable)),
        distinct_images=by_class(distinct),
        radiographs={
            name: len(np.unique(radiograph_ids[readable & (labels == label)])) for label, name in enumerate(CLASS_NAMES)
        },
        groups=len(np.unique(groups[readable])),
        largest_groups=sorted(Counter(groups[readable].tolist()).values(), reverse=True)[:10],
        splits={s: by_class(np.flatnonzero(readable & (found == s))) for s in SPLITS if (found == s).any()},
        formats=_counted(seen["format"]),
        wrong_extension=[
            path
            for path, kind in zip(seen["path"].to_pylist(), seen["format"].to_pylist(), strict=True)
            if _extension(path) not in _EXTENSIONS[kind]
        ],
        modes=_counted(seen["mode"]),
        sizes=dict(sizes.most_common(10)),
        side_range=(int(sides.min()), int(sides.max())) if len(sides) else (0, 0),
        rejected=[
            Rejection(path=path, split=split, reason=reason)
            for path, split, reason in zip(paths, found.tolist(), facts["reason"].to_pylist(), strict=True)
            if reason is not None
        ],
        copies={kind: pc.sum(pc.equal(links["kind"], kind)).as_py() or 0 for kind in KINDS},
        leakage=leakage(np.where(readable, found, ""), links),
        conflicts=_conflicts(radiograph_ids, labels, readable, paths),
        shortcuts=_shortcuts(facts, distinct, groups),
        plainest=_plainest(paths, found, groups, links),
    )


def leakage(splits: np.ndarray, links: pa.Table) -> dict[str, Leak]:
    """What validation and test share with training, and test with validation, which chooses.

    Args:
        splits: [files] str, "" for what is in none.
    """
    training, validation, test = (splits == split for split in SPLITS)
    if not training.any():
        return {}
    leaks = {split: Leak(images=int((splits == split).sum()), by_kind={}) for split in SPLITS[1:]}
    told = np.zeros(len(splits), bool)
    for number, kind in enumerate(KINDS):
        groups = group_numbers(len(splits), links, list(KINDS)[: number + 1])
        shared = np.isin(groups, groups[training]) & ~told
        for split, leak in leaks.items():
            leak.by_kind[kind] = int((shared & (splits == split)).sum())
        told |= shared
    leaks["test"].in_validation = int((np.isin(groups, groups[validation]) & test & ~told).sum())
    return leaks


def alarms(audit: Audit) -> list[str]:
    """What is wrong with the data, one line each, the worst first."""
    lines = []
    for split, leak in reversed(audit.leakage.items()):  # test first
        if leak.leaking:
            exact = leak.by_kind["bytes"]
            lines.append(
                f"{leak.leaking} of {leak.images} {split} images show a radiograph or patient that {leak.where} has "
                f"too ({exact} are byte-for-byte copies): in the split as found, figures measure memory."
            )
    if audit.conflicts:
        lines.append(
            f"Radiographs under both labels: {len(audit.conflicts):,}, for example {audit.conflicts[0][0]!r} and "
            f"{audit.conflicts[0][1]!r}."
        )
    readable, largest = sum(audit.images.values()), max(audit.largest_groups, default=0)
    if largest > _GIANT * readable and audit.groups > 1:
        lines.append(
            f"One group holds {largest:,} of {readable:,} images: no split can balance it. If that is not one patient, "
            "look for a patient column or a data.group_pattern that gives many the same name."
        )
    if bad := alarming(audit):
        told = ", ".join(f"{name} {s.auc:.2f}" for name, s in bad)
        lines.append(f"Things beside the anatomy predict the label (AUC, chance is 0.50): {told}.")
    return lines


def alarming(audit: Audit) -> list[tuple[str, Shortcut]]:
    """The shortcuts to be warned of, the plainest first."""
    bad = [(name, s) for name, s in audit.shortcuts.items() if s.alarming and name != "all"]
    return sorted(bad, key=lambda item: -item[1].auc)


def support(audit: Audit) -> str:
    """How finely a test on this many radiographs can tell, in one sentence."""
    counts = audit.radiographs
    tested = [round(_TESTED * count) for count in counts.values()]
    few = min(counts, key=lambda name: counts[name])
    if min(tested) < 2:
        return (
            f"no firm figure: {counts[few]} {few} of {sum(counts.values()):,} radiographs, and a test of {_TESTED:.0%} "
            "needs at least 2 of each class; --folds uses each one"
        )
    once, folds = (_auc_margin(_SUPPOSED, *numbers) for numbers in (tested, counts.values()))
    return (
        f"an AUC of {_SUPPOSED:.2f} to within ±{once:.2f} in a test of {_TESTED:.0%} of the radiographs "
        f"({_classes(dict(zip(counts, tested, strict=True)))}), ±{folds:.2f} in folds that test each one"
    )


def _auc_margin(auc: float, negatives: int, positives: int) -> float:
    """Half the 95 % interval of an AUC (Hanley and McNeil 1982, doi:10.1148/radiology.143.1.7063747)."""
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (positives - 1) * (q1 - auc**2) + (negatives - 1) * (q2 - auc**2)
    return 1.96 * float(np.sqrt(variance / (positives * negatives)))


def audit_lines(audit: Audit) -> list[str]:
    """The audit on a screen: about ten aligned lines, then the alarms."""
    a = audit
    readable = sum(a.images.values())
    distinct, radiograph_ids = sum(a.distinct_images.values()), sum(a.radiographs.values())
    lines = [f"files      {a.files:,}: {readable:,} readable ({_classes(a.images)}), {len(a.rejected)} rejected"]
    if a.rejected:
        reasons = Counter(r.reason for r in a.rejected).most_common(4)
        told = ", ".join(f"{n} {reason}" for reason, n in reasons)
        lines.append(
            f"rejected   {len(a.rejected)} files ({len(a.rejected) / a.files:.2%}): {told}; paths in audit.json"
        )
    formats = ", ".join(f"{n:,} {name}" for name, n in a.formats.items())
    wrong = f" · {len(a.wrong_extension)} under another extension" if a.wrong_extension else ""
    lines.append(f"formats    {formats}{wrong} · modes {', '.join(a.modes)}")
    common = ", ".join(f"{size} ({n:,})" for size, n in list(a.sizes.items())[:3])
    lines.append(f"sizes      sides of {a.side_range[0]:,} to {a.side_range[1]:,} pixels; most often {common}")
    largest = ", ".join(f"{n:,}" for n in a.largest_groups[:3])
    twice = f", {len(a.conflicts)} of them counted in both" if a.conflicts else ""
    lines.append(
        f"copies     {distinct:,} distinct images of {radiograph_ids - len(a.conflicts):,} radiographs "
        f"({_classes(a.radiographs)}{twice}); largest families {largest}"
    )
    for split, leak in a.leakage.items():
        kinds = ", ".join(f"{n:,} {KINDS[kind]}" for kind, n in leak.by_kind.items() if n)
        of_kinds = f" ({kinds})" if kinds else ""
        lines.append(f"leakage    {leak.leaking:,} of {leak.images:,} {split} images are in {leak.where} too{of_kinds}")
    if not a.leakage:
        lines.append("leakage    no split was found that could leak; training makes one of whole groups")
    lines.append(f"conflicts  radiographs under both labels: {len(a.conflicts) or 'none'}")
    if a.shortcuts:
        told = ", ".join(f"{name} {s.auc:.2f}" for name, s in a.shortcuts.items())
        lines.append(f"shortcuts  AUC of the label from {told} (0.50 and below is chance)")
    lines.append(f"supports   {support(a)}")
    return lines + [f"ALARM      {line}" for line in alarms(a)]


def _classes(counts: dict[str, int]) -> str:
    return ", ".join(f"{counts[name]:,} {name}" for name in reversed(CLASS_NAMES))


def _extension(path: str) -> str:
    return path.rsplit(".", 1)[-1].lower() if "." in path.rsplit("/", 1)[-1] else ""


def _counted(column: pa.ChunkedArray) -> dict[str, int]:
    return dict(Counter(column.to_pylist()).most_common())


def _conflicts(
    radiograph_ids: np.ndarray, labels: np.ndarray, readable: np.ndarray, paths: Sequence[str]
) -> list[list[str]]:
    both = set(radiograph_ids[readable & (labels == 0)].tolist()) & set(
        radiograph_ids[readable & (labels == 1)].tolist()
    )
    rows: dict[int, tuple[list[str], list[str]]] = {radiograph_id: ([], []) for radiograph_id in sorted(both)}
    for row in np.flatnonzero(np.isin(radiograph_ids, list(both)) & readable):
        rows[int(radiograph_ids[row])][labels[row]].append(paths[row])
    return [[fractured[0], normal[0], *fractured[1:5], *normal[1:5]] for normal, fractured in rows.values()]


def _shortcuts(facts: pa.Table, distinct: np.ndarray, groups: np.ndarray) -> dict[str, Shortcut]:
    some = np.random.default_rng(0).permutation(np.unique(groups[distinct]))[:_ENOUGH]
    distinct = distinct[np.isin(groups[distinct], some)]
    names = ["label", "origin", "bytes", "format", "width", "height", "mean", "border"]
    rows = facts.select(names).take(distinct)
    width, height = rows["width"].to_numpy().astype(float), rows["height"].to_numpy().astype(float)
    formats, origins = (np.array(rows[name].to_pylist()) for name in ("format", "origin"))
    features = {  # [N, D] each
        "size": np.stack([np.minimum(width, height), np.maximum(width, height)], axis=1),
        "aspect": (width / height)[:, None],
        "format": _one_hot(formats),
        "file size": rows["bytes"].to_numpy().astype(float)[:, None],
        "border": rows["border"].to_numpy().astype(float)[:, None],
        "mean grey": rows["mean"].to_numpy().astype(float)[:, None],
    }
    if len(np.unique(origins)) > 1:
        features["origin"] = _one_hot(origins)
    features["all"] = np.concatenate(list(features.values()), axis=1)
    labels, families = rows["label"].to_numpy(), groups[distinct]
    folds = min(5, *_groups_per_class(labels, families))
    if folds < 2:  # too few to tell
        return {}
    from sklearn.model_selection import StratifiedGroupKFold

    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=0)
    parts = list(splitter.split(labels, labels, families))
    found = {name: _cross_validated(values, labels, families, parts) for name, values in features.items()}
    return {name: shortcut for name, shortcut in found.items() if shortcut is not None}


def _groups_per_class(labels: np.ndarray, groups: np.ndarray) -> list[int]:
    return [len(np.unique(groups[labels == label])) for label in range(len(CLASS_NAMES))]


def _one_hot(names: np.ndarray) -> np.ndarray:
    return np.stack([names == name for name in np.unique(names)], axis=1).astype(float)


def _cross_validated(
    values: np.ndarray, labels: np.ndarray, groups: np.ndarray, parts: list[tuple[np.ndarray, np.ndarray]]
) -> Shortcut | None:
    """AUC of a small decision tree on groups it was not grown on; None where no part has both classes.

    Each group weighs 1 in all, shared by its images. Scores of different trees cannot be ranked among each other, so
    the AUC is that of each part, averaged by the pairs of groups in it.
    """
    from sklearn.metrics import roc_auc_score
    from sklearn.tree import DecisionTreeClassifier

    _, position, size = np.unique(groups, return_inverse=True, return_counts=True)
    weights = 1 / size[position]
    aucs, pairs = [], []
    for train, test in parts:
        tree = DecisionTreeClassifier(max_depth=3, min_weight_fraction_leaf=0.02, random_state=0)
        tree.fit(values[train], labels[train], sample_weight=weights[train])
        scores = tree.predict_proba(values[test]) @ tree.classes_
        if 0 < labels[test].sum() < len(test):  # large groups may leave a part one class only
            aucs.append(roc_auc_score(labels[test], scores, sample_weight=weights[test]))
            pairs.append(np.prod(_groups_per_class(labels[test], groups[test])))
    if not aucs:
        return None
    auc = float(np.average(aucs, weights=pairs))
    margin = _auc_margin(auc, *_groups_per_class(labels, groups))
    return Shortcut(auc=auc, low=max(0.0, auc - margin), high=min(1.0, auc + margin))


def _plainest(paths: Sequence[str], found: np.ndarray, groups: np.ndarray, links: pa.Table) -> list[Pair]:
    """Pairs of a test or validation image and one of training, of each kind of link as many, one a radiograph."""
    pairs: dict[str, dict[int, Pair]] = {kind: {} for kind in KINDS}
    told: set[tuple[int, int]] = set()  # identical bytes are identical pixels
    order = list(KINDS)
    for link in sorted(links.to_pylist(), key=lambda link: (order.index(link["kind"]), -(link["texture"] or 0))):
        twin, other = sorted((link["first"], link["second"]), key=lambda row: found[row] != SPLITS[0])
        if found[twin] == SPLITS[0] and found[other] in SPLITS[1:] and (twin, other) not in told:
            told.add((twin, other))
            figures = {name: link[name] for name in ("kind", "texture", "detail", "degrees", "flipped", "inverted")}
            pair = Pair(path=paths[other], twin=paths[twin], **figures)
            pairs[link["kind"]].setdefault(int(groups[twin]), pair)
    of_kind = [list(of_group.values()) for of_group in pairs.values() if of_group]
    return [pair for some in of_kind for pair in some[: _PLAINEST // len(of_kind)]]
