"""Files to groups: all that show one radiograph, or belong to one patient, are one group, and each link says why.

A group is what may not straddle splits, and what counts as one when radiographs are counted.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from fracture.config import DataConfig
from fracture.preparation.duplicates.alignment import SCALES, Likeness
from fracture.preparation.duplicates.candidates import NEIGHBOURS, candidates
from fracture.preparation.facts import RING_LENGTH

# From the plainest to the least plain.
KINDS = {
    "bytes": "the same bytes",
    "pixels": "the same pixels",
    "copy": "the same radiograph, edited",
    "name": "named as a copy, and alike",
    "patient": "the same patient or study",
}
COPY_KINDS = ("bytes", "pixels", "copy", "name")  # of one radiograph; one patient may have several

# Correlations of (texture, detail). Radiographs of the real set that only look alike stay below (0.87, 0.70) and
# mostly below (0.80, 0.55); copies of them, edited in each of the ways tested, lie above (0.95, 0.80) in 9 of 10 cases.
_SAME_RADIOGRAPH = (0.94, 0.75)
_SAME_RADIOGRAPH_BY_NAME = (0.80, 0.60)

LINKS = pa.schema(
    [
        pa.field("first", pa.int64()),  # row of FACTS
        pa.field("second", pa.int64()),
        pa.field("kind", pa.string()),  # of KINDS
        pa.field("texture", pa.float32()),  # correlations; null where nothing was compared
        pa.field("detail", pa.float32()),
        pa.field("degrees", pa.float32()),  # by which the second is turned
        pa.field("flipped", pa.bool_()),
        pa.field("inverted", pa.bool_()),
    ]
)

Compare = Callable[[np.ndarray], list[Likeness]]  # of pairs [M, 2] of views, as `stack_views` numbers them


def find_links(facts: pa.Table, config: DataConfig, compare: Compare) -> pa.Table:
    """All links between the files, as rows of `LINKS`: as many as it takes to join each group, not every pair.

    Args:
        facts: rows of `FACTS`; those that cannot be read get no link.
        compare: lays the views of each pair on each other; the costly part.
    """
    readable = pc.is_valid(facts["sha256"]).to_numpy()
    links = [_star(_equal(facts["sha256"], readable), "bytes"), _star(_equal(facts["pixels"], readable), "pixels")]
    distinct = first_of_each(facts["pixels"], readable)
    links += _near_copies(facts, distinct, compare)
    links += _named_copies(facts, distinct, config, compare, links)
    links.append(_star(_by_patient(facts, readable, config.group_pattern), "patient"))
    return pa.concat_tables(links)


def group_numbers(files: int, links: pa.Table, kinds: Iterable[str] = KINDS) -> np.ndarray:
    """[files] int64: files that links of these kinds join, directly or over others, have the same number."""
    chosen = links.filter(pc.is_in(links["kind"], pa.array(list(kinds), pa.string())))
    first, second = chosen["first"].to_numpy(), chosen["second"].to_numpy()
    graph = coo_array((np.ones(len(first), bool), (first, second)), shape=(files, files))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def first_of_each(column: pa.ChunkedArray, among: np.ndarray) -> np.ndarray:
    """Rows, in order, that are the first with their value."""
    rows = np.flatnonzero(among)
    values = column.take(rows).to_numpy()
    return np.sort(rows[np.unique(values, return_index=True)[1]]) if len(rows) else rows


def _near_copies(facts: pa.Table, distinct: np.ndarray, compare: Compare) -> list[pa.Table]:
    """Searches among all images; then, where families are so large that their members see only their own kin near
    them, among one of each family, until no two are joined any more."""
    owner = _owners(facts)
    views = np.flatnonzero(np.isin(owner, distinct))
    rings = _vectors(facts["rings"], views).reshape(len(views), len(SCALES), RING_LENGTH).transpose(1, 0, 2)
    spectra = _vectors(facts["spectrum"], views)
    links: list[pa.Table] = []
    asked: set[tuple[int, int]] = set()
    chosen, groups_before = np.arange(len(views)), len(distinct)
    while True:
        for pairs in candidates(rings[:, chosen], spectra[chosen]):
            pairs = views[chosen[pairs]]
            pairs = pairs[_apart(owner[pairs], len(facts), links)]
            new = [pair for pair in map(tuple, pairs.tolist()) if pair not in asked]
            asked.update(new)
            links.append(_compared(np.array(new, np.int64).reshape(-1, 2), owner, compare, _SAME_RADIOGRAPH, "copy"))
        groups = _groups(len(facts), links)[owner[views]]
        first, size = np.unique(groups, return_index=True, return_counts=True)[1:]
        if size.max(initial=0) <= NEIGHBOURS or len(first) == groups_before:
            return links
        chosen, groups_before = np.flatnonzero(np.isin(owner[views], owner[views[first]])), len(first)


def _named_copies(
    facts: pa.Table, distinct: np.ndarray, config: DataConfig, compare: Compare, links: list[pa.Table]
) -> list[pa.Table]:
    """Names suggest copies, pixels decide: `1.jpg`, `1.png` and `1 (1).jpg` may well be three patients."""
    suffix = re.compile(config.copy_suffix)
    families: dict[Hashable, list[int]] = defaultdict(list)
    paths, labels = (facts[name].take(distinct).to_pylist() for name in ("path", "label"))
    for row, path, label in zip(distinct.tolist(), paths, labels, strict=True):
        stem = path.rsplit("/", 1)[-1].rsplit(".", 1)[0]
        families[label, suffix.sub("", stem)].append(row)
    pairs = [(rows[0], row) for rows in families.values() for row in rows[1:]]
    pairs += [pair for rows in families.values() for pair in pairwise(rows[1:])]
    asked = np.array(sorted(pairs), np.int64).reshape(-1, 2)
    owner = _owners(facts)
    found: list[pa.Table] = []
    for position in (0, 1):  # both whole, or both from the middle
        asked = asked[_apart(asked, len(facts), [*links, *found])]
        views = np.searchsorted(owner, asked) + position
        there = (views < len(owner)).all(axis=1)
        there[there] = (owner[views[there]] == asked[there]).all(axis=1)
        found.append(_compared(views[there], owner, compare, _SAME_RADIOGRAPH_BY_NAME, "name"))
    return found


def _owners(facts: pa.Table) -> np.ndarray:
    """[views] int64: the row that each view is of."""
    lengths = pc.fill_null(pc.list_value_length(facts["small"]), 0).to_numpy()
    return np.repeat(np.arange(len(facts)), lengths)


def _groups(files: int, links: list[pa.Table]) -> np.ndarray:
    return group_numbers(files, pa.concat_tables(links)) if links else np.arange(files)


def _apart(pairs: np.ndarray, files: int, links: list[pa.Table]) -> np.ndarray:
    """[M] bool: which pairs of rows no link joins yet."""
    group = _groups(files, links)
    return group[pairs[:, 0]] != group[pairs[:, 1]]


def _compared(
    views: np.ndarray, owner: np.ndarray, compare: Compare, limits: tuple[float, float], kind: str
) -> pa.Table:
    found = compare(views)
    same = [i for i, likeness in enumerate(found) if likeness.texture >= limits[0] and likeness.detail >= limits[1]]
    return pa.table(
        {
            "first": owner[views[same, 0]],
            "second": owner[views[same, 1]],
            "kind": [kind] * len(same),
            "texture": [found[i].texture for i in same],
            "detail": [found[i].detail for i in same],
            "degrees": [found[i].degrees for i in same],
            "flipped": [found[i].flipped for i in same],
            "inverted": [found[i].inverted for i in same],
        },
        schema=LINKS,
    )


def _equal(column: pa.ChunkedArray, among: np.ndarray) -> Iterable[list[int]]:
    families: dict[Hashable, list[int]] = defaultdict(list)
    rows = np.flatnonzero(among)
    for row, value in zip(rows.tolist(), column.take(rows).to_pylist(), strict=True):
        families[value].append(row)
    return families.values()


def _by_patient(facts: pa.Table, among: np.ndarray, pattern: str) -> Iterable[list[int]]:
    """Files of one patient or study, by the labels file's column and by the path; number 7 of two hospitals is two."""
    search = re.compile(pattern) if pattern else None
    families: dict[Hashable, list[int]] = defaultdict(list)
    rows = np.flatnonzero(among)
    columns = (facts[name].take(rows).to_pylist() for name in ("path", "patient", "origin"))
    for row, path, patient, origin in zip(rows.tolist(), *columns, strict=True):
        if patient:
            families[origin, patient].append(row)
        match = search.search(path) if search else None
        captured = (match.groups() or (match.group(),)) if match else ()
        if any(captured):
            families[origin, captured].append(row)
    return families.values()


def _star(families: Iterable[list[int]], kind: str) -> pa.Table:
    """Links of each family's first file to all its others."""
    pairs = np.array([(rows[0], row) for rows in families for row in rows[1:]], np.int64).reshape(-1, 2)
    nothing = pa.nulls(len(pairs))
    columns = {"first": pairs[:, 0], "second": pairs[:, 1], "kind": [kind] * len(pairs)}
    return pa.table(columns | {name: nothing.cast(LINKS.field(name).type) for name in LINKS.names[3:]}, schema=LINKS)


def _vectors(column: pa.ChunkedArray, views: np.ndarray) -> np.ndarray:
    """[len(views), D] float32."""
    taken = pc.list_flatten(column).take(views).combine_chunks()
    return taken.flatten().to_numpy().reshape(len(views), -1)
