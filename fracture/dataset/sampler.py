"""The rows of each epoch of training, sampled so that no radiograph outweighs the others by its many copies."""

from collections.abc import Iterator, Sequence

import numpy as np


class BalancedSampler:
    """The rows of the training split for each epoch: plain arithmetic, the same on every worker.

    With `image`, each row is sampled once an epoch. With `radiograph` and `source`, each class gets as many samples as
    any other; within a class each radiograph gets as many as any other, and so does each row of a radiograph: exactly,
    over the epochs, and to within one sample at any time. An epoch has as many samples as the split has rows.
    """

    def __init__(self, radiograph_ids: np.ndarray, labels: np.ndarray, sampling: str, seed: int) -> None:
        """
        Args:
            radiograph_ids, labels: [rows], of the training split, in row order. For `source` the labels are those of
                `label_by_source`.
            sampling: `image`, `radiograph` or `source`.
            seed: of the order of radiographs, and of their rows.
        """
        self.count = len(radiograph_ids)  # samples in an epoch
        self._classes = list(self._by_class(radiograph_ids, labels, seed)) if sampling != "image" else []

    def _by_class(
        self, radiograph_ids: np.ndarray, labels: np.ndarray, seed: int
    ) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Yield (samples an epoch, rows of each radiograph) for each class that has rows."""
        present = np.unique(labels)
        for number, label in enumerate(present):
            rows = np.flatnonzero(labels == label)
            generator = np.random.default_rng([seed, int(label), 2])
            rows = rows[generator.permutation(len(rows))]  # a radiograph's rows, in random order
            rows = rows[np.argsort(radiograph_ids[rows], kind="stable")]
            members = np.split(rows, np.flatnonzero(np.diff(radiograph_ids[rows])) + 1)
            share = self.count * (number + 1) // len(present) - self.count * number // len(present)
            yield share, [members[i] for i in generator.permutation(len(members))]

    def rows(self, epoch: int) -> np.ndarray:
        """Return the rows of an epoch: [count] int64, ascending, a row as often as it is sampled."""
        if not self._classes:
            return np.arange(self.count)
        sampled = []
        for share, members in self._classes:
            # Radiograph r of n has had floor(epoch · share / n + r / n) samples before it; by Hermite's identity
            # these add up to epoch · share, so each epoch has exactly its share.
            number = np.arange(len(members))
            before = (epoch * share + number) // len(members)
            after = ((epoch + 1) * share + number) // len(members)
            sampled += [rows[np.arange(b, a) % len(rows)] for rows, b, a in zip(members, before, after, strict=True)]
        return np.sort(np.concatenate(sampled))


def choose_originals(radiograph_ids: np.ndarray, labels: np.ndarray, name_lengths: np.ndarray) -> np.ndarray:
    """Return the row of the shortest name of each radiograph: [radiographs] int64. Copies and edits add to a name.

    A radiograph that has images under both labels has two rows; of names of one length the first counts.

    Args:
        radiograph_ids, labels: [N].
        name_lengths: [N], of `measure_names`.
    """
    order = np.lexsort((name_lengths, labels, radiograph_ids))  # stable
    pairs = np.stack([radiograph_ids, labels.astype(np.int64)])[:, order]
    _, first = np.unique(pairs, axis=1, return_index=True)
    return order[first]


def measure_names(paths: Sequence[str]) -> np.ndarray:
    """Return the length of each path's last part, [N] int32."""
    return np.array([len(path.rpartition("/")[2]) for path in paths], np.int32)


def label_by_source(labels: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """Return a number for each pair of source and label: [rows] int64. Each is a class of its own to the sampler.

    Args:
        labels: [rows] of 0 and 1.
        sources: [rows] str.
    """
    _, number = np.unique(sources, return_inverse=True)
    return 2 * number + labels.astype(np.int64)


def row_weights(radiograph_ids: np.ndarray, labels: np.ndarray, sampling: str) -> np.ndarray:
    """Return [rows] float32: how often `BalancedSampler` samples each row in an epoch, on average."""
    if sampling == "image":
        return np.ones(len(radiograph_ids), np.float32)
    classes, class_of = np.unique(labels, return_inverse=True)
    pairs = np.stack([labels, radiograph_ids], axis=1)  # a radiograph under both labels is one of each class
    members, radiograph_of, rows_of = np.unique(pairs, axis=0, return_inverse=True, return_counts=True)
    radiographs_of_class = np.array([np.sum(members[:, 0] == label) for label in classes])
    return (len(radiograph_ids) / len(classes) / radiographs_of_class[class_of] / rows_of[radiograph_of]).astype(
        np.float32
    )
