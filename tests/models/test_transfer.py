"""Networks of keras.applications; the larger ones take seconds to build, and are among the long tests."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from fracture.config import Config, load_config
from fracture.errors import RunError, UsageError
from fracture.models import build_model, weight_shapes
from fracture.models.transfer import build_backbone, build_head
from fracture.storage import storage_path
from fracture.training.phase_model import _freeze
from fracture.training.phases import Phase, count_epochs, list_phases
from fracture.training.pretrained import keep_backbone, read_backbone
from tests.conftest import quick_bundle

NAMES = [
    "mobilenetv2",
    *(pytest.param(name, marks=pytest.mark.long) for name in ("resnet50", "densenet121", "efficientnetv2b0")),
]
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 1), np.uint8)


def settings(name: str = "mobilenetv2", *changes: str) -> Config:
    return load_config(None, [f"model.name={name}", "data.image_size=32", *changes])


@pytest.fixture(scope="module")
def drawn() -> keras.Model:
    return build_backbone(settings())


def of_keras(name: str, images: np.ndarray) -> np.ndarray:
    """Grey images as Keras' own preprocessing gives them to that family."""
    three = np.repeat(images, 3, axis=-1).astype(np.float32)
    match name:
        case "mobilenetv2":
            return keras.applications.mobilenet_v2.preprocess_input(three)
        case "resnet50":
            return keras.applications.resnet.preprocess_input(three)
        case "densenet121":
            return keras.applications.densenet.preprocess_input(three)
        case "efficientnetv2b0":  # in the network itself
            whole = keras.applications.EfficientNetV2B0(weights=None, include_top=False, input_shape=(32, 32, 3))
            # Not by its name, which Keras numbers where a test before this one has made another.
            last = next(layer for layer in whole.layers if isinstance(layer, keras.layers.Normalization))
            return keras.Model(whole.input, last.output)(three).numpy()


@pytest.mark.parametrize("name", NAMES)
def test_pixels_are_scaled_as_the_weights_of_each_family_expect(name: str):
    backbone = build_backbone(settings(name))
    scaled = keras.Model(backbone.input, backbone.get_layer("scale").output)(IMAGES).numpy()
    assert scaled.shape == (3, 32, 32, 3)
    np.testing.assert_allclose(scaled, of_keras(name, IMAGES), atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_backbone_and_head_are_the_model_and_their_weights_its_list(name: str):
    config = settings(name)
    model, backbone = build_model(config, 0.0, 1.0), build_backbone(config)
    head = build_head(config, backbone.output_shape[-1], step=lambda: 0)
    assert list(weight_shapes(config).items()) == [(weight.path, tuple(weight.shape)) for weight in model.weights]
    assert [w.shape for w in model.weights] == [w.shape for part in (backbone, head) for w in part.weights]
    model.set_weights([*backbone.get_weights(), *head.get_weights()])
    np.testing.assert_allclose(model(IMAGES), head(backbone(IMAGES)), rtol=1e-5)
    assert [layer.name for layer in model.layers][-2:] == ["logit", "probability"]


def test_weights_of_a_file_are_kept_with_the_run(drawn: keras.Model, tmp_path: Path):
    drawn.save(tmp_path / "mine.h5")
    config = settings("mobilenetv2", f"transfer.weights={tmp_path / 'mine.h5'}")
    run = storage_path(tmp_path / "run")
    keep_backbone(run, config, None)
    (tmp_path / "mine.h5").unlink()
    keep_backbone(run, config, None)  # as when the run is resumed
    for kept, value in zip(read_backbone(run, config), drawn.get_weights(), strict=True):
        assert np.array_equal(kept, value)


@pytest.mark.slow
def test_weights_of_imagenet_come_from_the_cache_of_keras(drawn: keras.Model, tmp_path: Path):
    """No network is there: what stands in the cache under the file's name is taken.

    In a process of its own, since Keras looks for the cache when it is imported.
    """
    (tmp_path / ".keras/models").mkdir(parents=True)
    drawn.save(tmp_path / ".keras/models/mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5")
    code = (
        "import sys; from tests.models.test_transfer import keep_backbone, settings, storage_path; "
        "keep_backbone(storage_path(sys.argv[1]), settings(), None)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    subprocess.run(command, env=os.environ | {"HOME": str(tmp_path)}, check=True)
    assert np.array_equal(read_backbone(storage_path(tmp_path / "run"), settings())[0], drawn.get_weights()[0])


def test_a_download_that_fails_says_what_else_can_be_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(
        RunError, match=r"ImageNet weights of mobilenetv2 cannot be downloaded: .*transfer.weights=none"
    ):
        keep_backbone(storage_path(tmp_path / "run"), settings(), None)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_weights_that_do_not_fit_are_refused(drawn: keras.Model, tmp_path: Path):
    def keep(name: str) -> None:
        keep_backbone(
            storage_path(tmp_path / "run"), settings("mobilenetv2", f"transfer.weights={tmp_path / name}"), None
        )

    with pytest.raises(
        UsageError, match=r"none.h5': there is no such file, or it does not end in .h5. Name imagenet, none, or a file"
    ):
        keep("none.h5")
    (tmp_path / "text.h5").write_text("no weights")
    with pytest.raises(UsageError, match=r"text.h5' does not hold the weights of mobilenetv2 without top: Unable"):
        keep("text.h5")
    small = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    small.save(tmp_path / "other.h5")
    with pytest.raises(UsageError, match=r"other.h5' does not hold the weights of mobilenetv2 .*Layer count mismatch"):
        keep("other.h5")
    narrow = keras.applications.MobileNetV2(weights=None, include_top=False, alpha=0.35, input_shape=(32, 32, 3))
    narrow.save(tmp_path / "narrow.h5")
    with pytest.raises(UsageError, match=r"narrow.h5' does not hold the weights of mobilenetv2 .*Shape mismatch"):
        keep("narrow.h5")
    assert not (tmp_path / "run").exists()


def test_a_bundle_of_a_backbone_is_rebuilt_without_the_file_it_began_with(tmp_path: Path):
    from fracture.inference.bundle import read_bundle

    small = ["model.name=mobilenetv2", "data.image_size=32", "transfer.weights=/gone.h5"]
    probabilities = read_bundle(storage_path(quick_bundle(tmp_path, *small))).build_model()(IMAGES)
    assert probabilities.shape == (3, 1)


def test_phases_of_each_way_to_train():
    assert list_phases(load_config()) == (Phase("all", 8, 1e-3, "training.learning_rate"),)
    assert list_phases(settings("mobilenetv2", "transfer.weights=none")) == (
        Phase("all", 8, 1e-3, "training.learning_rate"),
    )
    assert list_phases(settings()) == (Phase("head", 40, 1e-3, "training.learning_rate", on_frozen_features=True),)
    both = settings("mobilenetv2", "transfer.unfreeze=20", "transfer.features=augmented", "transfer.learning_rate=1e-4")
    assert list_phases(both) == (
        Phase("head", 40, 1e-3, "training.learning_rate"),
        Phase("fine-tuning", 8, 1e-4, "transfer.learning_rate"),
    )
    assert count_epochs(both) == 48


@pytest.mark.parametrize(("unfrozen", "expected"), [(0, 0), (3, 1), ("all", 52)])
def test_unfrozen_layers_are_the_last_ones_but_no_batch_norm(unfrozen: int | str, expected: int):
    """The last three layers are a convolution, its batch norm and its ReLU; in all, 52 have kernels."""
    model = build_model(settings(), 0.0, 1.0)
    _freeze(model, unfrozen)
    names = [variable.path for variable in model.trainable_variables]
    assert len(names) == expected + 2
    assert names[-2:] == ["logit/kernel", "logit/bias"]
    assert all("kernel" in name for name in names[:-2])


def test_image_sizes_and_names_that_no_backbone_takes_are_refused():
    with pytest.raises(UsageError, match=r"'data.image_size' = 31 is not possible: .* greater than or equal to 32"):
        settings("mobilenetv2", "data.image_size=31")
    with pytest.raises(
        UsageError, match=r"'model.name' = 'resnet' is not possible: .*'cnn', 'resnet50', 'densenet121'"
    ):
        settings("resnet")
    with pytest.raises(UsageError, match=r"'transfer.unfreeze' = -1 is not possible"):
        settings("mobilenetv2", "transfer.unfreeze=-1")
