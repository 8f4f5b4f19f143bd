"""Which rows an epoch of training sees, and how often: so that no radiograph drowns the others in copies of itself."""

from collections.abc import Iterator

import numpy as np


class Draws:
    """Rows of the training split for each epoch; plain arithmetic, known alike to every worker.

    By image, each row is drawn once an epoch. By radiograph, each class is given half of the draws, within its class
    each film as many as any other, and of its film each row as many as any other: exactly, over the epochs, and
    to within one draw at any time. An epoch has as many draws as the split has rows.
    """

    def __init__(self, films: np.ndarray, labels: np.ndarray, sampling: str, seed: int) -> None:
        """
        Args:
            films, labels: [rows], of the training split, in row order.
            sampling: image or radiograph.
        """
        self.count = len(films)  # draws in an epoch
        self._classes = list(self._by_class(films, labels, seed)) if sampling == "radiograph" else []

    def _by_class(self, films: np.ndarray, labels: np.ndarray, seed: int) -> Iterator[tuple[int, list[np.ndarray]]]:
        """(draws an epoch, rows of each film), for each class that there is."""
        present = np.unique(labels)
        for number, label in enumerate(present):
            rows = np.flatnonzero(labels == label)
            generator = np.random.default_rng([seed, int(label), 2])
            rows = rows[generator.permutation(len(rows))]  # of a film, in no order that means anything
            rows = rows[np.argsort(films[rows], kind="stable")]
            members = np.split(rows, np.flatnonzero(np.diff(films[rows])) + 1)
            share = self.count * (number + 1) // len(present) - self.count * number // len(present)
            yield share, [members[i] for i in generator.permutation(len(members))]

    def rows(self, epoch: int) -> np.ndarray:
        """[count] int64, ascending; a row that is drawn twice stands there twice."""
        if not self._classes:
            return np.arange(self.count)
        drawn = []
        for share, members in self._classes:
            # Film f has had floor(epoch · share / films + f / films) draws before this epoch; by Hermite's identity
            # these add up to epoch · share, so each epoch has exactly its share.
            number = np.arange(len(members))
            before = (epoch * share + number) // len(members)
            after = ((epoch + 1) * share + number) // len(members)
            drawn += [rows[np.arange(b, a) % len(rows)] for rows, b, a in zip(members, before, after, strict=True)]
        return np.sort(np.concatenate(drawn))


def row_weights(films: np.ndarray, labels: np.ndarray, sampling: str) -> np.ndarray:
    """[rows] float32: how often `Draws` takes each row in an epoch, on average; for what is to be counted as drawn."""
    if sampling == "image":
        return np.ones(len(films), np.float32)
    classes, class_of = np.unique(labels, return_inverse=True)
    pairs = np.stack([labels, films], axis=1)  # a film under both labels is one of each class
    members, film_of, rows_of = np.unique(pairs, axis=0, return_inverse=True, return_counts=True)
    films_of_class = np.array([np.sum(members[:, 0] == label) for label in classes])
    return (len(films) / len(classes) / films_of_class[class_of] / rows_of[film_of]).astype(np.float32)
