"""The pointing game: does the maximum of a model's map lie inside a box that a person drew around a fracture?

Zhang et al. 2018, doi:10.1007/s11263-017-1059-x. Their tolerance of some pixels around a box is left out: boxes
of fractures are small, and it would count much of what is beside them.
"""

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel

from fracture.dataset.format import Dataset, images_of
from fracture.evaluation.metrics import Figure, mean_with_interval
from fracture.labels import FRACTURE

FEWEST = 10  # radiographs; with fewer the interval says nothing
MOST = 200  # radiographs: each takes as long as a step of training
_SEED = 0  # chooses them


class Pointer(BaseModel):
    """How often something points into a box."""

    hits: int | None  # None where it is a mean probability
    share: Figure  # of the radiographs
    advantage: Figure | None  # the model's share minus this one, on the same resamples; None for the model's own


class PointingGame(BaseModel):
    """The result on the radiographs of fractures that have boxes."""

    radiographs: int  # played
    boxed: int  # fractures of test that have boxes; where there are more than `MOST`, a seed chose those played
    grid: tuple[int, int]  # rows and columns of the map
    empty: int  # maps without any evidence for a fracture, which are misses
    pointers: dict[str, Pointer]  # model, brightness, chance, limit

    @property
    def summary(self) -> str:
        """Return the result in a line."""
        model, brightness, chance = (self.pointers[name] for name in ("model", "brightness", "chance"))
        return (
            f"maximum of the map inside a box: model {model.hits} of {self.radiographs}, {_format(model.share)}; "
            f"brightness {brightness.hits}, {_format(brightness.share)}; chance {_format(chance.share)}"
        )


def play_pointing_game(
    model: Any, test: pa.Table, dataset: Dataset, boxes: Mapping[str, np.ndarray]
) -> PointingGame | None:
    """Compare the maxima of Grad-CAM maps with boxes, beside those of brightness, and chance.

    The map is that of the evidence for a fracture, whatever the model called. Its maximum is the centre of the position
    of the last convolution with the most evidence. Brightness is the mean grey at the same positions, so that both can
    point to the same points. Chance is the share of the image that the boxes cover. The limit is the share of
    radiographs that have such a point in a box: a coarse map cannot do better.

    Args:
        test: scores of test rows.
        boxes: of each file that has any, by its path, as `Dataset.read_boxes` returns them.

    Returns:
        None if fewer than `FEWEST` radiographs of fractures have boxes.
    """
    from fracture.evaluation.gradcam import compute_evidence

    boxed = select_boxed(test, boxes)
    if len(boxed) < FEWEST:
        return None
    rows = choose_rows(boxed)
    one_by_one = [dataset.read("test", row, row + 1) for row in rows["row"].to_pylist()]
    images = images_of(pa.concat_tables(one_by_one), dataset.image_size)
    evidence = compute_evidence(model, images, np.ones(len(images), bool))
    drawn = [boxes[path] for path in rows["source"].to_pylist()]
    return compare_with_boxes(evidence, images[..., 0], drawn, rows["group_id"].to_numpy(), len(boxed))


def select_boxed(test: pa.Table, boxes: Mapping[str, np.ndarray]) -> pa.Table:
    """Return the rows of fractures that have boxes, the first of each radiograph."""
    has_boxes = pc.is_in(test["source"], pa.array(list(boxes), pa.string()))
    rows = test.filter(pc.and_(pc.equal(test["label"], FRACTURE), has_boxes)).sort_by("row")
    _, first = np.unique(rows["radiograph_id"].to_numpy(), return_index=True)
    return rows.take(np.sort(first))


def choose_rows(boxed: pa.Table) -> pa.Table:
    """Return at most `MOST` rows, chosen by a seed, in their order."""
    chosen = np.random.default_rng(_SEED).permutation(len(boxed))[:MOST]
    return boxed.take(np.sort(chosen))


def compare_with_boxes(
    evidence: np.ndarray, images: np.ndarray, boxes: list[np.ndarray], groups: np.ndarray, boxed: int
) -> PointingGame:
    """Count how often the maxima of maps lie in boxes, with intervals by bootstrap over groups.

    Args:
        evidence: [N, H, W]; where nothing is above 0, the map is empty and points nowhere.
        images: [N, S, S] uint8.
        boxes: of each image, [B, 4] as shares of the square.
        groups: [N] int64.
        boxed: number of radiographs that these were chosen from.
    """
    count, height, width = evidence.shape
    grey = np.stack([cv2.resize(i.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA) for i in images])
    is_empty = evidence.max((1, 2)) <= 0
    positions = [mark_positions(b, height, width) for b in boxes]
    hits = {
        "model": _is_maximum_marked(evidence, positions) & ~is_empty,
        "brightness": _is_maximum_marked(grey, positions),
        "chance": np.array([measure_cover(b) for b in boxes]),
        "limit": np.array([marked.any() for marked in positions]),
    }
    pointers = {
        name: Pointer(
            hits=int(values.sum()) if values.dtype == bool else None,
            share=mean_with_interval(values, groups),
            advantage=None if name == "model" else mean_with_interval(hits["model"] - values.astype(float), groups),
        )
        for name, values in hits.items()
    }
    return PointingGame(
        radiographs=count, boxed=boxed, grid=(height, width), empty=int(is_empty.sum()), pointers=pointers
    )


def mark_positions(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return which positions of a map have their centre inside a box: [height, width] bool.

    Args:
        boxes: [B, 4] as shares of the square.
    """
    y, x = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width
    return _cover(boxes, x, y).any(0)


def measure_cover(boxes: np.ndarray) -> float:
    """Return the share of the square, in [0, 1], that boxes cover together; what two of them cover counts once.

    Args:
        boxes: [B, 4] as shares of the square.
    """
    x, y = np.unique(boxes[:, 0::2]), np.unique(boxes[:, 1::2])  # no side of a box runs through a cell between these
    covered = _cover(boxes, (x[1:] + x[:-1]) / 2, (y[1:] + y[:-1]) / 2).any(0)
    return float(np.diff(y) @ covered @ np.diff(x))


def _cover(boxes: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return which of the points of a grid are inside each box: [B, len(y), len(x)] bool."""
    x0, y0, x1, y1 = boxes.T[..., None]
    return ((y0 <= y) & (y < y1))[:, :, None] & ((x0 <= x) & (x < x1))[:, None]


def _is_maximum_marked(maps: np.ndarray, positions: list[np.ndarray]) -> np.ndarray:
    """Return whether the highest position of each map, the first of equals, is marked: [N] bool."""
    highest = maps.reshape(len(maps), -1).argmax(1)
    return np.array([marked.flat[position] for marked, position in zip(positions, highest, strict=True)])


def _format(figure: Figure) -> str:
    return f"{figure.value:.3f} [{figure.low:.3f}, {figure.high:.3f}]"
