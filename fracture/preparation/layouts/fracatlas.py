"""FracAtlas as downloaded: `dataset.csv` beside `images/Fractured/` and `images/Non_fractured/`; boxes as COCO."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from fracture.preparation.labels.class_words import ClassWords
from fracture.preparation.labels.labelling import Labelling
from fracture.preparation.layouts.coco import read_fracture_boxes
from fracture.preparation.layouts.tables import ImageRow, has_table, read_labels
from fracture.storage import StoragePath

EXPECTED = "dataset.csv with the columns image_id and fractured"
_COLUMNS = ("image_id", "fractured")
_NOTE = "FracAtlas names no patients: views of one patient may be in two splits."
fits = partial(has_table, columns=_COLUMNS)


def read(root: StoragePath, paths: Sequence[str], words: ClassWords) -> Labelling:
    """Label images by the column `fractured`; the folders, which say the same, are not asked. Boxes are those of COCO.

    Raises:
        UsageError: the table is damaged, or there are two; a COCO file is damaged.
    """

    def read_row(values: Mapping[str, str]) -> ImageRow | None:
        word = values["fractured"].strip()
        label = words.of_value(word)
        return None if label is None else ImageRow(label, word)

    labelling, boxes = read_labels(root, paths, _COLUMNS, read_row, [_NOTE]), read_fracture_boxes(root, paths, words)
    return replace(labelling, files=tuple(replace(f, boxes=boxes.get(f.path, ())) for f in labelling.files))
