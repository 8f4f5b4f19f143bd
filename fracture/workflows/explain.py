"""Show with Grad-CAM which parts of radiographs a finished model responds to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fracture.errors import UsageError
from fracture.progress.bars import ProgressBars
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
    from fracture.evaluation.scores import block_rows, score_blocks
    from fracture.inference.bundle import read_bundle
    from fracture.page import render

    bundle, page = read_bundle(storage_path(arguments.bundle)), storage_path(arguments.out) / PAGE
    dataset, is_new = prepare_test_data(arguments, [bundle], report)
    model, threshold = bundle.build_model(), bundle.operating_point.threshold
    done, rows = {"score": 0, "explain": 0}, block_rows(dataset.image_size)

    def advance(stage: str, images: int, total: int | None) -> None:
        done[stage] += images
        bars.show(stage, min(done[stage], total or done[stage]), total)

    with ProgressBars() as bars:
        scores = score_blocks(model, dataset, "test", 0, 1, lambda: advance("score", rows, len(is_new)))
        gallery = make_gallery(model, scores, dataset, threshold, arguments.count, lambda: advance("explain", 1, None))
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
