"""The feature space of a network: how far an image lies from the images that the network was trained on."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa

from fracture.dataset.format import Dataset, images_of
from fracture.evaluation.scores import read_blocks, run_in_batches

LIMIT_PERCENTILE = 99  # of the distances of training images that the space was not fitted on
MOST_COMPONENTS = 64
_IMAGES_PER_COMPONENT = 4  # at least, of those that the space is fitted on
_MOST_IMAGES = 1000  # of training that are looked at, in the process that writes the bundle
_MOST_OF_RADIOGRAPH = 4  # copies and edits
_FEWEST_IN_HALF = 10  # images; of a source in a half of the training groups, or the source does not count
_SMALL_SOURCES = "\n"  # no source's name
MOST_SOURCES = _MOST_IMAGES // (2 * _FEWEST_IN_HALF)
FEWEST_AS_A_WHOLE = 50
# Share of images beyond the median of training from which they are unlike as a whole. It was 0.19 to 0.56 in splits of
# the same collections, 0.88 to 1.0 in another one (docs/results.md).
_AS_A_WHOLE = 0.8
_ROUNDING = 1e-5  # root mean squared distance of features of length 1 from their mean, below which it is rounding
_FLOOR = 0.05  # of the mean deviation: the least deviation of a feature that hardly varies in training


@dataclass(frozen=True)
class FeatureSpace:
    """Where the features of training images lie, and how far from there is far.

    Features [F] are scaled to length 1, and the mean of a source is subtracted. They are divided by the deviations
    within sources, and split into principal components and a residual. The distance from the source is the root of two
    means: of the squared components, each over its variance, which is the Mahalanobis distance
    (https://arxiv.org/abs/1807.03888, with sources in place of classes), and of the squared residual over that of
    training, since what training has no direction for lies there (https://arxiv.org/abs/2203.10807). Without the
    scaling to length 1 (https://arxiv.org/abs/2505.18032) images with little in them, such as noise, are near
    everything. One source may spread wider than another, so each distance is divided by the median of its own source,
    and the least of them counts.
    """

    means: np.ndarray  # [S, F] float32, of features of length 1, of each source
    deviation: np.ndarray  # [F] float32, above 0
    components: np.ndarray  # [k, F] float32, orthonormal
    variances: np.ndarray  # [k] float32, above 0, of the components
    residual: np.ndarray  # [1] float32, above 0: the mean squared length of the residual
    # [S] float32, above 0: of images of each source that the space was not fitted on, the median distance.
    medians: np.ndarray
    limit: np.ndarray  # [1] float32, above 0: of all those images, a distance over its source's median that few have

    def measure(self, features: np.ndarray) -> np.ndarray:
        """Return the distances of features [N, F]: [N] float32, 1 at the limit."""
        return (self.measure_by_median(features) / self.limit[0]).astype(np.float32)

    @property
    def median(self) -> float:
        """Return the median distance of a source's images from their source, 1 at the limit."""
        return float(1 / self.limit[0])

    def measure_by_median(self, features: np.ndarray) -> np.ndarray:
        """Return the distances of features [N, F], each over the median of its source: [N] float."""
        return (self.measure_sources(features) / self.medians[:, np.newaxis]).min(axis=0)

    def measure_sources(self, features: np.ndarray) -> np.ndarray:
        """Return the distances of features [N, F] from each source: [S, N] float."""
        return np.stack([self._distance(_scale_to_one(features) - mean) for mean in self.means])

    def _distance(self, centred: np.ndarray) -> np.ndarray:
        rows = centred / self.deviation
        components = rows @ self.components.T
        residual = np.maximum((rows**2).sum(axis=1) - (components**2).sum(axis=1), 0)
        return np.sqrt((components**2 / self.variances).mean(axis=1) + residual / self.residual[0])

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by their names."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def array_shapes(sources: int, components: int, width: int) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of the arrays of a `FeatureSpace` of so many sources and components of so many features."""
    space = {"means": (sources, width), "deviation": (width,), "components": (components, width)}
    return space | {"variances": (components,), "residual": (1,), "medians": (sources,), "limit": (1,)}


def fit_feature_space(features: np.ndarray, groups: np.ndarray, sources: np.ndarray) -> FeatureSpace | None:
    """Fit the space on the features of half of the training groups; the others' distances give medians and limit.

    The images that a space was fitted on lie nearer to it than new ones of the same kind.

    Args:
        features: [N, F] float32, of training images.
        groups: [N] int64.
        sources: [N] str. Those with fewer than `_FEWEST_IN_HALF` images in a half count as one, and if they have
            fewer together, not at all.

    Returns:
        The space; None where there are not enough images, and where features do not vary or are not finite.
    """
    fitted = _choose_half(groups, sources)
    small = [name for name in np.unique(sources) if not _has_enough(fitted[sources == name])]
    sources = np.where(np.isin(sources, small), _SMALL_SOURCES, sources)
    fitted = _choose_half(groups, sources)
    names = [name for name in np.unique(sources) if _has_enough(fitted[sources == name])]
    counts = np.isin(sources, names)
    features, fitted, sources = features[counts], fitted[counts], sources[counts]
    if not names or not np.isfinite(features).all():
        return None
    rows = _scale_to_one(features)
    means = np.stack([rows[fitted & (sources == name)].mean(axis=0) for name in names])
    within = np.concatenate([rows[fitted & (sources == name)] - mean for name, mean in zip(names, means, strict=True)])
    deviation = within.std(axis=0)
    if np.linalg.norm(deviation) < _ROUNDING:
        return None
    deviation = np.maximum(deviation, _FLOOR * deviation.mean())
    _, singular, components = np.linalg.svd(within / deviation, full_matrices=False)
    count, width = within.shape
    most = max(1, min(MOST_COMPONENTS, count // _IMAGES_PER_COMPONENT, width // 2))
    variances = np.maximum(singular**2 / count, 1e-12)
    arrays = (means, deviation, components[:most], variances[:most], [max(variances[most:].sum(), 1e-12)])
    space = FeatureSpace(
        *(np.asarray(array, np.float32) for array in arrays), np.ones(len(names), np.float32), np.ones(1, np.float32)
    )
    distances, origins = space.measure_sources(features[~fitted]), sources[~fitted]
    medians = [np.median(own[origins == name]) for name, own in zip(names, distances, strict=True)]
    space = replace(space, medians=np.array(medians, np.float32))
    if not (space.medians > 0).all():
        return None
    limit = np.percentile(space.measure_by_median(features[~fitted]), LIMIT_PERCENTILE)
    space = replace(space, limit=np.array([limit], np.float32))
    is_finite = all(np.isfinite(array).all() for array in space.arrays().values())
    return space if is_finite and limit > 0 else None


def _choose_half(groups: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """Return true for the images of half of the groups of each source: [N] bool."""
    chosen = []
    for name in np.unique(sources):
        own = np.unique(groups[sources == name])
        chosen.append(np.random.default_rng(0).permutation(own)[: len(own) // 2])
    return np.isin(groups, np.concatenate(chosen))


def _has_enough(fitted: np.ndarray) -> bool:
    return min(fitted.sum(), (~fitted).sum()) >= _FEWEST_IN_HALF


def are_unlike(distances: np.ndarray, space: FeatureSpace | None) -> bool:
    """Say whether images as a whole are unlike those of training, if there are enough of them.

    Few images of another collection are unlike one by one, but nearly all lie farther than the median training image.

    Args:
        distances: [N] of `FeatureSpace.measure`.
        space: that measured them; None where there is none.
    """
    return space is not None and len(distances) >= FEWEST_AS_A_WHOLE and _farther(distances, space) >= _AS_A_WHOLE


def describe_distances(distances: np.ndarray, space: FeatureSpace | None) -> list[str]:
    """Return the line that says how far images lie from those of training as a whole, if there are enough of them.

    Args:
        distances, space: see `are_unlike`.
    """
    if space is None or len(distances) < FEWEST_AS_A_WHOLE:
        return []
    of_all = "as a whole they are unlike them, so all are in doubt"
    whole = of_all if are_unlike(distances, space) else "of the same kind it is at most about half"
    share = _farther(distances, space)
    return [f"{share:.0%} lie farther from the training images than half of those do: {whole}"]


def _farther(distances: np.ndarray, space: FeatureSpace) -> float:
    return float((distances > space.median).mean())


def _scale_to_one(features: np.ndarray) -> np.ndarray:
    """Return features [N, F] scaled to length 1, float32."""
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


class MeasuredNetwork:
    """A network that gives each image's probability and, where there is a feature space, its distance."""

    def __init__(self, model: Any, space: FeatureSpace | None) -> None:
        """Take a Keras model that gives probabilities [N, 1] and features [N, F], see `add_features`."""
        self._model, self._space = model, space

    def predict_on_batch(self, images: np.ndarray) -> np.ndarray:
        """Return [N, 2] float32: probabilities, and distances; NaN where there is no feature space."""
        probabilities, features = self._model.predict_on_batch(images)
        distances = np.full(len(images), np.nan) if self._space is None else self._space.measure(features)
        return np.column_stack([probabilities[:, 0], distances]).astype(np.float32)


def select_rows(radiograph_ids: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """Return the rows whose features are looked at, ascending: as many of each source, as far as it has them.

    Of a source, one row of each radiograph comes first, then the second of each, ...

    Args:
        sources: [rows] str.
    """
    occurrence = _number_in_turn(radiograph_ids)
    by_occurrence = np.argsort(occurrence, kind="stable")
    turn = np.empty(len(occurrence), np.int64)
    turn[by_occurrence] = _number_in_turn(sources[by_occurrence])
    in_turn = np.argsort(turn, kind="stable")
    return np.sort(in_turn[occurrence[in_turn] < _MOST_OF_RADIOGRAPH][:_MOST_IMAGES])


def _number_in_turn(values: np.ndarray) -> np.ndarray:
    """Return how many equal values come before each value, [N] int64."""
    order = np.argsort(values, kind="stable")
    _, first, count = np.unique(values[order], return_index=True, return_counts=True)
    before = np.empty(len(order), np.int64)
    before[order] = np.arange(len(order)) - np.repeat(first, count)
    return before


def compute_features(
    network: Any, dataset: Dataset, rows: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return features [N, F] float32, groups [N] and sources [N] of some images.

    Args:
        network: Keras model of images [N, S, S, 1] to features [N, F].
        rows: split -> numbers of the rows to choose from, ascending.
    """
    columns = ["radiograph_id", "group_id", "origin"]
    index = pa.concat_tables(dataset.read_columns(split, columns).take(numbers) for split, numbers in rows.items())
    sources = np.array(index["origin"].to_pylist(), str)
    chosen = select_rows(index["radiograph_id"].to_numpy(), sources)
    parts, first = [], 0
    for split, numbers in rows.items():
        own = numbers[chosen[(chosen >= first) & (chosen < first + len(numbers))] - first]
        first += len(numbers)
        for block, _ in read_blocks(dataset, split, own):
            parts.append(run_in_batches(network, images_of(block, dataset.image_size)))
    return np.concatenate(parts).astype(np.float32), index["group_id"].to_numpy()[chosen], sources[chosen]
