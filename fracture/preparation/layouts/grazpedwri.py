"""GRAZPEDWRI-DX as it is downloaded: `dataset.csv`, and 16-bit PNG in `images_part1/` and so on."""

from collections.abc import Mapping, Sequence
from functools import partial

from fracture.labels import NORMAL
from fracture.preparation.labels.class_words import ClassWords
from fracture.preparation.labels.labelling import Labelling
from fracture.preparation.layouts.tables import ImageRow, has_table, read_labels
from fracture.storage import StoragePath

EXPECTED = "dataset.csv with the columns filestem, fracture_visible and patient_id"
_COLUMNS = ("filestem", "fracture_visible", "patient_id")
_NOTE = "GRAZPEDWRI-DX is of children's wrists; normal means that no fracture is visible, not that nothing is found."
fits = partial(has_table, columns=_COLUMNS)


def read(root: StoragePath, paths: Sequence[str], words: ClassWords) -> Labelling:
    """Label images by the column `fracture_visible`, which is 1 or empty.

    Raises:
        UsageError: the table is damaged, or there are two.
    """

    def read_row(values: Mapping[str, str]) -> ImageRow | None:
        word = values["fracture_visible"].strip()
        label = words.of_value(word) if word else NORMAL
        if label is None:
            return None
        patient, study = values["patient_id"].strip(), (values.get("study_number") or "").strip()
        # Studies are numbered anew for each patient.
        return ImageRow(label, word or "(empty)", patient, f"{patient}/{study}" if patient and study else "")

    return read_labels(root, paths, _COLUMNS, read_row, [_NOTE])
