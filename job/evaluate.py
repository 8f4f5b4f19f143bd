"""Score a finished model on radiographs that it has not seen, from its own data set or from another hospital.

  python job/evaluate.py --bundle runs/NAME/bundle --data DIR --out evaluations/NAME
  python job/evaluate.py --bundle runs/NAME/bundle --shards SHARDS --out evaluations/NAME   the test split of shards

DIR is laid out as for job/preprocess.py; whatever splits it has, all of it is test. Copies are grouped; images that the
model was trained on, found byte for byte, are left out with all of their group, and counted; figures are given per
image and per radiograph, with intervals, and for each origin (several --data, or the source column of --labels). The
threshold is the bundle's own. Of a bundle only numbers and settings are read, so that one from elsewhere runs no code.
Leaves in OUT: report.html and its plots, predictions.parquet, metrics.json, and the shards where DIR was named.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import _cli
from preprocess import find, prepare

if TYPE_CHECKING:
    from pyarrow import Table

    from fracture.input.shards import Manifest
    from fracture.release.bundle import Bundle


def main(args: argparse.Namespace) -> None:
    import pyarrow as pa

    from fracture.errors import UsageError
    from fracture.evaluation.metrics import as_json
    from fracture.evaluation.report import Report, caveats, comparison_line, evaluate_run, result_lines, write_report
    from fracture.evaluation.scores import score_blocks, write_predictions
    from fracture.input.shards import read_manifest
    from fracture.release.bundle import read_bundle, versions
    from fracture.storage import place
    from fracture.training.driver import start_ray

    bundle, out = read_bundle(place(args.bundle)), place(args.out)
    shards = place(args.shards) if args.shards else out / "shards"
    if args.labels and not args.data:
        raise UsageError("--labels belongs to --data; --shards have their labels. Leave one out.")
    if args.data:
        config = _cli.settings(args, [f"data.image_size={bundle.image_size}", "data.split=test", "data.folds=0"])
        source = find(args, [place(data) for data in args.data], config)
        prepare(source, shards, config, lambda: start_ray(args.verbose))
    manifest = read_manifest(shards)
    if "test" not in manifest.shards or manifest.image_size != bundle.image_size:
        raise UsageError(
            f"{shards}: the model takes a test split of images of {bundle.image_size} pixels; these shards have "
            f"{', '.join(manifest.shards)} of {manifest.image_size}. Name the radiographs with --data instead."
        )
    fresh = bundle.fresh(shards, manifest, ["test"])["test"]
    if not fresh.any():
        raise UsageError(f"the model was trained on every one of these {len(fresh)} images: they cannot test it")
    scores = score_blocks(bundle.model(), shards, manifest, "test", rank=0, workers=1).filter(pa.array(fresh))
    manifest = _counted(manifest, scores)
    notes = [*_of_the_model(bundle), *caveats(manifest)]
    evaluations = evaluate_run(scores, shards, manifest, bundle.decision.threshold)
    facts = {"bundle": str(bundle.place), "dataset": manifest.fingerprint} | versions()
    own = bundle.evaluations["test"]
    title = f"{args.bundle} elsewhere"
    report = Report(title, manifest, bundle.decision, evaluations, [], 0, facts, notes, own)
    write_report(out, report, scores, shards)
    write_predictions(out, scores)
    (out / "metrics.json").write_json(as_json(evaluations))
    left_out = int((~fresh).sum())
    if left_out:
        print(f"left out   {left_out} images that the model was trained on, or of a radiograph or patient it knows")
    print("\n".join([*result_lines(evaluations), comparison_line(own, evaluations["test"])]))
    print("\n".join([*(f"CAVEAT     {line}" for line in notes), f"report     {out / 'report.html'}"]))


def _of_the_model(bundle: Bundle) -> list[str]:
    if not bundle.synthetic:
        return []
    return ["SYNTHETIC MODEL: it was trained on drawn sample radiographs and knows nothing of real ones."]


def _counted(manifest: Manifest, scores: Table) -> Manifest:
    """The manifest with the counts of what was scored."""
    from fracture.labels import CLASS_NAMES

    rows = list(zip(scores["label"].to_pylist(), scores["group"].to_pylist(), strict=True))
    of_class = {name: [group for label, group in rows if label == i] for i, name in enumerate(CLASS_NAMES)}
    counts = {"test": {name: len(groups) for name, groups in of_class.items()}}
    groups = {"test": {name: len(set(groups)) for name, groups in of_class.items()}}
    return manifest.model_copy(update={"counts": counts, "groups": groups})


if __name__ == "__main__":
    parser = _cli.parser(__doc__)
    parser.add_argument("--bundle", metavar="DIR", required=True, help="folder or URI of a finished run's bundle")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--data", metavar="DIR", action="append", help="folder or URI of radiographs; repeated: several")
    which.add_argument("--shards", metavar="SHARDS", help="folder or URI of shards that hold a test split")
    parser.add_argument("--labels", metavar="CSV", help="path,label[,patient][,source] in place of class folders")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder or URI for the report")
    _cli.run(main, parser.parse_args())
