"""What a network looks at: radiographs that it called right and wrong, each with the map of what spoke for it."""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel

from fracture.dataset.format import Dataset, images_of
from fracture.labels import CLASS_NAMES, FRACTURE, NORMAL
from fracture.page import picture
from fracture.storage import StoragePath

GROUPS = {  # name -> the label, and whether it was called a fracture
    "true positives": (FRACTURE, True),
    "false positives": (NORMAL, True),
    "true negatives": (NORMAL, False),
    "false negatives": (FRACTURE, False),
}
FILE = "gallery.json"
_NETWORKS = 5  # with random weights; one alone often draws channels that cancel out, and is like nothing
# Measured over 25 drawn networks on 32 radiographs, our default one, trained, is like the likest of five by 0.33 to
# 0.47 (5 and 95 %), and a map of nothing but the image's brightness by 0.55 to 0.79. Maps of different images: 0.25.
# In maps of 2 × 2 places, as backbones have of 64 pixels, chance alone comes near it: then the page warns too soon.
MOST_LIKENESS = 0.5
_OPAQUE = 0.6  # how much of the radiograph the map hides where it is 1


class Example(BaseModel):
    """A radiograph, and the map over it."""

    path: str
    label: str
    probability: float  # of a fracture, calibrated
    radiograph: str  # address of an `img`
    explained: str  # the same with the map


class Gallery(BaseModel):
    groups: dict[str, list[Example]]  # each of GROUPS -> the surest first
    likeness: list[float]  # to networks with random weights

    @property
    def is_sane(self) -> bool:
        return max(self.likeness) < MOST_LIKENESS

    @property
    def sanity(self) -> str:
        """What the sanity check found."""
        shown = sum(len(examples) for examples in self.groups.values())
        measured = (
            f"the mean size of the rank correlation over these {shown} images is {min(self.likeness):.2f} to "
            f"{max(self.likeness):.2f} (0: unrelated, 1: the same places)"
        )
        networks = f"{len(self.likeness)} copies of the network with random weights"
        if self.is_sane:
            return f"Sanity check: {networks} give other maps: {measured}, below the limit of {MOST_LIKENESS}."
        return (
            f"SANITY: do not believe these maps. Of {networks} at least one gives much the same, so that they may show "
            f"the image and not what the model has learned: {measured}, and the limit is {MOST_LIKENESS}."
        )


def surest(scores: pa.Table, threshold: float, count: int) -> dict[str, list[dict[str, Any]]]:
    """Rows of `scores` for each of GROUPS, the surest first, at most `count` and one image of a radiograph each."""
    called = pc.greater_equal(scores["probability"], threshold)
    found: dict[str, list[dict[str, Any]]] = {}
    for name, (label, fracture) in GROUPS.items():
        of_group = pc.and_(pc.equal(scores["label"], label), pc.equal(called, fracture))
        order = [("probability", "descending" if fracture else "ascending"), ("row", "ascending")]
        rows = scores.filter(of_group).sort_by(order)
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
    """
    Args:
        test: calibrated scores of rows of test, by this model.
        count: of each group, at most.
        each: is called after each step, of seconds.
    """
    from fracture.evaluation.gradcam import likeness_to_random, maps

    chosen = surest(test, threshold, count)
    rows = [row for group in chosen.values() for row in group]
    fracture = np.array([GROUPS[name][1] for name, group in chosen.items() for _ in group])
    one_by_one = [dataset.read("test", row["row"], row["row"] + 1) for row in rows]
    images = images_of(pa.concat_tables(one_by_one), dataset.image_size)
    found = maps(model, images, fracture)
    each()
    likeness = []
    for like in likeness_to_random(model, images, fracture, _NETWORKS):
        likeness.append(like)
        each()
    examples = iter(
        Example(
            path=row["source"],
            label=CLASS_NAMES[row["label"]],
            probability=row["probability"],
            radiograph=picture(image),
            explained=picture(overlay(image, of_image)),
        )
        for row, image, of_image in zip(rows, images[..., 0], found, strict=True)
    )
    groups = {name: [next(examples) for _ in group] for name, group in chosen.items()}
    return Gallery(groups=groups, likeness=likeness)


def overlay(image: np.ndarray, of_image: np.ndarray) -> np.ndarray:
    """[H, W, 3] uint8: the [H, W] uint8 image, covered with colour where its map, in [0, 1], is high."""
    colours = cv2.cvtColor(
        cv2.applyColorMap((255 * of_image).round().astype(np.uint8), cv2.COLORMAP_TURBO), cv2.COLOR_BGR2RGB
    )
    opacity = _OPAQUE * of_image[..., None]
    return (image[..., None] * (1 - opacity) + colours * opacity).round().astype(np.uint8)


def write_gallery(run: StoragePath, gallery: Gallery) -> None:
    (run / FILE).write_bytes(gallery.model_dump_json().encode())


def read_gallery(run: StoragePath) -> Gallery | None:
    """That of a run, if it has one."""
    file = run / FILE
    return Gallery.model_validate_json(file.read_bytes()) if file.is_file() else None
