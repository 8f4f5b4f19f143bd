import json

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from fracture.errors import UsageError
from fracture.evaluation.calibration import Decision
from fracture.evaluation.metrics import compute_metrics
from fracture.models import build_model
from fracture.release.bundle import Bundle, export_model, is_bundle, read_bundle, write_bundle
from fracture.storage import place

DECISION = Decision(temperature=2.0, offset=0.3, threshold=0.4, rule="given: 0.4")
FIGURES = {"image": compute_metrics(np.array([0, 1]), np.array([0.2, 0.9]), np.arange(2), 0.4)}


def test_both_forms_of_the_model_give_its_calibrated_probabilities(tiny_config, tmp_path):
    model = build_model(tiny_config(), 96.0, 50.0)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 1), np.uint8)
    expected = DECISION.calibrate(model(images).numpy())
    export_model(model, DECISION, place(tmp_path / "bundle"))
    served = tf.saved_model.load(str(tmp_path / "bundle/saved_model"))
    with Bundle(place(tmp_path / "bundle"), 32, True, DECISION, {}).model() as loaded_again:
        assert np.allclose(loaded_again.predict_on_batch(images), expected, atol=1e-6)
    assert np.allclose(served.serve_uint8(images), expected, atol=1e-6)
    assert np.allclose(served.serve(images.astype(np.float32)), expected, atol=1e-6)
    loaded = keras.models.load_model(tmp_path / "bundle/model.keras", safe_mode=True)
    assert np.allclose(loaded(images), expected, atol=1e-6)


def test_the_card_says_what_the_model_is_and_how_well_it_did(tiny_config, shard_folder, tmp_path):
    folder, manifest = shard_folder()
    bundle = place(tmp_path)
    assert not is_bundle(bundle)
    with pytest.raises(UsageError, match=r"is no bundle: bundle.json is missing. A finished run has one"):
        read_bundle(bundle)
    run = {"name": "x", "epochs": 3, "best_epoch": 2, "workers": 2, "precision": "float32"}
    write_bundle(bundle, tiny_config(), manifest, folder, run, DECISION, {"val": FIGURES, "test": FIGURES})
    card = json.loads((tmp_path / "bundle.json").read_text())
    assert card["class_names"] == ["normal", "fracture"]
    assert card["synthetic"] is True
    assert card["decision"]["threshold"] == card["metrics"]["test"]["image"]["threshold"] == 0.4
    assert card["input"]["shape"] == [None, 32, 32, 1]
    assert card["dataset"]["fingerprint"] == manifest.fingerprint
    assert card["config"]["training"]["batch_size"] == 8
    assert card["versions"]["tensorflow"] == tf.__version__
    read = read_bundle(bundle)
    assert (read.image_size, read.decision, read.evaluations) == (32, DECISION, {"val": FIGURES, "test": FIGURES})
    assert read.trained_on() == {bytes(32)}  # as the tests' shards have it


def test_a_bundle_of_another_format(tmp_path):
    place(tmp_path / "bundle.json").write_json({"format_version": 99})
    with pytest.raises(UsageError, match="is of bundle format 99, and this program reads 4"):
        read_bundle(place(tmp_path))
