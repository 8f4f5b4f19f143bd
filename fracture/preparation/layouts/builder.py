"""What a layout has found so far, as it becomes a Labelling."""

from collections import Counter
from collections.abc import Iterable, Mapping

from fracture.labels import CLASS_NAMES
from fracture.preparation.labels.labelling import LabelledFile, Labelling

# Reasons that several layouts have for leaving a file out.
OF_EXCLUDED = "named by data.excluded_labels"


class LabellingBuilder:
    """Collects labelled files, the words that gave their labels, and what is left out."""

    def __init__(self, left_out: Mapping[str, int]) -> None:
        self._files: list[LabelledFile] = []
        self._words: dict[str, set[str]] = {name: set() for name in CLASS_NAMES}
        self._left_out = Counter(left_out)

    def add(self, file: LabelledFile, words: Iterable[str]) -> None:
        self._files.append(file)
        self._words[CLASS_NAMES[file.label]].update(words)

    def leave_out(self, reason: str, files: int = 1) -> None:
        self._left_out[reason] += files

    def build(self, *notes: str) -> Labelling:
        return Labelling(
            files=tuple(sorted(self._files, key=lambda file: file.path)),
            words={name: sorted(words) for name, words in self._words.items()},
            left_out={reason: count for reason, count in sorted(self._left_out.items()) if count},
            notes=notes,
        )
