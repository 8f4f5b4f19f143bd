import keras
import numpy as np
import pytest
from scipy.stats import spearmanr

from fracture.errors import UsageError
from fracture.evaluation.gradcam import compute_evidence, compute_maps, measure_similarity_to_random, rank_correlation
from fracture.models import build_model

layers = keras.layers
CALLED, NORMAL = np.array([True]), np.array([False])


def bright_supports_fracture(*, trainable: bool = True, pool: type = layers.GlobalAveragePooling2D) -> keras.Model:
    """Two channels of grey x, relu(x - 100) and relu(50 - x); logit: twice the first, pooled, minus the other."""
    images = layers.Input((8, 8, 1), name="images")
    x = layers.Conv2D(2, 1, activation="relu", name="conv", trainable=trainable)(images)
    x = pool(name="pool")(x)
    logit = layers.Dense(1, name="logit", trainable=trainable)(x)
    model = keras.Model(images, layers.Activation("sigmoid", name="probability")(logit))
    model.set_weights([np.array([[[[1, -1]]]]), np.array([-100, 50]), np.array([[2], [-1]]), np.array([0])])
    return model


@pytest.fixture
def lit_corner() -> np.ndarray:
    images = np.zeros((1, 8, 8, 1), np.uint8)
    images[0, :2, :2] = 200
    return images


@pytest.mark.parametrize("trainable", [True, False])
def test_evidence_in_one_corner_gives_a_map_of_that_corner(lit_corner, trainable: bool):
    model = bright_supports_fracture(trainable=trainable)
    found = compute_maps(model, lit_corner, CALLED)
    assert found.dtype == np.float32
    assert (found[0, :2, :2] == 1).all()
    assert found.sum() == 4
    values = compute_evidence(model, lit_corner, CALLED)[0]
    assert values[0, 0] == pytest.approx(
        2 * 100 / 64
    )  # a logit's gradient by a channel's mean is spread over 64 places
    assert values[7, 7] == pytest.approx(-50 / 64)


def test_evidence_of_a_maximum_is_weighted_as_that_of_an_average(lit_corner):
    """Its gradient is spread over the places of the maximum, and the mean over all places weights the channel."""
    values = compute_evidence(bright_supports_fracture(pool=layers.GlobalMaxPooling2D), lit_corner, CALLED)[0]
    assert values[0, 0] == pytest.approx(2 * 100 / 64)
    assert values[7, 7] == pytest.approx(-50 / 64)


def test_a_network_that_sees_the_negative_has_the_evidence_of_both(lit_corner):
    """The negative is 55 in the corner, where neither channel is lit, and 255 elsewhere, of which the first has 155."""
    images = layers.Input((8, 8, 1), name="images")
    conv, pool = layers.Conv2D(2, 1, activation="relu", name="conv"), layers.GlobalAveragePooling2D()
    stored, negative = pool(conv(images)), pool(conv(layers.Rescaling(-1.0, 255.0, name="invert")(images)))
    logit = layers.Dense(1, name="logit")(layers.Average()([stored, negative]))
    model = keras.Model(images, layers.Activation("sigmoid", name="probability")(logit))
    model.set_weights(bright_supports_fracture().get_weights())
    values = compute_evidence(model, lit_corner, CALLED)[0]
    assert values[0, 0] == pytest.approx(2 * 100 / 64 / 2)
    assert values[7, 7] == pytest.approx((2 * 155 - 50) / 64 / 2)
    assert compute_evidence(model, 255 - lit_corner, CALLED)[0] == pytest.approx(values)


@pytest.mark.parametrize("reductions", ["[1]", "[1, 2]"])
def test_a_radiograph_and_its_negative_have_the_same_map(tiny_config, reductions: str):
    settings = ("model.name=mobilenetv2", "transfer.weights=none", f"transfer.reductions={reductions}")
    model = build_model(tiny_config("data.image_size=64", "transfer.inverted=true", *settings), 90.0, 50.0)
    images, called = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 1)).astype(np.uint8), np.array([True, False])
    values = compute_evidence(model, images, called)
    assert values.shape == (2, 2, 2)
    scale = np.abs(values).max()
    assert scale > 0
    assert compute_evidence(model, 255 - images, called) / scale == pytest.approx(values / scale, abs=1e-4)


def test_the_map_of_an_image_called_normal_shows_the_evidence_for_normal(lit_corner):
    found = compute_maps(bright_supports_fracture(), lit_corner, NORMAL)
    assert (found[0, :2, :2] == 0).all()
    assert found.sum() == 60
    assert (found.max(), found.min()) == (1, 0)


def test_without_evidence_for_the_prediction_the_map_is_empty():
    grey = np.full((1, 8, 8, 1), 75, np.uint8)  # neither channel answers
    assert not compute_maps(bright_supports_fracture(), grey, CALLED).any()


def test_the_maps_are_those_of_the_formula_and_calibration_changes_none():
    """ReLU(sum over channels of the gradient's mean times the channel), of 3 × 3 places that are enlarged to 6 × 6."""
    generator = np.random.default_rng(0)
    images = layers.Input((6, 6, 1), name="images")
    x = layers.Conv2D(3, 2, strides=2, name="conv")(images)
    model = keras.Model(images, layers.Dense(1, name="logit")(layers.Flatten()(x)))
    kernel, by_position = generator.normal(size=(2, 2, 1, 3)), generator.normal(size=(3, 3, 3))
    model.set_weights([kernel, np.zeros(3), by_position.reshape(27, 1), np.zeros(1)])
    pictures = generator.integers(0, 256, (20, 6, 6, 1), np.uint8)  # more than fit into one batch
    fracture = generator.random(20) < 0.5

    blocks = pictures[..., 0].reshape(20, 3, 2, 3, 2).transpose(0, 1, 3, 2, 4)  # [N, 3, 3, 2, 2]
    channels = np.einsum("nijab,abk->nijk", blocks, kernel[:, :, 0])
    signs = np.where(fracture, 1, -1)[:, None, None]
    expected = signs * (channels * by_position.mean((0, 1))).sum(-1)
    assert compute_evidence(model, pictures, fracture) == pytest.approx(expected, rel=1e-4, abs=1e-3)

    at = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 1, 1, 2, 2, 2])  # neighbours of -.25, .25, .75, 1.25, 1.75, 2.25
    of_second = np.array([0, 0.25, 0.75, 0.25, 0.75, 0])
    spread = np.zeros((6, 3))
    for position, (first, second, share) in enumerate(zip(*at, of_second, strict=True)):
        spread[position, first] += 1 - share
        spread[position, second] += share
    large = spread @ np.maximum(expected, 0) @ spread.T
    wanted = large / np.maximum(large.max((1, 2), keepdims=True), 1e-9)
    found = compute_maps(model, pictures, fracture)
    assert found == pytest.approx(wanted, abs=1e-5)
    assert ((found >= 0) & (found <= 1)).all()
    logit = model.get_layer("logit")
    logit.set_weights([logit.get_weights()[0] / 1.7, np.array([0.4])])
    assert compute_maps(model, pictures, fracture) == pytest.approx(found, abs=1e-5)


def test_a_network_without_spatial_layers_cannot_be_explained():
    images = layers.Input((8, 8, 1), name="images")
    model = keras.Model(images, layers.Dense(1, name="logit")(layers.Flatten()(images)), name="flat")
    with pytest.raises(UsageError, match=r"network 'flat' has no layer of shape \[N, H, W, C\].* Use a network with"):
        compute_maps(model, np.zeros((1, 8, 8, 1), np.uint8), CALLED)


def test_random_weights_give_other_maps_and_the_same_network_the_same(tiny_config):
    model = build_model(tiny_config(), 100.0, 50.0)
    keras.utils.set_random_seed(1)
    model = keras.models.clone_model(model)
    before = model.get_weights()
    images = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 1), np.uint8)
    fracture = np.arange(6) % 2 == 0
    others, same, more = measure_similarity_to_random(model, images, fracture, 3)
    assert same == pytest.approx(1, abs=1e-3), "the same weights"
    assert 0 < others < 0.9
    assert 0 < more < 0.9
    assert [others, same] == list(measure_similarity_to_random(model, images, fracture, 2)), "seeded"
    assert all(map(np.array_equal, before, model.get_weights()))


@pytest.mark.parametrize("name", ["qnn", pytest.param("mobilenetv2", marks=pytest.mark.long)])
def test_networks_of_other_kinds_are_explained(tiny_config, name: str):
    weights = [] if name == "qnn" else ["transfer.weights=none"]
    model = build_model(tiny_config(f"model.name={name}", "data.image_size=64", *weights), 100.0, 50.0)
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 1), np.uint8)
    fracture = np.array([True, False, True, False])
    found = compute_maps(model, images, fracture)
    assert found.shape == (4, 64, 64)
    assert ((found >= 0) & (found <= 1)).all()
    assert found.any()
    (similarity,) = measure_similarity_to_random(model, images, fracture, 1)
    assert 0 < similarity < 0.95


def test_rank_correlation_is_spearmans_and_0_of_a_map_without_ranks():
    generator = np.random.default_rng(0)
    first, second = np.maximum(generator.normal(size=(2, 4, 5, 5)), 0)  # half of it in ties
    expected = [spearmanr(a.ravel(), b.ravel())[0] for a, b in zip(first, second, strict=True)]
    assert rank_correlation(first, second) == pytest.approx(expected)
    assert rank_correlation(first, np.exp(first)) == pytest.approx(1)
    assert rank_correlation(first, np.ones_like(first)).tolist() == [0] * 4
