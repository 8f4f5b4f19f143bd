"""MURA as it is downloaded: `MURA-v1.1/train/XR_ELBOW/patient00005/study1_positive/image1.png`."""

import re
from collections.abc import Sequence

from fracture.preparation.labels.class_words import EXCLUDED, ClassWords
from fracture.preparation.labels.labelling import LabelledFile, Labelling
from fracture.preparation.layouts.builder import OF_EXCLUDED, LabellingBuilder
from fracture.preparation.layouts.clutter import sort_out
from fracture.preparation.layouts.paths import find_split
from fracture.storage import StoragePath

EXPECTED = "folders such as XR_ELBOW/patient00005/study1_positive"
_NOTE = (
    "MURA's positive studies are abnormal, which is not the same as fractured: hardware, degeneration and other "
    "findings are among them."
)
_STUDY = re.compile(
    r"(?P<above>.*?)(?:^|/)(?:(?P<part>XR_\w+)/)?(?P<patient>patient\d+)/(?P<study>study\d+)_(?P<word>positive|negative)"
    r"/[^/]+",
    re.IGNORECASE | re.DOTALL,
)


def fits(root: StoragePath, paths: Sequence[str]) -> bool:
    """Return whether there is a study folder."""
    return any(map(_STUDY.fullmatch, paths))


def read(root: StoragePath, paths: Sequence[str], words: ClassWords) -> Labelling:
    """Label files by their study's folder. A patient has one number in all body parts."""
    kept, left_out = sort_out(paths)
    builder = LabellingBuilder(left_out)
    for path in kept:
        study = _STUDY.fullmatch(path)
        label = words.of_folder(study["word"]) if study else None
        if study is None or label is None:
            builder.leave_out("in no study folder of MURA")
        elif label == EXCLUDED:
            builder.leave_out(OF_EXCLUDED)
        else:
            split, patient = find_split(study["above"].split("/")), study["patient"].lower()
            name = "/".join(filter(None, (study["part"], patient, study["study"])))
            builder.add(LabelledFile(path, label, split, patient, name), [study["word"].lower()])
    return builder.build(_NOTE)
