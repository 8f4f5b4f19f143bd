"""The one tree of settings: defaults here are `fracture/configs/default.yaml`; YAML and `--set` are deltas on it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from fracture.errors import UsageError

Positive = Annotated[int, Field(ge=1, strict=True)]
Units = Annotated[int, Field(ge=1, le=16384, strict=True)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


Backbone = Literal["resnet50", "densenet121", "mobilenetv2", "efficientnetv2b0"]
# What `model.name` may be, and the module of fracture.models whose `build` makes it.
MODELS = {"cnn": "cnn"} | dict.fromkeys(get_args(Backbone), "transfer") | {"qnn": "quantum", "qnn_transfer": "transfer"}

_MOST_ACTIVATIONS = 2**30  # bytes of one layer's float32 output for one image
_MOST_STATES = 2**31  # bytes of a circuit's states for all of a worker's images


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DataConfig(Settings):
    """How images become shards. Every key here changes the shards."""

    image_size: int = Field(224, ge=32, le=1024, description="side of the square grey image, pixels")
    seed: Seed = Field(0, description="order of the rows, and which group goes to which split")
    fracture_folders: tuple[str, ...] = Field((), strict=False, description="more folder names that mean fracture")
    normal_folders: tuple[str, ...] = Field((), strict=False, description="more folder names that mean normal")
    split: Literal["auto", "official", "group", "test"] = Field(
        "auto",
        description="auto keeps the split found if it is clean; group makes one that no radiograph straddles; test "
        "takes all as test, to try a model on",
    )
    folds: Annotated[int, Field(ge=0, le=20)] | Literal["source"] = Field(
        0, description="grouped folds in place of train/val/test; source: each hospital or collection once as test"
    )
    val_fraction: float = Field(0.15, gt=0, lt=0.5, description="share of the groups, where the split is ours")
    test_fraction: float = Field(0.15, gt=0, lt=0.5, description="share of the groups, where the split is ours")
    copy_suffix: str = Field(
        r"(-rotated\d+| - Copy| ?\(\d+\))+$",
        description="what copies add to a file's name; such files are compared with less strictness",
    )
    group_pattern: str = Field(
        "", description="regular expression on the path; files with the same match, or captures, are one patient"
    )
    max_rejected_fraction: Fraction = Field(0.05, description="unreadable files above this share stop the job")
    rows_per_shard: Positive = Field(512, description="images per Parquet file; 26 MB of pixels at 512")

    @field_validator("copy_suffix", "group_pattern")
    @classmethod
    def _compiles(cls, pattern: str, info: ValidationInfo) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"data.{info.field_name}: {pattern!r} is no regular expression: {error}") from None
        return pattern

    @model_validator(mode="after")
    def _fits_together(self) -> "DataConfig":
        if self.folds == 1 or self.folds == 2:
            raise ValueError(f"data.folds: {self.folds} folds leave nothing to train on; use 3 or more, or 0 for none")
        if self.folds and self.split == "official":
            raise ValueError("data.folds: folds replace the split found; leave out data.split = official")
        return self


class SampleConfig(Settings):
    """The synthetic radiographs that stand in when no data is named."""

    images: int = Field(600, ge=60, description="over all three splits")
    seed: Seed = 0


class ModelConfig(Settings):
    name: Literal[*MODELS] = "cnn"
    filters: tuple[Units, ...] = Field(
        (64, 128, 256, 512), min_length=1, max_length=6, strict=False, description="of the CNN's blocks"
    )
    block: Literal["conv-pool-bn-relu", "conv-bn-relu-pool"] = Field(
        "conv-pool-bn-relu", description="order inside a block; pooling first quarters the work of what follows"
    )
    head: Literal["pooled", "flatten"] = Field("pooled", description="global average pooling, or every activation")
    dense: tuple[Units, ...] = Field(
        (256,), max_length=8, strict=False, description="units of the dense layers before the sigmoid"
    )
    dropout: Fraction = Field(0.5, description="before each dense layer's output goes on")
    batch_norm: bool = True
    batch_norm_momentum: Fraction = Field(0.9, description="0.99 lags for many epochs on sets this small")
    sync_batch_norm: bool = Field(False, description="statistics over all workers; loses the fused kernel")


class TransferConfig(Settings):
    """Of a model on a backbone of tf_keras.applications: its head learns first, on a backbone that stays as it is."""

    weights: str = Field(
        "imagenet",
        min_length=1,
        description="imagenet: downloaded; none: drawn, and all layers learn at once; or folder/file.h5 or URI of the "
        "backbone's weights without top, as tf_keras.applications writes them",
    )
    features: Literal["once", "augmented"] = Field(
        "once",
        description="for the head: computed once for each image and its mirror image (augment.horizontal_flip), or "
        "anew for each augmented image",
    )
    head_epochs: Positive = Field(40, description="at most, at training.learning_rate")
    unfreeze: Annotated[int, Field(ge=0)] | Literal["all"] = Field(
        0, description="last layers of the backbone that learn too, after the head, for training.epochs at most"
    )
    learning_rate: float = Field(1e-5, gt=0, description="Adam's when they do, at its highest")


class QuantumConfig(Settings):
    """The circuit of the models `qnn` and `qnn_transfer`, simulated exactly."""

    qubits: int = Field(4, ge=1, le=64, description="4 to 8 are usual; each more doubles memory and work")
    layers: int = Field(3, ge=1, le=64, description="3 join each pair of 4 qubits in both directions")
    circuit: Literal["quantum", "classical"] = Field(
        "quantum", description="classical: the control, a map of as many parameters between the same layers"
    )
    backbone: Backbone = Field("mobilenetv2", description="of qnn_transfer")


def circuit_bytes(qubits: int, layers: int) -> int:
    """What training keeps of one image's states for the gradient, in float32."""
    state = 2 * 4 * 2**qubits  # real and imaginary parts
    return state * (layers * (qubits + 2) + 2)  # before each RY and two RZ of a layer; after embedding and at the end


class AugmentConfig(Settings):
    """Training images only: one affine transform that flips, rotates, zooms, stretches and shifts; then exposure."""

    horizontal_flip: bool = True
    vertical_flip: bool = False
    rotation_degrees: float = Field(20.0, ge=0, le=180, description="uniform in [-x, x]")
    zoom: float = Field(0.25, ge=0, lt=1, description="scale uniform in [1-x, 1+x]")
    stretch: float = Field(0.2, ge=0, lt=1, description="width to height, uniform in [1-x, 1+x]")
    shift: float = Field(0.1, ge=0, lt=1, description="uniform in [-x, x] of the side, each way")
    exposure: float = Field(
        0.3, ge=0, lt=1, description="contrast uniform in [1-x, 1+x] about mid-grey, brightness in [-x/2, x/2] of white"
    )


class TrainingConfig(Settings):
    epochs: Positive = 8
    batch_size: Positive = Field(32, description="global: shared out over the workers")
    sampling: Literal["radiograph", "image"] = Field(
        "radiograph", description="what counts alike in training: each radiograph of a class, or each image"
    )
    learning_rate: float = Field(1e-3, gt=0, description="Adam's, at its highest")
    schedule: Literal["constant", "cosine"] = Field("cosine", description="cosine: down to 0 at the last epoch")
    weight_decay: float = Field(0.01, ge=0, description="decoupled, as in AdamW")
    label_smoothing: Fraction = 0.05
    patience: Positive = Field(5, description="epochs without a lower validation loss before stopping")
    precision: Literal["auto", "float32", "mixed_bfloat16", "mixed_float16"] = Field(
        "auto", description="auto: the fastest that this hardware computes natively"
    )
    xla: bool = Field(False, description="let XLA fuse what it can of the training step")
    seed: Seed = Field(0, description="weights, shuffling, augmentation, dropout")


class EvaluationConfig(Settings):
    """What validation decides after training."""

    threshold_rule: Literal["sensitivity", "youden", "given"] = Field(
        "sensitivity", description="how validation chooses the probability from which a fracture is called"
    )
    min_sensitivity: float = Field(0.95, gt=0, le=1, description="for the rule `sensitivity`: the least on validation")
    threshold: float = Field(0.5, gt=0, lt=1, description="for the rule `given`")


class CheckpointConfig(Settings):
    every_minutes: float = Field(10.0, gt=0, description="inside an epoch; each epoch's end is a checkpoint anyway")


class RecoveryConfig(Settings):
    """What a run does when machines fail it; nothing of it changes what is learned."""

    max_failures: int = Field(3, ge=0, description="restarts in a row, without a checkpoint between, before giving up")
    stuck_seconds: Annotated[float, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="without a step done before a worker counts as stuck; auto: ten times the slowest, at least 300",
    )
    grace_seconds: float = Field(
        20.0, ge=0, description="after SIGTERM or Ctrl-C for a last checkpoint; Kubernetes grants 30 for all"
    )
    wait_minutes: float = Field(60.0, gt=0, description="for machines that hold the workers, before giving up")


class ComputeConfig(Settings):
    workers: Positive = Field(2, description="at most, where min_workers is set")
    min_workers: Positive | None = Field(
        None, description="go on with as few when machines are lost, and grow again; None: wait for all"
    )
    cpus_per_worker: Positive = 1
    image_memory_gb: float = Field(
        4.0, gt=0, description="images that a worker holds in memory, 0.5 GB for 10,000; more go to a file on its disk"
    )
    gpu: bool = Field(False, description="one GPU per worker")

    @property
    def fewest(self) -> int:
        """Workers without which a run waits."""
        return self.min_workers or self.workers


class GateConfig(Settings):
    """What a retrained model must show before it is used; figures per radiograph, on test."""

    min_radiographs: Positive = Field(20, description="of each class, in the test that both models are compared on")
    min_auc: float = Field(0.75, ge=0, le=1, description="the least; of a first model, all that it is measured by")
    auc_margin: float = Field(
        0.03, ge=0, le=1, description="how far the AUC may be below that of the model in use, ..."
    )
    confidence: float = Field(0.9, gt=0.5, lt=1, description="... and how sure it must be that it is not further")
    min_sensitivity: float = Field(0.85, ge=0, le=1, description="at the model's own threshold")
    max_calibration_error: float = Field(
        0.2, ge=0, le=1, description="expected calibration error; few radiographs raise it"
    )
    max_left_test: Fraction = Field(0.1, description="share of the earlier test that new images join to training")
    max_conflicts: Fraction = Field(
        0.02, description="share of the new radiographs under both labels, or another than before"
    )
    max_drift: float = Field(
        0.4, gt=0, le=1, description="Kolmogorov-Smirnov distance of the new radiographs from those before"
    )
    min_agreement: float = Field(
        0.6, ge=0, le=1, description="AUC of the model in use on the new radiographs; labels turned round give less"
    )


Range = dict[str, list[Any]]  # one kind of draw, and what it draws from
_DRAWS = ("uniform", "loguniform", "choice")


class TuneConfig(Settings):
    """The search of `job/tune.py` for better settings."""

    trials: Positive = Field(12, description="trainings, of which the first has the settings as they are")
    concurrent: Positive | None = Field(
        None, description="trials at a time at most; None: as many as there is room for"
    )
    grace_epochs: Positive = Field(2, description="that every trial trains before it may be stopped early")
    reduction_factor: int = Field(
        3, ge=2, description="at grace_epochs, and at each multiple by this factor, the best one in so many goes on"
    )
    space: dict[str, Range] = Field(
        {
            "training.learning_rate": {"loguniform": [0.0003, 0.01]},
            "training.weight_decay": {"loguniform": [0.001, 0.1]},
            "model.dropout": {"uniform": [0.2, 0.6]},
            "model.dense": {"choice": [[128], [256]]},
            "augment.rotation_degrees": {"uniform": [5.0, 30.0]},
        },
        description="setting: {uniform: [least, most]}, {loguniform: [least, most]} or {choice: [one, another, ...]}",
    )

    @field_validator("space")
    @classmethod
    def _can_be_drawn_from(cls, space: dict[str, Range]) -> dict[str, Range]:
        return {key: _checked_range(f"tune.space: {key}", draw) for key, draw in space.items()}


def _checked_range(name: str, draw: Range) -> Range:
    if len(draw) != 1 or not draw.keys() <= set(_DRAWS):
        raise ValueError(f"{name} has {', '.join(draw) or 'nothing'}; give one of {', '.join(_DRAWS)}")
    ((kind, values),) = draw.items()
    values = [_number(value) if isinstance(value, str) else value for value in values]
    if kind == "choice":
        if not values:
            raise ValueError(f"{name}: a choice of nothing; list the values")
        return {kind: values}
    if len(values) != 2 or not all(type(bound) in (int, float) and isfinite(bound) for bound in values):
        raise ValueError(f"{name}: {kind} of {values!r}; give the least and the most, two numbers")
    least, most = map(float, values)
    if least >= most or (kind == "loguniform" and least <= 0):
        above = " above 0" if kind == "loguniform" else ""
        raise ValueError(f"{name}: {kind} of {values!r}; the least comes first, below the most{above}")
    return {kind: [least, most]}


class RegistryConfig(Settings):
    keep: Positive = Field(5, description="newest versions and runs kept, beside every version that was ever in use")


class Config(Settings):
    data: DataConfig = DataConfig()
    sample: SampleConfig = SampleConfig()
    model: ModelConfig = ModelConfig()
    transfer: TransferConfig = TransferConfig()
    quantum: QuantumConfig = QuantumConfig()
    augment: AugmentConfig = AugmentConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    compute: ComputeConfig = ComputeConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    gate: GateConfig = GateConfig()
    registry: RegistryConfig = RegistryConfig()
    tune: TuneConfig = TuneConfig()

    def recipe(self) -> dict[str, Any]:
        """The settings that make a model what it is, as plain values."""
        others = {"compute", "sample", "checkpoint", "recovery", "gate", "registry", "tune"}
        return self.model_dump(mode="json", exclude=others)

    @property
    def backbone(self) -> Backbone | None:
        """The network of tf_keras.applications that the model stands on, if it does."""
        if self.model.name == "qnn_transfer":
            return self.quantum.backbone
        return self.model.name if self.model.name in get_args(Backbone) else None

    @property
    def pretrained(self) -> bool:
        """Whether training begins with a backbone that knows something."""
        return self.backbone is not None and self.transfer.weights != "none"

    @property
    def without_effect(self) -> set[str]:
        """Settings that this model, or the way it learns, does not ask for: "model.dense"."""
        quantum = self.model.name in ("qnn", "qnn_transfer")
        idle = {"quantum": set() if quantum else {*QuantumConfig.model_fields}}
        if self.backbone is None:
            idle |= {"transfer": {*TransferConfig.model_fields}, "model": {"head", "dense"} if quantum else set()}
            idle["quantum"] |= {"backbone"}
        else:
            idle["model"] = {"filters", "block", "head", "dense", "batch_norm", "sync_batch_norm"}
            if not self.pretrained:
                idle["transfer"] = {*TransferConfig.model_fields} - {"weights"}
            elif not self.transfer.unfreeze:
                idle |= {"transfer": {"learning_rate"}, "training": {"epochs"}}
                if self.transfer.features == "once":
                    idle["augment"] = {*AugmentConfig.model_fields} - {"horizontal_flip"}
        return {f"{section}.{name}" for section, names in idle.items() for name in names}

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        if self.backbone is None:
            self._check_filters()
        if self.model.name.startswith("qnn") and self.quantum.circuit == "quantum":
            self._check_circuit()
        if self.compute.workers > self.training.batch_size:
            raise ValueError(
                f"compute.workers: {self.compute.workers} workers cannot share a global training.batch_size of "
                f"{self.training.batch_size}; each needs at least one image a step"
            )
        if self.compute.fewest > self.compute.workers:
            raise ValueError(
                f"compute.min_workers: {self.compute.min_workers} is more than compute.workers, "
                f"{self.compute.workers}; it is the least to go on with"
            )
        if self.model.sync_batch_norm and not self.model.batch_norm:
            raise ValueError("model.sync_batch_norm: needs model.batch_norm; set it to true, or drop this key")
        return self

    def _check_circuit(self) -> None:
        qubits, layers, images = self.quantum.qubits, self.quantum.layers, self.training.batch_size
        each = -(-images // self.compute.fewest)  # of a worker
        needed = circuit_bytes(qubits, layers) * each
        if needed > _MOST_STATES:
            smaller = ", or a smaller training.batch_size" if needed / each <= _MOST_STATES else ""
            raise ValueError(
                f"quantum.qubits: {qubits} qubits in {layers} layers take {needed / 2**30:,.1f} GB for a worker's "
                f"{each} images of a step, over the limit of {_MOST_STATES / 2**30:.0f}; use fewer{smaller}"
            )

    def _check_filters(self) -> None:
        smallest = 2 ** len(self.model.filters)
        if self.data.image_size < smallest:
            raise ValueError(
                f"model.filters: {len(self.model.filters)} poolings need data.image_size of at least {smallest}"
            )
        for number, filters in enumerate(self.model.filters):
            needed = (self.data.image_size >> number) ** 2 * filters * 4
            if needed > _MOST_ACTIVATIONS:
                raise ValueError(
                    f"model.filters: {filters} filters at {self.data.image_size >> number} pixels take "
                    f"{needed / 2**30:.1f} GB for one image, over the limit of {_MOST_ACTIVATIONS / 2**30:.0f}; use "
                    "fewer, or a smaller data.image_size"
                )


def load_config(path: str | Path | None = None, assignments: Sequence[str] = ()) -> Config:
    """The defaults, with the YAML file at `path` and then each `key.subkey=value` laid on top.

    Raises:
        UsageError: unknown key, wrong type or impossible value; names the key, the value and what is allowed.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        _merge(tree, read_yaml(Path(path)))
    for assignment in assignments:
        _merge(tree, _parse_assignment(assignment))
    return _validated(tree)


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """The settings with those of `section.name` laid on top.

    Raises:
        UsageError: as `load_config`.
    """
    tree = config.model_dump(mode="json")
    for key, value in settings.items():
        _merge(tree, _nested(key, value))
    return _validated(tree)


def _validated(tree: Mapping[str, Any]) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UsageError("\n".join(_explain(e) for e in error.errors())) from None


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`{"a": {"b": 1}}` as `("a.b", 1)`, for comparing and printing settings."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def read_yaml(path: Path, flag: str = "--config") -> dict[str, Any]:
    """The mapping that the file at `path` holds, which `flag` named.

    Raises:
        UsageError: no such file, or another thing in it.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        beside = sorted(p.as_posix() for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f" There are: {', '.join(beside)}." if beside else ""
        raise UsageError(f"{flag} {path}: no such file.{hint}") from None
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{flag} {path}: not readable as YAML: {str(error).splitlines()[0]}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UsageError(f"{flag} {path}: must hold settings such as 'training: {{epochs: 3}}', holds {tree!r}")
    return tree


def _parse_assignment(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"--set {text!r}: must be KEY=VALUE, for example training.epochs=3")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UsageError(f"--set {text!r}: {value!r} is not readable as YAML") from None
    if isinstance(parsed, str):
        parsed = _number(parsed)
    return _nested(key.strip(), parsed)


def _nested(key: str, value: Any) -> dict[str, Any]:
    """`a.b` and 1 as `{"a": {"b": 1}}`."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _number(text: str) -> str | float:
    """YAML 1.1 reads `1e-3` as a string; everyone who types it means the number."""
    try:
        return float(text)
    except ValueError:
        return text


def _merge(tree: dict[str, Any], delta: Mapping[str, Any]) -> None:
    for key, value in delta.items():
        if isinstance(value, Mapping) and isinstance(tree.get(key), dict) and key != "space":  # which is one value
            _merge(tree[key], value)
        else:
            tree[key] = dict(value) if isinstance(value, Mapping) else value


def _explain(error: Mapping[str, Any]) -> str:
    # Where a setting may be of two kinds, pydantic adds the kind to its place, and has an error for each.
    kinds = ("constrained-int", "constrained-float", "literal[")
    place = [part for part in error["loc"] if not str(part).startswith(kinds)]
    location = [part for part in place if isinstance(part, str)]
    key = ".".join(map(str, place))
    if error["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        near = [".".join([*location[:-1], name]) for name in get_close_matches(location[-1], known, n=1)]
        near += [name for name, _ in flatten(Config().model_dump()) if name.endswith(f".{location[-1]}")]
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return f"unknown setting {key!r} = {error['input']!r}.{hint} Allowed here: {', '.join(known)}."
    if error["type"] == "value_error":  # a rule across several keys, which names them itself
        return str(error["ctx"]["error"])
    if error["type"] == "model_type":
        known = ", ".join(_known_keys(location))
        return f"setting {key!r} = {error['input']!r} is not possible: {key} is a section; it holds {known}."
    return f"setting {key!r} = {error['input']!r} is not possible: {error['msg'].lower()}."


def _known_keys(location: Sequence[str]) -> list[str]:
    settings: Any = Config
    for part in location:
        settings = settings.model_fields[part].annotation
    return list(settings.model_fields)
