"""Show with Grad-CAM which parts of radiographs a finished model responds to."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from fracture.errors import UsageError
from fracture.progress.bars import ProgressBars
from fracture.runtime.cluster import start_ray
from fracture.storage import StoragePath, storage_path
from fracture.workflows.arguments import Report, print_line
from fracture.workflows.evaluate import ScoringArguments, model_caveats, prepare_test_data

if TYPE_CHECKING:
    from fracture.evaluation.gallery import Gallery

PAGE = "explanations.html"


@dataclass(frozen=True, kw_only=True)
class ExplainArguments(ScoringArguments):
    """A model, and the radiographs to show its maps on."""

    bundle: str  # folder or URI
    count: int = 6  # radiographs of each group at most

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count < 1:
            raise UsageError(f"--count {self.count}: how many of each group to show, 1 or more")


@dataclass(frozen=True)
class ExplainResult:
    gallery: Gallery  # the radiographs shown, and the sanity check of their maps
    caveats: list[str]
    page: StoragePath


def explain(arguments: ExplainArguments, report: Report = print_line) -> ExplainResult:
    """Write the page with the most confident true and false positives and negatives, and their maps.

    Raises:
        UsageError: the bundle, the data or the folder for the page cannot be used.
    """
    from fracture.evaluation.gallery import make_gallery
    from fracture.evaluation.report import list_caveats
    from fracture.inference.bundle import read_bundle
    from fracture.inference.scoring import score_rows
    from fracture.page import render

    bundle, page = read_bundle(storage_path(arguments.bundle)), storage_path(arguments.out) / PAGE
    dataset, is_new = prepare_test_data(arguments, [bundle], report)
    threshold, steps = bundle.operating_point.threshold, itertools.count(1)
    with ProgressBars() as bars:
        config, start, rows = arguments.config, partial(start_ray, arguments.verbose), np.ones_like(is_new)
        scores = score_rows([bundle], dataset, {"test": rows}, config, start, bars.show)
        model = bundle.build_model()
        gallery = make_gallery(
            model, scores, dataset, threshold, arguments.count, lambda: bars.show("explain", next(steps), None)
        )
    notes = [*model_caveats([bundle]), *list_caveats(dataset.manifest)]
    if seen := len(is_new) - sum(is_new):
        notes.append(
            f"SEEN: the model was trained on {seen} of these {len(is_new)} images, or on others of their radiograph or "
            "patient: for those the maps may show what it remembers."
        )
    content = render(
        PAGE,
        title=f"What {arguments.bundle} looks at",
        radiographs=len(scores["radiograph_id"].unique()),
        images=len(scores),
        threshold=threshold,
        caveats=notes,
        gallery=gallery,
    )
    page.write_bytes(content)
    return ExplainResult(gallery, notes, page)
