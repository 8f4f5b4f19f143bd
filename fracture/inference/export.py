"""Export of a bundle's model to the formats of other programs.

Each export is built from the bundle's numbers alone. It takes images in [0, 255] and returns calibrated probabilities:
standardisation and calibration are part of it. It is compared with the bundle's model before it is written out.
`export.json`, which is written last, describes its input and output; while files are replaced, it says `incomplete`.

For the comparison ONNX and TFLite files are loaded. A SavedModel and a `.keras` file may contain programs, and no code
here loads them, not even its own: the model that they were saved from is compared, and the tests load the files.
"""

import hashlib
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fracture.dataset.format import Dataset, images_of
from fracture.errors import RunError, UsageError
from fracture.evaluation.metrics import Evaluation, as_json
from fracture.evaluation.report import evaluate
from fracture.evaluation.scores import score_blocks
from fracture.inference.bundle import IMAGES, WEIGHTS, Bundle, is_bundle, save_for_tensorflow, versions
from fracture.labels import CLASS_NAMES
from fracture.storage import StoragePath

CARD = "export.json"
INT8 = "model-int8.tflite"
_INCOMPLETE = "files are missing or cut: the export was interrupted, or is being written. Run the same command again."
_OPSET = 17  # from 2022, read by every current runtime
_TOLERANCE = 1e-5  # largest allowed difference of a float32 export from the bundle's model
_COMPARED_IMAGES = 16  # random images
_CALIBRATION_IMAGES = 256  # their activations give int8 its ranges; a few hundred are usual

Predict = Callable[[np.ndarray], np.ndarray]  # from images [N, S, S, 1] float32 to probabilities [N, 1]


@dataclass(frozen=True)
class ExportFormat:
    """A file format for a model."""

    file: str  # name of the file, or of the folder
    write: Callable[[Any, Path], Predict]  # writes the model, and returns the function that is compared
    line: str  # Python that loads the file; {!r} is its path
    packages: tuple[str, ...]  # whose versions are recorded, beside those of a bundle


def export(bundle: Bundle, to: str, out: StoragePath, dataset: Dataset | None = None) -> dict[str, Any]:
    """Write the model in one format into the folder `out`; an earlier export there is replaced.

    Args:
        to: key of `FORMATS`.
        dataset: for tflite only: images that the model was trained on calibrate its int8 version, the others test it.

    Returns:
        The content of `export.json`.

    Raises:
        UsageError: `out` is a bundle or holds files that are no export's, the format lacks a layer or an operation, or
            the dataset does not fit.
        RunError: the export returns other probabilities.
    """
    _check_out(out)
    evaluation = None if dataset is None else _Int8Evaluation.create(bundle, dataset)
    export_format, model = FORMATS[to], bundle.build_model()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        file = folder / export_format.file
        difference = _largest_difference(model, export_format.write(model, file), bundle.image_size)
        if not difference <= _TOLERANCE:  # true of NaN, too
            raise RunError(
                f"{file.name} returns probabilities that differ by up to {difference:.1e} from the bundle's, over the "
                f"limit of {_TOLERANCE:.0e}. Nothing was written; try another --to."
            )
        content = _describe(bundle, to) | {"largest_difference": difference}
        if evaluation is not None:
            (folder / INT8).write_bytes(_convert_to_int8(model, evaluation.read_calibration_images()))
            content["input"][INT8] = {"dtype": "uint8"}
            content |= {"test": as_json(evaluation.evaluate(model, [file, folder / INT8]))}
        content["files"] = {path.name: _count_bytes(path) for path in sorted(folder.iterdir())}
        # A job that is killed from here on leaves this card, so that the same command finds an export to replace.
        (out / CARD).write_json({"format": to, "incomplete": _INCOMPLETE})
        for name in _file_names():
            (out / name).delete()
        out.upload(folder)
    (out / CARD).write_json(content)
    return content


def _file_names() -> list[str]:
    """Return the names of all files and folders that an export may write beside its card."""
    return [INT8, *(export_format.file for export_format in FORMATS.values())]


def _check_out(out: StoragePath) -> None:
    if is_bundle(out):
        raise UsageError(f"--out {out} is a bundle, which is never changed. Name another folder.")
    existing = [name for name in _file_names() if (out / name).is_file() or (out / name).is_dir()]
    if existing and not (out / CARD).is_file():
        raise UsageError(
            f"--out {out} holds {existing[0]}, which would be replaced, but no {CARD}, so it is not an export. Name "
            "another folder."
        )


@dataclass(frozen=True)
class _Int8Evaluation:
    """A dataset that the model was trained on in part: those rows calibrate the int8 version, the others test it."""

    bundle: Bundle
    dataset: Dataset
    unseen: dict[str, np.ndarray]  # split -> [rows] bool, true where the model was not trained on the row's group

    @classmethod
    def create(cls, bundle: Bundle, dataset: Dataset) -> "_Int8Evaluation":
        """Find the rows that the model was not trained on.

        Raises:
            UsageError: the images have another size, or the model was trained on all of them or on none.
        """
        if dataset.image_size != bundle.image_size:
            raise UsageError(
                f"--shards {dataset.folder}: the model takes images of {bundle.image_size} pixels; these shards have "
                f"{dataset.image_size}. Prepare the same radiographs again with --set "
                f"data.image_size={bundle.image_size}"
            )
        unseen = bundle.find_unseen_rows(dataset, dataset.splits)
        count = sum(int(rows.sum()) for rows in unseen.values())
        total = sum(map(len, unseen.values()))
        if count in (0, total):
            raise UsageError(
                f"--shards {dataset.folder}: the model was trained on {'all' if count == 0 else 'none'} of these "
                f"{total:,} images. The int8 version is calibrated with images of the training and tested with others. "
                "Name the shards that the model was trained and tested on."
            )
        return cls(bundle, dataset, unseen)

    def read_calibration_images(self) -> np.ndarray:
        """Return images of the training, spread evenly: [N, S, S, 1] uint8."""
        seen = [(split, row) for split, unseen in self.unseen.items() for row in np.flatnonzero(~unseen).tolist()]
        chosen = np.linspace(0, len(seen) - 1, min(len(seen), _CALIBRATION_IMAGES)).astype(int)
        rows = (self.dataset.read(seen[i][0], seen[i][1], seen[i][1] + 1) for i in chosen)
        return images_of(pa.concat_tables(rows), self.dataset.image_size)

    def evaluate(self, model: Any, files: Sequence[Path]) -> dict[str, Evaluation]:
        """Evaluate the bundle's model and each TFLite file, by name, on the unseen rows."""
        models = {"bundle": model} | {file.name: TFLiteModel(file) for file in files}
        threshold = self.bundle.operating_point.threshold
        return {name: evaluate(self._score(model), threshold) for name, model in models.items()}

    def _score(self, model: Any) -> pa.Table:
        parts = (
            score_blocks(model, self.dataset, split, rank=0, workers=1, only=unseen)
            for split, unseen in self.unseen.items()
        )
        return pa.concat_tables(parts).combine_chunks()


def _describe(bundle: Bundle, to: str) -> dict[str, Any]:
    size = bundle.image_size
    named = {package: version(package) for package in FORMATS[to].packages}
    return {
        "format": to,
        "bundle": str(bundle.folder),
        "synthetic": bundle.synthetic,
        "class_names": list(CLASS_NAMES),
        "input": {"shape": [None, size, size, 1], "dtype": "float32", **IMAGES},
        "output": "probability of a fracture, calibrated",
        "threshold": bundle.operating_point.threshold,
        "weights_sha256": hashlib.sha256((bundle.folder / WEIGHTS).read_bytes()).hexdigest(),
        "versions": versions() | named,
    }


def _count_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())


def _largest_difference(model: Any, predict: Predict, size: int) -> float:
    """Return the largest difference of probabilities on random images.

    Each image consists of a few large squares, with a contrast from very low to full. Finer patterns resemble no
    radiograph: trained models give them probabilities near 0 or 1, where all formats agree.
    """
    generator = np.random.default_rng(0)
    images = np.empty((_COMPARED_IMAGES, size, size, 1), np.float32)
    for number, image in enumerate(images):
        cells = 2 + number % 4
        grey = 96 + generator.uniform(-96, 159, (cells, cells)) * (number + 1) / _COMPARED_IMAGES
        cell = np.arange(size) * cells // size
        image[..., 0] = grey[cell[:, None], cell].astype(np.uint8)
    return float(np.abs(predict(images) - model.predict_on_batch(images)).max())


def _write_keras(model: Any, path: Path) -> Predict:
    if own := [layer for layer in model.layers if not type(layer).__module__.startswith("keras.")]:
        raise UsageError(
            f"layer {own[0].name!r} is a {type(own[0]).__name__}, which Keras does not have: the file could not be "
            "loaded without this program. Use --to savedmodel."
        )
    model.save(path)
    return model.predict_on_batch


def _write_saved_model(model: Any, path: Path) -> Predict:
    module = save_for_tensorflow(model, path)
    return lambda images: module.serve(images).numpy()


def _write_onnx(model: Any, path: Path) -> Predict:
    import tensorflow as tf

    try:
        import onnx
        import onnxruntime
        import tf2onnx
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--to onnx needs {error.name}, which is not installed here: pip install tf2onnx onnxruntime"
        ) from None
    images = tf.TensorSpec(model.input_shape, tf.float32, name="images")
    function = tf.function(lambda images: {"probability": model(images, training=False)}, input_signature=[images])
    logging.getLogger("tf2onnx").setLevel(logging.CRITICAL)  # it logs an operation that it cannot convert, and goes on
    onnx_model, _ = tf2onnx.convert.from_function(function, [images], opset=_OPSET)
    try:
        onnx.checker.check_model(onnx_model)
    except onnx.checker.ValidationError as error:
        raise _conversion_error("ONNX", error) from None
    onnx.save(onnx_model, path)
    session = onnxruntime.InferenceSession(path)
    return lambda images: session.run(["probability"], {"images": images})[0]


def _write_tflite(model: Any, path: Path) -> Predict:
    path.write_bytes(_convert(_converter(model)))
    return TFLiteModel(path).predict_on_batch


def _converter(model: Any) -> Any:
    import tensorflow as tf

    from fracture.models.tensorflow_internals import convert_variables_to_constants_v2

    images = tf.TensorSpec(model.input_shape, tf.float32, name="images")
    function = tf.function(lambda images: model(images, training=False)).get_concrete_function(images)
    # With variables the converter traces each layer again, which takes longer than all the rest.
    constant = convert_variables_to_constants_v2(function)
    return tf.lite.TFLiteConverter.from_concrete_functions([constant], tf.Module())


def _convert(converter: Any) -> bytes:
    from fracture.models.tensorflow_internals import ConverterError

    try:
        return converter.convert()
    except ConverterError as error:
        raise _conversion_error("TFLite", error) from None


def _conversion_error(name: str, error: Exception) -> UsageError:
    reason = str(error).strip().partition("\n")[0].rstrip(".")
    return UsageError(f"{name} lacks an operation of this network ({reason}). Use --to savedmodel.")


def _convert_to_int8(model: Any, images: np.ndarray) -> bytes:
    """Convert to TFLite with 8-bit weights and activations.

    The result takes images uint8 in [0, 255] and returns float32 in steps of 1/256.

    Args:
        images: [N, S, S, 1] uint8; their activations give the ranges.
    """
    import tensorflow as tf

    images[0, 0, :2, 0] = 0, 255  # the full range, so that one step of the input is one grey level
    converter = _converter(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([image[None].astype(np.float32)] for image in images)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = tf.uint8
    return _convert(converter)


class TFLiteModel:
    """A TFLite model with the interface of a Keras model."""

    def __init__(self, file: Path) -> None:
        import tensorflow as tf

        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", ".*tf.lite.Interpreter is deprecated"
            )  # the version of TensorFlow is pinned
            self.interpreter = tf.lite.Interpreter(model_content=file.read_bytes(), num_threads=os.cpu_count())
        self._shape: tuple[int, ...] = ()

    def predict_on_batch(self, images: np.ndarray) -> np.ndarray:
        [inputs], [outputs] = self.interpreter.get_input_details(), self.interpreter.get_output_details()
        if images.shape != self._shape:
            self.interpreter.resize_tensor_input(inputs["index"], images.shape)
            self.interpreter.allocate_tensors()
            self._shape = images.shape
        self.interpreter.set_tensor(inputs["index"], images.astype(inputs["dtype"]))
        self.interpreter.invoke()
        return self.interpreter.get_tensor(outputs["index"])


FORMATS = {
    "keras": ExportFormat("model.keras", _write_keras, "keras.saving.load_model({!r})", ("keras",)),
    "savedmodel": ExportFormat("saved_model", _write_saved_model, "tensorflow.saved_model.load({!r})", ()),
    "onnx": ExportFormat(
        "model.onnx", _write_onnx, "onnxruntime.InferenceSession({!r})", ("tf2onnx", "onnx", "onnxruntime")
    ),
    "tflite": ExportFormat("model.tflite", _write_tflite, "tensorflow.lite.Interpreter({!r})", ()),
}
