"""Pairs of views that may show one radiograph, found with an index of nearest neighbours.

Two indexes are searched for the nearest neighbours of every view, so the work grows with n·log n, never with n².
"""

from collections.abc import Iterator

import faiss
import numpy as np

from fracture.preparation.duplicates.alignment import SCALES

# Distances of unit vectors. Copies of real radiographs, edited in each of the ways tested, are closer than these.
_NEAR_RINGS, _NEAR_SMALLER_RINGS, _NEAR_SPECTRUM = 0.30, 0.20, 0.16
NEIGHBOURS = 6  # searched for each view
_EDGES, _EFFORT = 24, 96  # of the graph: edges of a point, candidates kept during a search


def find_candidates(rings: np.ndarray, spectra: np.ndarray) -> Iterator[np.ndarray]:
    """Yield pairs of views that may show one radiograph, in rounds: nearest neighbours first, then second nearest, ...

    Pairs that one round has joined need no comparison in the next: a family of a thousand copies takes about a
    thousand comparisons.

    Args:
        rings: [len(SCALES), N, D] float32, rings at each scale; zeros for a blank view.
        spectra: [N, E] float32.

    Yields:
        [M, 2] int64, smaller number first.
    """
    present = np.flatnonzero(rings[0].any(axis=1) & spectra.any(axis=1))
    if len(present) < 2:
        return
    index = _build_index(rings[0][present])
    yield from _search_rounds(index, rings[0][present], _NEAR_RINGS, present)
    yield from _search_rounds(_build_index(spectra[present]), spectra[present], _NEAR_SPECTRUM, present)
    for scale in range(1, len(SCALES)):
        yield from _search_rounds(index, rings[scale][present], _NEAR_SMALLER_RINGS, present)


def _build_index(vectors: np.ndarray) -> faiss.Index:
    """Build a navigable small-world graph with one thread, because it depends on the order of insertion.

    Malkov and Yashunin 2018, https://arxiv.org/abs/1603.09320.
    """
    index = faiss.IndexHNSWFlat(vectors.shape[1], _EDGES)
    index.hnsw.efConstruction = _EFFORT
    index.hnsw.efSearch = _EFFORT
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    index.add(np.ascontiguousarray(vectors))
    faiss.omp_set_num_threads(threads)
    return index


def _search_rounds(index: faiss.Index, queries: np.ndarray, limit: float, numbers: np.ndarray) -> Iterator[np.ndarray]:
    squared, neighbours = index.search(np.ascontiguousarray(queries), NEIGHBOURS + 1)
    for column in range(NEIGHBOURS + 1):
        near = (neighbours[:, column] >= 0) & (squared[:, column] < limit**2)
        pairs = np.stack([np.flatnonzero(near), neighbours[near, column]], axis=1)
        pairs = pairs[pairs[:, 0] != pairs[:, 1]]
        if len(pairs):
            yield np.unique(np.sort(numbers[pairs], axis=1), axis=0)
