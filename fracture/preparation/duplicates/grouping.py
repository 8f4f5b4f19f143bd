"""Links between files that show one radiograph or belong to one patient, and the groups that these links form.

Each link says why it was made. A group may not be separated by a split, and counts as one when groups are counted.
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
from fracture.preparation.duplicates.alignment import SCALES, Similarity
from fracture.preparation.duplicates.candidates import NEIGHBOURS, find_candidates
from fracture.preparation.duplicates.signature import RING_LENGTH, SIDE

# From the strongest evidence to the weakest.
KINDS = {
    "bytes": "the same bytes",
    "pixels": "the same pixels",
    "object": "the same DICOM object",
    "copy": "the same radiograph, edited",
    "name": "named as a copy, and similar",
    "patient": "the same patient or study",
}
COPY_KINDS = ("bytes", "pixels", "object", "copy", "name")  # links within one radiograph; one patient may have several

# Correlations of (texture, detail). Different radiographs of the real set stay below (0.87, 0.70), and mostly below
# (0.80, 0.55). Copies of them, edited in each of the ways tested, are above (0.95, 0.80) in 9 of 10 cases.
_SAME_RADIOGRAPH = (0.94, 0.75)
_SAME_RADIOGRAPH_BY_NAME = (0.80, 0.60)

LINKS = pa.schema(
    [
        pa.field("first", pa.int64()),  # row of FACTS
        pa.field("second", pa.int64()),
        pa.field("kind", pa.string()),  # one of KINDS
        pa.field("texture", pa.float32()),  # correlations; null if nothing was compared
        pa.field("detail", pa.float32()),
        pa.field("degrees", pa.float32()),  # rotation of the second
        pa.field("flipped", pa.bool_()),
        pa.field("inverted", pa.bool_()),
    ]
)

Compare = Callable[[np.ndarray], list[Similarity]]  # of pairs [M, 2] of views, as `stack_views` numbers them
Families = Iterable[list[int]]  # rows of FACTS that belong together


def find_links(facts: pa.Table, config: DataConfig, compare: Compare) -> pa.Table:
    """Find links between the files: as many as it takes to join each group, not one for every pair.

    Args:
        facts: rows of `FACTS`; files that cannot be read get no link.
        compare: aligns the views of each pair; the costly part.

    Returns:
        Rows of `LINKS`.
    """
    readable = pc.is_valid(facts["sha256"]).to_numpy()
    links = [
        _link_families(_find_equal(facts["sha256"], readable), "bytes"),
        _link_families(_find_equal(facts["pixels"], readable), "pixels"),
        _link_families(_find_named(facts["instance"], readable), "object"),
    ]
    distinct = first_of_each(facts["pixels"], readable)
    links += _find_edited_copies(facts, distinct, compare)
    links += _find_copies_by_name(facts, distinct, config, compare, links)
    links.append(_link_families(_find_patients(facts, readable), "patient"))
    return pa.concat_tables(links)


def number_groups(files: int, links: pa.Table, kinds: Iterable[str] = KINDS) -> np.ndarray:
    """Number the groups that links of these kinds form.

    Returns:
        [files] int64, the same number for files that are joined directly or through others.
    """
    chosen = links.filter(pc.is_in(links["kind"], pa.array(list(kinds), pa.string())))
    first, second = chosen["first"].to_numpy(), chosen["second"].to_numpy()
    graph = coo_array((np.ones(len(first), bool), (first, second)), shape=(files, files))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def first_of_each(column: pa.ChunkedArray, included: np.ndarray) -> np.ndarray:
    """Return the first row of each distinct value, in row order.

    Args:
        included: [rows] bool; other rows are ignored.
    """
    rows = np.flatnonzero(included)
    values = column.take(rows).to_numpy()
    return np.sort(rows[np.unique(values, return_index=True)[1]]) if len(rows) else rows


def stack_views(facts: pa.Table) -> np.ndarray:
    """Stack all views of all files in row order: [V, SIDE, SIDE] uint8."""
    views = pc.list_flatten(facts["views"])
    stacked = np.empty((len(views), SIDE, SIDE), np.uint8)
    for number, view in enumerate(views):
        stacked[number] = np.frombuffer(view.as_buffer(), np.uint8).reshape(SIDE, SIDE)
    return stacked


def _find_edited_copies(facts: pa.Table, distinct: np.ndarray, compare: Compare) -> list[pa.Table]:
    """Search the neighbours of all distinct images, then of one member of each family, until no more are joined.

    The nearest neighbours of an image in a large family are all members of its own family. The second search lets two
    large families of one radiograph find each other.
    """
    rows_of_views = _rows_of_views(facts)
    views = np.flatnonzero(np.isin(rows_of_views, distinct))
    rows = rows_of_views[views]
    rings = _take_vectors(facts["rings"], views).reshape(len(views), len(SCALES), RING_LENGTH).transpose(1, 0, 2)
    spectra = _take_vectors(facts["spectrum"], views)
    links: list[pa.Table] = []
    compared: set[tuple[int, int]] = set()
    searched, groups_before = np.arange(len(views)), len(distinct)
    while True:
        for candidates in find_candidates(rings[:, searched], spectra[searched]):
            pairs = _drop_joined(views[searched[candidates]], rows_of_views, links, len(facts))
            new = [pair for pair in map(tuple, pairs.tolist()) if pair not in compared]
            compared.update(new)
            pairs = np.array(new, np.int64).reshape(-1, 2)
            links.append(_link_similar(pairs, rows_of_views, compare, _SAME_RADIOGRAPH, "copy"))
        groups = _number_groups_so_far(len(facts), links)[rows]
        first, size = np.unique(groups, return_index=True, return_counts=True)[1:]
        if size.max(initial=0) <= NEIGHBOURS or len(first) == groups_before:
            return links
        searched, groups_before = np.flatnonzero(np.isin(rows, rows[first])), len(first)


def _find_copies_by_name(
    facts: pa.Table, distinct: np.ndarray, config: DataConfig, compare: Compare, links: list[pa.Table]
) -> list[pa.Table]:
    """Compare files whose names suggest copies: `1.jpg`, `1.png` and `1 (1).jpg` may well be three patients."""
    rows_of_views = _rows_of_views(facts)
    pairs = _pair_similar_names(facts, distinct, config.copy_suffix)
    found: list[pa.Table] = []
    for position in (0, 1):  # the whole image of both, then the square in the middle of both
        pairs = pairs[_are_apart(pairs, [*links, *found], len(facts))]
        views = np.searchsorted(rows_of_views, pairs) + position
        exists = (views < len(rows_of_views)).all(axis=1)
        exists[exists] = (rows_of_views[views[exists]] == pairs[exists]).all(axis=1)
        found.append(_link_similar(views[exists], rows_of_views, compare, _SAME_RADIOGRAPH_BY_NAME, "name"))
    return found


def _pair_similar_names(facts: pa.Table, distinct: np.ndarray, copy_suffix: str) -> np.ndarray:
    """Pair rows of one class whose names differ only in what copies add to a name: [M, 2] int64."""
    suffix = re.compile(copy_suffix)
    families: dict[Hashable, list[int]] = defaultdict(list)
    paths, labels = (facts[name].take(distinct).to_pylist() for name in ("path", "label"))
    for row, path, label in zip(distinct.tolist(), paths, labels, strict=True):
        stem = path.rsplit("/", 1)[-1].rsplit(".", 1)[0]
        families[label, suffix.sub("", stem)].append(row)
    pairs = [(rows[0], row) for rows in families.values() for row in rows[1:]]
    pairs += [pair for rows in families.values() for pair in pairwise(rows[1:])]
    return np.array(sorted(pairs), np.int64).reshape(-1, 2)


def _rows_of_views(facts: pa.Table) -> np.ndarray:
    """Return the row that each view belongs to: [views] int64."""
    lengths = pc.fill_null(pc.list_value_length(facts["views"]), 0).to_numpy()
    return np.repeat(np.arange(len(facts)), lengths)


def _number_groups_so_far(files: int, links: list[pa.Table]) -> np.ndarray:
    return number_groups(files, pa.concat_tables(links)) if links else np.arange(files)


def _are_apart(pairs: np.ndarray, links: list[pa.Table], files: int) -> np.ndarray:
    """Mark the pairs of rows that no link joins yet: [M] bool."""
    group = _number_groups_so_far(files, links)
    return group[pairs[:, 0]] != group[pairs[:, 1]]


def _drop_joined(pairs: np.ndarray, rows_of_views: np.ndarray, links: list[pa.Table], files: int) -> np.ndarray:
    """Keep the pairs of views whose rows no link joins yet."""
    return pairs[_are_apart(rows_of_views[pairs], links, files)]


def _link_similar(
    pairs: np.ndarray, rows_of_views: np.ndarray, compare: Compare, limits: tuple[float, float], kind: str
) -> pa.Table:
    """Compare pairs of views, and link the files of those that are similar enough."""
    found = compare(pairs)
    similar = [i for i, pair in enumerate(found) if pair.texture >= limits[0] and pair.detail >= limits[1]]
    columns = {"first": rows_of_views[pairs[similar, 0]], "second": rows_of_views[pairs[similar, 1]]}
    columns["kind"] = [kind] * len(similar)
    for name in LINKS.names[3:]:
        columns[name] = [getattr(found[i], name) for i in similar]
    return pa.table(columns, schema=LINKS)


def _find_equal(column: pa.ChunkedArray, included: np.ndarray) -> Families:
    families: dict[Hashable, list[int]] = defaultdict(list)
    rows = np.flatnonzero(included)
    for row, value in zip(rows.tolist(), column.take(rows).to_pylist(), strict=True):
        families[value].append(row)
    return families.values()


def _find_named(column: pa.ChunkedArray, included: np.ndarray) -> Families:
    """Collect the rows of each value but the empty one."""
    return _find_equal(column, included & pc.not_equal(column, "").to_numpy(zero_copy_only=False))


def _find_patients(facts: pa.Table, included: np.ndarray) -> Families:
    """Collect the files of each patient, of each study, and of each match of `data.group_pattern`."""
    patients: dict[str, list[int]] = defaultdict(list)
    rows = np.flatnonzero(included)
    for row, names in zip(rows.tolist(), facts["patients"].take(rows).to_pylist(), strict=True):
        for name in names:
            patients[name].append(row)
    return [*patients.values(), *_find_named(facts["study"], included), *_find_named(facts["group_match"], included)]


def _link_families(families: Families, kind: str) -> pa.Table:
    """Link each family's first file to all its others."""
    pairs = np.array([(rows[0], row) for rows in families for row in rows[1:]], np.int64).reshape(-1, 2)
    nulls = pa.nulls(len(pairs))
    columns = {"first": pairs[:, 0], "second": pairs[:, 1], "kind": [kind] * len(pairs)}
    return pa.table(columns | {name: nulls.cast(LINKS.field(name).type) for name in LINKS.names[3:]}, schema=LINKS)


def _take_vectors(column: pa.ChunkedArray, views: np.ndarray) -> np.ndarray:
    """Take the vectors of some views from a column with a list of vectors a row: [len(views), D] float32."""
    taken = pc.list_flatten(column).take(views).combine_chunks()
    return taken.flatten().to_numpy().reshape(len(views), -1)
