import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import onnxruntime
import pyarrow as pa
import pytest
import tensorflow as tf
from pyarrow import fs
from safetensors.numpy import load_file

from fracture.arrays import save_arrays
from fracture.dataset.format import FILES, Dataset
from fracture.errors import RunError, UsageError
from fracture.inference.bundle import Bundle, read_bundle
from fracture.inference.export import FORMATS, TFLiteModel, export
from fracture.models import build_model
from fracture.storage import StoragePath, storage_path
from tests.conftest import TINY, quick_bundle, shell, write_shards

layers = keras.layers
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 1)).astype(np.float32)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return read_bundle(storage_path(quick_bundle(tmp_path_factory.mktemp("quick"), *TINY)))


def load(to: str, file: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Load an export with the library of its format."""
    if to == "keras":
        return keras.saving.load_model(file, compile=False, safe_mode=True).predict_on_batch
    if to == "savedmodel":
        loaded = tf.saved_model.load(str(file))
        return lambda images: loaded.serve(images).numpy()
    if to == "onnx":
        session = onnxruntime.InferenceSession(file)
        return lambda images: session.run(["probability"], {"images": images})[0]
    return TFLiteModel(file).predict_on_batch


@pytest.mark.parametrize("to", FORMATS)
def test_each_format_returns_the_probabilities_of_the_bundle(bundle, tmp_path, to: str):
    content = export(bundle, to, storage_path(tmp_path))
    export_format = FORMATS[to]
    expected = bundle.build_model().predict_on_batch(IMAGES)
    assert np.abs(load(to, tmp_path / export_format.file)(IMAGES) - expected).max() < 1e-5
    assert np.ptp(expected) > 1e-4, "different images get different probabilities"
    assert content["largest_difference"] < 1e-5
    assert content == json.loads((tmp_path / "export.json").read_text())
    assert content["format"] == to
    assert content["input"]["shape"] == [None, 32, 32, 1]
    assert content["threshold"] == 0.5
    weights = Path(str(bundle.folder / "weights.safetensors")).read_bytes()
    assert content["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    assert list(content["files"]) == [export_format.file]
    assert set(export_format.packages) < set(content["versions"])


STRANGER = """
import sys
sys.modules["fracture"] = None  # so that importing it fails
import keras, numpy as np, onnxruntime, tensorflow as tf
folder, images = sys.argv[1], np.load(sys.argv[1] + "/images.npy")
found = [keras.saving.load_model(folder + "/keras/model.keras").predict_on_batch(images)]
saved = tf.saved_model.load(folder + "/savedmodel/saved_model")
found += [saved.serve(images).numpy()]
found += onnxruntime.InferenceSession(folder + "/onnx/model.onnx").run(["probability"], {"images": images})
lite = tf.lite.Interpreter(folder + "/tflite/model.tflite")
(taken,), (given,) = lite.get_input_details(), lite.get_output_details()
lite.resize_tensor_input(taken["index"], images.shape)
lite.allocate_tensors()
lite.set_tensor(taken["index"], images)
lite.invoke()
found += [lite.get_tensor(given["index"])]
np.save(folder + "/found.npy", found)
"""


@pytest.mark.slow
def test_a_process_that_does_not_know_this_package_loads_each_format(bundle, tmp_path):
    for to in ("keras", "savedmodel", "onnx", "tflite"):
        export(bundle, to, storage_path(tmp_path / to))
    np.save(tmp_path / "images.npy", IMAGES)
    subprocess.run([sys.executable, "-W", "ignore", "-c", STRANGER, str(tmp_path)], check=True, env=shell())
    found, expected = np.load(tmp_path / "found.npy"), bundle.build_model().predict_on_batch(IMAGES)
    assert found.shape == (4, 3, 1)
    assert np.abs(found - expected).max() < 1e-5


def test_an_export_is_replaced_as_a_whole_and_other_files_stay(bundle, tmp_path):
    (tmp_path / "saved_model").mkdir()
    for name in ("export.json", "model.tflite", "model-int8.tflite", "saved_model/saved_model.pb", "notes.txt"):
        (tmp_path / name).write_text("from before")
    export(bundle, "keras", storage_path(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export.json", "model.keras", "notes.txt"]
    assert json.loads((tmp_path / "export.json").read_text())["format"] == "keras"


class KilledWhileWriting(fs.LocalFileSystem):
    """Ends the job, as Ctrl-C does, when it begins to write the model."""

    def open_output_stream(self, path: str, *args: Any, **options: Any) -> pa.NativeFile:
        if "model.tflite" in path:
            raise KeyboardInterrupt
        return super().open_output_stream(path, *args, **options)


def test_an_export_that_was_killed_says_so_and_is_made_by_the_same_command(bundle, tmp_path):
    for name in ("export.json", "model.keras"):
        (tmp_path / name).write_text("from before")
    with pytest.raises(KeyboardInterrupt):
        export(bundle, "tflite", StoragePath(KilledWhileWriting(), str(tmp_path)))
    card = json.loads((tmp_path / "export.json").read_text())
    assert card["incomplete"].startswith("files are missing or cut: the export was interrupted")
    assert [path.name for path in tmp_path.iterdir()] == ["export.json"]
    (tmp_path / "model.tflite").write_text("half of it")
    content = export(bundle, "tflite", storage_path(tmp_path))
    assert "incomplete" not in content
    assert json.loads((tmp_path / "export.json").read_text()) == content
    assert content["files"] == {"model.tflite": (tmp_path / "model.tflite").stat().st_size}


def test_files_that_are_no_exports_are_not_replaced(bundle, tmp_path):
    (tmp_path / "saved_model").mkdir()
    (tmp_path / "saved_model/mine").write_text("of another program")
    with pytest.raises(UsageError, match=r"--out .* holds saved_model, which would be replaced, but no export.json"):
        export(bundle, "tflite", storage_path(tmp_path))
    assert [path.name for path in tmp_path.rglob("*")] == ["saved_model", "mine"]


def test_a_bundle_is_never_written_to(bundle):
    with pytest.raises(UsageError, match=r"--out .* is a bundle, which is never changed. Name another folder"):
        export(bundle, "keras", bundle.folder)


def test_an_export_with_other_probabilities_is_not_written(tmp_path):
    """A difference of NaN is over any limit."""
    made = quick_bundle(tmp_path / "quick", *TINY)
    arrays = load_file(made / "weights.safetensors")
    weights = {name: np.full_like(a, np.nan) if "logit" in name else a for name, a in arrays.items()}
    save_arrays(made / "weights.safetensors", weights)
    with pytest.raises(
        RunError, match=r"model.tflite returns probabilities that differ by up to nan from the bundle's, over the limit"
    ):
        export(read_bundle(storage_path(made)), "tflite", storage_path(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_onnx_without_its_packages(bundle, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tf2onnx", None)
    with pytest.raises(UsageError, match="--to onnx needs tf2onnx, which is not installed here: pip install"):
        export(bundle, "onnx", storage_path(tmp_path))
    assert not any(tmp_path.iterdir())


@pytest.fixture
def half_seen(tmp_path: Path) -> Dataset:
    """Shards of 40 images that the model was trained on, and 60 others."""
    shards = storage_path(tmp_path / "shards")
    manifest = write_shards(shards, {"fold-1": 40, "fold-2": 60})
    files = (shards / FILES).read_parquet()
    hashes = [bytes(32) if group < 1000 else bytes([7] * 32) for group in files["group_id"].to_pylist()]
    files = files.set_column(0, "sha256", pa.array(hashes, pa.binary(32)))
    pixels = pa.array([digest[:16] for digest in hashes], pa.binary(16))
    (shards / FILES).write_parquet(files.set_column(files.column_names.index("pixels"), "pixels", pixels))
    return Dataset(shards, manifest)


def test_tflite_in_8_bits_is_evaluated_with_the_others_on_unseen_images(bundle, half_seen, tmp_path):
    content = export(bundle, "tflite", storage_path(tmp_path / "out"), half_seen)
    assert list(content["files"]) == ["model-int8.tflite", "model.tflite"]
    assert list(content["test"]) == ["bundle", "model.tflite", "model-int8.tflite"]
    exact, same, quantised = (evaluation["image"] for evaluation in content["test"].values())
    assert exact["count"] == same["count"] == quantised["count"] == 60
    assert exact["figures"]["auc"] == same["figures"]["auc"]
    int8 = TFLiteModel(tmp_path / "out/model-int8.tflite")
    [inputs] = int8.interpreter.get_input_details()
    assert inputs["dtype"] == np.uint8
    assert content["input"]["model-int8.tflite"] == {"dtype": "uint8"}
    assert inputs["quantization"] == (1.0, 0), "one step is one grey level"
    exact, quantised = (model.predict_on_batch(IMAGES) for model in (bundle.build_model(), int8))
    assert np.allclose(exact, quantised, atol=0.03)


@pytest.mark.parametrize(
    ("size", "hash_byte", "message"),
    [
        (64, 0, "the model takes images of 32 pixels; these shards have 64. Prepare the same .* data.image_size=32"),
        (32, 0, "the model was trained on all of these 20 images. The int8 .* that the model was trained and"),
        (32, 7, "the model was trained on none of these 20 images"),
    ],
)
def test_shards_that_cannot_calibrate_and_test(bundle, tmp_path, size: int, hash_byte: int, message: str):
    shards = storage_path(tmp_path / "shards")
    data = Dataset(shards, write_shards(shards, {"test": 20}, image_size=size, hash_byte=hash_byte))
    with pytest.raises(UsageError, match=f"--shards .*: {message}"):
        export(bundle, "tflite", storage_path(tmp_path / "out"), data)
    assert not (tmp_path / "out").exists()


def set_random_weights(model: keras.Model) -> keras.Model:
    """Set random weights whose activations do not vanish; the last layer's are scaled to logits of 2 at most."""
    generator = np.random.default_rng(0)
    for weight in model.weights:
        if "kernel" in weight.path:
            inputs = np.prod(weight.shape[: 2 if "depthwise" in weight.path or "dwconv" in weight.path else -1])
            value = generator.normal(0, (2 / inputs) ** 0.5, weight.shape)
        else:
            value = (
                generator.uniform(0.5, 1.5, weight.shape) if "gamma" in weight.path else np.abs(weight.numpy()) + 0.1
            )
        weight.assign(value)
    logit = model.get_layer("logit")
    kernel, bias = logit.get_weights()
    largest = np.abs(keras.Model(model.input, logit.output)(IMAGES) - bias).max()
    logit.set_weights([kernel * min(1, 2 / largest), bias])
    return model


def assert_loads_with_keras_alone(model: keras.Model, file: Path) -> None:
    FORMATS["keras"].write(model, file)
    expected = model(IMAGES).numpy()
    assert 0.001 < expected.min() < expected.max() < 0.999
    assert np.ptp(expected) > 1e-4, "different images get different probabilities"
    assert np.abs(load("keras", file)(IMAGES) - expected).max() < 1e-5


@pytest.mark.parametrize(
    "assignments",
    [
        ["model.block=conv-bn-relu-pool", "model.head=flatten"],
        ["model.batch_norm=false", "model.dropout=0", "model.dense=[]"],
    ],
)
def test_variants_of_the_network_load_with_keras_alone(tiny_config, tmp_path, assignments: list[str]):
    assert_loads_with_keras_alone(
        set_random_weights(build_model(tiny_config(*assignments), 90.0, 50.0)), tmp_path / "x.keras"
    )


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "pooling"),
    [
        ("mobilenetv2", "both"),
        ("resnet50", "average"),
        ("densenet121", "maximum"),
        ("efficientnetv2b0", "average"),
        ("convnexttiny", "average"),
    ],
)
def test_backbones_load_with_keras_alone(tiny_config, tmp_path, name: str, pooling: str):
    views = ("transfer.inverted=true", "transfer.reductions=[1, 2]") if name == "mobilenetv2" else ()
    config = tiny_config(f"model.name={name}", "transfer.weights=none", f"transfer.pooling={pooling}", *views)
    assert_loads_with_keras_alone(set_random_weights(build_model(config, 90.0, 50.0)), tmp_path / "x.keras")


@pytest.mark.parametrize("to", ["savedmodel", "onnx", "tflite"])
@pytest.mark.parametrize("name", ["qnn", pytest.param("qnn_transfer", marks=pytest.mark.long)])
def test_networks_with_a_circuit_in_the_other_formats(tiny_config, tmp_path, name: str, to: str):
    model = set_random_weights(
        build_model(tiny_config(f"model.name={name}", "quantum.qubits=2", "quantum.layers=1"), 90.0, 50.0)
    )
    FORMATS[to].write(model, tmp_path / FORMATS[to].file)
    expected = model(IMAGES).numpy()
    assert np.ptp(expected) > 1e-4, "different images get different probabilities"
    assert np.abs(load(to, tmp_path / FORMATS[to].file)(IMAGES) - expected).max() < 1e-5


def test_a_circuit_cannot_be_exported_to_keras(tiny_config, tmp_path):
    with pytest.raises(UsageError, match=r"layer 'circuit' is a Circuit, which Keras does not have"):
        FORMATS["keras"].write(build_model(tiny_config("model.name=qnn"), 90.0, 50.0), tmp_path / "x.keras")


class Spectrum(layers.Layer):
    """A layer with an operation that only TensorFlow has."""

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        return tf.math.bessel_i0e(inputs)


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("keras", "layer 'own' is a Spectrum, which Keras does not have"),
        ("onnx", r"ONNX lacks an operation of this network \(.*BesselI0e.*\)."),
        ("tflite", r"TFLite lacks an operation of this network \(.*BesselI0e.*\)."),
    ],
)
def test_a_layer_that_only_tensorflow_has(tmp_path, to: str, message: str):
    images = layers.Input((32, 32, 1), name="images")
    x = Spectrum(name="own")(layers.GlobalAveragePooling2D()(images))
    model = keras.Model(images, layers.Dense(1)(x))
    with pytest.raises(UsageError, match=rf"{message}.* Use --to savedmodel"):
        FORMATS[to].write(model, tmp_path / "file")
    FORMATS["savedmodel"].write(model, tmp_path / "saved_model")
    assert np.allclose(load("savedmodel", tmp_path / "saved_model")(IMAGES), model(IMAGES))
