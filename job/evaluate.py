"""Score a finished model on radiographs that it has not seen, from its own data set or from another hospital.

  python job/evaluate.py --bundle runs/NAME/bundle --data DIR --out evaluations/NAME
  python job/evaluate.py --bundle runs/NAME/bundle --shards SHARDS --out evaluations/NAME   the test split of shards
  python job/evaluate.py --bundle A --bundle B --flips --data DIR --out evaluations/NAME    an ensemble

DIR is laid out as for job/preprocess.py; whatever splits it has, all of it is test. Copies are grouped; images that the
model was trained on, found byte for byte, are left out with all of their group, and counted; figures are given per
image and per radiograph, with intervals, and for each origin (several --data, or the source column of --labels). The
threshold is the bundle's own. Of a bundle only numbers and settings are read, so that one from elsewhere runs no code.

Of several bundles the calibrated probabilities are averaged, and their thresholds; what any of them has seen is left
out. --flips averages those of each image and of its mirror image.

Leaves in OUT: report.html and its plots, predictions.parquet, metrics.json, and the shards where DIR was named.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import _cli
from preprocess import find, prepare

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from pyarrow import Table

    from fracture.dataset.format import Dataset, Manifest
    from fracture.inference.bundle import Bundle
    from fracture.storage import StoragePath


def main(args: argparse.Namespace) -> None:
    from fracture.dataset.format import Dataset
    from fracture.errors import UsageError
    from fracture.evaluation.gallery import make_gallery
    from fracture.evaluation.metrics import as_json
    from fracture.evaluation.operating_point import mean_operating_point
    from fracture.evaluation.report import (
        Report,
        evaluate_run,
        format_own_test_comparison,
        format_results,
        list_caveats,
        write_report,
    )
    from fracture.evaluation.scores import Ensemble, score_blocks, write_predictions
    from fracture.inference.bundle import read_bundle, versions
    from fracture.storage import storage_path

    bundles, out = [read_bundle(storage_path(bundle)) for bundle in args.bundle], storage_path(args.out)
    dataset, fresh = find_test(args, bundles, out)
    if not fresh.any():
        which = "the model was" if len(bundles) == 1 else "one model or another was"
        raise UsageError(
            f"{which} trained on every one of these {len(fresh)} images, or on others of their radiograph or patient: "
            "they cannot test it. Name radiographs that are new to it."
        )
    models = [bundle.load_model() for bundle in bundles]
    model = Ensemble(models, args.flips)
    scores = score_blocks(model, dataset, "test", rank=0, workers=1, only=fresh)
    operating_point = mean_operating_point([bundle.operating_point for bundle in bundles])
    dataset = Dataset(dataset.folder, _counted(dataset.manifest, scores))
    manifest = dataset.manifest
    notes = [*of_the_models(bundles), *list_caveats(manifest)]
    evaluations = evaluate_run(scores, dataset, operating_point.threshold)
    named = ", ".join(str(bundle.folder) for bundle in bundles)
    facts = {"bundle": named, "flips": args.flips, "dataset": manifest.fingerprint} | versions()
    own, gallery = None, None
    if len(bundles) == 1 and not args.flips:  # else it is not this model alone whose test and maps these would be
        own = bundles[0].evaluations["test"]
        gallery = make_gallery(models[0], scores, dataset, operating_point.threshold)
    flips = ", each image with its mirror image" if args.flips else ""
    title = f"{args.bundle[0] if len(bundles) == 1 else f'The mean of {len(bundles)} models'} elsewhere{flips}"
    report = Report(title, dataset, operating_point, evaluations, [], 0, facts, notes, own, len(bundles), gallery)
    write_report(out, report, scores)
    write_predictions(out, scores)
    (out / "metrics.json").write_json(as_json(evaluations))
    left_out = int((~fresh).sum())
    if left_out:
        print(f"left out   {left_out} images that the model was trained on, or of a radiograph or patient it knows")
    if len(bundles) > 1:
        print(f"ensemble   of {len(bundles)} models; threshold {operating_point.threshold:.3f}, {operating_point.rule}")
    lines = [*format_results(evaluations), *([format_own_test_comparison(own, evaluations["test"])] if own else [])]
    lines += [f"CAVEAT     {line}" for line in notes]
    print("\n".join([*lines, f"report     {out / 'report.html'}"]))


def find_test(args: argparse.Namespace, bundles: Sequence[Bundle], out: StoragePath) -> tuple[Dataset, np.ndarray]:
    """The shards that `--shards` names or that are made of `--data`, and of each row of test whether it is new.

    A radiograph or patient of which one of the models has seen a file is not new.
    """
    import numpy as np

    from fracture.dataset.format import read_dataset
    from fracture.errors import UsageError
    from fracture.inference.bundle import is_bundle
    from fracture.runtime.cluster import start_ray
    from fracture.storage import storage_path

    if (out / "run.json").is_file() or is_bundle(out):
        raise UsageError(f"--out {out} is a run or a bundle, whose files would be replaced. Name another folder.")
    image_size = _image_size(bundles)
    shards = storage_path(args.shards) if args.shards else out / "shards"
    if args.labels and not args.data:
        raise UsageError("--labels belongs to --data; --shards have their labels. Leave one out.")
    if args.data:
        config = _cli.settings(args, [f"data.image_size={image_size}", "data.split=test", "data.folds=0"])
        source = find(args, [storage_path(data) for data in args.data], config)
        prepare(source, shards, config, lambda: start_ray(args.verbose))
    dataset = read_dataset(shards)
    if "test" not in dataset.splits or dataset.image_size != image_size:
        raise UsageError(
            f"{shards}: the model takes a test split of images of {image_size} pixels; these shards have "
            f"{', '.join(dataset.splits)} of {dataset.image_size}. Name the radiographs with --data instead."
        )
    fresh = [bundle.find_unseen_rows(dataset, ["test"])["test"] for bundle in bundles]
    return dataset, np.logical_and.reduce(fresh)


def _image_size(bundles: Sequence[Bundle]) -> int:
    from fracture.errors import UsageError

    first = bundles[0]
    for number, bundle in enumerate(bundles):
        if bundle.folder in [other.folder for other in bundles[:number]]:
            raise UsageError(f"--bundle {bundle.folder} is named twice, and would count double. Name it once.")
        if bundle.image_size != first.image_size:
            raise UsageError(
                f"{bundle.folder} takes images of {bundle.image_size} pixels, and {first.folder} of "
                f"{first.image_size}: they cannot be averaged on the same shards. Name bundles of one data.image_size."
            )
    return first.image_size


def of_the_models(bundles: Sequence[Bundle]) -> list[str]:
    synthetic = sum(bundle.synthetic for bundle in bundles)
    if not synthetic:
        return []
    which = "it was" if len(bundles) == 1 else f"{synthetic} of {len(bundles)} were"
    know = "knows" if len(bundles) == 1 else "know"
    return [f"SYNTHETIC MODEL: {which} trained on drawn sample radiographs and {know} nothing of real ones."]


def _counted(manifest: Manifest, scores: Table) -> Manifest:
    """The manifest with the counts of what was scored."""
    from fracture.labels import CLASS_NAMES

    rows = list(zip(scores["label"].to_pylist(), scores["group_id"].to_pylist(), strict=True))
    of_class = {name: [group for label, group in rows if label == i] for i, name in enumerate(CLASS_NAMES)}
    counts = {"test": {name: len(groups) for name, groups in of_class.items()}}
    groups = {"test": {name: len(set(groups)) for name, groups in of_class.items()}}
    # Its leakage is that of its own training, and what this model has seen of it is left out.
    return manifest.model_copy(update={"counts": counts, "groups": groups, "leakage": {}})


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--data", metavar="DIR", action="append", help="folder or URI of radiographs; repeated: several")
    which.add_argument("--shards", metavar="SHARDS", help="folder or URI of shards that hold a test split")
    parser.add_argument("--labels", metavar="CSV", help="path,label[,patient][,source] in place of class folders")


if __name__ == "__main__":
    parser = _cli.parser(__doc__)
    parser.add_argument(
        "--bundle",
        metavar="DIR",
        action="append",
        required=True,
        help="folder or URI of a finished run's bundle; repeated: the mean of several",
    )
    parser.add_argument("--flips", action="store_true", help="the mean over each image and its mirror image")
    add_data_flags(parser)
    parser.add_argument("--out", metavar="DIR", required=True, help="folder or URI for the report")
    _cli.run(main, parser.parse_args())
