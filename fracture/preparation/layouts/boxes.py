"""Labels of images from the classes of the boxes drawn in them, and the boxes of fractures."""

from collections.abc import Collection, Iterable
from typing import NamedTuple

from fracture.errors import UsageError
from fracture.labels import FRACTURE, NORMAL
from fracture.preparation.labels.class_words import EXCLUDED, ClassWords
from fracture.preparation.labels.labelling import Box, LabelledFile, Labelling
from fracture.preparation.layouts.builder import OF_EXCLUDED, LabellingBuilder
from fracture.preparation.layouts.paths import join_few

NO_BOX = "(no box)"
_NOTE = "An image without any box counts as normal. The set names no patients: views of one may be in two splits."


class ClassBox(NamedTuple):
    """A box that somebody drew, and the name of its class."""

    name: str
    box: Box | None  # None where its position is not known, or it has no area inside the image


class BoxedImage(NamedTuple):
    """An image that somebody has looked at for boxes."""

    path: str
    split: str
    boxes: Collection[ClassBox]  # none where nothing was found to box


def clip_box(x0: float, y0: float, x1: float, y1: float) -> Box | None:
    """Return the part of a box that is inside the image; None where it has no area."""
    box = (max(x0, 0.0), max(y0, 0.0), min(x1, 1.0), min(y1, 1.0))
    return box if box[0] < box[2] and box[1] < box[3] else None


def list_fracture_boxes(boxes: Iterable[ClassBox], words: ClassWords) -> tuple[Box, ...]:
    """Return the boxes whose class names a fracture, each once and in order."""
    return tuple(sorted({box for name, box in boxes if box and words.of_box(name) == FRACTURE}))


def label_boxed(
    where: str, names: Collection[str], images: Iterable[BoxedImage], words: ClassWords, builder: LabellingBuilder
) -> Labelling:
    """Label each image: fracture with a box of one, normal without any box, or with boxes that mean normal.

    One with boxes of other classes alone is left out: what a box called `humerus` shows, nobody knows.

    Args:
        where: the file that has the names, for the message.
        names: of all classes.

    Raises:
        UsageError: no class means fracture.
    """
    label_of = {name: words.of_box(name) for name in names}
    if FRACTURE not in label_of.values():
        raise UsageError(
            f"{where}: no class of boxes means fracture; there are {join_few(names)}. "
            f"{words.advise(name for name, label in label_of.items() if label is None)}"
        )
    others: list[frozenset[str]] = []
    for image in images:
        found = {name for name, _ in image.boxes}
        labels = {label_of[name] for name in found}
        if EXCLUDED in labels:
            builder.leave_out(OF_EXCLUDED)
        elif FRACTURE in labels or labels <= {NORMAL}:
            label = FRACTURE if FRACTURE in labels else NORMAL
            meant = [name for name in found if label_of[name] == label]
            boxes = list_fracture_boxes(image.boxes, words)
            builder.add(LabelledFile(image.path, label, image.split, boxes=boxes), meant or [NO_BOX])
        else:
            others.append(frozenset(name for name in found if label_of[name] is None))
    builder.leave_out(f"with boxes of other classes alone: {join_few(sorted(frozenset().union(*others)))}", len(others))
    return builder.build(_NOTE)
