"""Show what a finished model looks at in radiographs, by Grad-CAM.

  python job/explain.py --bundle runs/NAME/bundle --data DIR --out explanations/NAME
  python job/explain.py --bundle runs/NAME/bundle --shards SHARDS --out explanations/NAME   the test split of shards

DIR is laid out as for job/preprocess.py, and read as by job/evaluate.py, but that images which the model was trained on
are shown too; how many there are is told. Leaves in OUT: explanations.html, with the true and false positives and
negatives of which the model is the surest, each beside a map of the places that spoke for what it decided, and the
result of a sanity check: networks with random weights have to give other maps. And the shards where DIR was named.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import _cli
from evaluate import add_data_flags, find_test, of_the_models

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(args: argparse.Namespace) -> None:
    from fracture.errors import UsageError
    from fracture.evaluation.gallery import make_gallery
    from fracture.evaluation.report import caveats
    from fracture.evaluation.scores import BLOCK_ROWS, score_blocks
    from fracture.inference.bundle import read_bundle
    from fracture.page import render
    from fracture.progress.bars import ProgressBars
    from fracture.storage import storage_path

    if args.count < 1:
        raise UsageError(f"--count {args.count}: how many of each group to show, 1 or more")
    bundle, out = read_bundle(storage_path(args.bundle)), storage_path(args.out)
    dataset, fresh = find_test(args, [bundle], out)
    model, threshold = bundle.model(), bundle.operating_point.threshold
    steps = {"score": 0, "explain": 0}

    def step(what: str, size: int, total: int | None) -> None:
        steps[what] += size
        bars.show(what, min(steps[what], total or steps[what]), total)

    with ProgressBars() as bars:
        scores = score_blocks(model, dataset, "test", 0, 1, lambda: step("score", BLOCK_ROWS, len(fresh)))
        gallery = make_gallery(model, scores, dataset, threshold, args.count, lambda: step("explain", 1, None))
    notes = [*of_the_models([bundle]), *caveats(dataset.manifest)]
    if seen := len(fresh) - sum(fresh):
        notes.append(
            f"SEEN: the model was trained on {seen} of these {len(fresh)} images, or on others of their radiograph or "
            "patient: of those this may show what it remembers."
        )
    page = render(
        "explanations.html",
        title=f"What {args.bundle} looks at",
        radiographs=len(scores["radiograph_id"].unique()),
        images=len(scores),
        threshold=threshold,
        caveats=notes,
        gallery=gallery,
    )
    (out / "explanations.html").write_bytes(page)
    print(f"shown      {', '.join(f'{len(examples)} {name}' for name, examples in gallery.groups.items())}")
    print("\n".join([f"maps       {gallery.sanity}", *(f"CAVEAT     {line}" for line in notes)]))
    print(f"page       {out / 'explanations.html'}")


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = _cli.parser(__doc__)
    parser.add_argument("--bundle", metavar="DIR", required=True, help="folder or URI of a finished run's bundle")
    add_data_flags(parser)
    parser.add_argument("--out", metavar="DIR", required=True, help="folder or URI for the page")
    parser.add_argument("--count", metavar="N", type=int, default=6, help="of each group at most; default: 6")
    return parser.parse_args(given)


if __name__ == "__main__":
    _cli.run(main, arguments())
