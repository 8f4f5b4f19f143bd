"""Write a finished model in the format of another program: Keras 3, TensorFlow, ONNX or TFLite."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

from fracture.dataset.format import read_dataset
from fracture.errors import UsageError
from fracture.runtime.quiet import silence_native_stderr
from fracture.storage import StoragePath, storage_path

ExportFormat = Literal["keras", "savedmodel", "onnx", "tflite"]


@dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """A model, and the format to write it in.

    Raises:
        UsageError: `shards` are given for another format than tflite.
    """

    bundle: str  # folder or URI
    to: ExportFormat
    out: str | None = None  # folder or URI; None: exports/NAME/FORMAT
    shards: str | None = None  # folder or URI of shards that calibrate and test the int8 form of tflite
    verbose: bool = False

    def __post_init__(self) -> None:
        if self.shards and self.to != "tflite":
            raise UsageError("--shards are for --to tflite, whose int8 form they calibrate and test. Leave them out.")


@dataclass(frozen=True)
class ExportResult:
    card: dict[str, Any]  # the content of export.json
    out: StoragePath
    synthetic: bool  # whether the model was trained on synthetic radiographs


def export(arguments: ExportArguments) -> ExportResult:
    """Write the model, and compare what was written with the bundle.

    Raises:
        UsageError: the bundle, the shards or the folder cannot be used, or the format lacks an operation of the model.
        RunError: what was written gives other probabilities than the bundle.
    """
    from fracture.inference.bundle import read_bundle

    bundle = read_bundle(storage_path(arguments.bundle))
    out = storage_path(arguments.out or f"exports/{name_export(bundle.folder)}/{arguments.to}")
    with nullcontext() if arguments.verbose else silence_native_stderr():
        from fracture.inference.export import export  # imports TensorFlow, which writes to stderr

        dataset = read_dataset(storage_path(arguments.shards)) if arguments.shards else None
        card = export(bundle, arguments.to, out, dataset)
    return ExportResult(card, out, bundle.synthetic)


def name_export(bundle: StoragePath) -> str:
    """Return the name of an export's folder.

    That is NAME for runs/NAME/bundle, NAME-cnn-fold-1 for runs/NAME/cnn/fold-1/bundle, REGISTRY-0003 for a registry's
    version, and for a bundle elsewhere the names of its folder and of the folder above.
    """
    parts = bundle.path.split("/")
    after = parts[len(parts) - parts[::-1].index("runs") :] if "runs" in parts else parts[-3:]
    return "-".join([part for part in after if part not in ("versions", "bundle")])
