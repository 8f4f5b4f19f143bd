"""A bundle's model in the forms that other programs read.

Each is made of the bundle's numbers alone, takes images in [0, 255] and gives calibrated probabilities: normalisation
and calibration are within. Each is compared with the bundle's model before it is handed over; `export.json` beside it,
which is written last, says what it takes and gives.

ONNX and TFLite files are loaded for that. A SavedModel and a `.keras` file may hold programs, and no code here loads
any, not even its own: the model that they were saved from is compared, and the tests load the files.
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
_OPSET = 17  # of 2022, which every runtime of today reads
_MOST_APART = 1e-5  # that float32 forms may be from the bundle's model
_COMPARED = 16  # drawn images
_CALIBRATING = 256  # images whose activations give int8 its ranges; a few hundred are usual

Probabilities = Callable[[np.ndarray], np.ndarray]  # of images [N, S, S, 1] float32, [N, 1]


@dataclass(frozen=True)
class Form:
    """One way to hand a model over."""

    file: str  # or folder
    write: Callable[[Any, Path], Probabilities]  # writes the model, and gives what is compared
    line: str  # of Python that loads the file
    packages: tuple[str, ...]  # whose versions matter beside those of a bundle


def export(bundle: Bundle, to: str, out: StoragePath, dataset: Dataset | None = None) -> dict[str, Any]:
    """Writes one form of the model into the folder `out`; an export that is there is replaced.

    Args:
        to: of `FORMS`.
        dataset: for tflite alone: images that the model has seen calibrate its int8 form, and the others test it.

    Returns:
        What `export.json` says.

    Raises:
        UsageError: `out` is a bundle or holds something of another's, a layer or operation has no counterpart, or the
            shards do not fit.
        RunError: what was written gives other probabilities.
    """
    _check_out(out)
    trial = None if dataset is None else _Trial.of(bundle, dataset)
    form, model = FORMS[to], bundle.model()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        apart = _apart(model, form.write(model, folder / form.file), bundle.image_size)
        if not apart <= _MOST_APART:
            raise RunError(
                f"{form.file} gives probabilities up to {apart:.1e} from the bundle's, over the limit of "
                f"{_MOST_APART:.0e}. Nothing was written; another --to may do better."
            )
        content = _content(bundle, to) | {"largest_difference": apart}
        if trial is not None:
            (folder / INT8).write_bytes(_int8(model, trial.to_calibrate()))
            content["input"][INT8] = {"dtype": "uint8"}
            content |= {"test": as_json(trial.results(model, [folder / form.file, folder / INT8]))}
        content["files"] = {path.name: _bytes(path) for path in sorted(folder.iterdir())}
        for name in _names():
            (out / name).delete()
        out.upload(folder)
    (out / CARD).write_json(content)
    return content


def _names() -> list[str]:
    """Of all that an export may leave."""
    return [CARD, INT8, *(form.file for form in FORMS.values())]


def _check_out(out: StoragePath) -> None:
    if is_bundle(out):
        raise UsageError(f"--out {out} is a bundle, which is never changed. Name another folder.")
    there = [name for name in _names() if (out / name).is_file() or (out / name).is_dir()]
    if there and not (out / CARD).is_file():
        raise UsageError(
            f"--out {out} holds {there[0]}, and no {CARD} says that it is an export, which would be replaced. Name "
            "another folder."
        )


@dataclass(frozen=True)
class _Trial:
    """Shards of which the model has seen a part, which calibrates, and not the other, which tests."""

    bundle: Bundle
    dataset: Dataset
    fresh: dict[str, np.ndarray]  # split -> [rows] bool, not seen

    @classmethod
    def of(cls, bundle: Bundle, dataset: Dataset) -> "_Trial":
        """
        Raises:
            UsageError: they are of another size, or all seen, or none.
        """
        if dataset.image_size != bundle.image_size:
            raise UsageError(
                f"--shards {dataset.folder}: the model takes images of {bundle.image_size} pixels; these shards have "
                f"{dataset.image_size}. Make others of the same radiographs with --set "
                f"data.image_size={bundle.image_size}"
            )
        fresh = bundle.fresh(dataset, dataset.splits)
        count = sum(int(rows.sum()) for rows in fresh.values())
        total = sum(map(len, fresh.values()))
        if count in (0, total):
            raise UsageError(
                f"--shards {dataset.folder}: the model has seen {'all' if count == 0 else 'none'} of these {total:,} "
                "images, and int8 takes its ranges from some that it has seen, and is tested with others. Name the "
                "shards that it was trained and tested on."
            )
        return cls(bundle, dataset, fresh)

    def to_calibrate(self) -> np.ndarray:
        """[N, S, S, 1] uint8, spread evenly over those seen."""
        seen = [(split, row) for split, fresh in self.fresh.items() for row in np.flatnonzero(~fresh).tolist()]
        chosen = np.linspace(0, len(seen) - 1, min(len(seen), _CALIBRATING)).astype(int)
        rows = (self.dataset.read(seen[i][0], seen[i][1], seen[i][1] + 1) for i in chosen)
        return images_of(pa.concat_tables(rows), self.dataset.image_size)

    def results(self, model: Any, files: Sequence[Path]) -> dict[str, Evaluation]:
        """Figures of the bundle's model and of each TFLite file, by name, on what the model has not seen."""
        models = {"bundle": model} | {file.name: Lite(file) for file in files}
        return {
            name: evaluate(self._scores(model), self.bundle.operating_point.threshold) for name, model in models.items()
        }

    def _scores(self, model: Any) -> pa.Table:
        parts = (
            score_blocks(model, self.dataset, split, rank=0, workers=1, only=fresh)
            for split, fresh in self.fresh.items()
        )
        return pa.concat_tables(parts).combine_chunks()


def _content(bundle: Bundle, to: str) -> dict[str, Any]:
    size = bundle.image_size
    named = {package: version(package) for package in FORMS[to].packages}
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


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())


def _apart(model: Any, probabilities: Probabilities, size: int) -> float:
    """The largest difference on drawn images: a few large squares each, from hardly any contrast to all of it.

    Finer ones are so unlike a radiograph that trained models are sure of them, and at 0 or 1 all forms agree.
    """
    generator = np.random.default_rng(0)
    images = np.empty((_COMPARED, size, size, 1), np.float32)
    for number, image in enumerate(images):
        cells = 2 + number % 4
        grey = 96 + generator.uniform(-96, 159, (cells, cells)) * (number + 1) / _COMPARED
        at = np.arange(size) * cells // size
        image[..., 0] = grey[at[:, None], at].astype(np.uint8)
    return float(np.abs(probabilities(images) - model.predict_on_batch(images)).max())


def _write_keras(model: Any, path: Path) -> Probabilities:
    from fracture.inference.keras3 import to_keras3

    twin = to_keras3(model)
    twin.save(path)
    return twin.predict_on_batch


def _write_tensorflow(model: Any, path: Path) -> Probabilities:
    module = save_for_tensorflow(model, path)
    return lambda images: module.serve(images).numpy()


def _write_onnx(model: Any, path: Path) -> Probabilities:
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
    logging.getLogger("tf2onnx").setLevel(logging.CRITICAL)  # it only logs what it cannot convert, and writes the rest
    made, _ = tf2onnx.convert.from_function(function, [images], opset=_OPSET)
    try:
        onnx.checker.check_model(made)
    except onnx.checker.ValidationError as error:
        raise _not_convertible("ONNX", error) from None
    onnx.save(made, path)
    session = onnxruntime.InferenceSession(path)
    return lambda images: session.run(["probability"], {"images": images})[0]


def _write_tflite(model: Any, path: Path) -> Probabilities:
    path.write_bytes(_convert(_converter(model)))
    return Lite(path).predict_on_batch


def _converter(model: Any) -> Any:
    import tensorflow as tf

    from fracture.models.tensorflow_internals import convert_variables_to_constants_v2

    images = tf.TensorSpec(model.input_shape, tf.float32, name="images")
    function = tf.function(lambda images: model(images, training=False)).get_concrete_function(images)
    # With its weights as constants, else each layer of the model is traced anew, which takes longer than all else.
    constant = convert_variables_to_constants_v2(function)
    return tf.lite.TFLiteConverter.from_concrete_functions([constant], tf.Module())


def _convert(converter: Any) -> bytes:
    from fracture.models.tensorflow_internals import ConverterError

    try:
        return converter.convert()
    except ConverterError as error:
        raise _not_convertible("TFLite", error) from None


def _not_convertible(what: str, error: Exception) -> UsageError:
    said = str(error).strip().partition("\n")[0].rstrip(".")
    return UsageError(f"{what} has no counterpart of an operation of this network ({said}). Take --to savedmodel.")


def _int8(model: Any, images: np.ndarray) -> bytes:
    """Weights and activations in 8 bits; takes images uint8 as they are, gives float32 in steps of 1/256.

    Args:
        images: [N, S, S, 1] uint8, whose activations give the ranges.
    """
    import tensorflow as tf

    images[0, 0, :2, 0] = 0, 255  # the whole range, so that a step of the input is a grey level
    converter = _converter(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([image[None].astype(np.float32)] for image in images)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = tf.uint8
    return _convert(converter)


class Lite:
    """A TFLite model that is called as a Keras model is."""

    def __init__(self, file: Path) -> None:
        import tensorflow as tf

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*tf.lite.Interpreter is deprecated")  # TensorFlow is pinned
            self.interpreter = tf.lite.Interpreter(model_content=file.read_bytes(), num_threads=os.cpu_count())
        self._shape: tuple[int, ...] = ()

    def predict_on_batch(self, images: np.ndarray) -> np.ndarray:
        [taken], [given] = self.interpreter.get_input_details(), self.interpreter.get_output_details()
        if images.shape != self._shape:
            self.interpreter.resize_tensor_input(taken["index"], images.shape)
            self.interpreter.allocate_tensors()
            self._shape = images.shape
        self.interpreter.set_tensor(taken["index"], images.astype(taken["dtype"]))
        self.interpreter.invoke()
        return self.interpreter.get_tensor(given["index"])


FORMS = {
    "keras": Form("model.keras", _write_keras, "keras.saving.load_model({!r})", ("keras",)),
    "savedmodel": Form("saved_model", _write_tensorflow, "tensorflow.saved_model.load({!r})", ()),
    "onnx": Form("model.onnx", _write_onnx, "onnxruntime.InferenceSession({!r})", ("tf2onnx", "onnx", "onnxruntime")),
    "tflite": Form("model.tflite", _write_tflite, "tensorflow.lite.Interpreter({!r})", ()),
}
