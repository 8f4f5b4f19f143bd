from collections.abc import Iterator
from dataclasses import replace

import cv2
import keras
import numpy as np
import pytest
from sklearn.datasets import load_sample_images

from fracture.config import SampleConfig, load_config
from fracture.dataset.format import images_of
from fracture.evaluation.feature_space import (
    FeatureSpace,
    MeasuredNetwork,
    are_unlike,
    compute_features,
    describe_distances,
    fit_feature_space,
    select_rows,
)
from fracture.evaluation.scores import run_in_batches
from fracture.models import add_features, build_model, cut_at_features
from fracture.preparation.decoding.decode import decode
from fracture.preparation.sample import draw_sample

# Of three features; the first component is the second feature.
SPACE = FeatureSpace(
    means=np.array([[0.6, 0.0, 0.8]], np.float32),
    deviation=np.full(3, 0.1, np.float32),
    components=np.array([[0, 1, 0]], np.float32),
    variances=np.array([4.0], np.float32),
    residual=np.array([9.0], np.float32),
    medians=np.array([1.0], np.float32),
    limit=np.array([2.0], np.float32),
)


def test_a_distance_in_worked_numbers():
    """Of length 1 they are the mean, and (.6, .8, 0), which is 8 / 2 along the component and 8 / 3 beside it."""
    features = np.array([[3, 0, 4], [3, 4, 0]], np.float32)
    assert SPACE.measure(features) == pytest.approx([0, np.sqrt(64 / 4 + 64 / 9) / 2], rel=1e-5)
    assert np.array_equal(SPACE.measure(4 * features), SPACE.measure(features)), (
        "the length of the features is no matter"
    )
    assert np.isfinite(SPACE.measure(np.zeros((1, 3), np.float32))).all()


def test_the_nearest_source_by_its_own_median_counts():
    """From the first source they lie at 0 and sqrt(64 / 4 + 64 / 9), from the second at that and 0."""
    both = replace(
        SPACE,
        means=np.array([[0.6, 0.0, 0.8], [0.6, 0.8, 0.0]], np.float32),
        medians=np.array([1.0, 4.0], np.float32),
    )
    features, apart = np.array([[3, 0, 4], [3, 4, 0], [5, 0, 0]], np.float32), np.sqrt(64 / 4 + 64 / 9)
    assert both.measure_sources(features)[:, :2] == pytest.approx(np.array([[0, apart], [apart, 0]]), abs=1e-5)
    assert both.measure(features)[:2] == pytest.approx([0, 0], abs=1e-5)
    first = np.sqrt((16 + 64) / 9)  # (1, 0, 0) less the first mean is (.4, 0, -.8), all of it beside the component
    second = np.sqrt(64 / 4 + 16 / 9) / 4  # less the second (.4, -.8, 0)
    assert both.measure(features)[2] == pytest.approx(min(first, second) / 2, rel=1e-5)
    assert second < first


def draw(count: int, seed: int, directions: int = 5) -> np.ndarray:
    """Features that vary in a few directions of 40."""
    pattern = np.random.default_rng(99).normal(size=(directions, 40))
    generator = np.random.default_rng(seed)
    return (5 + generator.normal(size=(count, directions)) @ pattern + generator.normal(0, 0.1, (count, 40))).astype(
        "f4"
    )


def fit(features: np.ndarray, groups: np.ndarray) -> FeatureSpace | None:
    """Fit on images of one source."""
    return fit_feature_space(features, groups, np.full(len(groups), "one"))


def test_of_new_images_of_the_same_kind_one_in_a_hundred_is_unlike():
    space = fit(draw(1000, 0), np.arange(1000))
    assert len(space.components) == 20, "half of the features"
    assert (space.measure(draw(20000, 1)) > 1).mean() == pytest.approx(0.01, abs=0.008)
    assert (space.measure(draw(1000, 2, directions=9)) > 1).mean() > 0.95, "directions that training does not have"
    assert (space.measure(5 + 4 * (draw(1000, 3) - 5)) > 1).mean() > 0.5, "the same directions, four times as far"


def test_the_limit_is_of_groups_that_the_space_was_not_fitted_on():
    """Each group is one image a hundred times: a limit of its own images would be too near."""
    groups = np.arange(40)
    once = fit(draw(40, 0), groups)
    copied = fit(np.repeat(draw(40, 0), 100, axis=0), np.repeat(groups, 100))
    new = draw(2000, 1)
    assert (once.measure(new) > 1).mean() < 0.25
    assert (copied.measure(new) > 1).mean() < 0.25


def test_images_as_a_whole_are_compared_with_the_median_of_training():
    assert SPACE.median == 0.5
    space = fit(draw(1000, 0), np.arange(1000))
    assert (space.measure(draw(2000, 1)) > space.median).mean() == pytest.approx(0.5, abs=0.06)
    alike, unlike = (np.r_[np.full(count, 0.51), np.full(100 - count, 0.5)] for count in (79, 80))
    start = "lie farther from the training images than half of those do"
    assert describe_distances(alike, SPACE) == [f"79% {start}: of the same kind it is at most about half"]
    assert describe_distances(unlike, SPACE) == [f"80% {start}: as a whole they are unlike them, so all are in doubt"]
    assert [are_unlike(distances, SPACE) for distances in (alike, unlike, unlike[:50], unlike[:49])] == [
        *(False, True, True, False),
    ], "the last are too few"
    assert describe_distances(unlike[:49], SPACE) == []
    assert describe_distances(np.full(60, np.nan), None) == []
    assert not are_unlike(np.full(60, np.nan), None)


def test_a_small_source_among_large_ones_is_not_unlike():
    """A tenth of the images lies apart from the others: the mean and median of all would not hold for it."""
    apart = np.random.default_rng(7).normal(size=40).astype(np.float32) * 3
    features, sources = np.r_[draw(900, 0), draw(100, 1) + apart], np.repeat(["large", "small"], (900, 100))
    new, groups = draw(500, 2) + apart, np.arange(1000)
    of_all, by_source = fit(features, groups), fit_feature_space(features, groups, sources)
    assert are_unlike(of_all.measure(new), of_all)
    assert not are_unlike(by_source.measure(new), by_source)
    assert are_unlike(by_source.measure(draw(500, 3, directions=9)), by_source)


def test_few_images_of_a_source_do_not_move_the_limit():
    """They lie four deviations apart, which would be the limit for all."""
    apart = np.random.default_rng(7).normal(size=40).astype(np.float32) * 4
    alone = fit(draw(400, 0), np.arange(400))
    features, sources = np.r_[draw(400, 0), draw(15, 1) + apart], np.repeat(["many", "few"], (400, 15))
    joined = fit_feature_space(features, np.arange(415), sources)
    assert joined.means.shape == (1, 40)
    assert joined.limit == pytest.approx(alone.limit)
    assert (joined.measure(draw(100, 2) + apart) > 1).all()


@pytest.mark.parametrize(("count", "kept"), [(30, 30), (60, 1), (1000, 1)])
def test_of_many_sources_those_with_few_images_count_as_one(count: int, kept: int):
    features, sources = draw(1200, 0), np.char.add("source ", (np.arange(1200) % count).astype(str))
    rows = select_rows(np.arange(1200), sources)
    space = fit_feature_space(features[rows], rows, sources[rows])
    assert len(space.means) == kept
    assert not are_unlike(space.measure(draw(500, 1)), space)
    assert are_unlike(space.measure(draw(500, 2, directions=9)), space)


def test_too_few_images_or_one_group_have_no_feature_space():
    assert fit(draw(19, 0), np.arange(19)) is None
    assert fit(draw(30, 0), np.zeros(30)) is None
    assert fit(draw(20, 0), np.arange(20)) is not None


def test_both_halves_have_ten_images():
    """All images but one are of one patient: of one half nothing could be learned."""
    groups = np.r_[np.zeros(199), 1]
    assert fit(draw(200, 0), groups) is None
    assert fit(draw(200, 0), 1 - groups) is None, "the other half"
    assert fit(draw(200, 0), np.r_[np.zeros(191), np.ones(9)]) is None
    assert fit(draw(200, 0), np.r_[np.zeros(190), np.ones(10)]) is not None


@pytest.mark.parametrize("value", [0, 1, 0.3, np.nan, np.inf])
def test_features_that_never_vary_or_are_no_numbers_have_no_feature_space(value: float):
    assert fit(np.full((40, 8), value, np.float32), np.arange(40)) is None


def test_features_that_vary_by_rounding_alone_have_no_feature_space():
    constant = np.tile(draw(1, 0), (300, 1))
    assert fit(constant, np.arange(300)) is None
    assert fit(constant + draw(300, 1) / 1e7, np.arange(300)) is None
    assert fit(constant + draw(300, 1) / 1e3, np.arange(300)) is not None


@pytest.mark.parametrize("groups", [np.arange(40) // 20, 1 - np.arange(40) // 20])
def test_a_half_whose_features_are_all_dead_gives_no_feature_space(groups: np.ndarray):
    """The other half's have the mean 0, so the dead ones lie at distance 0, which is no limit."""
    alive = np.where(np.arange(20) % 2, 1, -1)[:, None] * np.ones(4, np.float32)
    assert fit(np.r_[alive, 0 * alive], groups) is None


def test_an_image_with_features_that_were_dead_in_training_is_unlike():
    dead = draw(40, 0) * (np.arange(40) < 20)
    assert (fit(dead, np.arange(40)).measure(draw(100, 1)) > 1).all()


def test_one_image_of_each_radiograph_comes_first():
    """Of radiograph 7 there are six images; the others have one or two."""
    ids = np.array([7, 7, 7, 3, 7, 7, 3, 5, 7])
    assert select_rows(ids, np.full(9, "")).tolist() == [0, 1, 2, 3, 4, 6, 7], "four of a radiograph at most"
    many = np.r_[np.arange(900), np.arange(900)]
    chosen = select_rows(many, np.full(1800, ""))
    assert len(chosen) == 1000
    assert set(range(900)) < set(chosen.tolist())


def test_sources_have_as_many_images_as_far_as_they_have_them():
    """One has 5,000 radiographs, one 600, and one 20 with 100 images each, of which four count."""
    ids = np.r_[np.arange(5000), np.arange(5000, 5600), np.repeat(np.arange(6000, 6020), 100)]
    sources = np.repeat(["large", "medium", "copies"], (5000, 600, 2000))
    chosen = select_rows(ids, sources)
    names, counts = np.unique(sources[chosen], return_counts=True)
    assert dict(zip(names.tolist(), counts.tolist(), strict=True)) == {"copies": 80, "large": 460, "medium": 460}


def test_the_features_of_training_images_are_read_in_blocks(tiny_config, dataset):
    """Five rows of the first ten are one radiograph, which has four of them looked at."""
    data = dataset(train=150)
    network = cut_at_features(build_model(tiny_config(), 96.0, 50.0))
    features, groups, sources = compute_features(network, data, {"train": np.arange(150)})
    assert features.shape == (149, 8)
    assert (groups == 0).sum() == 4
    assert len(set(groups.tolist())) == 146
    assert len(sources) == 149
    assert len(set(sources.tolist())) == 1


def test_features_of_chosen_rows_of_several_splits(tiny_config, dataset):
    data = dataset(train=90, test=80)
    network = cut_at_features(build_model(tiny_config(), 96.0, 50.0))
    rows = {"train": np.array([20, 21, 89]), "test": np.array([1, 70])}
    features, _, _ = compute_features(network, data, rows)
    images = np.concatenate(
        [images_of(data.read(split, 0, data.rows(split)), data.image_size)[numbers] for split, numbers in rows.items()]
    )
    assert features == pytest.approx(run_in_batches(network, images), abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "width"),
    [
        ((), 8),
        (("model.head=flatten",), 8),
        (("model.name=qnn",), 8),
        (("model.name=mobilenetv2", "transfer.weights=none"), 1280),
        (("model.name=mobilenetv2", "transfer.weights=none", "transfer.reductions=[1,2]"), 2 * 1280),
    ],
)
def test_every_network_has_features(tiny_config, settings: tuple[str, ...], width: int):
    model = build_model(tiny_config(*settings), 96.0, 50.0)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 1), np.uint8)
    network = add_features(model)
    probabilities, features = network.predict_on_batch(images)
    assert np.allclose(probabilities, model.predict_on_batch(images), atol=1e-6)
    assert features.shape == (3, width)
    assert [w.path for w in network.weights] == [w.path for w in model.weights]
    measured = MeasuredNetwork(network, None).predict_on_batch(images)
    assert np.array_equal(measured[:, 0], probabilities[:, 0])
    assert np.isnan(measured[:, 1]).all(), "without a feature space"


def read_samples(images: int, seed: int) -> Iterator[tuple[int, np.ndarray]]:
    for path, data in draw_sample(SampleConfig(images=images, seed=seed)):
        yield int(path.rpartition("patient")[2][:5]), decode(data, 64).pixels


def cut_photographs(count: int) -> np.ndarray:
    """Squares of scikit-learn's two photographs, a temple and a flower, in grey."""
    generator, pieces = np.random.default_rng(0), []
    for photograph in load_sample_images().images:
        grey = cv2.cvtColor(photograph, cv2.COLOR_RGB2GRAY)
        for _ in range(count // 2):
            y, x = generator.integers(0, grey.shape[0] - 200), generator.integers(0, grey.shape[1] - 200)
            pieces.append(cv2.resize(grey[y : y + 200, x : x + 200], (64, 64), interpolation=cv2.INTER_AREA))
    return np.array(pieces)


def test_what_is_no_radiograph_is_unlike_and_new_radiographs_are_not():
    """By a network of random weights, on sample radiographs. Blurred ones pass: many radiographs are not sharp."""
    keras.utils.set_random_seed(0)
    config = load_config(None, ["data.image_size=64", "model.filters=[16,32,64]"])
    network = cut_at_features(build_model(config, 60.0, 50.0))
    patients, images = map(np.array, zip(*read_samples(160, 0), strict=True))
    new = np.array([pixels for _, pixels in read_samples(60, 1)])
    generator, ramp = np.random.default_rng(0), np.tile(np.linspace(0, 255, 64), (64, 1))
    kinds = {
        "new": new,
        "inverted": 255 - new,
        "blurred": np.array([cv2.GaussianBlur(pixels, (0, 0), 4) for pixels in new]),
        "photographs": cut_photographs(20),
        "noise": generator.integers(0, 256, (20, 64, 64)),
        "gradients": np.array([np.roll(ramp, 3 * number, axis=1) for number in range(20)]),
    }
    space = fit(run_in_batches(network, images[..., None]), patients)
    unlike = {
        kind: (space.measure(run_in_batches(network, pixels[..., None].astype(np.uint8))) > 1).mean()
        for kind, pixels in kinds.items()
    }
    assert unlike["new"] <= 0.05
    assert min(unlike[kind] for kind in ("inverted", "photographs", "noise", "gradients")) >= 0.9
