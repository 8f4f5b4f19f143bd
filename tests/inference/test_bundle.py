import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from safetensors.numpy import load_file

from fracture.arrays import parse_arrays, save_arrays
from fracture.cli import main
from fracture.config import load_config
from fracture.dataset.format import Dataset, images_of
from fracture.errors import UsageError
from fracture.evaluation.feature_space import FeatureSpace
from fracture.evaluation.metrics import compute_metrics
from fracture.evaluation.operating_point import OperatingPoint
from fracture.inference.bundle import (
    FEATURES,
    WEIGHTS,
    export_model,
    is_bundle,
    read_bundle,
    rename_weight,
    write_bundle,
)
from fracture.models import build_model, cut_at_features
from fracture.storage import storage_path
from tests.conftest import TINY, quick_bundle, write_shards

OPERATING_POINT = OperatingPoint(temperature=2.0, offset=0.3, threshold=0.4, rule="given: 0.4")
FIGURES = {
    unit: compute_metrics(np.array([0, 1]), np.array([0.2, 0.9]), np.arange(2), 0.4, unit)
    for unit in ("image", "radiograph")
}
RUN = {"name": "x", "epochs": 3, "best_epoch": 2, "workers": 2, "precision": "float32"}
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 1), np.uint8)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A finished bundle of a network whose weights and moving averages are random, and its probabilities."""
    folder = tmp_path_factory.mktemp("exported")
    config, shards = load_config(None, TINY), storage_path(folder / "shards")
    manifest = write_shards(shards, {"train": 40, "val": 16, "test": 16})
    model = build_model(config, manifest.pixel_mean, manifest.pixel_std)
    generator = np.random.default_rng(0)
    positive = [generator.uniform(0.1, 0.5, weight.shape) for weight in model.weights]
    signs = [1 if "moving_variance" in w.name else generator.choice([-1, 1], w.shape) for w in model.weights]
    model.set_weights([sign * value for sign, value in zip(signs, positive, strict=True)])
    expected = OPERATING_POINT.calibrate(model(IMAGES).numpy())
    assert 0.01 < expected.min() < expected.max() < 0.99
    bundle, evaluations = storage_path(folder / "bundle"), {"val": FIGURES, "test": FIGURES}
    export_model(model, OPERATING_POINT, bundle)
    write_bundle(bundle, config, Dataset(shards, manifest), RUN, OPERATING_POINT, evaluations)
    return folder / "bundle", expected


@pytest.fixture
def bundle(exported: tuple[Path, np.ndarray], tmp_path: Path) -> Path:
    return shutil.copytree(exported[0], tmp_path / "bundle")


def change_card(bundle: Path, path: str, value: Any) -> None:
    """Sets one value of `bundle.json`."""
    card = json.loads((bundle / "bundle.json").read_text())
    *parents, last = path.split(".")
    section = card
    for key in parents:
        section = section[key]
    section[last] = value
    (bundle / "bundle.json").write_text(json.dumps(card))


def test_all_formats_return_the_calibrated_probabilities(exported):
    bundle, expected = exported
    served = tf.saved_model.load(str(bundle / "saved_model"))
    assert np.allclose(served.serve_uint8(IMAGES), expected, atol=1e-6)
    assert np.allclose(served.serve(IMAGES.astype(np.float32)), expected, atol=1e-6)
    loaded = keras.models.load_model(bundle / "model.keras", safe_mode=True)
    assert np.allclose(loaded(IMAGES), expected, atol=1e-6)
    rebuilt = read_bundle(storage_path(bundle)).build_model()
    assert np.allclose(rebuilt.predict_on_batch(IMAGES), expected, atol=1e-6)
    assert np.allclose(rebuilt.predict_on_batch(IMAGES), served.serve_uint8(IMAGES), rtol=1e-6, atol=1e-7)


def test_the_rebuilt_network_is_float32_whatever_was_set_before(bundle):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = read_bundle(storage_path(bundle)).build_model()
    finally:
        keras.config.set_dtype_policy("float32")
    assert {layer.compute_dtype for layer in model.layers} == {"float32"}


def test_no_program_of_a_bundle_is_read(bundle, exported):
    """Evaluation needs the three files that hold numbers and settings, and no other."""
    (bundle / "saved_model/saved_model.pb").write_bytes(b"not a model")
    (bundle / "model.keras").write_bytes(b"not a model")
    read = read_bundle(storage_path(bundle))
    assert np.allclose(read.build_model().predict_on_batch(IMAGES), exported[1], atol=1e-6)
    assert bytes(32) in read.read_trained_on()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "config.model.filters",
            [4, 16],
            r"holds 'conv2/kernel' as float32 of shape \(3, 3, 4, 8\), and .*\(3, 3, 4, 16",
        ),
        ("config.model.filters", [4], r"holds 'dense1/kernel' as .*|holds an array 'conv2/kernel' that is not exp"),
        ("config.model.dense", [8, 8], "holds no array 'dense2/kernel', one of 16 that are expected"),
        ("config.model.batch_norm", False, "holds no array 'conv1/bias', one of 8"),
        (
            "config.model.head",
            "flatten",
            r"holds 'dense1/kernel' as float32 of shape \(8, 8\), and .*\(512, 8\) is expected",
        ),
        ("config.model.filters", [16384, 16384], r"holds 'conv1/kernel' as float32 of shape \(3, 3, 1, 4\), and"),
    ],
)
def test_an_architecture_that_the_arrays_do_not_fit(bundle, path: str, value: Any, message: str):
    change_card(bundle, path, value)
    with pytest.raises(UsageError, match=rf"bundle/weights.safetensors ({message}).*Fetch the bundle again"):
        read_bundle(storage_path(bundle)).build_model()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("config.data.image_size", 10**9, "at 'config.data.image_size': Input should be less than or equal to 1024"),
        ("config.data.image_size", 64, "input.shape is .*32.*, but config.data.image_size is 64"),
        ("config.model.filters", [10**9], "at 'config.model.filters.0': Input should be less than or equal to 16384"),
        ("config.model.dense", [10**30], "at 'config.model.dense.0'"),
        ("config.model.dense", [1] * 10**5, "at 'config.model.dense': .*at most 8 items"),
        ("config.model.layer", "Lambda", "at 'config.model.layer': Extra inputs are not permitted"),
        ("config.model", "cnn", "at 'config.model'"),
        ("config", None, "at 'config'"),
        ("input", {}, "at 'input.shape': Field required"),
        ("input.shape", [None, 10**9, 10**9, 1], "input.shape is .*, but config.data.image_size is 32"),
        ("input.pixel_std", float("nan"), "at 'input.pixel_std'"),
        ("input.pixel_mean", -1e300, "at 'input.pixel_mean'"),
        ("operating_point.threshold", float("nan"), "operating_point.threshold is nan, not in 0 to 1"),
        ("operating_point.fracture_threshold", 0.39, "fracture_threshold is 0.39, not from the threshold to 1"),
        ("operating_point.fracture_threshold", 1.5, "fracture_threshold is 1.5, not from the threshold to 1"),
        ("metrics", {"val": {}}, "metrics.test.image has no AUC"),
        ("metrics.test.image", {"unit": "image"}, "at 'metrics.test.image.count': Field required"),
        ("caveats", ["a\x1b[2Jb"], "at 'caveats.0': String should match pattern"),
        ("features", {"components": 65, "width": 8}, "at 'features.components': Input should be less than or equal"),
        ("features", {"components": 4, "width": 10**9}, "at 'features.width': Input should be less than or equal"),
        ("properties", {"size": [1, 2]}, "at 'properties.size.2': Field required"),
        ("properties", {"size": [1, 2, float("inf")]}, "at 'properties.size.2': Input should be a finite number"),
        ("properties", {"a\nb": [1, 2, 3]}, "at 'properties.a.*': String should match pattern"),
        ("map_similarity", [0.2, 1.5], "at 'map_similarity.1': Input should be less than or equal to 1"),
        ("adapted", {"bundle": "0" * 64, "unit": "image"}, "at 'adapted.unit'"),
        ("adapted", {"bundle": "0" * 64, "images": -1}, "at 'adapted.images'"),
        ("format_version", 99, "has bundle format 99, and this program reads formats 6 to 8"),
        ("format_version", "9" * 999, "has bundle format '9999999999999999999, and this program reads formats 6 to 8"),
    ],
)
def test_an_invalid_card_is_refused_with_the_invalid_value(bundle, path: str, value: Any, message: str):
    change_card(bundle, path, value)
    with pytest.raises(UsageError, match=message):
        read_bundle(storage_path(bundle))


@pytest.mark.parametrize(
    ("older", "path"),
    [
        ("conv1/kernel:0", "conv1/kernel"),
        ("conv1/conv/kernel:0", "conv1_conv/kernel"),  # in DenseNet121
        ("conv2_block1_1_bn/moving_variance:0", "conv2_block1_1_bn/moving_variance"),
        ("expanded_conv_depthwise/depthwise_kernel:0", "expanded_conv_depthwise/kernel"),  # in MobileNetV2
        ("circuit/weights:0", "circuit/weights"),
    ],
)
def test_the_bundle_of_the_format_before_is_read(bundle, older: str, path: str):
    """Its weights have the names of Keras 2."""
    assert rename_weight(older) == path
    expected = read_bundle(storage_path(bundle)).load_weights()
    arrays, _ = parse_arrays((bundle / WEIGHTS).read_bytes())
    save_arrays(bundle / WEIGHTS, {f"{name}:0": array for name, array in arrays.items()})
    change_card(bundle, "format_version", 6)
    card = json.loads((bundle / "bundle.json").read_text())
    names = card["config"]["data"].pop("fracture_labels"), card["config"]["data"].pop("normal_labels")
    card["config"]["data"] |= dict(zip(("fracture_folders", "normal_folders"), names, strict=True))
    (bundle / "bundle.json").write_text(json.dumps(card))
    assert all(map(np.array_equal, read_bundle(storage_path(bundle)).load_weights(), expected))


@pytest.mark.parametrize("text", ["", "{", "[" * 10**6, "\x80", '{"format_version": ' + "9" * 10**6])
def test_a_card_that_is_not_json(bundle, text: str):
    (bundle / "bundle.json").write_text(text)
    with pytest.raises(UsageError, match=r"bundle.json is damaged: not JSON. Fetch the bundle again"):
        read_bundle(storage_path(bundle))


@pytest.mark.parametrize("text", ["{}", "[]", "5", "null"])
def test_a_card_of_no_format(bundle, text: str):
    (bundle / "bundle.json").write_text(text)
    with pytest.raises(UsageError, match="has bundle format None, and this program reads formats 6 to 8"):
        read_bundle(storage_path(bundle))


def test_huge_weights_are_not_read_even_if_the_card_describes_them(bundle):
    change_card(bundle, "config.model.filters", [16384, 16384, 16384])
    with (bundle / "weights.safetensors").open("r+b") as file:
        file.truncate(2**33)
    with pytest.raises(
        UsageError, match=r"weights.safetensors has 8,589,934,592 bytes, over the limit of 4,294,967,296"
    ):
        read_bundle(storage_path(bundle)).build_model()


def test_huge_files_are_not_read(bundle):
    for name in ("weights.safetensors", "bundle.json"):
        with (bundle / name).open("r+b") as file:
            file.truncate(2**40)  # a sparse file, which takes no space on the disk
        read = (
            read_bundle(storage_path(bundle)).build_model
            if name == "weights.safetensors"
            else lambda: read_bundle(storage_path(bundle))
        )
        with pytest.raises(UsageError, match=rf"{name} has 1,099,511,627,776 bytes, over the limit of"):
            read()


def evaluate(bundle: Path, shards: Path, out: Path, *more: str) -> int:
    return main(["evaluate", "--bundle", str(bundle), "--shards", str(shards), "--out", str(out), *more])


def test_a_model_is_evaluated_with_the_numbers_alone(bundle, tmp_path):
    manifest = write_shards(storage_path(tmp_path / "others"), {"test": 70}, hash_byte=7)
    served = tf.saved_model.load(str(bundle / "saved_model"))
    shutil.rmtree(bundle / "saved_model")
    (bundle / "model.keras").unlink()
    assert evaluate(bundle, tmp_path / "others", tmp_path / "out") == 0
    images = images_of(Dataset(storage_path(tmp_path / "others"), manifest).read("test", 0, 70), 32)
    scores = pq.read_table(tmp_path / "out/predictions.parquet")["probability"]
    assert np.allclose(scores, served.serve_uint8(images)[:, 0], rtol=1e-6, atol=1e-7)


def test_an_ensemble_is_averaged_and_tested_on_unseen_images(bundle, tmp_path, capsys):
    """Of 70 images five are of one group, and the second model was trained on one of them."""
    others, second = tmp_path / "others", quick_bundle(tmp_path / "second", *TINY)
    manifest = write_shards(storage_path(others), {"test": 70}, hash_byte=7)
    seen = pa.array([bytes([9] * 32)], pa.binary(32))
    storage_path(second / "trained_on.parquet").write_parquet(pa.table({"sha256": seen}))
    files = pq.read_table(others / "files.parquet")
    hashes = pa.array([bytes([7 if group else 9] * 32) for group in files["group_id"].to_pylist()], pa.binary(32))
    storage_path(others / "files.parquet").write_parquet(files.set_column(0, "sha256", hashes))
    assert evaluate(bundle, others, tmp_path / "out", "--bundle", str(second), "--flips") == 0
    printed = capsys.readouterr().out
    assert "left out   5 images" in printed
    assert "ensemble   of 2 models; threshold 0.450, the mean of the 2 models' own: 0.400, 0.500" in printed
    assert "compare    AUC" not in printed, "an ensemble has no test of its own"
    assert "CAVEAT     SYNTHETIC MODEL: 2 of 2 were trained on generated sample radiographs" in printed
    images = images_of(Dataset(storage_path(others), manifest).read("test", 0, 70), 32)
    models = [read_bundle(storage_path(folder)).build_model() for folder in (bundle, second)]
    expected = np.mean([model(view)[:, 0] for model in models for view in (images, images[:, :, ::-1])], axis=0)
    scores = pq.read_table(tmp_path / "out/predictions.parquet")
    assert len(scores) == 65
    assert np.allclose(scores["probability"], expected[scores["row"].to_numpy()], rtol=1e-5, atol=1e-7)
    page = (tmp_path / "out/report.html").read_text()
    assert "The mean of 2 models elsewhere" in page
    assert "Probabilities are the mean of 2 models," in page


def test_a_new_file_of_the_same_pixels_patient_or_study_is_no_unseen_radiograph(tmp_path):
    """Four files of a clinic, none of which training has byte for byte; a public set's own numbers mark nothing."""
    seen, other, own = "ab" * 32, "cd" * 32, "/patient7"
    folder = storage_path(tmp_path / "trained")
    manifest = write_shards(folder, {"train": 2, "val": 2, "test": 2})
    files = (folder / "files.parquet").read_parquet()
    patients = pa.array([[seen, own]] * len(files), pa.list_(pa.string()))
    (folder / "files.parquet").write_parquet(
        files.set_column(files.column_names.index("patients"), "patients", patients)
    )
    write_bundle(
        storage_path(tmp_path / "b"),
        load_config(None, TINY),
        Dataset(folder, manifest),
        RUN,
        OPERATING_POINT,
        {"val": FIGURES, "test": FIGURES},
    )
    others = storage_path(tmp_path / "others")
    there = Dataset(others, write_shards(others, {"test": 4}, hash_byte=7))
    table = {
        "sha256": pa.array([bytes([number + 8] * 32) for number in range(5)], pa.binary(32)),
        "group_id": pa.array(range(5), pa.int64()),
        "pixels": pa.array([bytes([0 if number == 3 else number + 8] * 16) for number in range(5)], pa.binary(16)),
        "patients": pa.array([[seen], [other], [own], [], []], pa.list_(pa.string())),
        "study": pa.array(["", "", "", "", seen]),
    }
    (others / "files.parquet").write_parquet(pa.table(table))
    assert read_bundle(storage_path(tmp_path / "b")).find_seen_groups(there) == {0, 3, 4}
    earlier = Dataset(others, there.manifest.model_copy(update={"schema_version": 4}))
    (others / "files.parquet").write_parquet(pa.table(table).select(["sha256", "group_id"]))
    assert read_bundle(storage_path(tmp_path / "b")).find_seen_groups(earlier) == set()


def test_models_of_images_of_different_sizes_are_not_averaged(bundle, tmp_path, capsys):
    larger = quick_bundle(tmp_path / "larger", *TINY, "data.image_size=64")
    assert evaluate(bundle, tmp_path / "others", tmp_path / "out", "--bundle", str(larger)) == 2
    message = f"error: {larger} takes images of 64 pixels, and {bundle} of 32: they cannot be averaged"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damaged", ["card", "weights", "seen", "shard", "files"])
def test_a_hostile_file_ends_the_job_in_a_line(bundle, tmp_path, capsys, damaged: str):
    others = tmp_path / "others"
    manifest = write_shards(storage_path(others), {"test": 20}, hash_byte=7)
    file = {
        "card": bundle / "bundle.json",
        "weights": bundle / "weights.safetensors",
        "seen": bundle / "trained_on.parquet",
        "shard": others / manifest.shards["test"][0].file,
        "files": others / "files.parquet",
    }[damaged]
    size = file.stat().st_size
    file.write_bytes(b"\x80\x04c__builtin__\nprint\n.".ljust(size, b"."))
    assert evaluate(bundle, others, tmp_path / "out") == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith(f"error: {'shard ' if damaged == 'shard' else ''}{file}")


def test_weights_that_are_missing_or_hold_objects(bundle):
    read = read_bundle(storage_path(bundle))
    with io.BytesIO() as stream:
        np.save(stream, np.array([print], dtype=object), allow_pickle=True)
        (bundle / "weights.safetensors").write_bytes(stream.getvalue())
    with pytest.raises(UsageError, match=r"weights.safetensors is not a whole .safetensors file"):
        read.build_model()
    (bundle / "weights.safetensors").unlink()
    with pytest.raises(UsageError, match=r"weights.safetensors is missing. Fetch the bundle again"):
        read.build_model()


def test_weights_of_another_width_of_numbers(bundle):
    arrays = load_file(bundle / "weights.safetensors")
    save_arrays(bundle / "weights.safetensors", {name: array.astype(np.float64) for name, array in arrays.items()})
    with pytest.raises(UsageError, match=r"'conv1/kernel' as float64 of shape .*, and float32 of shape"):
        read_bundle(storage_path(bundle)).build_model()


def test_a_list_of_hashes_may_claim_twenty_million(bundle):
    """With 32 bytes each they would take 640 MB; the file stores the hash once."""
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(10**6, np.int32)), pa.array([bytes(32)], pa.binary(32)))
    table = pa.table({"sha256": column.cast(pa.binary(32))})
    with pq.ParquetWriter(bundle / "trained_on.parquet", table.schema) as writer:
        for _ in range(20):
            writer.write_table(table)
    assert (bundle / "trained_on.parquet").stat().st_size < 10**6
    code = (
        "import sys, resource; from fracture.inference.bundle import read_bundle; "
        "from fracture.storage import storage_path; "
        "read = read_bundle(storage_path(sys.argv[1])); before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        "assert read.read_trained_on() == {bytes(32)}; "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(bundle)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200_000, "kB"


def test_a_list_of_hashes_that_is_damaged(bundle):
    pq.write_table(pa.table({"sha256": ["x" * 10**6]}), bundle / "trained_on.parquet")
    with pytest.raises(
        UsageError, match=r"trained_on.parquet cannot be read: column 'sha256' is not fixed_size_binary"
    ):
        read_bundle(storage_path(bundle)).read_trained_on()
    (bundle / "trained_on.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match=r"trained_on.parquet cannot be read: .*Fetch or make it anew"):
        read_bundle(storage_path(bundle)).read_trained_on()


def test_the_card_describes_the_model_and_its_results(tiny_config, dataset, tmp_path):
    data, bundle = dataset(), storage_path(tmp_path)
    assert not is_bundle(bundle)
    with pytest.raises(UsageError, match=r"is no bundle: bundle.json is missing. A finished run has one"):
        read_bundle(bundle)
    write_bundle(bundle, tiny_config(), data, RUN, OPERATING_POINT, {"val": FIGURES, "test": FIGURES})
    card = json.loads((tmp_path / "bundle.json").read_text())
    assert card["class_names"] == ["normal", "fracture"]
    assert card["synthetic"] is True
    assert card["operating_point"]["threshold"] == card["metrics"]["test"]["image"]["threshold"] == 0.4
    assert card["input"]["shape"] == [None, 32, 32, 1]
    assert card["dataset"]["fingerprint"] == data.manifest.fingerprint
    assert card["config"]["training"]["batch_size"] == 8
    assert card["versions"]["tensorflow"] == tf.__version__
    read = read_bundle(bundle)
    assert (read.image_size, read.operating_point, read.evaluations) == (
        32,
        OPERATING_POINT,
        {"val": FIGURES, "test": FIGURES},
    )
    assert bytes(32) in read.read_trained_on()  # as the tests' shards have it


SPACE = FeatureSpace(
    means=np.zeros((2, 8), np.float32),
    deviation=np.ones(8, np.float32),
    components=np.eye(2, 8, dtype=np.float32),
    variances=np.ones(2, np.float32),
    residual=np.ones(1, np.float32),
    medians=np.ones(2, np.float32),
    limit=np.array([2], np.float32),
)


@pytest.fixture
def measured(tiny_config, dataset, bundle: Path) -> Path:
    """A bundle with a feature space and properties."""
    folder, properties = storage_path(bundle), {"size": (1.0, 2.0, 3.0)}
    figures = {"val": FIGURES, "test": FIGURES}
    write_bundle(folder, tiny_config(), dataset(), RUN, OPERATING_POINT, figures, space=SPACE, properties=properties)
    return bundle


def test_a_feature_space_is_read_as_it_was_written(measured: Path, exported):
    read = read_bundle(storage_path(measured))
    assert read.properties == {"size": (1.0, 2.0, 3.0)}
    found = read.load_feature_space().arrays()
    assert all(np.array_equal(found[name], array) for name, array in SPACE.arrays().items())
    measures = read.build_measured_network().predict_on_batch(IMAGES)
    assert measures[:, 0] == pytest.approx(exported[1][:, 0], abs=1e-6)
    features = cut_at_features(read.build_model()).predict_on_batch(IMAGES)
    assert measures[:, 1] == pytest.approx(SPACE.measure(features), rel=1e-5)


def test_bundles_without_a_feature_space_have_no_distances(bundle: Path):
    for key in ("features", "properties"):  # as an earlier version wrote it
        card = json.loads((bundle / "bundle.json").read_text())
        del card[key]
        (bundle / "bundle.json").write_text(json.dumps(card))
    read = read_bundle(storage_path(bundle))
    assert (read.load_feature_space(), read.properties) == (None, {})
    assert np.isnan(read.build_measured_network().predict_on_batch(IMAGES)[:, 1]).all()


def test_a_feature_space_of_an_earlier_version_is_that_of_one_source(measured: Path):
    """Its limit is a distance, and the new one a multiple of the median."""
    card = json.loads((measured / "bundle.json").read_text())
    del card["features"]["sources"]
    (measured / "bundle.json").write_text(json.dumps(card))
    arrays = {name: SPACE.arrays()[name] for name in ("deviation", "components", "variances")}
    arrays |= {"mean": np.full(8, 0.1, np.float32), "scale": np.array([4, 6, 3], np.float32)}
    save_arrays(measured / FEATURES, arrays)
    space = read_bundle(storage_path(measured)).load_feature_space()
    assert (space.means.shape, space.residual, space.medians, space.limit) == ((1, 8), [4], [3], [2])
    features = np.random.default_rng(0).normal(size=(5, 8))
    rows = features / np.linalg.norm(features, axis=1, keepdims=True) - 0.1
    distances = np.sqrt((rows[:, :2] ** 2).mean(axis=1) + (rows[:, 2:] ** 2).sum(axis=1) / 4)
    assert space.measure(features) == pytest.approx(distances / 6, rel=1e-5)
    assert space.median == pytest.approx(3 / 6)
    save_arrays(measured / FEATURES, arrays | {"scale": np.array([4, 6, 0], np.float32)})
    with pytest.raises(UsageError, match="holds numbers that no training gives"):
        read_bundle(storage_path(measured)).load_feature_space()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("deviation", np.zeros(8), "features.safetensors holds numbers that no training gives. Fetch the bundle again"),
        ("variances", -np.ones(2), "holds numbers that no training gives"),
        ("limit", np.zeros(1), "holds numbers that no training gives"),
        ("means", np.full((2, 8), np.nan), "holds numbers that no training gives"),
        ("means", np.zeros(9), r"holds 'means' as float32 of shape \(9,\), and float32 of shape \(2, 8\) is expected"),
    ],
)
def test_a_feature_space_that_cannot_be(measured: Path, name: str, value: np.ndarray, message: str):
    save_arrays(measured / FEATURES, SPACE.arrays() | {name: value.astype(np.float32)})
    with pytest.raises(UsageError, match=message):
        read_bundle(storage_path(measured)).load_feature_space()


def test_a_feature_space_that_is_missing_or_of_another_network(measured: Path):
    change_card(measured, "features.width", 9)
    arrays = SPACE.arrays() | {"means": np.ones((2, 9), np.float32), "deviation": np.ones(9, np.float32)}
    save_arrays(measured / FEATURES, arrays | {"components": np.eye(2, 9, dtype=np.float32)})
    with pytest.raises(UsageError, match=r"damaged at 'features.width': 9, and the network has 8 features. Fetch"):
        read_bundle(storage_path(measured)).build_measured_network()
    (measured / FEATURES).unlink()
    with pytest.raises(UsageError, match=r"features.safetensors is missing. Fetch the bundle again"):
        read_bundle(storage_path(measured)).load_feature_space()


def test_groups_of_another_writing_are_not_compared_with_the_shards(bundle, shard_folder):
    folder, manifest = shard_folder()
    assert read_bundle(storage_path(bundle)).find_seen_groups(Dataset(folder, manifest))
    mixed = manifest.model_copy(update={"files_sha256": "0" * 64})
    with pytest.raises(UsageError, match=r"files.parquet is not the one that dataset.json describes"):
        read_bundle(storage_path(bundle)).find_seen_groups(Dataset(folder, mixed))
