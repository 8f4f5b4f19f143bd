"""The bundle: the result of a run, one folder with the model and everything needed to judge and use it.

`bundle.json` is written last: a folder without it is not a bundle.

A bundle may come from anyone. A SavedModel is a program, and `model.keras` may contain one, so both are for other
programs only. This program reads a bundle's numbers and settings alone, checks them, and builds the network itself.
"""

import hashlib
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, Field, FiniteFloat, ValidationError, model_validator
from pydantic_core import from_json, to_json

from fracture.arrays import Expected, limit_bytes, load_arrays, save_arrays
from fracture.config import Config, rename_settings
from fracture.dataset.format import Dataset
from fracture.errors import UsageError
from fracture.evaluation.feature_space import MOST_COMPONENTS, MOST_SOURCES, FeatureSpace, MeasuredNetwork, array_shapes
from fracture.evaluation.metrics import Evaluation, as_json
from fracture.evaluation.operating_point import OperatingPoint
from fracture.labels import CLASS_NAMES
from fracture.storage import StoragePath

FORMAT_VERSION = 8
_READ_TOO = (6, 7)  # 6 was of Keras 2: the names of its weights differ; both have other names for two settings
CARD = "bundle.json"
WEIGHTS = "weights.safetensors"
FEATURES = "features.safetensors"
TRAINED_ON = "trained_on.parquet"
IMAGES = {
    "range": [0, 255],
    "colour": "grey",
    "resize": "bilinear with antialiasing to the square; the aspect is not kept",
}
# Hashes of files and of their pixels, and HMACs of patients and studies: 32 bytes each, and nobody needs to know which.
_TRAINED_ON = pa.schema([pa.field("sha256", pa.binary(32))])
_FILES = pa.schema([pa.field("sha256", pa.binary(32)), pa.field("group_id", pa.int64())])  # of the table of files
_IDS = (  # since schema version 5 of datasets
    *(pa.field("pixels", pa.binary(16)), pa.field("patients", pa.list_(pa.string())), pa.field("study", pa.string())),
)
_ONE_LINE = r"^[^\x00-\x1f\x7f-\x9f]*$"  # for a screen, of a bundle that may come from anyone
_HIDDEN = 64  # letters of an HMAC
_MAX_CARD_BYTES = 2**24  # a usual bundle.json has some 20,000
_MAX_FEATURES = 2**16  # of a network; the widest has 2,048 a scale
_MAX_WEIGHTS_BYTES = 2**32  # a billion weights; the reference network has 27 million
_ADVICE = "Fetch the bundle again from where it was trained, or train again."


def export_model(model: Any, operating_point: OperatingPoint, bundle: StoragePath) -> None:
    """Write the model into the bundle's folder, in three formats.

    `weights.safetensors` is what this program reads, `model.keras` is for Keras, and `saved_model/` for TensorFlow.

    Args:
        operating_point: its calibration becomes part of the last layer's weights, so that all three formats return
            calibrated probabilities.
    """
    logit = model.get_layer("logit")
    kernel, bias = logit.get_weights()
    logit.set_weights(
        [kernel / operating_point.temperature, bias / operating_point.temperature + operating_point.offset]
    )
    with tempfile.TemporaryDirectory() as folder:
        names = [weight.path for weight in model.weights]
        save_arrays(Path(folder) / WEIGHTS, dict(zip(names, model.get_weights(), strict=True)))
        model.save(Path(folder) / "model.keras")
        save_for_tensorflow(model, Path(folder) / "saved_model")
        bundle.upload(Path(folder))


def save_for_tensorflow(model: Any, folder: Path) -> Any:
    """Write a SavedModel and return the module in it.

    Its function `serve` takes images [N, H, W, 1] float32 in [0, 255], and `serve_uint8` takes uint8.
    """
    import tensorflow as tf

    module = tf.Module()
    module.model = model
    for name, dtype in (("serve", tf.float32), ("serve_uint8", tf.uint8)):
        images = tf.TensorSpec(model.input_shape, dtype, name="images")
        setattr(module, name, tf.function(lambda images: _probabilities(model, images), input_signature=[images]))
    tf.saved_model.save(module, str(folder), signatures={"serving_default": module.serve})
    return module


def _probabilities(model: Any, images: Any) -> Any:
    import tensorflow as tf

    return model(tf.cast(images, tf.float32), training=False)


def write_bundle(
    bundle: StoragePath,
    config: Config,
    dataset: Dataset,
    run: Mapping[str, Any],
    operating_point: OperatingPoint,
    evaluations: Mapping[str, Evaluation],
    initial: "Bundle | None" = None,
    caveats: Sequence[str] = (),
    map_similarity: Sequence[float] = (),
    space: FeatureSpace | None = None,
    properties: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Add `bundle.json` to an exported model, and the hashes of the files that it was trained on.

    Args:
        run: name, epochs trained, best epoch, workers, precision and initial weights of the training.
        initial: the bundle that the training started from; the model was trained on its files, too.
        caveats: what every report on the dataset has to say.
        map_similarity: of Grad-CAM maps to those of networks with random weights; none where it was not measured.
        space: of the model's features; None where there is none, see `fit_feature_space`.
        properties: of the training images, see `summarise_properties`.
    """
    manifest = dataset.manifest
    content = {
        "format_version": FORMAT_VERSION,
        "synthetic": manifest.synthetic,
        "class_names": list(CLASS_NAMES),
        "input": {
            "shape": [None, manifest.image_size, manifest.image_size, 1],
            **IMAGES,
            "pixel_mean": manifest.pixel_mean,  # the first layer subtracts it
            "pixel_std": manifest.pixel_std,  # and divides by it
        },
        "output": "probability of a fracture, calibrated",
        "operating_point": operating_point.model_dump(),
        "metrics": as_json(evaluations),
        "caveats": list(caveats),
        "map_similarity": list(map_similarity),
        "features": _write_space(bundle, space),
        "properties": properties or {},
        "dataset": {
            "fingerprint": manifest.fingerprint,
            "counts": manifest.counts,
            "groups": manifest.groups,
            "split": manifest.split,
            "split_reason": manifest.split_reason,
            "leakage": {split: leak.model_dump() for split, leak in manifest.leakage.items()},
            "alarms": manifest.alarms,
        },
        "run": run,
        "config": config.model_dump(mode="json"),
        "versions": versions(),
    }
    marks = set(dataset.read_seen("sha256").to_pylist()) | _list_seen_marks(dataset)
    if initial is not None:
        marks |= initial.read_trained_on()
    (bundle / TRAINED_ON).write_parquet(pa.table([sorted(marks)], schema=_TRAINED_ON))
    (bundle / CARD).write_json(content)


class Adaptation(BaseModel):
    """What a finished model was adapted to, what of it was changed, and how it does there by folds."""

    bundle: str  # SHA-256 of the weights before
    dataset: str = ""  # fingerprint of the local cases; "" where there were none
    unit: Literal["radiograph", "study"] = "radiograph"  # of `fractures` and `normals`
    fractures: int = Field(0, ge=0)
    normals: int = Field(0, ge=0)
    images: int = Field(0, ge=0)  # of the local cases
    groups: int = Field(0, ge=0)  # separate radiographs or patients among them
    aligned_on: int = Field(0, ge=0)  # images whose mean features and variance took the place of the training's
    ridge: bool = False  # whether the last layer was fitted anew
    figures: dict[str, Evaluation] = {}  # unadapted, aligned, calibrated, ridge -> metrics on the local cases

    def describe(self) -> str:
        """Say in words what was changed on how many cases."""
        parts = [f"features standardised by {self.aligned_on:,} local images"] if self.aligned_on else []
        if cases := self.fractures + self.normals:
            what = "last layer, calibration and threshold" if self.ridge else "calibration and threshold"
            units = "studies" if self.unit == "study" else "radiographs"
            parts.append(f"{what} from {cases:,} local {units} ({self.fractures:,} fractures)")
        return "; ".join(parts)

    def describe_test(self) -> str:
        """Say in words what the model's own test is."""
        return "Its own test is that by folds of those cases." if self.figures else "It has no test of its own."


def write_adapted_bundle(
    bundle: StoragePath,
    initial: "Bundle",
    operating_point: OperatingPoint,
    evaluation: Evaluation | None,
    adaptation: Adaptation,
    dataset: Dataset | None,
    cases: Mapping[str, np.ndarray],
    caveats: Sequence[str],
    space: FeatureSpace | None,
    properties: Mapping[str, Sequence[float]],
) -> None:
    """Add `bundle.json` to the exported model that `initial` became, and the marks of what both have seen.

    Args:
        operating_point: its calibration is of the probabilities of `initial`, or of a new last layer.
        evaluation: on the local cases, by folds, in place of the test of `initial`, which was another model. None:
            there were no cases, and the model is not tested.
        dataset: of the local cases; None where there were none.
        cases: split of `dataset` -> [rows] bool, true for the local cases.
        caveats: in place of those of `initial`, of which some are about the test that it had.
        space, properties: of the local cases where there are any, else those of `initial`.
    """
    if evaluation is None:
        evaluation = {unit: metrics.without_cases() for unit, metrics in initial.evaluations["test"].items()}
    content = (initial.folder / CARD).read_json() | {
        "format_version": FORMAT_VERSION,
        "synthetic": initial.synthetic or (dataset is not None and dataset.manifest.synthetic),
        "operating_point": operating_point.model_dump(),
        "metrics": as_json({"test": evaluation}),
        "caveats": list(caveats),
        "features": _write_space(bundle, space),
        "properties": properties,
        "adapted": adaptation.model_dump(),
        "config": initial.config.model_dump(mode="json"),
        "versions": versions(),
    }
    if adaptation.ridge or adaptation.aligned_on:
        content["map_similarity"] = []  # Grad-CAM's maps are other ones, and nobody has checked them
    marks = initial.read_trained_on()
    if dataset is not None:
        groups = {
            group
            for split, chosen in cases.items()
            for group in dataset.read_columns(split, ["group_id"])["group_id"].to_numpy()[chosen].tolist()
        }
        marks |= _list_marks(dataset, groups)
    (bundle / TRAINED_ON).write_parquet(pa.table([sorted(marks)], schema=_TRAINED_ON))
    (bundle / CARD).write_json(content)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result depends on."""
    named = {name: version(name) for name in ("tensorflow", "keras", "ray", "pyarrow", "numpy")}
    return {"python": platform.python_version()} | named


class _Input(BaseModel):
    shape: tuple[None, int, int, Literal[1]]
    pixel_mean: float = Field(ge=0, le=255)
    pixel_std: float = Field(ge=0, le=255)


class FeatureShape(BaseModel):
    """The shape of a bundle's feature space."""

    sources: int = Field(0, ge=0, le=MOST_SOURCES)  # 0: of an earlier version, which did not tell them apart
    components: int = Field(ge=1, le=MOST_COMPONENTS)
    width: int = Field(ge=1, le=_MAX_FEATURES)


class _Card(BaseModel):
    """The part of `bundle.json` that this program reads."""

    synthetic: bool
    input: _Input
    operating_point: OperatingPoint
    metrics: dict[str, Evaluation]
    config: Config
    caveats: tuple[Annotated[str, Field(pattern=_ONE_LINE)], ...] = ()  # younger than the format, as what follows
    map_similarity: tuple[Annotated[float, Field(ge=0, le=1)], ...] = ()
    features: FeatureShape | None = None
    properties: dict[Annotated[str, Field(pattern=_ONE_LINE)], tuple[FiniteFloat, FiniteFloat, FiniteFloat]] = {}
    adapted: Adaptation | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> "_Card":
        size = self.config.data.image_size
        if self.input.shape[1:3] != (size, size):
            raise ValueError(f"input.shape is {self.input.shape}, but config.data.image_size is {size}")
        if not 0 <= self.operating_point.threshold <= 1:
            raise ValueError(f"operating_point.threshold is {self.operating_point.threshold}, not in 0 to 1")
        surely = self.operating_point.fracture_threshold
        if surely is not None and not self.operating_point.threshold <= surely <= 1:
            raise ValueError(f"operating_point.fracture_threshold is {surely}, not from the threshold to 1")
        for unit in ("image", "radiograph"):
            if unit not in self.metrics.get("test", {}) or "auc" not in self.metrics["test"][unit].figures:
                raise ValueError(f"metrics.test.{unit} has no AUC")
        return self


@dataclass(frozen=True)
class Bundle:
    """A finished bundle whose `bundle.json` was read and checked."""

    folder: StoragePath
    config: Config
    pixel_mean: float  # of the training images, in [0, 255]
    pixel_std: float
    synthetic: bool  # trained on generated sample radiographs
    operating_point: OperatingPoint
    evaluations: dict[str, Evaluation]
    caveats: tuple[str, ...]  # what every report on the dataset that it was trained on has to say
    map_similarity: tuple[float, ...]  # of its Grad-CAM maps to those of random networks; none: not measured
    features: FeatureShape | None = None  # of its feature space; None where there is none, as in earlier versions
    # Property -> its 5th, 50th and 95th percentile over the training images; none in earlier versions.
    properties: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    adapted: Adaptation | None = None  # to local cases, after its training

    @property
    def image_size(self) -> int:
        return self.config.data.image_size

    def read_trained_on(self) -> set[bytes]:
        """Return what marks the files of training and validation: hashes of files and pixels, HMACs of ids."""
        batches = (self.folder / TRAINED_ON).parquet_batches(_TRAINED_ON)
        return {digest for batch in batches for digest in pc.unique(batch["sha256"]).to_pylist()}

    def find_seen_groups(self, dataset: Dataset) -> set[int]:
        """Return the groups of a dataset that have a file of training or validation, or another of its patients.

        Files are known byte for byte or by their pixels, patients and studies if both datasets were prepared with the
        same patient key. The whole group counts as seen, since its images show the same radiographs or patient.

        Raises:
            UsageError: the dataset's table of files is missing, damaged or of another writing.
        """
        seen = self.read_trained_on()
        return {group for group, marks in _read_marks(dataset) if not seen.isdisjoint(marks)}

    def find_unseen_rows(self, dataset: Dataset, splits: Sequence[str]) -> dict[str, np.ndarray]:
        """Return split -> [rows] bool: true for rows whose group neither training nor validation has seen."""
        seen = list(self.find_seen_groups(dataset))
        groups = {split: dataset.read_columns(split, ["group_id"])["group_id"].to_numpy() for split in splits}
        return {split: ~np.isin(numbers, seen) for split, numbers in groups.items()}

    def build_model(self) -> Any:
        """Build the Keras model from images [N, S, S, 1] in [0, 255], of any dtype, to calibrated probabilities [N, 1].

        Raises:
            UsageError: see `load_weights`.
        """
        return build_final_model(self.config, self.pixel_mean, self.pixel_std, self.load_weights())

    def build_measured_network(self) -> MeasuredNetwork:
        """Build the model that gives distances from the training images, too.

        Raises:
            UsageError: see `load_weights` and `load_feature_space`.
        """
        from fracture.models import add_features

        network, space = add_features(self.build_model()), self.load_feature_space()
        width = network.output_shape[1][-1]
        if self.features and self.features.width != width:
            raise UsageError(
                f"{self.folder / CARD} is damaged at 'features.width': {self.features.width}, and the network has "
                f"{width} features. {_ADVICE}"
            )
        return MeasuredNetwork(network, space)

    def load_feature_space(self) -> FeatureSpace | None:
        """Return the feature space; None where the bundle has none.

        Raises:
            UsageError: `features.safetensors` is missing or damaged, or not as `bundle.json` describes it.
        """
        if self.features is None:
            return None
        arrays = _read_space(self.folder / FEATURES, self.features)
        space = FeatureSpace(**arrays)
        positive = (space.deviation, space.variances, space.residual, space.medians, space.limit)
        if not all(np.isfinite(array).all() for array in arrays.values()) or any((a <= 0).any() for a in positive):
            raise UsageError(f"{self.folder / FEATURES} holds numbers that no training gives. {_ADVICE}")
        return space

    def hash_weights(self) -> str:
        """Return the SHA-256 of the weights, in hexadecimal, which tells this model from others."""
        return (self.folder / WEIGHTS).hash_bytes()

    def load_weights(self) -> list[np.ndarray]:
        """Return the weights in the order of `model.weights`; they include the calibration.

        Raises:
            UsageError: `weights.safetensors` is damaged, or not of the network that `bundle.json` describes.
        """
        from fracture.models import weight_shapes

        return _read_arrays(self.folder / WEIGHTS, weight_shapes(self.config), rename_weight)


def _write_space(bundle: StoragePath, space: FeatureSpace | None) -> dict[str, int] | None:
    """Write the feature space, if there is one, and return what `bundle.json` says of it."""
    if space is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        save_arrays(Path(folder, "arrays"), space.arrays())
        (bundle / FEATURES).write_bytes(Path(folder, "arrays").read_bytes())
    return dict(zip(("sources", "width"), space.means.shape, strict=True)) | {"components": len(space.components)}


def _read_space(file: StoragePath, shape: FeatureShape) -> dict[str, np.ndarray]:
    """Return the arrays of a feature space; see `_read_arrays`."""
    shapes = array_shapes(shape.sources or 1, shape.components, shape.width)
    if shape.sources:
        return dict(zip(shapes, _read_arrays(file, shapes), strict=True))
    earlier = {"mean": (shape.width,)} | {name: shapes[name] for name in ("deviation", "components", "variances")}
    *space, scale = _read_arrays(file, earlier | {"scale": (3,)})
    mean, deviation, components, variances = space
    residual, limit, median = scale[:, np.newaxis]
    with np.errstate(divide="ignore", invalid="ignore"):  # a damaged file's are refused later
        values = (mean[np.newaxis], deviation, components, variances, residual, median, limit / median)
    return dict(zip(shapes, values, strict=True))


def _read_arrays(
    file: StoragePath, shapes: Mapping[str, tuple[int, ...]], rename: Callable[[str], str] = lambda name: name
) -> list[np.ndarray]:
    """Return the float32 arrays of a file in the order of `shapes`; see `load_arrays`."""
    expected = [Expected(name, shape, np.dtype(np.float32)) for name, shape in shapes.items()]
    if not file.is_file():
        raise UsageError(f"{file} is missing. {_ADVICE}")
    most = min(limit_bytes(expected), _MAX_WEIGHTS_BYTES)
    return load_arrays(file.read_bytes(most=most), expected, file, _ADVICE, rename)


def _read_marks(dataset: Dataset) -> Iterator[tuple[int, list[bytes]]]:
    """Yield the group of each readable file of a dataset, and what marks the file; see `_TRAINED_ON`."""
    fields = [*_FILES, *(_IDS if dataset.manifest.schema_version >= 5 else ())]
    for batch in dataset.find_files().parquet_batches(pa.schema(fields)):
        for sha256, group, *ids in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            if sha256 is not None:
                yield group, [sha256, *(list_marks(*ids) if ids else ())]


def list_marks(pixels: bytes, patients: Sequence[str], study: str) -> list[bytes]:
    """Return the marks of a file's pixels, by their `hash_pixels`, and of its ids.

    A public set's own ids mark nothing: another set may have them.
    """
    hidden = (value for value in (*patients, study) if len(value) == _HIDDEN)
    return [hashlib.sha256(b"pixels" + pixels).digest(), *map(bytes.fromhex, hidden)]


def _list_seen_marks(dataset: Dataset) -> set[bytes]:
    """Return the marks of all files in the groups of training and validation; none where shards came without files."""
    try:
        return _list_marks(dataset, set(dataset.read_seen("group_id").to_pylist()))
    except UsageError:
        return set()


def _list_marks(dataset: Dataset, groups: set[int]) -> set[bytes]:
    """Return the marks of all files in some groups.

    Raises:
        UsageError: see `Bundle.find_seen_groups`.
    """
    return {mark for group, found in _read_marks(dataset) if group in groups for mark in found}


def rename_weight(name: str) -> str:
    """Return the path that Keras 3 gives a weight of Keras 2; a path stays as it is."""
    if not name.endswith(":0"):
        return name
    layer, _, variable = name.removesuffix(":0").rpartition("/")
    return f"{layer.replace('/', '_')}/{variable.removeprefix('depthwise_')}"


def build_final_model(config: Config, pixel_mean: float, pixel_std: float, weights: Sequence[np.ndarray]) -> Any:
    """Build the Keras model that scores and is exported: in float32, whatever precision it was trained in."""
    from fracture.models import build_model  # first: it keeps TensorFlow quiet as it loads

    import keras  # isort: skip

    keras.config.set_dtype_policy("float32")
    model = build_model(config, pixel_mean, pixel_std)
    model.set_weights(weights)
    return model


def _rename_settings(content: dict[str, Any]) -> bytes:
    """Return the text of an older `bundle.json` with today's names of settings."""
    config = content.get("config")
    if isinstance(config, dict) and isinstance(config.get("data"), dict):
        config["data"] = rename_settings(config["data"])
    return to_json(content)


def is_bundle(folder: StoragePath) -> bool:
    return (folder / CARD).is_file()


def read_bundle(folder: StoragePath) -> Bundle:
    """Read and check a bundle's `bundle.json`.

    Raises:
        UsageError: the folder is no bundle, a bundle of another format, or its `bundle.json` is damaged.
    """
    if not is_bundle(folder):
        inside = (
            f"Name {folder / 'bundle'}." if is_bundle(folder / "bundle") else "A finished run has one, in RUN/bundle."
        )
        raise UsageError(f"{folder} is no bundle: bundle.json is missing. {inside}")
    text = (folder / CARD).read_bytes(most=_MAX_CARD_BYTES)
    try:
        content = from_json(text)
    except ValueError:
        raise UsageError(f"{folder / CARD} is damaged: not JSON. {_ADVICE}") from None
    format_version = content.get("format_version") if isinstance(content, dict) else None
    if format_version not in (FORMAT_VERSION, *_READ_TOO):
        raise UsageError(
            f"{folder} has bundle format {format_version!r:.20}, and this program reads formats {_READ_TOO[0]} to "
            f"{FORMAT_VERSION}. Use the version of the program that wrote it, or train again under another --run name."
        )
    try:
        card = _Card.model_validate_json(_rename_settings(content) if format_version in _READ_TOO else text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UsageError(
            f"{folder / CARD} is damaged{f' at {key!r:.100}' if key else ''}: {first['msg']}. {_ADVICE}"
        ) from None
    return Bundle(
        folder=folder,
        config=card.config,
        pixel_mean=card.input.pixel_mean,
        pixel_std=card.input.pixel_std,
        synthetic=card.synthetic,
        operating_point=card.operating_point,
        evaluations=card.metrics,
        caveats=card.caveats,
        map_similarity=card.map_similarity,
        features=card.features,
        properties=card.properties,
        adapted=card.adapted,
    )
