"""Hand a finished model over to other programs: Keras 3, TensorFlow, ONNX or TFLite.

  python job/export.py --bundle runs/NAME/bundle --to keras        model.keras, for Keras 3 alone
  python job/export.py --bundle runs/NAME/bundle --to savedmodel   saved_model/, for TensorFlow alone
  python job/export.py --bundle runs/NAME/bundle --to onnx         model.onnx, by tf2onnx
  python job/export.py --bundle runs/NAME/bundle --to tflite --shards SHARDS   model.tflite and model-int8.tflite

All take images [N, S, S, 1] in [0, 255], grey, and give calibrated probabilities [N, 1] float32: normalisation and
calibration are within, the threshold is in export.json. They take float32, the int8 form uint8; the SavedModel takes
both (serve, serve_uint8). An ONNX or TFLite file in float32 whose probabilities on drawn images differ by over 1e-5
from the bundle's is not kept, nor a SavedModel or .keras file if the model that it is saved from does.

SHARDS are those that the model was trained on, of any split or folds: images that it has seen calibrate the int8 form,
those that it has not test it, beside the float one and the bundle's. Without them only model.tflite is written.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import _cli

if TYPE_CHECKING:
    from fracture.storage import StoragePath

_FORMATS = ("keras", "savedmodel", "onnx", "tflite")  # of fracture.inference.export, which takes seconds to import
_WORSE = 0.02  # AUC that 8 bits may cost without a word


def main(args: argparse.Namespace) -> None:
    from fracture.dataset.format import read_dataset
    from fracture.errors import UsageError
    from fracture.inference.bundle import read_bundle
    from fracture.storage import storage_path

    if args.shards and args.to != "tflite":
        raise UsageError("--shards are for --to tflite, whose int8 form they calibrate and test. Leave them out.")
    bundle = read_bundle(storage_path(args.bundle))
    out = storage_path(args.out or f"exports/{_name(bundle.folder)}/{args.to}")
    with nullcontext() if args.verbose else _cli.python_alone_on_stderr():
        from fracture.inference.export import export

        content = export(bundle, args.to, out, read_dataset(storage_path(args.shards)) if args.shards else None)
    print("\n".join(_lines(content, out)))
    if bundle.synthetic:
        print("CAVEAT     SYNTHETIC MODEL: it was trained on drawn radiographs and knows nothing of real ones.")


def _name(bundle: StoragePath) -> str:
    """NAME of runs/NAME/bundle, NAME-cnn-fold-1 of runs/NAME/cnn/fold-1/bundle, REGISTRY-0003 of a version.

    Of a bundle elsewhere, its folder's name and that of the folder above.
    """
    parts = bundle.path.split("/")
    after = parts[len(parts) - parts[::-1].index("runs") :] if "runs" in parts else parts[-3:]
    return "-".join([part for part in after if part not in ("versions", "bundle")])


def _lines(content: dict[str, Any], out: StoragePath) -> list[str]:
    from fracture.evaluation.metrics import Metrics
    from fracture.evaluation.report import format_figure
    from fracture.inference.export import CARD, FORMATS, INT8

    export_format, (_, size, _, _) = FORMATS[content["format"]], content["input"]["shape"]
    lines = [f"written    {out / file} ({count / 1e6:.1f} MB)" for file, count in content["files"].items()]
    lines += [
        f"takes      images [N, {size}, {size}, 1] in [0, 255]; a fracture from {content['threshold']:.4f} on ({CARD})",
        f"compared   {export_format.file} differs from the bundle's model by at most "
        f"{content['largest_difference']:.1e}",
        f"load       {export_format.line.format(str(out / export_format.file))}",
    ]
    if content["format"] == "tflite" and "test" not in content:
        lines.append("int8       not written: name the shards that the model was trained on with --shards")
    tested = {name: Metrics.model_validate(unit["radiograph"]) for name, unit in content.get("test", {}).items()}
    for name, m in tested.items():
        if name == "bundle":
            lines.append(f"test       {m.count:,} radiographs that the model has not seen:")
        auc, recall, specificity = (format_figure(m.figures[figure]) for figure in ("auc", "recall", "specificity"))
        lines.append(f"  {name:<18} AUC {auc}, sensitivity {recall}, specificity {specificity}")
    if tested and (exact := tested["bundle"]["auc"]) is not None and exact - tested[INT8]["auc"] > _WORSE:
        lines.append(
            f"CAVEAT     INT8: its AUC is {exact - tested[INT8]['auc']:.3f} below the bundle's. Take the float form."
        )
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-v", "--verbose", action="store_true", help="show the logs of TensorFlow, and traces")
    parser.add_argument("--bundle", metavar="DIR", required=True, help="folder or URI of a finished run's bundle")
    parser.add_argument("--to", choices=_FORMATS, required=True, help="the format")
    parser.add_argument("--out", metavar="DIR", help="folder or URI to write to; else exports/NAME/FORMAT")
    parser.add_argument("--shards", metavar="SHARDS", help="folder or URI of shards, for the int8 form of tflite")
    parser.set_defaults(kept="nothing was exported")
    _cli.run(main, parser.parse_args())
