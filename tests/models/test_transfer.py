"""Networks of keras.applications; the larger ones take seconds to build, and are among the long tests."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

from fracture.config import Config, load_config, with_settings
from fracture.errors import RunError, UsageError
from fracture.models import build_model, weight_shapes
from fracture.models.transfer import build_backbone, build_head
from fracture.storage import storage_path
from fracture.training.checks import check_initial, check_weights_file
from fracture.training.phase_model import _freeze
from fracture.training.phases import Phase, count_epochs, list_phases
from fracture.training.pretrained import check_backbone, keep_backbone, read_backbone
from tests.conftest import quick_bundle

NAMES = [
    "mobilenetv2",
    *(
        pytest.param(name, marks=pytest.mark.long)
        for name in ("resnet50", "densenet121", "efficientnetv2b0", "efficientnetv2s", "convnexttiny")
    ),
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
    constructor = {  # in the network itself
        "efficientnetv2b0": keras.applications.EfficientNetV2B0,
        "efficientnetv2s": keras.applications.EfficientNetV2S,
        "convnexttiny": keras.applications.ConvNeXtTiny,
    }[name]
    whole = constructor(weights=None, include_top=False, input_shape=(32, 32, 3))
    # Not by their names, which Keras numbers where a test before this one has made others.
    scaling = keras.layers.Normalization, keras.layers.Rescaling
    last = [layer for layer in whole.layers if isinstance(layer, scaling)][-1]
    return keras.Model(whole.input, last.output)(three).numpy()


@pytest.mark.parametrize("name", NAMES)
def test_pixels_are_scaled_as_the_weights_of_each_family_expect(name: str):
    backbone = build_backbone(settings(name))
    scaled = keras.Model(backbone.input, backbone.get_layer("scale").output)(IMAGES).numpy()
    assert scaled.shape == (3, 32, 32, 3)
    np.testing.assert_allclose(scaled, of_keras(name, IMAGES), atol=1e-4)


def test_pixels_are_scaled_as_in_the_code_of_radimagenet():
    """That of https://github.com/BMEII-AI/RadImageNet, whatever the order that its arguments suggest."""
    generator = tf.keras.preprocessing.image.ImageDataGenerator(
        rescale=1.0 / 255, preprocessing_function=keras.applications.imagenet_utils.preprocess_input
    )
    expected = [generator.standardize(np.repeat(image, 3, axis=-1).astype(np.float32)) for image in IMAGES]
    backbone = build_backbone(settings("mobilenetv2", "transfer.pixel_scaling=radimagenet"))
    scaled = keras.Model(backbone.input, backbone.get_layer("scale").output)(IMAGES).numpy()
    np.testing.assert_allclose(scaled, expected, atol=1e-6)
    assert -0.49 < scaled.min() < scaled.max() < 0.6


@pytest.mark.parametrize("pooling", ["average", "maximum", "both"])
def test_features_are_the_average_and_the_maximum_of_each_channel(drawn: keras.Model, pooling: str):
    config = settings("mobilenetv2", f"transfer.pooling={pooling}", "data.image_size=64")
    backbone = build_backbone(config)
    backbone.set_weights(drawn.get_weights())
    images = np.tile(IMAGES, (1, 2, 2, 1))
    channels = keras.Model(backbone.input, backbone.get_layer("out_relu").output)(images).numpy()
    assert channels.shape == (3, 2, 2, 1280)
    average, maximum = channels.mean((1, 2)), channels.max((1, 2))
    expected = {"average": average, "maximum": maximum, "both": np.concatenate([average, maximum], axis=1)}[pooling]
    np.testing.assert_allclose(backbone(images), expected, rtol=1e-4)
    assert (maximum > 1.5 * average).any()
    assert weight_shapes(config)["logit/kernel"] == (expected.shape[1], 1)


@pytest.mark.parametrize("name", ["mobilenetv2", "qnn_transfer"])
def test_a_head_of_both_poolings_is_twice_as_wide(name: str):
    config = settings(name, "transfer.pooling=both")
    first = "bottleneck/kernel" if name == "qnn_transfer" else "logit/kernel"
    assert weight_shapes(config)[first][0] == 2560
    head = build_head(config, 2560, step=lambda: 0)
    assert list(weight_shapes(config).values())[-len(head.weights) :] == [tuple(w.shape) for w in head.weights]


@pytest.mark.parametrize("name", NAMES)
def test_backbones_draw_no_random_numbers_in_fine_tuning(name: str):
    backbone = build_backbone(settings(name))
    _freeze(backbone, "all")
    np.testing.assert_allclose(backbone(IMAGES, training=True), backbone(IMAGES, training=False), rtol=1e-4)
    assert {type(layer) for layer in backbone.layers if not layer.trainable} <= {keras.layers.BatchNormalization}


@pytest.mark.long
def test_convnext_is_that_of_keras_with_its_weights(tmp_path: Path):
    whole = keras.applications.ConvNeXtTiny(weights=None, include_top=False, input_shape=(32, 32, 3))
    generator = np.random.default_rng(0)
    whole.set_weights([0.05 * generator.normal(size=weight.shape) for weight in whole.weights])
    write_as_keras_2(tmp_path / "convnext_tiny_notop.h5", whole)
    config = settings("convnexttiny", f"transfer.weights={tmp_path / 'convnext_tiny_notop.h5'}")
    keep_backbone(storage_path(tmp_path / "run"), config, None)
    backbone = build_backbone(config)
    backbone.set_weights(read_backbone(storage_path(tmp_path / "run"), config))
    expected = whole(np.repeat(IMAGES, 3, axis=-1).astype(np.float32)).numpy().mean((1, 2))
    np.testing.assert_allclose(backbone(IMAGES), expected, atol=1e-5)
    assert np.ptp(expected) > 0.1, "the weights matter"


def test_the_large_convnext_has_the_parameters_of_keras():
    """88,591,464 are those of https://keras.io/api/applications, 1,025,000 of them in the top."""
    shapes = weight_shapes(settings("convnextbase"))
    head = {name: shape for name, shape in shapes.items() if name.startswith(("standardise/", "logit/"))}
    assert sum(map(math.prod, shapes.values())) - sum(map(math.prod, head.values())) == 88_591_464 - 1_025_000
    assert shapes["convnext_base_stage_3_block_2_layer_scale/kernel"] == (1024,)


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


def write_as_keras_2(file: Path, network: keras.Model, rename: Callable[[str], str] = str) -> None:
    """Write a whole model with the groups, attributes and names that TensorFlow 2.4's Keras gave it in HDF5."""
    with h5py.File(file, "w") as content:
        content.attrs["keras_version"], content.attrs["backend"] = b"2.4.0", b"tensorflow"
        content.attrs["model_config"] = json.dumps({"class_name": "Functional", "config": {}}).encode()
        group = content.create_group("model_weights")
        names = [rename(layer.name) for layer in network.layers]
        group.attrs["layer_names"] = [name.encode() for name in names]
        for name, layer in zip(names, network.layers, strict=True):
            own = group.create_group(name)
            weights = [
                f"{rename(weight.path.removesuffix('/' + weight.name))}/{weight.name}:0" for weight in layer.weights
            ]
            own.attrs["weight_names"] = [weight.encode() for weight in weights]
            for weight, value in zip(weights, layer.get_weights(), strict=True):
                own[weight] = value


def name_as_keras_2(layer: str) -> str:
    """Return the name of a layer of DenseNet in Keras 2, such as conv1/bn."""
    return layer.replace("conv1_", "conv1/", 1) if layer in ("conv1_conv", "conv1_bn", "conv1_relu") else layer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "file"),
    [("resnet50", "RadImageNet-ResNet50_notop.h5"), ("densenet121", "RadImageNet-DenseNet121_notop.h5")],
)
def test_files_of_the_layout_of_radimagenet_load_as_they_are(name: str, file: str, tmp_path: Path):
    constructor = {"resnet50": keras.applications.ResNet50, "densenet121": keras.applications.DenseNet121}[name]
    whole = constructor(weights=None, include_top=False, input_shape=(224, 224, 3), pooling="avg")
    generator = np.random.default_rng(0)
    drawn = {weight.path: generator.random(weight.shape, np.float32) for weight in whole.weights}
    whole.set_weights(list(drawn.values()))
    write_as_keras_2(tmp_path / file, whole, name_as_keras_2)
    if name == "densenet121":
        with h5py.File(tmp_path / file) as content:
            assert "model_weights/conv1/conv/conv1/conv/kernel:0" in content
    changes = [f"transfer.weights={tmp_path / file}", "transfer.pixel_scaling=radimagenet"]
    config = settings(name, *changes)
    keep_backbone(storage_path(tmp_path / "run"), config, None)
    kept = read_backbone(storage_path(tmp_path / "run"), config)
    names = [weight.path for weight in build_backbone(config).weights]
    assert sorted(names) == sorted(drawn)
    assert all(np.array_equal(array, drawn[path]) for path, array in zip(names, kept, strict=True))


def test_a_file_of_radimagenet_needs_its_scaling_of_pixels(tmp_path: Path):
    file = tmp_path / "RadImageNet-ResNet50_notop.h5"
    file.touch()
    with pytest.raises(UsageError, match=r"has RadImageNet in its name.*Add --set transfer.pixel_scaling=radimagenet"):
        check_weights_file(settings("resnet50", f"transfer.weights={file}"))
    with pytest.raises(UsageError, match=r"'radimagenet' does not belong to transfer.weights = 'imagenet'. Name a fi"):
        check_weights_file(settings("resnet50", "transfer.pixel_scaling=radimagenet"))
    check_weights_file(settings("resnet50", f"transfer.weights={file}", "transfer.pixel_scaling=radimagenet"))


@pytest.mark.slow
def test_layers_of_one_shape_in_another_order_or_of_unknown_names_are_refused(drawn: keras.Model, tmp_path: Path):
    file = tmp_path / "file.h5"
    config = settings("qnn_transfer", f"transfer.weights={file}")
    other = {"block_4_expand": "block_5_expand", "block_5_expand": "block_4_expand"}
    write_as_keras_2(file, drawn, lambda name: other.get(name, name))
    with pytest.raises(
        UsageError,
        match=r"file.h5' does not hold the weights of mobilenetv2 without top: its layer 'block_5_expand' stands where "
        r"this network has 'block_4_expand'. Name a file that does, or set quantum.backbone to the network of this",
    ):
        check_backbone(config)
    write_as_keras_2(file, drawn, lambda name: f"layer_of_{name}")
    with pytest.raises(UsageError, match=r"its layers have other names, such as 'layer_of_Conv1' for 'Conv1'. Name a"):
        check_backbone(config)
    write_as_keras_2(file, drawn)
    check_backbone(config)


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

    small = ["model.name=mobilenetv2", "data.image_size=32", "transfer.weights=/gone.h5", "transfer.pooling=both"]
    model = read_bundle(storage_path(quick_bundle(tmp_path, *small))).build_model()
    assert model(IMAGES).shape == (3, 1)
    assert model.get_layer("logit").kernel.shape == (2560, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("transfer.pooling=maximum", "its network has average at 'transfer.pooling', and these settings maximum"),
        (
            "transfer.pixel_scaling=radimagenet",
            "its network has imagenet at 'transfer.pixel_scaling', and these settings radimagenet",
        ),
    ],
)
def test_training_does_not_begin_with_weights_of_another_pooling_or_scaling(change: str, message: str, tmp_path: Path):
    from fracture.inference.bundle import read_bundle

    bundle = read_bundle(storage_path(quick_bundle(tmp_path, "model.name=mobilenetv2", "data.image_size=32")))
    check_initial(bundle.config, bundle)
    with pytest.raises(UsageError, match=message):
        check_initial(
            with_settings(bundle.config, {"transfer": dict([change.removeprefix("transfer.").split("=")])}), bundle
        )


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


@pytest.mark.parametrize("pooling", ["average", "both"])
@pytest.mark.parametrize(("unfrozen", "expected"), [(0, 0), (3, 1), ("all", 52)])
def test_unfrozen_layers_are_the_last_ones_but_no_batch_norm(unfrozen: int | str, expected: int, pooling: str):
    """The last three layers are a convolution, its batch norm and its ReLU; in all, 52 have kernels."""
    model = build_model(settings("mobilenetv2", f"transfer.pooling={pooling}"), 0.0, 1.0)
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


def test_features_of_reductions_are_those_of_reduced_images_side_by_side():
    """At 64 pixels, which are fewer than 224: an image reduced to 32 is enlarged to 64 again."""
    config = settings("mobilenetv2", "data.image_size=64", "transfer.reductions=[1, 2]")
    joined = build_backbone(config)
    single = build_backbone(with_settings(config, {"transfer.reductions": [1]}))
    assert [weight.path for weight in joined.weights] == [weight.path for weight in single.weights]
    assert joined.output_shape == (None, 2 * 1280)
    images = np.random.default_rng(1).integers(0, 256, (2, 64, 64, 1)).astype(np.float32)
    reduced = images.reshape(2, 32, 2, 32, 2, 1).mean((2, 4))
    enlarged = keras.layers.UpSampling2D(2, interpolation="bilinear")(reduced)
    joined.set_weights(single.get_weights())
    found, expected = joined(images).numpy(), np.concatenate([single(images), single(enlarged)], axis=1)
    scale = np.abs(expected).max()  # random weights make very small features
    np.testing.assert_allclose(found / scale, expected / scale, atol=1e-4)
    whole, half = expected[:, :1280], expected[:, 1280:]
    assert np.abs(whole - half).max() / scale > 1e-2, "the reduced image has features of its own"


@pytest.mark.parametrize(("reductions", "pooling"), [("[1]", "average"), ("[1, 2]", "both")])
def test_features_of_an_image_and_its_negative_are_averaged(reductions: str, pooling: str):
    changes = (f"transfer.reductions={reductions}", f"transfer.pooling={pooling}")
    config = settings("mobilenetv2", "data.image_size=64", "transfer.inverted=true", *changes)
    network = build_backbone(config)
    plain = build_backbone(with_settings(config, {"transfer.inverted": False}))
    assert [weight.path for weight in network.weights] == [weight.path for weight in plain.weights]
    assert network.output_shape == plain.output_shape
    images = np.random.default_rng(1).integers(0, 256, (2, 64, 64, 1)).astype(np.uint8)
    network.set_weights(plain.get_weights())
    found, negative, stored, inverted = network(images), network(255 - images), plain(images), plain(255 - images)
    scale = np.abs(stored).max()
    np.testing.assert_allclose(found / scale, negative / scale, atol=1e-4)
    np.testing.assert_allclose(found / scale, (stored + inverted) / (2 * scale), atol=1e-4)
    assert np.abs(stored - inverted).max() / scale > 1e-2, "alone they differ"


def test_an_image_of_448_pixels_is_not_enlarged_at_half_its_size():
    network = build_backbone(settings("mobilenetv2", "data.image_size=448", "transfer.reductions=[2, 4]"))
    assert network.get_layer("reduce_2").output.shape == (None, 224, 224, 3)
    assert network.get_layer("enlarge_4").output.shape == (None, 224, 224, 3)
    assert "enlarge_2" not in [layer.name for layer in network.layers]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("transfer.reductions=[2, 1]",), r"transfer.reductions: \[2, 1\] do not ascend; name each factor once"),
        (("transfer.reductions=[1, 3]",), r"transfer.reductions: 3 does not divide data.image_size, 32; use factors"),
        (("transfer.head=ridge", "transfer.weights=none"), r"transfer.head: ridge needs the features of a pretrained"),
        (
            ("transfer.standardise=source", "transfer.features=augmented"),
            r"transfer.standardise: source needs the feat",
        ),
        (("transfer.head=ridge", "model.name=qnn_transfer"), r"ridge cannot train a circuit; use logistic"),
    ],
)
def test_settings_of_a_transfer_that_cannot_be(changes: tuple[str, ...], message: str):
    with pytest.raises(UsageError, match=message):
        settings("mobilenetv2", *changes)


def test_a_ridge_head_is_one_epoch_that_only_measures():
    [phase] = list_phases(settings("mobilenetv2", "transfer.head=ridge"))
    assert (phase.epochs, phase.learning_rate, phase.in_closed_form) == (1, 0.0, True)
    idle = settings("mobilenetv2", "transfer.head=ridge").without_effect
    assert {"transfer.head_epochs", "training.learning_rate", "model.dropout"} <= idle
    tuned = settings("mobilenetv2", "transfer.head=ridge", "transfer.unfreeze=10").without_effect
    assert "transfer.head_epochs" in tuned
    assert "training.learning_rate" not in tuned
    assert "transfer.reductions" not in settings("mobilenetv2", "transfer.weights=none").without_effect


def test_training_does_not_begin_with_weights_of_other_views(tmp_path: Path):
    from fracture.inference.bundle import read_bundle

    bundle = read_bundle(storage_path(quick_bundle(tmp_path, "model.name=mobilenetv2", "data.image_size=32")))
    other = with_settings(bundle.config, {"transfer.reductions": [2]})
    with pytest.raises(UsageError, match=r"its network has .*1.* at 'transfer.reductions', and these settings .*2"):
        check_initial(other, bundle)
    other = with_settings(bundle.config, {"transfer.inverted": True})
    with pytest.raises(UsageError, match=r"its network has False at 'transfer.inverted', and these settings True"):
        check_initial(other, bundle)
