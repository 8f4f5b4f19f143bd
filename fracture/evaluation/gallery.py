"""Gallery of explanations: radiographs that were classified correctly and wrongly, each with its Grad-CAM map."""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel

from fracture.dataset.format import Dataset, images_of
from fracture.evaluation.pointing import PointingGame, play_pointing_game
from fracture.labels import CLASS_NAMES, FRACTURE, NORMAL
from fracture.page import picture
from fracture.storage import StoragePath

GROUPS = {  # name -> (label, true if the model called a fracture)
    "true positives": (FRACTURE, True),
    "false positives": (NORMAL, True),
    "true negatives": (NORMAL, False),
    "false negatives": (FRACTURE, False),
}
FILE = "gallery.json"
_NETWORKS = 5  # with random weights; the channels of a single one often cancel out, and then its map resembles none
# Highest similarity of five random networks, measured with 25 of them on 32 radiographs (5 to 95 %): 0.33 to 0.47 for
# the trained default network, 0.55 to 0.79 for a map of the image's brightness alone; maps of different images: 0.25.
# Maps of 2 × 2 positions, which backbones have at 64 pixels, come near the limit by chance: there the page warns early.
MAX_SIMILARITY = 0.5
_BOX_COLOUR = (255, 220, 0)
_OPACITY = 0.6  # of the map where it is 1


class Example(BaseModel):
    """A radiograph, and the same radiograph with its map on top."""

    path: str
    label: str
    probability: float  # of a fracture, calibrated
    radiograph: str  # data URL; boxes that a person drew around fractures are outlined
    explained: str  # data URL of the radiograph under its map


class Gallery(BaseModel):
    """Explained radiographs of a test split, and the result of the sanity check of their maps."""

    groups: dict[str, list[Example]]  # name of GROUPS -> examples, the most confident first
    similarity: list[float]  # of the maps to those of each network with random weights
    pointing: PointingGame | None = None  # where enough test fractures have boxes

    @property
    def passes_sanity_check(self) -> bool:
        return max(self.similarity) < MAX_SIMILARITY

    @property
    def sanity_check(self) -> str:
        """Describe the result of the sanity check in a sentence."""
        shown = sum(len(examples) for examples in self.groups.values())
        measured = (
            f"the mean absolute rank correlation over these {shown} images is {min(self.similarity):.2f} to "
            f"{max(self.similarity):.2f} (0: unrelated, 1: the same positions)"
        )
        networks = f"{len(self.similarity)} copies of the network with random weights"
        if self.passes_sanity_check:
            return f"Sanity check passed: {networks} give other maps: {measured}, below the limit of {MAX_SIMILARITY}."
        return (
            f"SANITY CHECK FAILED: do not rely on these maps. At least one of {networks} gives similar maps, so they "
            f"may show the image and not what the model has learned: {measured}; the limit is {MAX_SIMILARITY}."
        )


def select_most_confident(scores: pa.Table, threshold: float, count: int) -> dict[str, list[dict[str, Any]]]:
    """Return the `count` most confident rows of each of GROUPS, at most one image per radiograph."""
    called = pc.greater_equal(scores["probability"], threshold)
    found: dict[str, list[dict[str, Any]]] = {}
    for name, (label, fracture) in GROUPS.items():
        in_group = pc.and_(pc.equal(scores["label"], label), pc.equal(called, fracture))
        order = [("probability", "descending" if fracture else "ascending"), ("row", "ascending")]
        rows = scores.filter(in_group).sort_by(order)
        _, first = np.unique(rows["radiograph_id"].to_numpy(), return_index=True)
        found[name] = rows.take(np.sort(first)[:count]).to_pylist()
    return found


def make_gallery(
    model: Any,
    test: pa.Table,
    dataset: Dataset,
    threshold: float,
    count: int = 3,
    each: Callable[[], None] = lambda: None,
) -> Gallery:
    """Explain the most confident test radiographs with Grad-CAM, and check the maps; against boxes where there are any.

    Args:
        test: calibrated scores of test rows, by this model.
        count: the maximum for each of GROUPS.
        each: called after each step, which takes seconds.
    """
    from fracture.evaluation.gradcam import compute_maps, measure_similarity_to_random

    chosen = select_most_confident(test, threshold, count)
    rows = [row for group in chosen.values() for row in group]
    fracture = np.array([GROUPS[name][1] for name, group in chosen.items() for _ in group])
    one_by_one = [dataset.read("test", row["row"], row["row"] + 1) for row in rows]
    images = images_of(pa.concat_tables(one_by_one), dataset.image_size)
    maps = compute_maps(model, images, fracture)
    each()
    similarity = []
    for value in measure_similarity_to_random(model, images, fracture, _NETWORKS):
        similarity.append(value)
        each()
    boxes = dataset.read_boxes()
    if pointing := play_pointing_game(model, test, dataset, boxes):
        each()
    examples = iter(
        Example(
            path=row["source"],
            label=CLASS_NAMES[row["label"]],
            probability=row["probability"],
            radiograph=picture(outline(image, boxes.get(row["source"]))),
            explained=picture(overlay(image, heat_map)),
        )
        for row, image, heat_map in zip(rows, images[..., 0], maps, strict=True)
    )
    groups = {name: [next(examples) for _ in group] for name, group in chosen.items()}
    return Gallery(groups=groups, similarity=similarity, pointing=pointing)


def outline(image: np.ndarray, boxes: np.ndarray | None) -> np.ndarray:
    """Draw the outlines of boxes, if there are any.

    Args:
        image: [S, S] uint8.
        boxes: [B, 4] as in `BOXES`.

    Returns:
        [S, S, 3] uint8, or the image itself.
    """
    if boxes is None:
        return image
    coloured = np.stack([image] * 3, axis=-1)
    for x0, y0, x1, y1 in (boxes * len(image)).astype(int).tolist():
        cv2.rectangle(coloured, (x0, y0), (x1, y1), _BOX_COLOUR)
    return coloured


def overlay(image: np.ndarray, heat_map: np.ndarray) -> np.ndarray:
    """Cover an image with colour where its map is high.

    Args:
        image: [H, W] uint8.
        heat_map: [H, W] in [0, 1].

    Returns:
        [H, W, 3] uint8.
    """
    colours = cv2.cvtColor(
        cv2.applyColorMap((255 * heat_map).round().astype(np.uint8), cv2.COLORMAP_TURBO), cv2.COLOR_BGR2RGB
    )
    opacity = _OPACITY * heat_map[..., None]
    return (image[..., None] * (1 - opacity) + colours * opacity).round().astype(np.uint8)


def write_gallery(run: StoragePath, gallery: Gallery) -> None:
    (run / FILE).write_bytes(gallery.model_dump_json().encode())
