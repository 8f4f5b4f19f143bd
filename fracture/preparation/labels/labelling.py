"""What is known of each file before it is decoded: label, split, patient and study, from wherever the user has them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

Box = tuple[float, float, float, float]  # x0, y0, x1, y1: shares, in [0, 1], of the decoded image's width and height


@dataclass(frozen=True)
class LabelledFile:
    """A file of one data folder with its label, as folders, a labels file or a public set's own files say."""

    path: str  # below the data folder, as it is on the disk
    label: int
    split: str = ""  # as found; "" if there is none
    patient: str = ""  # "" if unknown
    study: str = ""  # "" if unknown
    origin: str = ""  # hospital, scanner or collection; "" if unknown
    boxes: tuple[Box, ...] = ()  # drawn around its fractures; none where nobody drew any


@dataclass(frozen=True)
class Labelling:
    """The labelled files of one data folder, and what was found beside them."""

    files: tuple[LabelledFile, ...]  # sorted by path
    words: Mapping[str, list[str]]  # class name -> words found that mean it
    left_out: Mapping[str, int] = field(default_factory=dict)  # why -> files; no faults
    notes: tuple[str, ...] = ()  # what every report on this data has to say, such as that abnormal is not fracture
