"""Labels of images from the classes of the boxes drawn in them."""

from collections.abc import Collection, Iterable
from typing import NamedTuple

from fracture.errors import UsageError
from fracture.labels import FRACTURE, NORMAL
from fracture.preparation.labels.class_words import EXCLUDED, ClassWords
from fracture.preparation.labels.labelling import LabelledFile, Labelling
from fracture.preparation.layouts.builder import OF_EXCLUDED, LabellingBuilder
from fracture.preparation.layouts.paths import join_few

NO_BOX = "(no box)"
_NOTE = "An image without any box counts as normal. The set names no patients: views of one may be in two splits."


class BoxedImage(NamedTuple):
    """An image that somebody has looked at for boxes."""

    path: str
    split: str
    classes: Collection[str]  # names of its boxes' classes; none where nothing was found to box


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
        labels = {label_of[name] for name in image.classes}
        if EXCLUDED in labels:
            builder.leave_out(OF_EXCLUDED)
        elif FRACTURE in labels or labels <= {NORMAL}:
            label = FRACTURE if FRACTURE in labels else NORMAL
            meant = [name for name in image.classes if label_of[name] == label]
            builder.add(LabelledFile(image.path, label, image.split), meant or [NO_BOX])
        else:
            others.append(frozenset(name for name in image.classes if label_of[name] is None))
    builder.leave_out(f"with boxes of other classes alone: {join_few(sorted(frozenset().union(*others)))}", len(others))
    return builder.build(_NOTE)
