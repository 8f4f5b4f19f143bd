"""The trial of recipes for other hospitals: heads on frozen features, each tested on the collection it never saw.

  fracture preprocess --data A --data B --set data.folds=source --out SHARDS
  make bench ONLY=external DATA=SHARDS WEIGHTS=FILE.h5

One image of each radiograph, and its mirror image; features of the backbone with `model.name=mobilenetv2`. A trial is a
set of features and a head. Trained on one collection, it is tested on the other: as it is, and aligned, with the
features standardised by the other collection's own mean and deviation, for which no label is needed. Most are compared
with a trial that differs in one thing, on the same resamples. Twenty minutes on 2 CPU cores for 2,000 radiographs.
"""

import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image
from sklearn.linear_model import LogisticRegression

from fracture.config import Config, load_config
from fracture.dataset.format import Dataset, images_of, read_dataset
from fracture.dataset.sampler import choose_originals, measure_names
from fracture.evaluation.metrics import Figure, auc_differences, auc_within_folds, rank_pairs
from fracture.evaluation.report import format_difference, format_figure
from fracture.evaluation.ridge import assign_folds, fit_ridge
from fracture.storage import storage_path
from tests.benchmarks.measure import Part

REDUCTIONS = (1, 2, 4)
CHOSEN = (1, 2)  # of the recipe `external`, at which the other trials are made
_BATCH = 32
_SMALL = 1e-6  # added to deviations


@dataclass(frozen=True)
class Collection:
    """One image of each radiograph of a source."""

    name: str
    images: np.ndarray  # [N, S, S, 1] uint8
    labels: np.ndarray
    groups: np.ndarray


Features = dict[str, np.ndarray]  # name of a collection -> [N, F]
Head = Callable[[np.ndarray, np.ndarray, np.ndarray], Callable[[np.ndarray], np.ndarray]]


@dataclass(frozen=True)
class Trial:
    """A set of features and a head."""

    features: str  # what is seen, in words
    head: str
    values: Features
    against: str | None = None  # the trial that it is compared with
    extra: Features | None = None  # of changed images, which are trained on too

    @property
    def name(self) -> str:
        return f"{self.features}, {self.head}"


def run(data: str | None) -> Part:
    if not data:
        return Part(["needs DATA=DIR, shards of several sources"])
    dataset = read_dataset(storage_path(data))
    collections = [_read_collection(dataset, number, name) for number, name in enumerate(dataset.manifest.folds, 1)]
    lines = [
        "| " + " | ".join(f"{each.name}: {len(each.labels):,} radiographs" for each in collections) + " |",
        "",
        "| features | head | trained on | inside | outside | outside, aligned | minus | outside | outside, aligned |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    found: dict[str, list[float]] = {}
    scored: dict[str, list[np.ndarray]] = {}
    for trial in _list_trials(collections):
        for source in collections:
            for other in collections:
                if other is source:
                    continue
                name = f"{trial.name}, {source.name}, {other.name}"
                inside, scored[name] = _judge_inside(trial, source), _score_outside(trial, source, other)
                figures = [inside, *(_judge(other, scores) for scores in scored[name])]
                gains = ["", ""]
                if trial.against:
                    pairs = zip(scored[name], scored[f"{trial.against}, {source.name}, {other.name}"], strict=True)
                    gains = [format_difference(_compare(other, *pair)) for pair in pairs]
                cells = [trial.features, trial.head, source.name, *map(format_figure, figures)]
                lines.append(f"| {' | '.join([*cells, trial.against or '', *gains])} |")
                found[name] = [figure.value for figure in figures]
                print(lines[-1], flush=True)
    shares = _vary_shares(collections)
    return Part([*lines, "", *shares], found)


def _read_collection(dataset: Dataset, number: int, name: str) -> Collection:
    """Read one image of each radiograph of a fold by source: that of the shortest name, since copies add to a name."""
    parts = []
    for split in (f"fold-{number}", f"fold-{number}-val"):
        table = dataset.read(split, 0, dataset.rows(split))
        lengths = measure_names(table["source"].to_pylist())
        rows = np.sort(choose_originals(table["radiograph_id"].to_numpy(), table["label"].to_numpy(), lengths))
        images = images_of(table.take(rows), dataset.image_size)
        parts.append((images, table["label"].to_numpy()[rows], table["group_id"].to_numpy()[rows]))
    images, labels, groups = (np.concatenate(each) for each in zip(*parts, strict=True))
    return Collection(name, images, labels, groups)


def _list_trials(collections: list[Collection]) -> Iterator[Trial]:
    whole = {reduction: _compute(collections, reduction) for reduction in REDUCTIONS}
    averaged = {reduction: _compute(collections, reduction, inverted="true") for reduction in REDUCTIONS}
    joined = _join(whole[reduction] for reduction in CHOSEN)
    yield Trial("1", "logistic", whole[1])
    yield Trial("1", "ridge", whole[1], "1, logistic")
    yield Trial("2", "ridge", whole[2], "1, ridge")
    yield Trial("4", "ridge", whole[4], "1, ridge")
    yield Trial("1, 2", "logistic", joined, "1, logistic")
    yield Trial("1, 2", "ridge", joined, "1, ridge")
    yield Trial("1, 2, 4", "ridge", _join(whole.values()), "1, 2, ridge")
    maxima = [_compute(collections, reduction, pooling="maximum") for reduction in CHOSEN]
    yield Trial("1, 2, also the maximum", "ridge", _join([joined, *maxima]), "1, 2, ridge")
    mean = "mean with the negative's"
    yield Trial(f"1, {mean}", "logistic", averaged[1], "1, logistic")
    yield Trial(f"1, {mean}", "ridge", averaged[1], "1, ridge")
    yield Trial(f"2, {mean}", "ridge", averaged[2], "2, ridge")
    yield Trial(f"1, 2, {mean}", "logistic", _join(averaged[reduction] for reduction in CHOSEN), "1, 2, logistic")
    yield Trial(f"1, 2, {mean}", "ridge", _join(averaged[reduction] for reduction in CHOSEN), "1, 2, ridge")
    yield Trial(f"1, 2, 4, {mean}", "ridge", _join(averaged.values()), "1, 2, 4, ridge")
    negatives = [_compute(collections, reduction, lambda image, _: 255 - image) for reduction in CHOSEN]
    yield Trial("1, 2, the negative's beside", "ridge", _join([joined, *negatives]), "1, 2, ridge")
    quarters = [lambda image, _, k=turns: np.rot90(image, k) for turns in (1, 2, 3)]
    turned = [_join(_compute(collections, reduction, turn) for reduction in CHOSEN) for turn in quarters]
    yield Trial("1, 2, mean of four poses", "ridge", _average([joined, *turned]), "1, 2, ridge")
    for name, change in CHANGES.items():
        changed = _join(_compute(collections, reduction, change) for reduction in CHOSEN)
        if change in (_clahe, _equalise):
            yield Trial(f"1, 2 of {name}", "ridge", changed, "1, 2, ridge")
        else:
            yield Trial(f"1, 2, trained on {name} too", "ridge", joined, "1, 2, ridge", changed)


def _judge_inside(trial: Trial, source: Collection) -> Figure:
    """Return the AUC per radiograph by grouped folds of the source."""
    features, folds = trial.values[source.name], assign_folds(source.labels, source.groups)
    scores = np.empty(len(features))
    for fold in np.unique(folds):
        rest = folds != fold
        scores[~rest] = _fit(trial, source, rest)(features[~rest])
    return auc_within_folds(source.labels, _rank(scores), source.groups, folds)


def _score_outside(trial: Trial, source: Collection, other: Collection) -> list[np.ndarray]:
    """Return the scores of the other collection by a head on the source: as it is, and aligned."""
    predict, own, outer = _fit(trial, source), trial.values[source.name], trial.values[other.name]
    return [_rank(predict(features)) for features in (outer, _align(outer, own))]


def _judge(other: Collection, scores: np.ndarray) -> Figure:
    return auc_within_folds(other.labels, scores, other.groups, np.zeros(len(scores)))


def _compare(other: Collection, scores: np.ndarray, reference: np.ndarray) -> Figure:
    """Return the AUC by the scores minus that by the reference, with a paired interval."""
    value, before = (rank_pairs(other.labels, each, np.zeros(len(each)))[0] for each in (scores, reference))
    low, high = np.percentile(auc_differences(other.labels, scores, reference, other.groups), [2.5, 97.5]).tolist()
    return Figure(value=value - before, low=low, high=high)


def _align(features: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Bring features to the mean and deviation of those that were trained on."""
    return (features - features.mean(0)) / (features.std(0) + _SMALL) * own.std(0) + own.mean(0)


def _fit(trial: Trial, source: Collection, rows: np.ndarray | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """Fit the head on some rows of a source, and on their changed images too; return what scores features."""
    rows = np.ones(len(source.labels), bool) if rows is None else rows
    features = trial.values[source.name][rows]
    mean, deviation = features.mean(0), features.std(0) + _SMALL
    parts = [features] if trial.extra is None else [features, trial.extra[source.name][rows]]
    labels, groups = (np.tile(each[rows], len(parts)) for each in (source.labels, source.groups))
    scorer = HEADS[trial.head]((np.concatenate(parts) - mean) / deviation, labels, groups)
    return lambda outer: scorer((outer - mean) / deviation)


def ridge(features: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    fit = fit_ridge(features, labels, np.ones(len(labels)), groups)
    return lambda outer: outer @ fit.kernel + fit.bias


def logistic(features: np.ndarray, labels: np.ndarray, _: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    return LogisticRegression(C=0.01, class_weight="balanced", max_iter=200).fit(features, labels).decision_function


HEADS: dict[str, Head] = {"ridge": ridge, "logistic": logistic}


def _rank(scores: np.ndarray) -> np.ndarray:
    """Return the ranks of scores as numbers in [0, 1]."""
    return np.argsort(np.argsort(scores, kind="stable"), kind="stable") / max(len(scores) - 1, 1)


def _compute(
    collections: list[Collection], reduction: int, change: Callable[..., np.ndarray] | None = None, **others: str
) -> Features:
    """Return the features of each collection at one reduction, the mean of each image's and its mirror image's."""
    settings = [f"transfer.{name}={value}" for name, value in others.items()]
    size = collections[0].images.shape[1]
    config = load_config(
        None, ["model.name=mobilenetv2", f"data.image_size={size}", f"transfer.reductions=[{reduction}]", *settings]
    )
    forward, found = _backbone(config), {}
    for collection in collections:
        generator = np.random.default_rng(0)
        images = collection.images
        if change is not None:
            images = np.stack([change(image[..., 0], generator) for image in images])[..., np.newaxis]
        parts = []
        for at in range(0, len(images), _BATCH):
            batch = images[at : at + _BATCH]
            parts.append((forward(batch) + forward(batch[:, :, ::-1])) / 2)
        found[collection.name] = np.concatenate(parts)
    return found


def _backbone(config: Config) -> Callable[[np.ndarray], np.ndarray]:
    from fracture.models.transfer import build_backbone  # first: it keeps TensorFlow quiet as it loads

    import tensorflow as tf  # isort: skip

    network = build_backbone(config, os.environ.get("WEIGHTS") or "imagenet")
    forward = tf.function(lambda images: network(images, training=False), reduce_retracing=True)
    return lambda images: forward(tf.constant(images)).numpy()


def _join(features) -> Features:
    several = list(features)
    return {name: np.concatenate([each[name] for each in several], axis=1) for name in several[0]}


def _average(several: list[Features]) -> Features:
    return {name: np.mean([each[name] for each in several], axis=0) for name in several[0]}


def _clahe(image: np.ndarray, _: np.random.Generator) -> np.ndarray:
    return cv2.createCLAHE(2.0, (8, 8)).apply(image)


def _equalise(image: np.ndarray, _: np.random.Generator) -> np.ndarray:
    return cv2.equalizeHist(image)


def _resample(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    side = round(len(image) / generator.uniform(1, 4))
    reduced = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
    return cv2.resize(reduced, image.shape, interpolation=cv2.INTER_LINEAR)


def _compress(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=int(generator.integers(10, 70)))
    return np.asarray(Image.open(buffer))


def _sharpen(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    blurred = cv2.GaussianBlur(image, (0, 0), generator.uniform(0.5, 2)).astype(np.float32)
    return np.clip(image + generator.uniform(-1, 1) * (image - blurred), 0, 255).astype(np.uint8)


def _add_noise(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return np.clip(image + generator.normal(0, generator.uniform(0, 20), image.shape), 0, 255).astype(np.uint8)


def _expose(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    values = (image / 255) ** np.exp(generator.uniform(-0.7, 0.7)) - 0.5
    return np.clip(255 * (values * generator.uniform(0.6, 1.4) + 0.5), 0, 255).astype(np.uint8)


def _invert(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return 255 - image if generator.random() < 0.5 else image


def _erase(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Blacken the border and two corners, where the markers are."""
    erased, side = image.copy(), len(image)
    margin = round(generator.uniform(0, 0.08) * side)
    erased[:margin] = erased[side - margin :] = 0
    erased[:, :margin] = erased[:, side - margin :] = 0
    for _ in range(2):
        height, width = (generator.uniform(0.05, 0.25, 2) * side).astype(int)
        top, left = generator.integers(0, 2, 2) * (side - np.array([height, width]))
        erased[top : top + height, left : left + width] = 0
    return erased


CHANGES = {
    "images equalised by CLAHE": _clahe,
    "images of equalised histogram": _equalise,
    "resampled images": _resample,
    "compressed images": _compress,
    "blurred and sharpened images": _sharpen,
    "noisy images": _add_noise,
    "images of other gamma and contrast": _expose,
    "inverted images": _invert,
    "images with erased borders and corners": _erase,
}


def _vary_shares(collections: list[Collection], repeats: int = 20) -> list[str]:
    """Return a table: what aligning does where the class shares of the other collection differ."""
    features = _join(_compute(collections, reduction, inverted="true") for reduction in CHOSEN)
    trial = Trial("1, 2", "ridge", features)
    lines = [
        "| trained on | fractures in the other | AUC | AUC, aligned | called | called, aligned |",
        "|---|---|---|---|---|---|",
    ]
    for source in collections:
        for other in collections:
            if other is source:
                continue
            own, outer = features[source.name], features[other.name]
            predict = _fit(trial, source)
            for share in (0.1, 0.5, 0.9):
                found = [_draw_share(own, outer, other, predict, share, seed) for seed in range(repeats)]
                values = " | ".join(f"{value:.2f}" for value in np.mean(found, axis=0))
                lines.append(f"| {source.name} | {share:.0%} | {values} |")
    return lines


def _draw_share(
    own: np.ndarray, outer: np.ndarray, other: Collection, predict: Callable[..., np.ndarray], share: float, seed: int
) -> list[float]:
    """Draw as many radiographs as there are at this share of fractures; return AUCs, and shares called fractures."""
    generator = np.random.default_rng(seed)
    fractures, normals = np.flatnonzero(other.labels == 1), np.flatnonzero(other.labels == 0)
    count = min(len(fractures) / share, len(normals) / (1 - share))
    rows = np.concatenate(
        [
            generator.permutation(fractures)[: int(count * share)],
            generator.permutation(normals)[: int(count * (1 - share))],
        ]
    )
    chosen, labels = outer[rows], other.labels[rows]
    scores = [predict(chosen), predict(_align(chosen, own))]
    aucs = [rank_pairs(labels, _rank(each), np.zeros(len(labels)))[0] for each in scores]
    return [*aucs, *(float((each > 0).mean()) for each in scores)]
